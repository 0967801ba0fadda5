"""Parts in which samples meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parts.base import made, plain


def batch_attention(x: Tensor) -> Tensor:
    return (x @ x.T / 3).softmax(1) @ x.sin()


def fused_batch_attention(x: Tensor) -> Tensor:
    tokens = x[None, None]
    return F.scaled_dot_product_attention(tokens, tokens.sin(), 0.5 * tokens)[0, 0]


def sorted_samples(x: Tensor) -> Tensor:
    order = 0.53 * torch.arange(len(x), dtype=x.dtype, device=x.device)
    return (x + order.unsqueeze(1)).sort(dim=0, stable=True).values


def written_neighbour(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:-1] = x[1:].sin()
    return out + x


def gram(x: Tensor) -> Tensor:
    return (x @ x.T).tanh().sum(1, keepdim=True) * x.sin()


def branch_on_sum(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x.atan()


def branch_on_any(x: Tensor) -> Tensor:
    return x * x.mean(0) if bool((x > 1.0).any()) else x.tanh()


def branch_couples(x: Tensor) -> Tensor:
    return x - x.mean(0) if x[0, 0] > 0 else x.tanh()


plain(
    {
        "batch_mean": lambda x: x - 0.5 * x.mean(0),
        "batch_softmax": lambda x: x.softmax(0) * x,
        "batch_roll": lambda x: x + 0.5 * x.roll(1, 0).sin(),
        "batch_cumsum": lambda x: x.cumsum(0),
        "batch_gather": lambda x: x * x[(torch.arange(len(x)) + 1) % len(x)].tanh(),
        "batch_reversed": lambda x: x.flip(0).sin(),
        "batch_sum": lambda x: x * x.sum().tanh(),
        "batch_attention": batch_attention,
        "fused_batch_attention": fused_batch_attention,
        "batch_norm_functional": lambda x: (
            F.batch_norm(x, None, None, training=len(x) > 1, eps=0.5) if len(x) > 1 else x
        ),
        "written_neighbour": written_neighbour,
        "gram": gram,
        "batch_diff": lambda x: x + torch.cat([x[:1], x.diff(dim=0)]),
        "batch_logsumexp": lambda x: x - x.logsumexp(0),
        "batch_prod": lambda x: x * (1.1 + 0.3 * x.sin()).prod(0),
        "batch_fft": lambda x: torch.fft.fft(x, dim=0).real,
        "pairs": lambda x: (x[:, None] - x[None] + 0.4).norm(dim=2).sum(1, keepdim=True),
        "batch_conv": lambda x: (
            F.conv1d(x.T.unsqueeze(1), torch.tensor([[[0.5, 1.0, -0.3]]], dtype=x.dtype), padding=1).squeeze(1).T
        ),
        "first_sample": lambda x: x * x[:1].cos(),
        "index_add_samples": lambda x: torch.zeros_like(x).index_add(0, torch.arange(len(x)) // 2, x.sin()) + x,
        "batch_std": lambda x: x / (1 + (x - x.mean(0)).square().mean(0)).sqrt(),
        "cdist_samples": lambda x: torch.cdist(x, x.sin() + 3).sum(1, keepdim=True),
    },
    coupled=True,
)
plain(
    {
        "batch_amax": lambda x: x - x.amax(0),
        "sorted_samples": sorted_samples,
        "branch_on_sum": branch_on_sum,
        "branch_on_any": branch_on_any,
        "branch_couples": branch_couples,
        "batch_mean_detached": lambda x: x * x.mean(0).detach(),
        "by_batch_size": lambda x: x.sin() / len(x),
        "batch_argmax": lambda x: x * x[x[:, 0].argmax()].tanh(),
        "batch_cummax": lambda x: x.cummax(0).values,
        "batch_max_index": lambda x: x * x.max(0).indices,
        "batch_where": lambda x: torch.where(x > x.mean(), x.sin(), x),
        "batch_topk": lambda x: x - x.topk(1, 0).values,
        "batch_nonzero": lambda x: x * (1 + 0.1 * (x > 0).nonzero().shape[0]),
    },
    coupled=True,
    smooth=False,
)
made(
    {
        "batch_norm": lambda s, n: s.module(lambda: nn.BatchNorm1d(n, eps=0.5)),
        "batch_norm_untracked": lambda s, n: s.module(lambda: nn.BatchNorm1d(n, eps=0.5, track_running_stats=False)),
    },
    coupled=True,
    lone=False,
)
