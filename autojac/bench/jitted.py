"""The same Jacobians by JAX, compiled by XLA: `jax.jit` of `jax.vmap` of `jax.jacrev` and of `jax.jacfwd`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autojac.bench.contests import Announce, at_rest, contest
from autojac.bench.extra import loaded
from autojac.bench.results import Promised
from autojac.bench.run import Entrant, Settings, Tuned, admitted, tune
from autojac.bench.workloads import WORKLOADS, Func, Workload, sine

NAMES = ("mlp-2-16-2", "sin", "mlp-6-128-128-6", "mlp-3-64-64-3")
BOUND = 1.0
MODES = ("jacrev", "jacfwd")


def against_jax(settings: Settings, announce: Announce = lambda name: None) -> list[Promised]:
    """Race tuned plans, compilers allowed, against jitted JAX on the same shapes and weights.

    Args:
        settings: how to measure.
        announce: called with each workload's name before its turn.

    Raises:
        ImportError: if JAX is not installed.
    """
    found = []
    with at_rest():
        for name in NAMES:
            announce(f"JAX on {name}")
            found.append(jax_contest(WORKLOADS[name], settings))
    return found


def jax_contest(workload: Workload, settings: Settings) -> Promised:
    """Race a tuned plan against both of JAX's modes."""
    libraries = loaded("jax")
    if isinstance(libraries, str):
        raise ImportError(f"jax is {libraries}")
    (jax,) = libraries
    tuned = tune(workload, settings)
    return contest(tuned, [jax_way(mode, tuned, jax) for mode in MODES], settings, BOUND)


def jax_way(mode: str, tuned: Tuned, jax: Any) -> Entrant:
    """Return one of JAX's modes, checked as torch's ways are, then timed up to where its result is ready."""
    jacobian = jax.jit(jax.vmap(getattr(jax, mode)(of_jax(tuned.func, jax.numpy))))
    point = jax.numpy.asarray(tuned.x.numpy())

    def result() -> Tensor:
        return torch.from_numpy(jax.device_get(jacobian(point)).copy())

    entrant = admitted(f"jit(vmap({mode}))", result, tuned.truth)
    return dataclasses.replace(entrant, run=entrant.run and (lambda: jacobian(point).block_until_ready()))


def of_jax(func: Func, jnp: Any) -> Callable[[Any], Any]:
    """A workload's function for JAX, with the same weights: sine, or linear layers with tanh between them.

    Raises:
        NotImplementedError: for any other.
    """
    if func is sine:
        return jnp.sin  # type: ignore[no-any-return]
    steps: list[Callable[[Any], Any]] = []
    for layer in func if isinstance(func, nn.Sequential) else [func]:
        if type(layer) is nn.Linear:
            steps.append(_linear(jnp.asarray(layer.weight.numpy()), jnp.asarray(layer.bias.numpy())))
        elif type(layer) is nn.Tanh:
            steps.append(jnp.tanh)
        else:
            raise NotImplementedError(f"{type(layer).__name__} is not written for JAX here")

    def run(sample: Any) -> Any:
        for step in steps:
            sample = step(sample)
        return sample

    return run


def _linear(weight: Any, bias: Any) -> Callable[[Any], Any]:
    return lambda sample: weight @ sample + bias
