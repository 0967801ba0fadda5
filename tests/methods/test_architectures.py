"""Right numbers for functions that nobody wrote by hand: drawn architectures against the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import autojac
from architectures import Architecture, Around, Made, architectures, chain
from autojac import AutoJacobian
from autojac.core.sandbox import Sandbox
from autojac.methods.base import registry
from autojac.planning.search import measure
from autojac.problem.reference import Reference
from harness import Ticking, compare, planned
from oracle import jacobian_full
from parts import KINDS

QUIET = {
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    "print_blob": True,
}


def ordinary(examples: int) -> Callable[[Any], Any]:
    """The same examples each time."""
    return settings(max_examples=examples, derandomize=True, database=None, **QUIET)  # type: ignore[arg-type]


def nightly(examples: int) -> Callable[[Any], Any]:
    """Other examples every night."""
    return settings(max_examples=examples, **QUIET)  # type: ignore[arg-type]


# heads and parts that are detached on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* of func moves? with the inputs:autojac.NoGraphWarning")


@contextmanager
def calm(made: Made) -> Iterator[None]:
    """The call's grad mode, and no warnings: plans may be found not to hold, loudly and rightly."""
    with warnings.catch_warnings(), made.grad_mode:
        warnings.simplefilter("ignore")
        yield


def jacobian_of(made: Made, **options: Any) -> AutoJacobian:
    return AutoJacobian(made.func, **{"on_miss": "estimate", "store": ":memory:", **made.options, **options})


def derived(oracle: Callable[[], Any]) -> Any:
    """The oracle's answer; an example is dropped in which a gradient inside the function has no derivative."""
    try:
        return oracle()
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        assume(False)


def expected_of(made: Made, *at: Any) -> Any:
    """The oracle's answer; an example is dropped that has none, or where rounding is all there is of a derivative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = derived(lambda: made.expected(*at))
    for J in pytree.tree_leaves(expected):
        if J.numel():
            assume(bool(torch.isfinite(J).all()))
            scale = float(J.abs().amax())
            assume(scale == 0 or 1e-7 < scale < 1e6)
    return expected


def check_right(drawn: Architecture) -> None:
    made = drawn.make()
    expected = expected_of(made)
    with calm(made):
        # where all derivatives vanish, what is left of terms of size one that cancel is their rounding
        compare(jacobian_of(made)(*made.args, **made.kwargs), expected, least=1e-6)


@given(architectures())
@ordinary(12)
def test_any_architecture_is_right(drawn: Architecture) -> None:
    check_right(drawn)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@given(architectures())
@nightly(2000)
def test_very_many_architectures_are_right(drawn: Architecture) -> None:
    check_right(drawn)


def check_probe(drawn: Architecture) -> None:
    """Where one sample's derivative reaches another, the probe must not call them independent."""
    made = drawn.make()
    assume(drawn.roles != "none" and not drawn.packed and "dropout" not in drawn.names)
    with calm(made), torch.inference_mode(False):
        whole = derived(lambda: jacobian_full(made.plain, made.plain_args, kwargs=made.kwargs))
        in_dims = made.options.get("in_dims", "auto")
        structure = autojac.probe(made.func, *made.args, in_dims=in_dims, **made.kwargs)
    reached, scale = 0.0, 0.0
    for J in pytree.tree_leaves(whole):
        sizes = J.abs().movedim(J.dim() - 1 - len(drawn.event), 1).reshape(drawn.batch, drawn.batch, -1).amax(2)
        scale = max(scale, float(sizes.amax()))
        reached = max(reached, float((sizes - sizes.diagonal().diag()).amax()))
    assert drawn.coupled or reached <= 1e-13 * scale
    if reached > 1e-9 * scale:
        assert not structure.independent


@given(architectures())
@ordinary(12)
def test_the_probe_sees_every_live_coupling(drawn: Architecture) -> None:
    check_probe(drawn)


def check_candidates(drawn: Architecture) -> None:
    made = drawn.make()
    expected = expected_of(made)
    with calm(made), torch.inference_mode(False):
        request, seen, problem = planned(made.func, made.args, made.kwargs, **made.options)
        sandbox = Sandbox(seen.sandbox.captured, seen.sandbox.state)
        reference = Reference(problem, request.leaves, request.keywords, sandbox)
        right = 0
        for kind in registry().values():
            for method in kind.candidates(problem, 1):
                if "Compiled" in repr(method) or method.unsupported(problem) is not None:
                    continue
                try:
                    with sandbox():
                        result = method.prepare(problem)(request.leaves, request.keywords)
                except Exception:  # an infeasible candidate; the reason is the search's business
                    continue
                if reference.check(result) is None:
                    right += 1
                    compare(request.layout.jacobian(result.jacobians), expected)
        assert right


@given(architectures())
@ordinary(4)
def test_every_candidate_for_an_architecture_is_right_or_caught(drawn: Architecture) -> None:
    check_candidates(drawn)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@given(architectures())
@nightly(500)
def test_every_candidate_for_very_many_is_right_or_caught(drawn: Architecture) -> None:
    check_candidates(drawn)


def check_mistimed(drawn: Architecture, inverted: bool) -> None:
    made = drawn.make()
    expected = expected_of(made)
    draws = torch.Generator().manual_seed(drawn.seed)

    def seconds(true: float) -> float:
        return 1e-6 / max(true, 1e-9) if inverted else float(torch.rand(1, generator=draws)) * 1e-3

    with calm(made), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "clock", Ticking(seconds))
        jac = jacobian_of(made, on_miss="tune", effort="quick", budget_s=0.2)
        for _ in range(2):
            with torch.random.fork_rng():  # one mask of a dropout for both
                compare(jac(*made.args, **made.kwargs), expected)


@given(architectures(), st.booleans())
@ordinary(4)
def test_wrong_clocks_never_make_wrong_numbers(drawn: Architecture, inverted: bool) -> None:
    check_mistimed(drawn, inverted)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@given(architectures(), st.booleans())
@nightly(300)
def test_very_many_wrong_clocks_never_make_wrong_numbers(drawn: Architecture, inverted: bool) -> None:
    check_mistimed(drawn, inverted)


def rows_of(made: Made, args: tuple[Any, ...]) -> Any:
    """The first argument's blocks with their graph: one plain VJP per row."""
    x = args[0]
    outputs, spec = pytree.tree_flatten(made.func(*args, **made.kwargs))
    batch = made.drawn.batch
    Js = []
    for y in outputs:
        rows = []
        for b in range(batch):
            for entry in y[b].reshape(-1):
                (row,) = torch.autograd.grad(entry, x, create_graph=True, allow_unused=True, materialize_grads=True)
                rows.append(row if made.drawn.layout == "full" else row[b])
        Js.append(torch.stack(rows).reshape(*y.shape, *rows[0].shape))
    return pytree.tree_unflatten(Js, spec)


def trained(J: Any, made: Made, args: tuple[Any, ...], retain: bool = False) -> list[Tensor]:
    """The gradients of a loss on a Jacobian."""
    generator = torch.Generator().manual_seed(5)
    loss: Any = torch.zeros(())
    for block in pytree.tree_leaves(J):
        weight = torch.randn(block.shape, generator=generator, dtype=block.dtype)
        loss = loss + (block * weight).sum() + 0.5 * block.square().sum()
    sources = [args[0], *(weight for weight in made.weights if weight.requires_grad)]
    if not loss.requires_grad:
        return [torch.zeros_like(source) for source in sources]
    return list(torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True))


def check_trained(drawn: Architecture) -> None:
    made = drawn.make()
    assume(drawn.axis == 0 and drawn.roles != "none" and not drawn.packed)
    made.args = (made.args[0].detach().requires_grad_(), *made.args[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            right = trained(rows_of(made, made.args), made, made.args)
        except RuntimeError:  # torch has no second derivative of it
            assume(False)
        for gradient in right:
            size = float(gradient.abs().amax())
            assume(bool(torch.isfinite(gradient).all()) and (size == 0 or 1e-6 < size < 1e6))
        J = jacobian_of(made, argnums=0)(*made.args, **made.kwargs)
        found = trained(J, made, made.args)
    scale = max(float(gradient.abs().amax()) for gradient in right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(scale, 1e-6))


@given(architectures(smooth=True, grad="on"))
@ordinary(6)
def test_a_loss_on_the_jacobian_trains_as_plain_rows_do(drawn: Architecture) -> None:
    check_trained(drawn)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@given(architectures(smooth=True, grad="on"))
@nightly(500)
def test_very_many_losses_train_as_plain_rows_do(drawn: Architecture) -> None:
    check_trained(drawn)


def moved(made: Made, change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments with other floats in the first."""
    x = made.args[0]
    other = pytree.tree_map(change, x)
    return (other, *made.args[1:])


def sliced(made: Made, count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first samples of all that carries the batch."""
    axis, batched = made.drawn.axis, made.by_batch[-1]
    first, *rest = made.args
    first = pytree.tree_map(lambda x: x.narrow(axis, 0, count), first)
    rest = [z[:count] if batched and isinstance(z, Tensor) else z for z in rest]
    named = {name: z[:count] if batched and isinstance(z, Tensor) else z for name, z in made.kwargs.items()}
    return (first, *rest), named


def check_later(drawn: Architecture) -> None:
    """`verify="always"` promises every call right, whatever has changed since the plan was made."""
    made = drawn.make()
    assume(drawn.second != "neighbours" or drawn.batch == 1)
    calls = [(made.args, made.kwargs)]
    calls += [(moved(made, change), made.kwargs) for change in (lambda x: 2 * x + 1, lambda x: -3 * x)]
    if drawn.batch > 1:
        calls.append(sliced(made, drawn.batch - 1))
    calls.append((made.args, made.kwargs))
    expected = [expected_of(made, *call) for call in calls]
    with calm(made):
        jac = jacobian_of(made, verify="always")
        for (args, kwargs), right in zip(calls, expected, strict=True):
            with torch.random.fork_rng():  # one mask of a dropout for both
                compare(jac(*args, **kwargs), right)


@given(architectures())
@ordinary(6)
def test_later_calls_are_right_when_all_are_checked(drawn: Architecture) -> None:
    check_later(drawn)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@given(architectures())
@nightly(500)
def test_very_many_later_calls_are_right_when_all_are_checked(drawn: Architecture) -> None:
    check_later(drawn)


def test_an_architecture_prints_as_the_expression_that_makes_it() -> None:
    drawn = Architecture(chain("tanh", Around("residual", chain("conv"))), batch=3)
    assert repr(drawn) == "Architecture(trunk=chain('tanh', Around('residual', chain('conv'))), batch=3)"


@pytest.mark.by_day(3)
@pytest.mark.parametrize("name", KINDS)
def test_every_part_couples_what_it_says(name: str) -> None:
    drawn = Architecture(chain(name), batch=3, event=(3,))
    made = drawn.make()
    whole = jacobian_full(made.plain, made.plain_args)
    across = whole.abs().amax((1, 3)) - whole.abs().amax((1, 3)).diagonal().diag()
    assert drawn.coupled or float(across.amax()) == 0
    assert torch.isfinite(whole).all()
