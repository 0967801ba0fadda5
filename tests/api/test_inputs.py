"""Bad and odd input: a clear error, nothing lost, nothing cached; and odd but legal input: the right Jacobian."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, PlanStore
from harness import compare
from oracle import jacobian_blocks


def cube(x: Tensor) -> Tensor:
    return torch.stack((x[:, 0] ** 3, x[:, 0] * x[:, -1]), 1)


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def refused(error: type[Exception], words: str, func: Any, *args: Any, **options: Any) -> None:
    """The call raises, the message says `words`, and nothing is stored or kept."""
    store = PlanStore(":memory:")
    jac = estimated(func, store=store, **options)
    with pytest.raises(error, match=words):
        jac(*args)
    assert store.listing() == []
    assert "0 plans" in repr(jac)


def test_integer_input() -> None:
    refused(autojac.InputError, r"int64.*floating-point.*argnums", cube, torch.ones(4, 2, dtype=torch.int64))


def test_complex_input_names_the_real_view() -> None:
    refused(autojac.InputError, "view_as_real", cube, torch.ones(4, 2, dtype=torch.complex64))


def test_argument_that_is_no_tensor() -> None:
    refused(autojac.InputError, "list|float|nothing", cube, 3.0)


def test_scalar_input() -> None:
    refused(autojac.InputError, "batch was expected on axis 0", torch.sin, torch.tensor(1.0))


def test_output_without_the_batch() -> None:
    refused(autojac.OutputError, r"\(2,\).*in_dims=None", lambda x: x.sum(0), torch.ones(5, 2))


def test_scalar_output() -> None:
    refused(autojac.OutputError, "scalar", lambda x: x.sum(), torch.ones(5, 2))


def test_integer_output() -> None:
    refused(autojac.OutputError, "int64", lambda x: x.argmax(1), torch.ones(5, 2))


def test_complex_output() -> None:
    refused(autojac.OutputError, "view_as_real", torch.fft.fft, torch.ones(5, 2))


def test_output_that_is_no_tensor() -> None:
    refused(autojac.OutputError, "float", lambda x: (x, 1.0), torch.ones(5, 2))


def test_output_whose_axis_0_is_the_batch_by_chance() -> None:
    refused(autojac.OutputError, "half of the batch", lambda x: x.T @ x, torch.randn(4, 4))


def test_outputs_of_different_length() -> None:
    refused(autojac.OutputError, "share the batch", lambda x: (x, x[1:]), torch.ones(5, 2))


def test_inputs_of_different_batch_size() -> None:
    refused(autojac.InputError, r"\[4, 5\]", lambda a, b: a * b, torch.ones(4, 2), torch.ones(5, 2), argnums=(0, 1))


def test_inputs_whose_declared_batches_differ() -> None:
    args = (torch.ones(4, 2), torch.ones(1, 2))
    refused(autojac.InputError, r"\[1, 4\]", lambda a, b: a * b, *args, argnums=(0, 1), in_dims=0)


def test_function_that_raises_keeps_its_own_error() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("of the user")

    refused(KeyError, "of the user", fails, torch.ones(4, 2))


def test_function_that_writes_into_its_input() -> None:
    def writes(x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x * 2

    x = torch.ones(4, 2)
    refused(autojac.MutationError, "number 0.*clone", writes, x)
    assert torch.equal(x, torch.ones(4, 2))


def test_function_that_draws_random_numbers() -> None:
    refused(autojac.RandomnessError, "randomness='different'", lambda x: x * torch.rand_like(x), torch.ones(4, 2))


def test_function_that_is_not_repeatable() -> None:
    own = torch.Generator().manual_seed(0)
    refused(
        autojac.RandomnessError, "two different outputs", lambda x: x * torch.rand(2, generator=own), torch.ones(4, 2)
    )


@pytest.mark.parametrize("argnums", [1, -3, (0, 1), (0, 0), (0, -1)])
def test_argnums_that_do_not_fit(argnums: Any) -> None:
    refused(autojac.OptionError, "argnums", cube, torch.ones(4, 2), argnums=argnums)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layuot": "full"}, "did you mean 'layout'"),
        ({"layout": "ful"}, "did you mean 'full'"),
        ({"effort": "mesure"}, "did you mean 'measure'"),
        ({"on_miss": "tun"}, "did you mean 'tune'"),
        ({"coupling": "independant"}, "did you mean 'independent'"),
        ({"verify": True}, "verify must be one of"),
        ({"budget_s": -1}, "budget_s"),
        ({"budget_s": "3s"}, "budget_s"),
        ({"memory_limit": "8 gigs"}, "8GiB"),
        ({"memory_limit": 0}, "positive"),
        ({"argnums": "x"}, "argnums"),
        ({"argnums": ()}, "argnums"),
        ({"in_dims": "batch"}, "in_dims"),
        ({"version": 3}, "version"),
    ],
)
def test_option_that_is_not_accepted(options: dict[str, Any], words: str) -> None:
    with pytest.raises(autojac.OptionError, match=re.escape(words)):
        estimated(cube, **options)(torch.ones(4, 2))


def test_something_that_is_no_function() -> None:
    with pytest.raises(autojac.InputError, match="Tensor"):
        AutoJacobian(torch.ones(3))  # type: ignore[arg-type]


def test_unknown_effort_of_a_tuning() -> None:
    with pytest.raises(autojac.OptionError, match="effort"):
        estimated(cube).tune(torch.ones(4, 2), effort="much")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_empty_batch_gives_an_empty_jacobian(layout: str) -> None:
    jac = estimated(cube, layout=layout)
    y, J = jac.value_and_jacobian(doubles(0, 3))
    assert y.shape == (0, 2)
    assert J.shape == ((0, 2, 3) if layout == "blocks" else (0, 2, 0, 3))
    assert jac(doubles(4, 3)).shape[:2] == (4, 2)


def test_events_without_elements() -> None:
    assert estimated(lambda x: x[:, :0])(doubles(4, 3)).shape == (4, 0, 3)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_as_small_or_as_large_as_n(batch: int) -> None:
    x = doubles(batch, 3)
    compare(estimated(cube)(x), jacobian_blocks(cube, (x,)))


@pytest.mark.parametrize(
    "x",
    [
        doubles(3, 5).T,
        doubles(1, 3).expand(5, 3),
        doubles(5, 6)[:, ::2],
        doubles(10, 3)[::2],
        doubles(5, 3).flip(0),
    ],
    ids=["transposed", "expanded", "strided columns", "strided rows", "flipped"],
)
def test_inputs_that_are_not_contiguous(x: Tensor) -> None:
    compare(estimated(cube)(x), jacobian_blocks(cube, (x,)))


def test_grad_modes() -> None:
    x = doubles(6, 3).requires_grad_()
    expected = jacobian_blocks(cube, (x,))
    jac = estimated(cube)
    assert jac(x).requires_grad
    with torch.no_grad():
        assert not jac(x).requires_grad
    with torch.inference_mode():
        J = jac(x * 1)
        value, again = jac.value_and_jacobian(x)
    for one in (J, again, jac(x)):
        compare(one.detach(), expected)
    assert not J.requires_grad
    assert not value.requires_grad
    assert not jac(x.detach()).requires_grad
    assert x.grad is None


def test_function_that_returns_nan() -> None:
    def root(x: Tensor) -> Tensor:
        return x.sqrt() * x[:, :1]

    x = torch.tensor([[4.0, 1.0], [-1.0, 2.0], [9.0, 0.25]], dtype=torch.float64)
    J = estimated(root)(x)
    expected = jacobian_blocks(root, (x,))
    assert bool(J[1].isnan().any())
    compare(J[::2], expected[::2])


@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1, 0), (1,)])
def test_argnums_nest_as_jacrev_nests(argnums: Any) -> None:
    def func(a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return a * b[:, :1], {"sum": (a + b).sum(1)}

    args = (doubles(4, 2), doubles(4, 2))
    J = estimated(func, argnums=argnums)(*args)
    compare(J, jacobian_blocks(func, args, argnums))
    single = torch.func.jacrev(lambda a, b: func(a[None], b[None]), argnums)(args[0][0], args[1][0])
    assert torch.utils._pytree.tree_structure(J) == torch.utils._pytree.tree_structure(single)


def test_negative_argnums_count_from_the_end() -> None:
    args = (doubles(4, 2), doubles(4, 2))
    compare(estimated(torch.mul, argnums=-1)(*args), torch.diag_embed(args[0]))


def test_the_same_tensor_twice_is_two_inputs() -> None:
    x = doubles(4, 3).requires_grad_()
    first, second = estimated(lambda a, b: a * b**2, argnums=(0, 1))(x, x)
    compare(first.detach(), torch.diag_embed(x.detach() ** 2))
    compare(second.detach(), torch.diag_embed(2 * x.detach() ** 2))


def test_an_input_that_the_function_captures_too_is_held_fixed() -> None:
    x = doubles(4, 3).requires_grad_()
    compare(estimated(lambda z: z * x)(x).detach(), torch.diag_embed(x.detach()))


def test_masks_and_keywords_pass_through() -> None:
    def model(x1: Tensor, x2: Tensor, mask: Tensor, *, scale: float, offset: Tensor) -> tuple[Tensor, Tensor]:
        return (x1 * mask + x2 * scale).sin() + offset, x2.cos()

    args = (doubles(5, 3), doubles(5, 3), torch.rand(5, 3) > 0.5)
    jac = estimated(model, argnums=(0, 1))
    for scale in (2.0, 3.0):
        kwargs = {"scale": scale, "offset": doubles(3)}
        compare(jac(*args, **kwargs), jacobian_blocks(model, args, (0, 1), kwargs=kwargs))


def test_batch_on_another_axis() -> None:
    x, w = doubles(3, 5), doubles(5, 3)

    def func(x: Tensor, w: Tensor) -> Tensor:
        return (x.T * w).sin()

    J = estimated(func, in_dims=(1, 0))(x, w)
    compare(J, torch.diag_embed((x.T * w).cos() * w))
    compare(estimated(func, in_dims=(-1, 0))(x, w), J)


def test_shared_argument() -> None:
    x, w = doubles(5, 3), doubles(3, 2)
    J = estimated(lambda x, w: x @ w, argnums=1)(x, w)
    assert J.shape == (5, 2, 3, 2)
    compare(J, jacobian_blocks(lambda x, w: x @ w, (x, w), 1, shared=(1,)))


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_shared_argument_of_the_batchs_length(batch: int) -> None:
    x, w = doubles(batch, batch), doubles(batch, batch)
    J = estimated(lambda x, w: x @ w, argnums=(0, 1))(x, w)
    compare(J, jacobian_blocks(lambda x, w: x @ w, (x, w), (0, 1), shared=(1,)))


def test_function_without_a_batch() -> None:
    x, a = doubles(4), doubles(3, 4)
    jac = estimated(lambda x, a: ((a @ x).sin(), x.sum()), in_dims=None)
    outer, total = jac(x, a)
    compare(outer, torch.func.jacrev(lambda x: (a @ x).sin())(x))
    compare(total, torch.ones(4, dtype=torch.float64))
    value, _ = jac.value_and_jacobian(x, a)
    compare(value, ((a @ x).sin(), x.sum()))


def test_a_plan_keeps_no_argument_of_its_first_call() -> None:
    jac = estimated(lambda x, s, k: x * s * k["gain"])
    x = doubles(4, 3)
    for _ in range(3):
        s, gain = doubles(4, 3), doubles(4, 1)
        compare(jac(x, s, {"gain": gain}), torch.diag_embed(s * gain))


def test_module_in_eval_and_train_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = doubles(8, 3)
    model.eval()
    jac = estimated(model, randomness="different")
    compare(jac(x).detach(), jacobian_blocks(model, (x,)))
    model.train()
    batches = model[1].num_batches_tracked.clone()
    state = torch.get_rng_state()
    J = jac(x)
    assert model[1].num_batches_tracked == batches + 1
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    model(x)
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(state)
    compare(J.detach(), jacobian_blocks(model, (x,)))


def test_a_float_that_changes_with_every_call_is_no_new_signature() -> None:
    jac = estimated(lambda x, t, *, scale: (x * t).sin() * scale)
    x = doubles(4, 3)
    for t in (0.1, 0.2, 0.3):
        compare(jac(x, t, scale=1 + t), torch.diag_embed((x * t).cos() * t * (1 + t)))
    assert "1 plan in use" in repr(jac)
    assert jac(x, 2, scale=1.0).shape == (4, 3, 3)
    assert "2 plans" in repr(jac)


def test_parameters_that_cannot_be_listed_still_get_gradients() -> None:
    hidden = {"box": itertools.cycle([torch.randn(3, dtype=torch.float64, requires_grad=True)])}

    def func(x: Tensor) -> Tensor:
        return x**2 * next(hidden["box"])

    assert estimated(func)(doubles(4, 3)).requires_grad


@pytest.mark.parametrize("coupled", [False, True])
def test_an_output_may_have_another_dtype_than_the_input(coupled: bool) -> None:
    def func(x: Tensor) -> Tensor:
        return (x + (x.mean(0) if coupled else 0)).float().sin()

    x = doubles(4, 3)
    J = estimated(func)(x)
    assert J.dtype == torch.float64
    compare(J, jacobian_blocks(func, (x,)), rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_mask_by_keyword_stretches_a_small_slice(batch: int) -> None:
    def func(x: Tensor, *, mask: Tensor) -> Tensor:
        return x.sin() * mask.unsqueeze(1)

    x, mask = torch.randn(batch, 3).double(), torch.arange(batch) % 2 == 0
    J = AutoJacobian(func, store=":memory:", on_miss="estimate")(x, mask=mask)
    compare(J, jacobian_blocks(func, (x,), kwargs={"mask": mask}))


def test_a_single_element_may_have_any_stride() -> None:
    x = torch.randn(1, 2).double()[:, ::2]
    compare(AutoJacobian(torch.sin, store=":memory:", on_miss="estimate")(x), jacobian_blocks(torch.sin, (x,)))
