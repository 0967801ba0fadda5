"""Inverses and determinants: right for every structure, in every order of derivative, and never garbage."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from autojac import InputError, SingularJacobianError
from autojac.api.linalg import as_matrices, inverse, slogdet

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STRUCTURES = ("dense", "diagonal", "lower", "upper", "permuted", "block")
SHAPES = ((3, 4, 4), (4, 4), (2, 3, 4, 4), (2, 1, 1), (2, 5, 3), (2, 3, 5), (3, 1), (1, 3))
EMPTY = ((0, 3, 3), (2, 0, 0), (0, 0), (2, 3, 0), (2, 0, 3), (0, 4, 2), (0, 0, 0))


def masked(matrices: Tensor, structure: str) -> Tensor:
    n = matrices.shape[-1]
    match structure:
        case "diagonal":
            return matrices * torch.eye(n, dtype=matrices.dtype)
        case "lower":
            return matrices.tril()
        case "upper":
            return matrices.triu()
        case "permuted":
            return (matrices * torch.eye(n, dtype=matrices.dtype)).roll(1, -1)
        case "block":
            half = torch.arange(n) < n // 2
            return matrices * (half[:, None] == half)
        case _:
            return matrices


def invertible(*shape: int, structure: str = "dense", dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrices with a condition number of a few, whatever the structure."""
    noise = torch.rand(*shape, dtype=torch.float64) - 0.5
    small = noise / max(shape[-2:]) + 2 * torch.eye(*shape[-2:], dtype=torch.float64)
    return masked(small * (1 + torch.rand(*shape, dtype=torch.float64)), structure).to(dtype)


def tanh_jacobians(x: Tensor) -> Tensor:
    """Jacobians of x + tanh(x) in the form of a general matrix; diagonal by value."""
    return (2 - x.tanh() ** 2).diag_embed()


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@settings(max_examples=60)
@given(
    batch=st.lists(st.integers(1, 4), max_size=2),
    n=st.integers(1, 7),
    structure=st.sampled_from(STRUCTURES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_square_matrices_are_inverted(batch: list[int], n: int, structure: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    matrices = invertible(*batch, n, n, structure=structure, dtype=dtype)
    inverses = inverse(matrices)
    assert inverses.dtype == dtype and inverses.shape == matrices.shape
    torch.testing.assert_close(inverses, torch.linalg.inv(matrices.double()).to(dtype))
    sign, logabsdet = slogdet(matrices)
    expected = torch.linalg.slogdet(matrices.double())
    assert sign.dtype == logabsdet.dtype == dtype
    torch.testing.assert_close(sign, expected.sign.to(dtype))
    torch.testing.assert_close(logabsdet, expected.logabsdet.to(dtype), atol=8 * torch.finfo(dtype).eps, rtol=1e-5)


@settings(max_examples=40)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_rectangular_matrices_have_the_moore_penrose_inverse(
    batch: list[int], m: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    matrices = invertible(*batch, m, n, dtype=dtype)
    torch.testing.assert_close(inverse(matrices), torch.linalg.pinv(matrices.double()).to(dtype))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_is_inverted_to_nothing(shape: tuple[int, ...]) -> None:
    matrices = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    inverses = inverse(matrices)
    assert inverses.shape == matrices.mT.shape
    inverses.sum().backward()
    assert matrices.grad is not None and matrices.grad.shape == shape
    if shape[-1] == shape[-2]:
        sign, logabsdet = slogdet(matrices)
        assert torch.equal(sign, torch.ones(shape[:-2], dtype=torch.float64))
        assert torch.equal(logabsdet, torch.zeros(shape[:-2], dtype=torch.float64))
        logabsdet.sum().backward()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("value", ["inverse", "logabsdet"])
def test_gradients_are_those_of_a_general_matrix(structure: str, value: str) -> None:
    ours: dict[str, Callable[[Tensor], Tensor]] = {"inverse": inverse, "logabsdet": lambda a: slogdet(a).logabsdet}
    torch_s = {"inverse": torch.linalg.inv, "logabsdet": lambda a: torch.linalg.slogdet(a).logabsdet}
    matrices = invertible(3, 4, 4, structure=structure).requires_grad_()
    result = ours[value](matrices)
    weights = torch.randn_like(result)
    (actual,) = torch.autograd.grad(result, matrices, weights)
    (expected,) = torch.autograd.grad(torch_s[value](matrices), matrices, weights)
    if value == "inverse":
        assert expected.ne(0).all(), "entries that are zero must have a gradient too, or this test shows nothing"
    torch.testing.assert_close(actual, expected)


@pytest.mark.by_day(6)
@pytest.mark.parametrize("structure", ["dense", "diagonal", "lower"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_of_any_order_and_mode(shape: tuple[int, ...], structure: str) -> None:
    matrices = masked(invertible(*shape), structure if shape[-1] == shape[-2] else "dense").requires_grad_()
    functions: list[Callable[[Tensor], Tensor]] = [inverse]
    if shape[-1] == shape[-2]:
        functions.append(lambda a: slogdet(a).logabsdet)
    for function in functions:
        assert gradcheck(
            function, matrices, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
        )
        assert gradgradcheck(function, matrices, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3)], ids=str)
def test_third_derivatives(shape: tuple[int, int]) -> None:
    matrices = invertible(*shape).requires_grad_()

    def gradient(a: Tensor) -> Tensor:
        return torch.autograd.grad(inverse(a).pow(3).sum(), a, create_graph=True)[0]

    assert gradgradcheck(gradient, matrices)


@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3)], ids=str)
def test_transforms_nest(outer: Callable[..., Any], inner: Callable[..., Any], shape: tuple[int, int]) -> None:
    matrices = invertible(*shape)
    twice = torch.func.jacrev(torch.func.jacrev(torch.linalg.pinv))
    torch.testing.assert_close(outer(inner(inverse))(matrices), twice(matrices))
    if shape[0] == shape[1]:
        # torch's own forward mode over the tangents of slogdet gives zeros
        twice = torch.func.jacrev(torch.func.jacrev(lambda a: torch.linalg.slogdet(a).logabsdet))
        torch.testing.assert_close(outer(inner(lambda a: slogdet(a).logabsdet))(matrices), twice(matrices))


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_vmap_over_any_axis(axis: int) -> None:
    matrices = invertible(5, 3, 3)
    moved = matrices.movedim(0, axis)
    torch.testing.assert_close(torch.vmap(inverse, in_dims=axis)(moved), torch.linalg.inv(matrices))
    sign, logabsdet = torch.vmap(slogdet, in_dims=axis)(moved)
    torch.testing.assert_close(torch.stack([sign, logabsdet]), torch.stack(torch.linalg.slogdet(matrices)))


def test_per_sample_gradients() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    for ours, reference in (
        (lambda v: inverse(tanh_jacobians(v)).sum(), lambda v: torch.linalg.inv(tanh_jacobians(v)).sum()),
        (lambda v: slogdet(tanh_jacobians(v)).logabsdet, lambda v: torch.logdet(tanh_jacobians(v))),
    ):
        actual = torch.vmap(torch.func.grad(ours))(x)
        torch.testing.assert_close(actual, torch.vmap(torch.func.grad(reference))(x))
        tangents = torch.vmap(lambda v, f=ours: torch.func.jvp(f, (v,), (torch.ones_like(v),))[1])(x)
        torch.testing.assert_close(tangents, actual.sum(1))
        hessians = torch.vmap(torch.func.hessian(ours))(x)
        # torch's own forward mode over the gradient of logdet gives NaN under vmap
        torch.testing.assert_close(hessians, torch.vmap(torch.func.jacrev(torch.func.jacrev(reference)))(x))


def test_singular_samples_are_named_under_vmap_too() -> None:
    matrices = invertible(6, 3, 3)
    matrices[4] = 1
    with pytest.raises(SingularJacobianError, match="1 of 6 Jacobians is singular") as caught:
        torch.vmap(torch.func.jacrev(inverse))(matrices)
    assert caught.value.singular == (4,)


@pytest.mark.parametrize(
    ("structure", "used"),
    [("diagonal", set()), ("lower", {"linalg_solve_triangular"}), ("upper", {"linalg_solve_triangular"})],
)
def test_structured_matrices_need_no_lu(structure: str, used: set[str]) -> None:
    matrices = invertible(3, 4, 4, structure=structure).requires_grad_()
    with Operators() as ran:
        result = inverse(matrices).sum() + slogdet(matrices).logabsdet.sum()
        result.backward()
    assert {name for name in ran.names if "linalg" in name or "lu" in name.split("_")} == used


def test_general_matrices_use_lu() -> None:
    with Operators() as ran:
        inverse(invertible(3, 4, 4))
    assert "linalg_inv_ex" in ran.names


def test_zeros_must_be_shared_by_all_samples() -> None:
    matrices = torch.cat([invertible(2, 3, 3, structure="lower"), invertible(2, 3, 3, structure="upper")])
    torch.testing.assert_close(inverse(matrices), torch.linalg.inv(matrices))
    torch.testing.assert_close(slogdet(matrices).logabsdet, torch.linalg.slogdet(matrices).logabsdet)


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(2, 2), (4, 4), (4, 3), (3, 4)]),
    structure=st.sampled_from(["dense", "diagonal", "lower", "upper"]),
    dtype=st.sampled_from(DTYPES),
    flaws=st.lists(st.sampled_from(["none", "none", "zero", "repeated", "nan", "inf"]), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
)
def test_flawed_samples_are_named(
    shape: tuple[int, int], structure: str, dtype: torch.dtype, flaws: list[str], seed: int
) -> None:
    torch.manual_seed(seed)
    if shape[0] != shape[1]:
        structure = "dense"
    matrices = invertible(len(flaws), *shape, structure=structure, dtype=dtype)
    at = torch.randint(min(shape), (len(flaws),)).tolist()
    for sample, (flaw, i) in enumerate(zip(flaws, at, strict=True)):
        if flaw == "zero":
            # both, so that it costs a tall and a wide matrix its rank
            matrices[sample, i, :] = 0
            matrices[sample, :, i] = 0
        elif flaw == "repeated":
            matrices[sample] = 1
        elif flaw in ("nan", "inf"):
            matrices[sample, i, (i + 1) % shape[1]] = float(flaw)
    singular = tuple(i for i, flaw in enumerate(flaws) if flaw in ("zero", "repeated"))
    not_finite = tuple(i for i, flaw in enumerate(flaws) if flaw in ("nan", "inf"))
    if not singular and not not_finite:
        assert inverse(matrices).isfinite().all()
        return
    with pytest.raises(SingularJacobianError) as caught:
        inverse(matrices)
    assert (caught.value.singular, caught.value.not_finite) == (singular, not_finite)


@settings(max_examples=60)
@given(
    n=st.integers(2, 24),
    rank=st.integers(1, 23),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    extra=st.integers(0, 4),
    tall=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rank_lost_in_rounding_is_found(
    n: int, rank: int, dtype: torch.dtype, extra: int, tall: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, n - 1)
    matrices = (torch.randn(4, n + extra, rank).double() @ torch.randn(4, rank, n).double()).to(dtype)
    with pytest.raises(SingularJacobianError) as caught:
        inverse(matrices if tall else matrices.mT)
    assert caught.value.singular == (0, 1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 9)], ids=str)
def test_the_threshold_is_a_few_eps_of_the_dtype(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    eps = torch.finfo(dtype).eps
    k = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], k, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], k, dtype=torch.float64))

    def conditioned(reciprocal: float) -> Tensor:
        spectrum = torch.ones(k, dtype=torch.float64)
        spectrum[-1] = reciprocal
        return (u * spectrum @ v.mT).to(dtype)

    # the 1-norms of a condition number are within a factor of the size of its 2-norms
    nearly = conditioned(300 * eps)
    inverses = inverse(nearly)
    assert (inverses @ nearly @ inverses - inverses).norm() / inverses.norm() < 0.1
    with pytest.raises(SingularJacobianError):
        inverse(conditioned(0.02 * eps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_units_do_not_count(dtype: torch.dtype, structure: str) -> None:
    eps = torch.finfo(dtype).eps
    matrices = invertible(3, 4, 4, structure=structure)
    rows = torch.tensor([1, eps**2, eps**-2, 1], dtype=torch.float64)[:, None]
    columns = torch.tensor([eps**-1, 1, 1, eps], dtype=torch.float64)
    inverses = inverse((rows * matrices * columns).to(dtype)).double()
    torch.testing.assert_close(
        columns[:, None] * inverses * rows[:, 0], torch.linalg.inv(matrices), atol=100 * eps, rtol=100 * eps
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_verdict_does_not_hang_on_the_zeros_of_other_samples(structure: str) -> None:
    scaled = invertible(2, 4, 4, structure=structure) * torch.logspace(-20, 20, 4, dtype=torch.float64)[:, None]
    alone, among = inverse(scaled), inverse(torch.cat([scaled, invertible(1, 4, 4)]))[:2]
    torch.testing.assert_close(alone, among, rtol=1e-10, atol=0)


def test_an_inverse_that_overflows_is_no_inverse() -> None:
    matrices = torch.tensor([1.0, 1e-6]).half()[:, None, None] * torch.eye(2, dtype=torch.float16)
    with pytest.raises(SingularJacobianError) as caught:
        inverse(matrices)
    assert caught.value.singular == (1,)
    assert inverse(matrices.float()).isfinite().all()
    with pytest.raises(SingularJacobianError):
        inverse(torch.full((1, 1), 1e-40))


def test_half_precision_is_inverted_in_single() -> None:
    # a condition number of 2000 is beyond bfloat16's own eps, and the inverse is right to the last digit of it
    matrices = torch.tensor([[1, 1], [1, 1.0009765625]], dtype=torch.float32).half()
    torch.testing.assert_close(inverse(matrices), torch.linalg.inv(matrices.double()).half(), rtol=1e-3, atol=0)
    leaf = invertible(2, 3, 3, dtype=torch.bfloat16).requires_grad_()
    (inverse(leaf).sum() + slogdet(leaf).logabsdet.sum()).backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


def test_the_error_is_one_sentence_that_counts_and_names() -> None:
    matrices = invertible(64, 3, 3)
    matrices[[17, 40, 41]] = 1
    matrices[5, 0, 2] = torch.nan
    with pytest.raises(SingularJacobianError) as caught:
        inverse(matrices)
    found = "3 of 64 Jacobians are singular (samples 17, 40, 41) and 1 is not finite (sample 5): damp"
    assert str(caught.value).startswith(found)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.singular, copied.not_finite) == (str(caught.value), (17, 40, 41), (5,))

    matrices[20:32] = 1
    with pytest.raises(SingularJacobianError, match=r"samples 17, 20, 21, 22, 23, 24, 25, 26 and 7 more") as caught:
        inverse(matrices)
    assert len(caught.value.singular) == 15


def test_the_error_of_a_single_matrix() -> None:
    with pytest.raises(SingularJacobianError, match=r"^the Jacobian is singular: damp") as caught:
        inverse(torch.ones(2, 2))
    assert (caught.value.singular, caught.value.not_finite) == ((0,), ())
    with pytest.raises(SingularJacobianError, match=r"^the Jacobian is rank-deficient"):
        inverse(torch.ones(2, 3))
    with pytest.raises(SingularJacobianError, match=r"^the Jacobian is not finite: look") as caught:
        inverse(torch.full((2, 2), torch.inf))
    assert (caught.value.singular, caught.value.not_finite) == ((), (0,))


def test_it_is_an_arithmetic_error() -> None:
    assert issubclass(SingularJacobianError, ArithmeticError)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "lower"])
def test_singular_matrices_have_a_determinant(structure: str) -> None:
    matrices = invertible(3, 4, 4, structure=structure)
    matrices[1, :, 2] = 0
    matrices.requires_grad_()
    sign, logabsdet = slogdet(matrices)
    expected = torch.linalg.slogdet(matrices)
    torch.testing.assert_close(sign, expected.sign)
    torch.testing.assert_close(logabsdet, expected.logabsdet)
    assert sign[1] == 0 and logabsdet[1] == -torch.inf
    (gradient,) = torch.autograd.grad(logabsdet.sum(), matrices, retain_graph=True)
    assert gradient[1].isnan().all()
    torch.testing.assert_close(gradient[::2], torch.linalg.inv(matrices[::2]).mT)
    # leaving singular samples out leaves nothing of them in the gradient
    (gradient,) = torch.autograd.grad(torch.where(sign == 0, 0, logabsdet).sum(), matrices)
    assert gradient[1].eq(0).all() and gradient.isfinite().all()


def test_no_gradient_is_made_of_rounding() -> None:
    # LU of the first leaves a pivot of 1e-16 in place of its zero
    matrices = torch.arange(1.0, 10).double().reshape(1, 3, 3).repeat(2, 1, 1)
    matrices[1] = invertible(3, 3)
    matrices[0] /= 7
    matrices.requires_grad_()
    logabsdet = slogdet(matrices).logabsdet
    (gradient,) = torch.autograd.grad(logabsdet.sum(), matrices, retain_graph=True)
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()
    (gradient,) = torch.autograd.grad(logabsdet[1], matrices)
    assert gradient[0].eq(0).all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("structure", ["dense", "diagonal", "lower"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_determinants_of_what_is_not_finite_are_nan(structure: str, value: float) -> None:
    matrices = invertible(3, 4, 4, structure=structure)
    matrices[1, 2, 2] = value
    sign, logabsdet = slogdet(matrices)
    assert sign.isnan().tolist() == logabsdet.isnan().tolist() == [False, True, False]


def test_the_sign_carries_no_graph() -> None:
    sign, logabsdet = slogdet(invertible(2, 3, 3).requires_grad_())
    assert logabsdet.requires_grad and not sign.requires_grad


def test_no_graph_without_a_need() -> None:
    with torch.no_grad():
        assert not inverse(invertible(2, 3, 3).requires_grad_()).requires_grad
    with torch.inference_mode():
        assert inverse(invertible(2, 3, 3)).is_inference()


def test_autocast_rounds_nothing() -> None:
    matrices = invertible(2, 5, 3, dtype=torch.float32).requires_grad_()
    plain = inverse(matrices)
    (expected,) = torch.autograd.grad(plain.sum(), matrices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = inverse(matrices)
        (gradient,) = torch.autograd.grad(result.sum(), matrices)
    assert torch.equal(result, plain) and torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64)], ids=str
)
def test_what_is_no_real_matrix_is_refused(value: Tensor) -> None:
    with pytest.raises(InputError, match="inverse expects real floating-point matrices"):
        inverse(value)
    with pytest.raises(InputError, match="slogdet expects real floating-point matrices"):
        slogdet(value)


def test_determinants_need_square_matrices() -> None:
    with pytest.raises(InputError, match="these are 3 x 2"):
        slogdet(torch.ones(4, 3, 2))


@pytest.mark.parametrize("batch", [(), (0,), (1,), (4,)], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [((), ()), ((3,), (3,)), ((2, 2), (4,)), ((3,), (1, 2)), ((0,), (2,)), ((4,), ())], ids=str
)
@pytest.mark.parametrize("layout", ["blocks", "full"])
def test_jacobians_become_matrices_and_come_back(
    batch: tuple[int, ...], outputs: tuple[int, ...], inputs: tuple[int, ...], layout: str
) -> None:
    m, n = torch.Size(outputs).numel(), torch.Size(inputs).numel()
    again = batch if layout == "full" else ()
    jacobian = torch.randn((*batch, *outputs, *again, *inputs))
    matrices, restore = as_matrices(jacobian, outputs, inputs)
    if layout == "full" and batch:
        assert matrices.shape == (batch[0] * m, batch[0] * n)
    else:
        assert matrices.shape == (*batch, m, n)
    back = restore(matrices.mT)
    assert back.shape == (*batch, *inputs, *again, *outputs)
    lead, half = len(batch), len(batch) + len(outputs)
    if layout == "full":
        transposed = jacobian.permute((*range(half, jacobian.ndim), *range(half)))
    else:
        transposed = jacobian.permute((*range(lead), *range(half, jacobian.ndim), *range(lead, half)))
    assert torch.equal(back, transposed)


def test_a_jacobian_of_another_layout_is_refused() -> None:
    with pytest.raises(InputError, match=r'"blocks" or "full".*outputs \(3,\) and inputs \(3,\).*shape \(4, 5\)'):
        as_matrices(torch.ones(4, 5), (3,), (3,))
