"""What lies inside Python's library, torch and NumPy and can change is watched by replays, or they are refused."""

from __future__ import annotations

import abc
import collections
import collections.abc
import copy
import decimal
import logging
import numbers
import pickle
import pydoc
import textwrap
from collections.abc import Callable, Sized
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._tensor_str import PRINT_OPTS
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from autojac.guards.guard import Change, Guard
from autojac.replay.replayer import Replayer
from harness import compare, forced, in_use
from oracle import jacobian_blocks

REPLAY = {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "loop"}}
LOGGER = logging.getLogger("autojac.tests.process")
ARRAY = np.array([1.23456789])
THIRD = decimal.Decimal(3)


class Thing:
    """Registered with abstract classes, and as a node of pytrees."""


class Shape(abc.ABC):
    """An abstract class of the user's."""

    @abc.abstractmethod
    def area(self) -> float: ...


Patch = Callable[[Any, str, Any], None]
Case = tuple[Callable[[Tensor], Tensor], Callable[[Patch], Any]]


def _scaled(gain: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.sin() * gain()


def _registered(kind: Any) -> Case:
    one = type("One", (), {})()
    return _scaled(lambda: 2.0 if isinstance(one, kind) else 3.0), lambda patch: kind.register(type(one))


def _flag(get: Callable[[], Any], set_to: Callable[[Any], Any], value: Any) -> Case:
    def change(patch: Patch) -> None:
        before = get()
        set_to(value)
        UNDO.append(lambda: set_to(before))

    return _scaled(lambda: 2.0 if get() == value else 3.0), change


UNDO: list[Callable[[], Any]] = []
CASES: dict[str, Callable[[], Case]] = {
    "abstract class": lambda: _registered(Sized),
    "number": lambda: _registered(numbers.Number),
    "abstract class of the user's": lambda: _registered(Shape),
    "print options": lambda: (
        _scaled(lambda: float(PRINT_OPTS.precision)),
        lambda patch: patch(PRINT_OPTS, "precision", 7),
    ),
    "print options by their module": lambda: (
        _scaled(lambda: float(torch._tensor_str.PRINT_OPTS.edgeitems)),
        lambda patch: patch(PRINT_OPTS, "edgeitems", 9),
    ),
    "decimal context": lambda: (
        _scaled(lambda: float(decimal.Decimal(1) / THIRD)),
        lambda patch: patch(decimal.getcontext(), "prec", 3),
    ),
    "logging level": lambda: (_scaled(lambda: LOGGER.level + 1.0), lambda patch: patch(LOGGER, "level", 10)),
    "logger disabled": lambda: (
        _scaled(lambda: 2.0 if LOGGER.disabled else 3.0),
        lambda patch: patch(LOGGER, "disabled", True),
    ),
    "anomaly mode": lambda: _flag(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, True),
    "warnings": lambda: _flag(torch.is_warn_always_enabled, torch.set_warn_always, True),
    "autocast cache": lambda: _flag(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False),
    "autocast dtype": lambda: _flag(
        lambda: torch.get_autocast_dtype("cpu"), lambda dtype: torch.set_autocast_dtype("cpu", dtype), torch.float16
    ),
    "attention kernels": lambda: _flag(torch._C._get_math_sdp_enabled, torch.backends.cuda.enable_math_sdp, False),
    "NumPy's errors": lambda: _flag(lambda: np.geterr()["divide"], lambda how: np.seterr(divide=how), "ignore"),
    "NumPy's printing": lambda: (
        _scaled(lambda: float(len(repr(ARRAY)))),
        lambda patch: (np.set_printoptions(precision=2), UNDO.append(lambda: np.set_printoptions(precision=8))),
    ),
    "method of tensors": lambda: (lambda x: x.cosh(), lambda patch: patch(Tensor, "cosh", Tensor.sin)),
    "function behind a layer": lambda: (
        nn.Softsign(),
        lambda patch: patch(nn.functional, "softsign", torch.cos),
    ),
    "operator behind a layer": lambda: (nn.SELU(), lambda patch: patch(torch, "selu", torch.cos)),
    "class attribute of a library": lambda: (
        _scaled(lambda: 2.0 if torch.distributions.Distribution._validate_args else 3.0),
        # torch's compiler switches it off for the process
        lambda patch: patch(Distribution, "_validate_args", not Distribution._validate_args),
    ),
    "class attribute of Python's library": lambda: (
        _scaled(lambda: float(len(textwrap.TextWrapper.unicode_whitespace_trans))),
        lambda patch: patch(textwrap.TextWrapper, "unicode_whitespace_trans", {}),
    ),
    "table of a library": lambda: (
        _scaled(lambda: torch.testing._comparison._DTYPE_PRECISIONS[torch.float32][0]),
        lambda patch: patch(torch.testing._comparison, "_DTYPE_PRECISIONS", collections.defaultdict(lambda: (3.0,))),
    ),
}


@pytest.mark.filterwarnings("ignore::autojac.StructureChangedWarning")
@pytest.mark.parametrize("name", CASES)
def test_state_of_libraries_is_watched_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    func, change = CASES[name]()
    x = torch.randn(4, 3, dtype=torch.float64)
    jac = forced(func, (x,), REPLAY)
    for _ in range(5):
        before = jac(x)
    try:
        change(monkeypatch.setattr)
        for _ in range(2):
            after = jac(x)
            compare(after, jacobian_blocks(func, (x,)))
        assert not torch.equal(before, after)
    finally:
        while UNDO:
            UNDO.pop()()


def test_a_node_of_pytrees_that_is_registered_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    thing = Thing()

    def func(x: Tensor) -> Tensor:
        return x.sin() * len(pytree.tree_leaves(thing))

    x = torch.randn(4, 3, dtype=torch.float64)
    jac = forced(func, (x,), REPLAY)
    for _ in range(5):
        jac(x)
    node = pytree.NodeDef(Thing, lambda thing: ([1.0, 2.0], None), lambda *_: Thing(), None)
    monkeypatch.setitem(pytree.SUPPORTED_NODES, Thing, node)
    compare(jac(x), jacobian_blocks(func, (x,)))


class Settings:
    """An object that copies, pickles and help() look into."""

    def __init__(self) -> None:
        self.gain = 2.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * self.settings.gain


LOOKS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": pickle.dumps,
    "help": lambda model: (pydoc.render_doc(model), pydoc.render_doc(model.settings)),
    "annotations": lambda model: (type(model).__annotations__, type(model.settings).__annotations__),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_python_writes_into_classes_is_no_change(look: str) -> None:
    for kind in (Settings, Scaled):
        for name in ("__slotnames__", "__annotations__"):
            if name in vars(kind):
                delattr(kind, name)
    model = Scaled()
    guard = Guard(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    jac = forced(model, (x,), REPLAY)
    for _ in range(5):
        jac(x)
    entry = in_use(jac)
    assert isinstance(entry.compute, Replayer)
    traces = entry.compute.traces
    for one in (model, model.settings):
        LOOKS[look](model if look in ("help", "annotations") else one)
    assert guard.diff() == Change("", {})
    for _ in range(2):
        compare(jac(x), jacobian_blocks(model, (x,)))
    assert entry.compute.traces == traces == 1
    model.settings.gain = 3.0
    compare(jac(x), jacobian_blocks(model, (x,)))
