"""Compiled plans: flat programs under autojac's own guard, and the program itself where nothing compiles it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian
from autojac.methods.base import build, registry
from autojac.planning.search.space import candidates
from autojac.replay import compilation
from autojac.replay.replayer import Replayer
from harness import compare, forced, in_use, planned
from oracle import jacobian_blocks

OLD = {"method": "Compiled", "inner": {"method": "PerSample", "mode": "reverse"}}
LOOP = {"method": "Pull", "seeds": "identity", "engine": "loop"}
FLAT = {"method": "Compiled", "inner": {"method": "Replay", "inner": LOOP}}


def points(count: int = 5) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The programs that were to be compiled; they run as they are."""
    programs: list[Any] = []

    def plain(run: Any, inputs: Any) -> Any:
        programs.append(run)
        return run

    monkeypatch.setattr(compilation, "_run_inductor", plain)
    yield programs


def replaying(jac: AutoJacobian) -> Replayer:
    entry = in_use(jac)
    assert isinstance(entry.compute, Replayer)
    return entry.compute


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double().requires_grad_(False)
        self.power = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.shaped(self.linear(x)) * self.power

    def shaped(self, x: Tensor) -> Tensor:
        return x.sin()


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


CHANGES: dict[str, Callable[[Layer, pytest.MonkeyPatch], Any]] = {
    "a hook": lambda layer, _: layer.linear.register_forward_hook(doubled),
    "a global hook": lambda layer, _: nn.modules.module.register_module_forward_hook(doubled),
    "a method of its class": lambda layer, patch: patch.setattr(Layer, "shaped", lambda self, x: x.cos()),
    "a number": lambda layer, _: setattr(layer, "power", 3.0),
}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", [FLAT, OLD], ids=["flat", "of earlier versions"])
def test_changes_are_seen_at_once(
    change: str, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compilations: list[Any]
) -> None:
    layer, x = Layer(), points()
    jac = forced(layer, (x,), method, verify="never")
    for _ in range(3):
        compare(jac(x), jacobian_blocks(layer, (x,), 0))
    handle = CHANGES[change](layer, monkeypatch)
    try:
        for _ in range(3):
            compare(jac(x), jacobian_blocks(layer, (x,), 0))
    finally:
        if handle is not None:
            handle.remove()
    compare(jac(x), jacobian_blocks(layer, (x,), 0))


@pytest.mark.parametrize("method", [FLAT, OLD], ids=["flat", "of earlier versions"])
def test_many_values_of_a_number(method: dict[str, Any], compilations: list[Any]) -> None:
    layer, x = Layer(), points()
    jac = forced(layer, (x,), method, verify="never")
    for value in range(12):
        layer.power = float(value)
        compare(jac(x), jacobian_blocks(layer, (x,), 0))


def test_only_flat_programs_are_compiled() -> None:
    for func in (torch.sin, lambda x: x - x.mean(0)):
        _, _, problem = planned(func, (points(),))
        compiled = [m for kind in registry().values() for m in kind.candidates(problem, 2) if "Compiled(" in repr(m)]
        assert compiled
        assert all(method.inner.makes_flat_programs for method in compiled)  # type: ignore[attr-defined]
        assert "flat" in str(build(OLD).unsupported(problem))


def test_what_earlier_versions_compiled_is_planned_anew(compilations: list[Any]) -> None:
    layer, x = Layer(), points()
    jac = forced(layer, (x,), OLD)
    compare(jac(x), jacobian_blocks(layer, (x,), 0))
    assert jac.plan(x).method["method"] != "Compiled"


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "randint": lambda x: torch.randint(0, 5, x.shape),
    "rrelu": lambda x: nn.functional.rrelu(x, training=True),
    "dropout": lambda x: nn.functional.dropout(torch.ones_like(x)),
}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("name", DRAWS)
def test_functions_that_draw_are_not_compiled(name: str, compilations: list[Any]) -> None:
    class Noisy(nn.Module):
        draws = False

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * DRAWS[name](x) if self.draws else x.sin()

    noisy, x = Noisy(), points()
    later = forced(noisy, (x,), FLAT, verify="never")
    compare(later(x), torch.diag_embed(x.cos()))
    assert len(compilations) == 1
    noisy.draws = True
    _, _, problem = planned(noisy, (x,))
    assert "draws" in str(build(FLAT).unsupported(problem))
    for jac in (later, forced(noisy, (x,), FLAT, verify="never")):
        for seed in range(3):
            torch.manual_seed(seed)
            right = jacobian_blocks(noisy, (x,), 0)
            noisy(x)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            compare(jac(x), right)
            assert torch.equal(torch.get_rng_state(), state)
    assert len(compilations) == 1


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")

    def refuse(*args: Any) -> Any:
        raise AssertionError("it tried to compile")

    monkeypatch.setattr(compilation, "_run_inductor", refuse)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_programs_run_as_they_are() -> None:
    layer, x = Layer(), points()
    jac = forced(layer, (x,), FLAT)
    for scale in (1, 2, 3):
        compare(jac(scale * x), jacobian_blocks(layer, (scale * x,), 0))
    assert replaying(jac).traces == 1
    assert replaying(jac).calls
    assert jac.plan(x).method["method"] == "Compiled"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_nothing_compiled_is_tried() -> None:
    net = nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 12)).double().requires_grad_(False)
    _, _, problem = planned(net, (torch.randn(5, 12, dtype=torch.float64),))
    problem = dataclasses.replace(problem, trial=True)
    assert "no-such-compiler" in str(build(FLAT).unsupported(problem))
    assert not [method for method in candidates(problem, 2) if method.compiles]


def refusing(times: int) -> Callable[..., Any]:
    """A compiler whose programs run so often, and raise then."""

    def compiler(run: Any, inputs: Any) -> Any:
        left = [times]
        if times < 0:
            raise RuntimeError("the compiler refuses")

        def program(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise AssertionError("wrong strides")
            return run(*args)

        return program

    return compiler


@pytest.mark.by_day(2)
@pytest.mark.parametrize("times", [-1, 0, 1, 2, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_where_a_compiler_refuses_the_program_runs_as_it_is(
    times: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_run_inductor", refusing(times))
    layer = Layer().requires_grad_(grad)
    x = points()
    jac = forced(layer, (x,), FLAT)
    for scale in (1, 2, 3, 4, 5):
        J = jac(scale * x)
        compare(J.detach(), jacobian_blocks(layer, (scale * x,), 0))
        if grad:
            (gradient,) = torch.autograd.grad(J.square().sum(), [layer.linear.weight])
            assert gradient.abs().sum() > 0
    assert replaying(jac).traces == 1
    assert not replaying(jac)._refused
    # a search has no use for a candidate that is another one
    _, _, problem = planned(layer, (x,))
    compute = build(FLAT).prepare(dataclasses.replace(problem, trial=True))
    if times <= 0:
        with pytest.raises((RuntimeError, AssertionError)):
            compute((x,), {})


def test_a_function_that_raises_by_itself_goes_on_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []

    def plain(run: Any, inputs: Any) -> Any:
        def program(*args: Any) -> Any:
            runs.append(True)
            return run(*args)

        return program

    monkeypatch.setattr(compilation, "_run_inductor", plain)

    def chosen(x: Tensor, places: Tensor) -> Tensor:
        return x.sin().gather(1, places)

    x, places = points(), torch.tensor([[0, 2]]).repeat(5, 1)
    jac = forced(chosen, (x, places), FLAT, verify="never")
    compare(jac(x, places), jacobian_blocks(chosen, (x, places), 0))
    with pytest.raises(RuntimeError, match="out of bounds"):
        jac(x, places + 2)
    before = len(runs)
    compare(jac(x, places), jacobian_blocks(chosen, (x, places), 0))
    assert len(runs) > before > 0
