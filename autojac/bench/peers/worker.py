"""The process of a peer: it builds a function from a program and its weights, and is timed on request.

It runs in another environment, on another Python, and imports neither autojac nor torch. Requests and answers are lines
of JSON on standard input and output; arrays lie in files.

Usage: python worker.py jax|asdex|tensorflow THREADS
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = Any
Program = Sequence[Sequence[Any]]
Weights = Mapping[str, Array]
A, B, DIFFUSION = 3.4, 1.0, 0.1


class Ops:
    """What programs are made of, on arrays whose last axis holds a sample's features.

    Args:
        xp: the library's functions by NumPy's names: `tanh`, `sin`, `roll`, `stack`, `reshape`, `matmul`.
        silu, gelu: its activations.
    """

    def __init__(self, xp: Any, silu: Callable[[Array], Array], gelu: Callable[[Array], Array]) -> None:
        self.xp, self.silu, self.gelu = xp, silu, gelu

    def run(self, program: Program, weights: Weights, x: Array) -> Array:
        """Run a program on a sample or on a batch."""
        for name, *details in program:
            if name == "linear":
                weight, bias = (weights[key] for key in details)
                x = self.xp.matmul(x, weight) + bias
            elif name == "residual":
                x = x + self.run(details[0], weights, x)
            else:
                x = getattr(self, name)(x, *details)
        return x

    def tanh(self, x: Array) -> Array:
        return self.xp.tanh(x)

    def sin(self, x: Array) -> Array:
        return self.xp.sin(x)

    def burgers(self, u: Array) -> Array:
        step = 2 * math.pi / u.shape[-1]
        left, right = self.xp.roll(u, 1, -1), self.xp.roll(u, -1, -1)
        return -u * (right - left) / (2 * step) + 0.01 * (left - 2 * u + right) / step**2

    def lorenz96(self, x: Array) -> Array:
        roll = self.xp.roll
        return (roll(x, -1, -1) - roll(x, 2, -1)) * roll(x, 1, -1) - x + 8

    def brusselator(self, state: Array, size: int) -> Array:
        u, v = self.xp.reshape(state, (2, size, size))
        roll = self.xp.roll

        def laplacian(z: Array) -> Array:
            return roll(z, 1, 0) + roll(z, -1, 0) + roll(z, 1, 1) + roll(z, -1, 1) - 4 * z

        reaction, strength = u * u * v, DIFFUSION * size * size
        du = B + reaction - (A + 1) * u + strength * laplacian(u)
        dv = A * u - reaction + strength * laplacian(v)
        return self.xp.reshape(self.xp.stack((du, dv)), (-1,))


class Jax:
    """JAX's ways, compiled."""

    def __init__(self, threads: int) -> None:
        import jax

        self.jax, self.jnp = jax, jax.numpy
        self.ops = Ops(jax.numpy, jax.nn.silu, lambda x: jax.nn.gelu(x, approximate=False))

    def build(self, way: str, program: Program, weights: dict[str, np.ndarray], x: np.ndarray) -> Callable[[], Array]:
        """Return what computes the Jacobian, or the gradients of a training step on it in all weights."""
        point, held = self.jnp.asarray(x), {name: self.jnp.asarray(w) for name, w in weights.items()}
        mode = getattr(self.jax, "jacfwd" if "jacfwd" in way else "jacrev")

        def jacobian(held: Weights, z: Array) -> Array:
            return self.jax.vmap(mode(lambda sample: self.ops.run(program, held, sample)))(z)

        if way.startswith("step"):
            step = self.jax.jit(self.jax.value_and_grad(lambda held, z: (jacobian(held, z) ** 2).mean()))
            return lambda: self.jax.block_until_ready(step(held, point)[1])
        compiled = self.jax.jit(lambda z: jacobian(held, z))
        return lambda: self.jax.block_until_ready(compiled(point))

    def numbers(self, found: Any) -> dict[str, np.ndarray]:
        if isinstance(found, dict):
            return {name: np.asarray(part) for name, part in found.items()}
        return {"J": np.asarray(found.todense() if hasattr(found, "todense") else found)}


class Asdex(Jax):
    """asdex on JAX: the sparse Jacobian of a function without a batch."""

    def build(self, way: str, program: Program, weights: dict[str, np.ndarray], x: np.ndarray) -> Callable[[], Array]:
        import asdex

        point, held = self.jnp.asarray(x), {name: self.jnp.asarray(w) for name, w in weights.items()}
        compute = self.jax.jit(asdex.jacobian(lambda z: self.ops.run(program, held, z), point))
        return lambda: self.jax.block_until_ready(compute(point))


class TensorFlow:
    """TensorFlow's `batch_jacobian` in a `tf.function`, with XLA and without."""

    def __init__(self, threads: int) -> None:
        os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self.tf = tf

        # `batch_jacobian` vectorizes a roll along a negative axis as one along another axis, and returns wrong numbers
        def roll(x: Array, shift: int, axis: int) -> Array:
            return tf.roll(x, shift, axis % len(x.shape))

        functions = {"tanh": tf.tanh, "sin": tf.sin, "roll": roll, "matmul": tf.matmul}
        self.ops = Ops(
            type("Functions", (), {name: staticmethod(f) for name, f in functions.items()}), tf.nn.silu, tf.nn.gelu
        )

    def build(self, way: str, program: Program, weights: dict[str, np.ndarray], x: np.ndarray) -> Callable[[], Array]:
        tf = self.tf
        point, held = tf.constant(x), {name: tf.constant(w) for name, w in weights.items()}

        def jacobian(z: Array) -> Array:
            with tf.GradientTape() as tape:
                tape.watch(z)
                y = self.ops.run(program, held, z)
            return tape.batch_jacobian(y, z)

        compiled = tf.function(jacobian, jit_compile="xla" in way)
        return lambda: compiled(point).numpy()

    def numbers(self, found: Any) -> dict[str, np.ndarray]:
        return {"J": np.asarray(found)}


LIBRARIES = {"jax": Jax, "asdex": Asdex, "tensorflow": TensorFlow}


class Worker:
    """Answers requests, one at a time.

    Args:
        library: the peer.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        self.runs: dict[str, Callable[[], Any]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self, request.pop("do"))(**request)
            return answer
        except Exception as error:  # of whatever kind, it is the peer's result
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:300]}

    def prepare(self, way: str, program: Program, arrays: str, result: str) -> dict[str, Any]:
        """Build a way and run it once; its numbers are written to a file."""
        with np.load(arrays) as data:
            weights = {name: data[name] for name in data.files}
        x = weights.pop("x")
        start = time.perf_counter()
        run = self.runs[way] = self.library.build(way, program, weights, x)
        found = run()
        seconds = time.perf_counter() - start
        np.savez(result, **self.library.numbers(found))
        return {"seconds": seconds}

    def time(self, way: str, calls: int) -> dict[str, float]:
        """Time a block of calls: wall seconds per call, and processor seconds per wall second."""
        run, start, spent = self.runs[way], time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        wall = time.perf_counter() - start
        return {"seconds": wall / calls, "cores": (time.process_time() - spent) / wall}


def one_thread() -> dict[str, str]:
    """Return what keeps XLA and the libraries below it to one thread."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return {"XLA_FLAGS": flags, "NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def serve(name: str, threads: int) -> None:
    # what libraries print goes elsewhere
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if threads == 1:
        os.environ |= one_thread()
    try:
        worker = Worker(LIBRARIES[name](threads))
        version = importlib.metadata.version("tensorflow-cpu" if name == "tensorflow" else name)
        print(json.dumps({"name": name, "version": version}), file=answers, flush=True)
    except ImportError as error:
        print(json.dumps({"error": f"{name} is not installed there: {error}"}), file=answers, flush=True)
        return
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
