"""What a call leaves behind is what one plain call of func would have left."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian
from harness import compare, forced, in_use
from oracle import jacobian_blocks

METHODS = {
    "pull": {"method": "Pull", "seeds": "shared", "engine": "vmap"},
    "push": {"method": "Push", "seeds": "shared", "engine": "vmap"},
    "replicate": {"method": "Replicate", "mode": "reverse"},
    "chunks": {"method": "BatchChunk", "inner": {"method": "Pull", "seeds": "shared", "engine": "loop"}, "chunk": 2},
    "per sample": {"method": "PerSample", "mode": "reverse"},
    "replay": {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": "batched"}},
}


class Keeping(torch.nn.Module):
    """Keeps its last result in all the places that people use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).double()
        self.last: dict[str, Tensor] = {}
        self.features: list[Tensor] = []
        self.calls = 0
        self.linear.register_forward_hook(lambda module, given, made: self.features.append(made))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        self.calls += 1
        self.log_det = y.sum(1)
        self.last["y"] = y
        return y


def check_left(module: Keeping, x: Tensor, calls: int) -> None:
    assert module.calls == calls == len(module.features)
    with torch.no_grad():
        right = module.linear.forward(x).tanh()
    trained = module.linear.weight.requires_grad
    for left, wanted in ((module.log_det, right.sum(1)), (module.last["y"], right)):
        compare(left.detach(), wanted)
        assert left.requires_grad == trained
    assert all(len(feature) == len(x) for feature in module.features)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_module_is_left_with_what_one_plain_call_keeps(method: str, trained: bool) -> None:
    torch.manual_seed(0)
    module = Keeping().requires_grad_(trained)
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(module, (x,), METHODS[method])
    module.features.clear()
    module.calls = 0
    for calls in (1, 2, 3):
        jacobian = jac(x)
        check_left(module, x, calls)
    with torch.no_grad():
        slope = 1 - module.linear.forward(x).tanh() ** 2
    compare(jacobian.detach(), slope[:, :, None] * module.linear.weight.detach())
    if trained:
        module.log_det.sum().backward()
        assert module.linear.weight.grad is not None


@pytest.mark.parametrize("effort", ["estimate", "quick"])
def test_a_search_leaves_what_one_plain_call_keeps(effort: Any) -> None:
    module = Keeping()
    x = torch.randn(6, 3, dtype=torch.float64)
    AutoJacobian(module, store=":memory:", on_miss="tune", effort=effort)(x)
    check_left(module, x, 1)
    AutoJacobian(module, store=":memory:", on_miss="tune", effort=effort)(x)
    check_left(module, x, 2)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_buffer_that_is_replaced_moves_as_in_one_plain_call(method: str | None) -> None:
    class Running(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return (x - self.mean).sin()

    module, x = Running(), torch.randn(6, 3, dtype=torch.float64)
    jac = AutoJacobian(module, store=":memory:") if method is None else forced(module, (x,), METHODS[method])
    mean = torch.zeros(3, dtype=torch.float64)
    for _ in range(4):
        mean = 0.9 * mean + 0.1 * x.mean(0)
        compare(jac(x), torch.diag_embed((x - mean).cos()))
        compare(module.mean, mean)


class Centred(torch.nn.Module):
    """Replaces its running mean, in which J has a part, and keeps its last result and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).double()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        y = (self.linear(x) - self.mean).tanh()
        self.last, self.halves = y, y.split(2, 1)
        return y


@pytest.mark.by_day(2)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_what_func_keeps_beside_a_buffer_has_a_graph_where_a_plain_call_gives_one(
    norm: bool, trained: bool, grad: bool
) -> None:
    def twin(state: dict[str, Any]) -> Centred:
        module = Centred()
        if norm:  # a buffer that is written into
            module.linear = torch.nn.Sequential(module.linear, torch.nn.BatchNorm1d(3).double())
        module.load_state_dict(state or module.state_dict())
        return module.requires_grad_(trained)

    module = twin({})
    plain = twin(module.state_dict())
    jac = AutoJacobian(module, store=":memory:", on_miss="estimate")
    with torch.set_grad_enabled(grad):
        for call in range(4):
            x = torch.randn(6, 3, dtype=torch.float64) + call
            slope = jacobian_blocks(twin(plain.state_dict()), (x,))
            compare(jac(x).detach(), slope)
            plain(x)
            for left, right in zip((module.last, *module.halves), (plain.last, *plain.halves), strict=True):
                compare(left.detach(), right.detach())
                assert left.requires_grad == right.requires_grad == (trained and grad)
            compare(module.mean, plain.mean)


@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_plan_that_does_not_hold_leaves_nothing(how: str) -> None:
    class Odd(Keeping):
        """Runs otherwise under a transform from some time on."""

        odd = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.odd and torch._C._functorch.is_functorch_wrapped_tensor(x):
                if how == "raises":
                    raise RuntimeError("under a transform")
                return 2 * y
            return y

    module, x = Odd(), torch.randn(6, 3, dtype=torch.float64)
    jac = forced(module, (x,), METHODS["per sample"], verify="always")
    jac(x)
    module.features.clear()
    module.odd, module.calls = True, 0
    with pytest.warns(autojac.StructureChangedWarning, match="does not hold"):
        jacobian = jac(x)
    check_left(module, x, 1)
    compare(jacobian.detach(), jacobian_blocks(module, (x,)))


def test_a_cache_is_filled_by_a_plain_call_and_served_by_a_replay() -> None:
    cache: dict[int, Tensor] = {}

    def rotated(x: Tensor) -> Tensor:
        if len(x) not in cache:
            cache[len(x)] = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None]
        return (x * cache[len(x)]).sin()

    x = torch.randn(6, 3, dtype=torch.float64)
    jac = forced(rotated, (x,), METHODS["replay"])
    for _ in range(3):
        compare(jac(x), torch.diag_embed((x * cache[6]).cos() * cache[6]))
    assert list(cache) == [6]
    assert type(cache[6]) is Tensor
    assert "operators left" in jac.explain(x)


class ActNorm(torch.nn.Module):
    """Initialises itself by its first batch, and counts the batches that it has seen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        zeros = torch.zeros(3, dtype=torch.float64)
        if kind.endswith("parameter"):
            self.scale = torch.nn.Parameter(zeros)
        else:
            self.register_buffer("scale", zeros)
        self.register_buffer("seen", torch.zeros(()))
        self.assigns = kind.startswith("assigned")
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            scale = -x.detach().std(0).log()
            if self.assigns:
                self.scale.data = scale
            else:
                with torch.no_grad():
                    self.scale.copy_(scale)
            self.ready = True
        self.seen += 1
        return (x * self.scale.exp()).sin()


@pytest.mark.by_day(4)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("effort", ["estimate", "quick"])
@pytest.mark.parametrize("kind", ["assigned parameter", "assigned buffer", "copied parameter", "copied buffer"])
def test_a_module_that_initialises_itself_is_initialised_once(kind: str, effort: Any, grad: bool) -> None:
    module, plain = ActNorm(kind), ActNorm(kind)
    batches = [scale * torch.randn(6, 3, dtype=torch.float64) for scale in (3, 2, 1)]
    with torch.set_grad_enabled(grad):
        jac = AutoJacobian(module, store=":memory:", on_miss="tune", effort=effort)
        for calls, x in enumerate(batches, 1):
            plain(x)
            scale = plain.scale.detach().exp()
            compare(jac(x).detach(), torch.diag_embed((x * scale).cos() * scale))
            assert module.ready
            assert int(module.seen) == calls
            compare(module.scale.detach(), plain.scale.detach())


def test_nothing_is_initialised_where_a_call_is_refused() -> None:
    class Warm(torch.nn.Module):
        """Gives something else in its first call."""

        first = True
        level = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            if self.first:
                self.first = False
                self.level = torch.ones(())
                return x.sin()
            return x.cos()

    module = Warm()
    with pytest.raises(autojac.RandomnessError, match="two different outputs"):
        AutoJacobian(module, store=":memory:")(torch.randn(4, 3))
    assert module.first
    assert not module.level


@pytest.mark.parametrize("before", [None, 7.0])
def test_gradients_that_a_backward_writes_are_put_back(before: float | None) -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    weight.grad = None if before is None else torch.full((3,), before, dtype=torch.float64)

    class Adjoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            with torch.enable_grad():
                (weight * 2).sum().backward()
            return cotangents[0] * ctx.saved_tensors[0].cos()

    x = torch.randn(4, 3, dtype=torch.float64)
    jac = AutoJacobian(lambda x: Adjoint.apply(x) + 0 * weight.detach(), store=":memory:")
    jac.tune(x)
    if before is None:
        assert weight.grad is None
    else:
        compare(weight.grad, torch.full((3,), before, dtype=torch.float64))


def dropout(x: Tensor) -> Tensor:
    return torch.dropout(x.sin(), 0.5, True)


DRAWING: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "torch": (dropout, ("cpu",)),
    "python": (lambda x: x.sin() * random.random(), ("python",)),
    "numpy": (lambda x: x.sin() * float(np.random.rand()), ("numpy",)),
}


@pytest.fixture
def loader(fixed_seeds: None) -> Iterator[list[float]]:
    """Another thread that draws all the time, from every generator."""
    np.random.rand()
    seen: list[float] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            torch.rand(())
            seen.append(random.random())
            np.random.rand()

    thread = threading.Thread(target=load)
    thread.start()
    yield seen
    stop.set()
    thread.join()


def test_another_thread_that_draws_is_not_taken_for_func(loader: list[float]) -> None:
    for _ in range(5):
        AutoJacobian(torch.tanh, store=":memory:", on_miss="estimate")(torch.randn(8, 4))
    seen = tuple(loader)
    assert len(set(seen)) == len(seen) > 0


@pytest.mark.parametrize("kind", ["torch", "python"])
def test_func_s_own_draws_are_seen_beside_another_thread_s(kind: str, loader: list[float]) -> None:
    with pytest.raises(autojac.RandomnessError, match="draws random numbers"):
        AutoJacobian(DRAWING[kind][0], store=":memory:", on_miss="estimate")(torch.randn(8, 4))


@pytest.mark.parametrize("kind", DRAWING)
def test_func_s_own_draws_are_seen_beside_a_thread_that_rests(kind: str) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(autojac.RandomnessError, match="draws random numbers"):
            AutoJacobian(DRAWING[kind][0], store=":memory:", on_miss="estimate")(torch.randn(8, 4))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", DRAWING)
def test_only_the_generators_that_func_draws_from_are_saved(kind: str) -> None:
    func, generators = DRAWING[kind]
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate", randomness="different")
    x = torch.randn(4, 3, dtype=torch.float64)
    jac(x)
    entry = in_use(jac)
    assert entry.problem.generators == generators
    assert tuple(entry.sandbox.state) == generators


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("kind", DRAWING)
def test_the_random_state_is_left_where_one_plain_call_leaves_it(kind: str, randomness: Any) -> None:
    func = DRAWING[kind][0]
    jac = AutoJacobian(func, store=":memory:", on_miss="estimate", randomness=randomness)
    x = torch.randn(4, 3, dtype=torch.float64)

    def seeded() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    def next_numbers() -> tuple[float, ...]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    seeded()
    func(x)
    wanted = next_numbers()
    for _ in range(2):
        seeded()
        jac(x)
        assert next_numbers() == wanted


def test_numpy_s_draws_are_refused_where_func_imports_it_itself() -> None:
    script = """
import torch, autojac
def func(x):
    import numpy.random
    return x.sin() * float(numpy.random.rand())
for _ in range(2):
    try:
        autojac.AutoJacobian(func, store=":memory:", on_miss="estimate")(torch.ones(4, 3))
    except autojac.RandomnessError as error:
        print(str(error)[:25])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["func draws random numbers"] * 2 + [""]
