"""Parts within a sample with kinks, branches, detached ways or rules of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parts.base import apart, plain
from parts.functions import Straight
from scenarios.awkward import Cube, ReverseGradient


def boolean_writes(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[x > 0.1] = x[x > 0.1].sin()
    return out


def masked_gather(x: Tensor) -> Tensor:
    keep = x > 0
    return torch.zeros_like(x).masked_scatter(keep, x[keep].tanh())


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].mul_(1.5)
    y[:, -1] += x[:, 0].sin()
    return y.clamp_(-3, 3).add_(x)


def rows_by_item(x: Tensor) -> Tensor:
    return torch.stack([row.sin() if row.sum().item() > 0 else 0.5 * row for row in x])


def rows_by_count(x: Tensor) -> Tensor:
    return torch.stack([row * (1 + int((row > 0).sum())) for row in x.unbind()])


def frozen_gate(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.mean(1, keepdim=True).sigmoid()
    return x * gate


plain(
    {
        "relu": F.relu,
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "selu": F.selu,
        "celu": F.celu,
        "hardtanh": F.hardtanh,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "softsign": F.softsign,
        "softshrink": F.softshrink,
        "hardshrink": F.hardshrink,
        "abs": torch.abs,
        "threshold": lambda x: F.threshold(x, 0.1, 0.4),
        "clamp": lambda x: x.clamp(-0.6, 0.8),
        "frac": torch.frac,
        "where": lambda x: torch.where(x > 0.2, x.sin(), 0.3 * x),
        "where_nan_side": lambda x: torch.where(x > 0.2, x, 0.2).log(),
        "fmod": lambda x: torch.fmod(x, 0.7),
        "remainder": lambda x: torch.remainder(x, 0.7),
        "masked_fill": lambda x: x.masked_fill(x < -0.1, 0.5),
        "sign": lambda x: x * x.sign(),
        "maximum": lambda x: torch.maximum(apart(x), x.flip(1)),
        "minimum": lambda x: torch.minimum(x, 0.2 * x.sin()),
        "nan_to_num": lambda x: x.nan_to_num(),
        "copysign": lambda x: torch.copysign(x, torch.cos(3 * x)),
        "huber": lambda x: F.huber_loss(x, 0.4 * torch.ones_like(x), reduction="none", delta=0.5),
        "smooth_l1": lambda x: F.smooth_l1_loss(x, x.flip(1).detach() + 0.3, reduction="none"),
        "boolean_writes": boolean_writes,
        "masked_gather": masked_gather,
        "in_place": in_place,
        "rows_by_item": rows_by_item,
        "rows_by_count": rows_by_count,
        "cube": lambda x: Cube.apply(x.tanh()),
        "reverse_gradient": ReverseGradient.apply,
        "straight": Straight.apply,
        "round": lambda x: x + (x.round() - x).detach(),
        "stopped": lambda x: x * x.detach().tanh(),
        "frozen_gate": frozen_gate,
        "detached_column": lambda x: x - x.mean(1, keepdim=True).detach(),
        "by_requires_grad": lambda x: x.sin() if x.requires_grad else x.cos(),
    },
    smooth=False,
)
plain(
    {
        "amax": lambda x: apart(x).amax(1, keepdim=True),
        "amin": lambda x: apart(x).amin(1, keepdim=True),
        "max": lambda x: apart(x).max(1, keepdim=True).values,
        "median": lambda x: apart(x).median(1, keepdim=True).values,
        "sort": lambda x: apart(x).sort(dim=1, stable=True).values,
        "topk": lambda x: apart(x).topk(2, 1).values,
        "argsort": lambda x: x.gather(1, apart(x).argsort(1)),
        "cummax": lambda x: apart(x).cummax(1).values,
        "kthvalue": lambda x: apart(x).kthvalue(2, 1, keepdim=True).values,
        "argmax": lambda x: x.sin().gather(1, apart(x).argmax(1, keepdim=True)),
        "max_pool": lambda x: F.max_pool1d(apart(x).unsqueeze(1), 2, 1).squeeze(1),
        "adaptive_max": lambda x: F.adaptive_max_pool1d(apart(x).unsqueeze(1), 2).squeeze(1),
        "l1_norm": lambda x: x.norm(1, dim=1, keepdim=True),
        "inf_norm": lambda x: apart(x).norm(float("inf"), dim=1, keepdim=True),
        "quantile": lambda x: apart(x).quantile(0.3, dim=1).unsqueeze(1),
        "scatter_amax": lambda x: torch.full((len(x), 2), -9.0, dtype=x.dtype).scatter_reduce(
            1, (torch.arange(x.shape[1]) % 2).expand_as(x), apart(x), "amax"
        ),
        "nanmedian": lambda x: apart(x).nanmedian(1, keepdim=True).values,
        "searchsorted": lambda x: (
            x * torch.searchsorted(torch.tensor([-0.5, 0.2, 1.0], dtype=x.dtype), x.detach().contiguous())
        ),
        "bucketed_weights": lambda x: (
            torch.tensor([0.5, 1.0, -1.5], dtype=x.dtype)[(x > 0).long() + (x > 1).long()] * x
        ),
        "one_hot": lambda x: F.one_hot(apart(x).argmax(1), x.shape[1]).to(x) * x,
        "renorm": lambda x: torch.renorm(x + 0.1, 2, 0, 1.0),
    },
    smooth=False,
    least=4,
)
