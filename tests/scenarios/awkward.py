"""Independent functions that some transform can't take, or takes and gets wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import well_conditioned

ROWS = 5


class Cube(torch.autograd.Function):
    """Written before torch.func: no setup_context, no vmap, no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class ReverseGradient(torch.autograd.Function):
    """What the user's backward says is the derivative, not what the forward does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.head(states[:, -1])


def item_branch(x: Tensor) -> Tensor:
    return torch.stack([row.sin() if row[0].item() > 0 else 2 * row for row in x])


def item_branch_jacobian(_: Any, x: Tensor) -> Tensor:
    return torch.where(x[:, :1] > 0, x.cos(), 2.0).diag_embed()


def fill_zeros(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 2, dtype=x.dtype)
    out[:, 0] = x[:, 0] * x[:, 1]
    out[:, 1] = x[:, 2].sin()
    return out


def fill_zeros_jacobian(_: Any, x: Tensor) -> Tensor:
    a, b, c = x.unbind(-1)
    zero = torch.zeros_like(a)
    return torch.stack([torch.stack([b, a, zero], -1), torch.stack([zero, zero, c.cos()], -1)], -2)


def boolean_index(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    positive = x > 0
    out[positive] = x[positive] ** 2
    return out


def scale_copy_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] *= 2
    return y.add_(x**2)


def double_argument_in_place(x: Tensor) -> Tensor:
    return x.mul_(2).sin()


def attention_in_a_sample(x: Tensor) -> Tensor:
    # four axes: with three, torch takes the formula apart and forward mode works
    return F.scaled_dot_product_attention(x, 0.5 * x, x.sin())


def solve(draw: Draw) -> Any:
    right = draw.normal(3)
    return lambda a: torch.linalg.solve(a, right.expand(len(a), 3)), (well_conditioned(draw, 3),)


def distances(draw: Draw) -> Any:
    anchors = draw.normal(4, 3)
    return lambda x: torch.cdist(x, anchors), (draw.normal(ROWS, 2, 3),)


def sparse_product(draw: Draw) -> Any:
    matrix = (draw.normal(4, 3) * draw.mask(4, 3)).to_sparse()
    return lambda x: torch.sparse.mm(matrix, x.T).T.sin(), (draw.normal(ROWS, 3),)


def checkpointed(draw: Draw) -> Any:
    net = draw.mlp(3, 6, 2)
    return lambda x: checkpoint(net, x, use_reentrant=False), (draw.normal(ROWS, 3),)


def inner_gradient(draw: Draw) -> Any:
    net = draw.mlp(3, 6, 1)

    def func(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return slope

    return func, (draw.normal(ROWS, 3),)


def frozen_gate(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sum(-1, keepdim=True).sin()
    return x * gate


def per_sample_weights(draw: Draw) -> Any:
    weights = draw.normal(ROWS, 1)

    def func(x: Tensor) -> Tensor:
        return weights * x.sin()

    func.weights = weights  # type: ignore[attr-defined]
    return func, (draw.normal(ROWS, 3),)


def some_zero(draw: Draw) -> Tensor:
    x = draw.uniform(ROWS, 3, low=0.5, high=1.0)
    x[1, 2] = 0.0
    return x


SCENARIOS = [
    Scenario(
        "branch on .item()",
        lambda d: (item_branch, (d.normal(ROWS, 3),)),
        jacobian=item_branch_jacobian,
        traits=traits("no_vmap", "data_dependent"),
    ),
    Scenario(
        "writes into torch.zeros",
        lambda d: (fill_zeros, (d.normal(ROWS, 3),)),
        jacobian=fill_zeros_jacobian,
        traits=traits("no_vmap", "in_place"),
    ),
    Scenario(
        "boolean indexing",
        lambda d: (boolean_index, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (2 * x.relu()).diag_embed(),
        traits=traits("no_vmap", "in_place", "data_dependent"),
    ),
    Scenario(
        "in place on its own copy",
        lambda d: (scale_copy_in_place, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (2 * x + x.new_tensor([2.0, 1.0, 1.0])).diag_embed(),
        traits=traits("in_place"),
    ),
    Scenario(
        "writes into its argument",
        lambda d: (double_argument_in_place, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (2 * (2 * x).cos()).diag_embed(),
        traits=traits("in_place", "mutates_input", "no_functorch_vjp"),
    ),
    Scenario(
        "custom Function of the old style",
        lambda d: (Cube.apply, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (3 * x**2).diag_embed(),
        traits=traits("no_vmap", "no_forward_ad", "no_functorch_vjp", "custom_function"),
    ),
    Scenario(
        "gradient reversal",
        lambda d: (lambda x: ReverseGradient.apply(x.sin()), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (-x.cos()).diag_embed(),
        traits=traits("no_forward_ad", "custom_function", "kink"),
    ),
    Scenario(
        "straight-through rounding",
        lambda d: (lambda x: x.sin() + (x.round() - x).detach(), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("kink"),
    ),
    Scenario(
        "stop gradient",
        lambda d: (lambda x: x * x.detach(), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.diag_embed(),
        traits=traits("kink"),
    ),
    Scenario(
        "region under no_grad",
        lambda d: (frozen_gate, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.sum(-1, keepdim=True).sin().expand_as(x).diag_embed(),
        traits=traits("modes_differ", "wrong_vmap_jacfwd", "kink"),
    ),
    Scenario(
        "branch on requires_grad",
        lambda d: (lambda x: x.sin() if x.requires_grad else x.cos(), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("modes_differ", "wrong_vmap_jacfwd", "kink"),
    ),
    Scenario("gradient inside the function", inner_gradient, traits=traits("no_forward_ad")),
    Scenario("checkpointed", checkpointed, traits=traits("no_functorch_vjp")),
    Scenario(
        "GRU",
        lambda d: (d.module(Recurrent), (d.normal(3, 4, 2),)),
        traits=traits("no_vmap"),
    ),
    Scenario(
        "scaled_dot_product_attention in a sample",
        lambda d: (attention_in_a_sample, (d.normal(3, 2, 4, 2),)),
        traits=traits("no_forward_ad"),
    ),
    Scenario("distances by cdist", distances, traits=traits("wrong_vmap_jacrev", "no_forward_ad")),
    Scenario("linear solve", solve, traits=traits("wrong_vmap_jacfwd")),
    Scenario(
        "determinant",
        lambda d: (torch.linalg.det, (well_conditioned(d, 3),)),
        jacobian=lambda _, a: torch.linalg.det(a)[:, None, None] * a.inverse().mT,
        traits=traits("wrong_vmap_jacfwd"),
    ),
    Scenario(
        "log-determinant",
        lambda d: (lambda a: torch.linalg.slogdet(a).logabsdet, (well_conditioned(d, 3),)),
        jacobian=lambda _, a: a.inverse().mT,
        traits=traits("wrong_vmap_jacfwd"),
    ),
    Scenario(
        "sparse matrix product",
        sparse_product,
        traits=traits("no_vmap", "no_forward_ad", "no_batched_grad"),
    ),
    Scenario(
        "additive noise",
        lambda d: (lambda x: x.sin() + torch.randn_like(x), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("random", "not_sliceable"),
    ),
    Scenario(
        "dropout",
        lambda d: (d.module(lambda: nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5))), (d.normal(ROWS, 3),)),
        traits=traits("random", "not_sliceable"),
    ),
    Scenario(
        "counts its calls",
        lambda d: (d.module(Counting), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("stateful", "no_vmap", "no_functorch_vjp"),
    ),
    Scenario(
        "weights of the batch's length, captured",
        per_sample_weights,
        jacobian=lambda func, x: (func.weights * x.cos()).diag_embed(),
        traits=traits("not_sliceable", "wrong_vmap_jacrev", "wrong_vmap_jacfwd"),
    ),
    Scenario(
        "divided by the batch size",
        lambda d: (lambda x: x.sin() / len(x), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (x.cos() / len(x)).diag_embed(),
        traits=traits("not_sliceable", "wrong_vmap_jacrev", "wrong_vmap_jacfwd"),
    ),
    Scenario(
        "branch on the batch size",
        lambda d: (lambda x: x.sin() if len(x) > 1 else 3 * x, (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: x.cos().diag_embed(),
        traits=traits("not_sliceable", "wrong_vmap_jacrev", "wrong_vmap_jacfwd"),
    ),
    Scenario(
        "side input averaged over the batch",
        lambda d: (lambda x, mask: x.sin() * mask.to(x.dtype).mean(0), (d.normal(ROWS, 3), d.mask(ROWS, 3))),
        jacobian=lambda _, x, mask: (x.cos() * mask.to(x.dtype).mean(0)).diag_embed(),
        traits=traits("not_sliceable", "masked", "wrong_vmap_jacrev", "wrong_vmap_jacfwd"),
    ),
    Scenario(
        "square root at zero",
        lambda d: (torch.sqrt, (some_zero(d),)),
        jacobian=lambda _, x: (0.5 / x.sqrt()).diag_embed(),
        traits=traits("nan"),
    ),
    Scenario(
        "logarithm of negative numbers", lambda d: (lambda x: (x - 0.3).log(), (some_zero(d),)), traits=traits("nan")
    ),
    Scenario(
        "where over a square root",
        lambda d: (lambda x: torch.where(x > 0, x.sqrt(), 0.0), (some_zero(d),)),
        traits=traits("nan"),
    ),
]
