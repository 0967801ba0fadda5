"""A run that reads what no guard can list is refused, and named; what models do is not."""

# ruff: noqa: PLW0108
from __future__ import annotations

import copy
import cProfile
import datetime
import functools
import io
import logging
import math
import operator
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autojac.guards import compiled_check
from autojac.guards.function_state import FunctionState
from autojac.guards.guard import Guard
from autojac.guards.run_monitor import RunMonitor
from autojac.replay.codegen import emit

X = torch.ones(2, 3)


def reason(func: Callable[[Tensor], Any], *args: Any) -> str:
    """Why a function may not be replayed: by its guard, or by its run."""
    with RunMonitor() as watched:
        func(*args or (X,))
    state = FunctionState(func)
    state.cover(watched.ran)
    return state.present.guard.reason or watched.reason or state.why_uncovered(watched.ran)


def helper(x: Tensor) -> Tensor:
    return x + 1


def made(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * value


foreign = types.ModuleType("foreign")
foreign.__file__ = os.path.join(os.path.dirname(torch.__file__), "..", "site-packages", "foreign.py")
foreign.nn = nn
exec("class Foreign(nn.Module):\n def forward(self, x): return x", vars(foreign))
sys.modules["foreign"] = foreign
Foreign = foreign.Foreign


def read_by_class(x: Tensor) -> Any:
    with io.FileIO(os.devnull) as file:
        return file.read()


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "clock": (lambda x: x * time.perf_counter(), "perf_counter of time"),
    "clock as a value": (lambda x: [f() for f in (time.time,)], "time of time"),
    "clock behind map": (lambda x: list(map(lambda f: f(), [time.monotonic])), "monotonic of time"),
    "random": (lambda x: x * random.random(), "random"),
    "random, in Python": (lambda x: x * random.uniform(0, 1), "random"),
    "random partial": (functools.partial(lambda x, f: x * f(), f=random.random), "random"),
    "numpy random": (lambda x: x * np.random.rand(), "numpy.random"),
    "user": (lambda x: os.path.expanduser("~"), "posixpath"),
    "files": (lambda x: open(os.devnull).close(), "open"),
    "files by class": (read_by_class, "file"),
    "print": (lambda x: print("", end=""), "print"),
    "date": (lambda x: datetime.datetime.now(), "now"),
    "processes": (lambda x: subprocess.list2cmdline(["a"]), "subprocess"),
    "threads": (lambda x: threading.current_thread(), "thread"),
    "uuid": (lambda x: uuid.uuid4(), "uuid"),
    "pickle": (lambda x: pickle.loads(pickle.dumps(1)), "pickle"),
    "another library": (lambda x: platformdirs.user_cache_path("x"), "posix"),
    "identity": (lambda x: id(x), "id"),
    "identity behind map": (lambda x: list(map(id, [1])), "id"),
    "hash": (lambda x: hash("a"), "hash"),
    "eval": (lambda x: eval("x"), "eval"),
    "exec": (lambda x: exec("y = 1"), "exec"),
    "globals": (lambda x: globals()["X"], "globals"),
    "vars": (lambda x: vars(F)["relu"](x), "vars"),
    "frames": (lambda x: sys._getframe(), "sys"),
    "numpy": (lambda x: x.numpy(), "values of a tensor"),
    "array": (lambda x: np.asarray(x), "values of a tensor"),
    "array of": (lambda x: np.sum(np.array(x)), "values of a tensor"),
    "address": (lambda x: x.data_ptr(), "values of a tensor"),
    "storage": (lambda x: x.untyped_storage(), "values of a tensor"),
    "numpy's functions": (lambda x: np.sqrt(x), "values of a tensor"),
    "text": (lambda x: f"{x}", "values of a tensor"),
    "repr": (lambda x: repr(x), "values of a tensor"),
    "copy": (lambda x: copy.deepcopy(x), "values of a tensor"),
    "random state": (lambda x: torch.get_rng_state(), "state"),
    "seed": (lambda x: torch.initial_seed(), "state"),
    "seeding": (lambda x: torch.manual_seed(0), "state"),
    "threads of torch": (lambda x: torch.get_num_threads(), "state"),
    "generator": (lambda x: torch.Generator().seed(), "seed"),
    "code made as it runs": (lambda x: __import__("types").FunctionType(made.__code__, globals())(2.0)(x), ""),
    "function found by name": (lambda x: getattr(sys.modules[__name__], "help" + "er")(x), ""),
}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_guard_can_list_is_refused(name: str) -> None:
    func, expected = REFUSED[name]
    found = reason(func)
    assert found
    assert expected in found


def test_code_that_the_walk_did_not_find_is_named() -> None:
    registry = {"f": helper}

    def func(x: Tensor, f: Any = None) -> Any:
        return f(x) if f else x

    with RunMonitor() as watched:
        func(X, registry["f"])
    state = FunctionState(func)
    state.cover(watched.ran)
    assert "it calls helper (test_run_monitor.py, line" in state.why_uncovered(watched.ran)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU()])
        self.norm = nn.BatchNorm1d(3)
        self.act = torch.tanh
        self.dims: dict[str, int] = {"last": -1}
        self.register_forward_hook(lambda module, args, y: y * 2)

    @property
    def width(self) -> int:
        return next(self.parameters()).shape[0]

    @contextmanager
    def doubled(self) -> Any:
        yield 2

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn import functional  # noqa: PLC0415

        if x.dim() != 2:
            raise ValueError(f"{x.shape}")
        with torch.no_grad(), self.doubled() as factor:
            scale = torch.full((), 1 / math.sqrt(self.width)) * factor
        for number, layer in enumerate(self.layers):
            x = layer(x) * number
        parts = sorted((part.sum(self.dims["last"]) for part in x.split(1, 1)), key=operator.methodcaller("dim"))
        x = torch.stack(list(parts), 1) + sum(p.sum() for _, p in self.named_parameters())
        if not torch.jit.is_scripting() and isinstance(x, Tensor) and hasattr(self, "act"):
            x = self.act(getattr(functional, "relu")(x))  # noqa: B009
        x = functools.reduce(torch.add, [x, x, torch.zeros_like(x), torch.arange(3)])
        return self.norm(F.dropout(x, 0.1, self.training) * scale.to(x.dtype) + np.pi * float(np.sqrt(4.0)))


ALLOWED: dict[str, Callable[[], tuple[Callable[[Tensor], Any], Tensor]]] = {
    "model": lambda: (Model().eval(), X),
    "training": lambda: (Model(), X),
    "helper": lambda: (lambda x: helper(x) * made(2.0)(x), X),
    "partial": lambda: (functools.partial(torch.add, other=1), X),
    "vmap": lambda: (torch.vmap(lambda x: x.sin().sum()), X),
    "grad": lambda: (torch.func.jacrev(lambda x: (x**2).sum(0)), X),
    "checkpoint": lambda: (
        lambda x: torch.utils.checkpoint.checkpoint(helper, x, use_reentrant=False, preserve_rng_state=False),
        X,
    ),
    "einsum": lambda: (lambda x: torch.einsum("ij,kj->ik", x, x), X),
    "draws": lambda: (lambda x: x + torch.randn_like(x), X),
    "modules of others": lambda: (nn.Sequential(Foreign()), X),
    "logging": lambda: (lambda x: logging.getLogger("quiet").debug("x") or x, X),
    "environment": lambda: (lambda x: x * len(os.environ.get("HOME", "")) * len(os.getenv("HOME", "")), X),
    "lstm": lambda: (nn.LSTM(3, 2, batch_first=True), X[None]),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_models_do_is_no_reason(name: str) -> None:
    func, x = ALLOWED[name]()
    assert reason(func, x) == ""


def test_what_a_checkpoint_draws_is_drawn_again() -> None:
    x = torch.ones(2, requires_grad=True)

    def func(x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)
        return torch.autograd.grad(y.sum(), x)[0]

    guard = Guard(func)
    with RunMonitor() as watched:
        func(x)
    assert (guard.reason, watched.reason, watched.repeated) == ("", "", True)
    with RunMonitor() as watched:
        helper(x)
    assert not watched.repeated


def test_own_functions_of_autograd_are_followed() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * 3 * x**2

    def func(x: Tensor) -> Tensor:
        return torch.autograd.grad(Cube.apply(x).sum(), x)[0]

    x = torch.ones(2, requires_grad=True)
    assert reason(func, x) == ""


def test_a_profiler_that_was_there_is_there_again() -> None:
    seen: list[str] = []

    def profiler(frame: Any, event: str, arg: Any) -> None:
        seen.append(event)

    sys.setprofile(profiler)
    try:
        with RunMonitor():
            helper(X)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    with RunMonitor():
        assert sys.getprofile() is not None
    assert sys.getprofile() is None
    profile = cProfile.Profile()
    profile.enable()
    with RunMonitor():
        helper(X)
    made(1.0)
    profile.disable()
    text = [str(entry.code) for entry in profile.getstats()]
    assert any("made" in one for one in text)


def test_errors_leave_no_profiler() -> None:
    with pytest.raises(ZeroDivisionError), RunMonitor():
        1 / 0  # noqa: B018
    assert sys.getprofile() is None


def test_other_threads_are_not_watched() -> None:
    started, stopped = threading.Event(), threading.Event()

    def work() -> None:
        started.wait()
        time.time()
        stopped.set()

    thread = threading.Thread(target=work)
    thread.start()
    with RunMonitor() as watched:
        helper(X)
        started.set()
        stopped.wait()
    thread.join()
    assert watched.reason == ""


def test_guards_and_programs_that_are_compiled_meanwhile_are_autojacs_own() -> None:
    """A wrapper inside of the function that is watched compiles its guard, or a program, while it runs."""
    x, node = torch.ones(2), torch.fx.Graph()
    given = node.placeholder("x")
    made = node.call_function(torch.ops.aten.sin.default, (given,))
    compiled_check._compile.cache_clear()
    with RunMonitor() as monitor:
        unchanged = Guard(lambda x: x + X).is_unchanged()
        program = emit([given], [made], [made])
        program(x)
    assert unchanged
    assert not monitor.reason
    assert not [code for code in monitor.ran if code.co_filename.startswith("<autojac")]
