"""Models whose samples are independent, and functions whose samples meet: what a proof must and must not hold for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Build = Callable[[], tuple[Any, Tensor]]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attention(nn.Module):
    """Inside a sample: (B, T, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[:, 0], torch.zeros(len(x), 5))
        return self.cell(x[:, 1], h)


class LastState(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][:, -1]

    def recurrent_first(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Across(nn.Module):
    """Attention that takes the samples for a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table((x.abs().sum(-1, keepdim=True) * 0).long()).squeeze(1)


def peak(x: Tensor) -> Tensor:
    return torch.zeros(1).copy_(x.detach().amax())


def mlp(activation: nn.Module) -> Build:
    return lambda: (nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3)), torch.randn(5, 4))


def of(func: Any, *shape: int) -> Build:
    return lambda: (func() if isinstance(func, type) else func, torch.randn(*shape))


def einsum(x: Tensor) -> Tensor:
    return torch.einsum("bi,bj,bk->bijk", x, x.sin(), x.exp()).flatten(1)


def image(*layers: nn.Module) -> Build:
    return lambda: (nn.Sequential(*layers).eval(), torch.randn(5, 2, 8, 8))


def signal(*layers: nn.Module) -> Build:
    return lambda: (nn.Sequential(*layers).eval(), torch.randn(5, 2, 8))


def quietly(func: Any, *args: Any) -> Tensor:
    with torch.no_grad():
        return func(*args)


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = x[1]
    return y


aten = torch.ops.aten
put = aten.index_put.default

ACTIVATIONS = (
    *("ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "ELU", "SELU"),
    *("Softplus", "Mish", "LeakyReLU", "Hardswish", "PReLU", "LogSigmoid"),
)

INDEPENDENT: dict[str, Build] = {
    "axes from a list": of(lambda x: x.view(5, 2, 2).cos().sum(torch.arange(1, 3).tolist()), 5, 4),
    **{f"MLP {name}": mlp(getattr(nn, name)()) for name in ACTIVATIONS},
    "linear": lambda: (nn.Linear(4, 3), torch.randn(5, 4)),
    "in-place ReLU": mlp(nn.ReLU(inplace=True)),
    "LayerNorm": lambda: (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), torch.randn(5, 4)),
    "RMSNorm": lambda: (nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8)), torch.randn(5, 4)),
    "GroupNorm": signal(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)),
    "InstanceNorm": image(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4)),
    "eval BatchNorm": lambda: (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval(), torch.randn(5, 4)),
    "eval BatchNorm2d": image(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
    "Conv1d": signal(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 1, 3)),
    "Conv2d": image(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten()),
    "Conv3d": lambda: (nn.Conv3d(1, 2, 2), torch.randn(5, 1, 3, 3, 3)),
    "transposed convolution": signal(nn.ConvTranspose1d(2, 3, 3, stride=2)),
    "grouped convolution": signal(nn.Conv1d(2, 4, 3, groups=2)),
    "max pooling": image(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten()),
    "average pooling": image(nn.AvgPool2d(2), nn.Flatten()),
    "adaptive pooling": image(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    "upsampling": image(nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3)),
    "pixel shuffle": lambda: (nn.Sequential(nn.Conv2d(2, 4, 3), nn.PixelShuffle(2)), torch.randn(5, 2, 6, 6)),
    "attention inside a sample": of(Attention, 5, 3, 4),
    "scaled dot product": lambda: (lambda x: F.scaled_dot_product_attention(x, x, x), torch.randn(5, 2, 3, 4)),
    "multi-head attention": lambda: (
        LastState(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)).recurrent,
        torch.randn(5, 3, 4),
    ),
    "RNN cell": lambda: (Cells(nn.RNNCell(3, 5)), torch.randn(4, 2, 3)),
    "GRU cell": lambda: (Cells(nn.GRUCell(3, 5)), torch.randn(4, 2, 3)),
    "RNN": lambda: (LastState(nn.RNN(3, 5, batch_first=True)), torch.randn(4, 6, 3)),
    "GRU": lambda: (LastState(nn.GRU(3, 5, batch_first=True)), torch.randn(4, 6, 3)),
    "LSTM": lambda: (LastState(nn.LSTM(3, 5, batch_first=True)), torch.randn(4, 6, 3)),
    "residual": of(Residual, 5, 4),
    "einsum": of(einsum, 5, 3),
    "bilinear": lambda: (lambda x: F.bilinear(x, x.sin(), torch.ones(2, 3, 3)), torch.randn(5, 3)),
    "embedding": of(Embedded, 5, 4),
    "gather": of(lambda x: x.gather(1, x.argsort(-1)), 5, 4),
    "sort and topk": of(lambda x: x.sort(-1).values[:, :2] * x.topk(2, -1).values, 5, 4),
    "padding": of(lambda x: F.pad(x, (1, 2)) ** 2, 5, 4),
    "FFT inside a sample": of(lambda x: torch.fft.rfft(x).abs(), 5, 6),
    "inverse FFT": of(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=6), 5, 6),
    "cumsum and flip": of(lambda x: x.cumsum(-1).flip(-1), 5, 4),
    "where and clamp": of(lambda x: torch.where(x > 0, x.clamp(max=1), 0.1 * x), 5, 4),
    "reshape and transpose": of(lambda x: x.view(5, 2, 3).transpose(1, 2).reshape(5, 6).tanh(), 5, 6),
    "stack and cat": of(lambda x: torch.cat([torch.stack([x, x.sin()], -1).flatten(1), x], -1), 5, 3),
    "determinant": of(lambda x: torch.linalg.det(x @ x.mT + torch.eye(3)), 5, 3, 3),
    "inverse": of(lambda x: torch.linalg.inv(x @ x.mT + torch.eye(3)), 5, 3, 3),
    "norm": of(lambda x: x / x.norm(dim=-1, keepdim=True), 5, 4),
    "logsumexp": of(lambda x: x.logsumexp(-1), 5, 4),
    "roll inside a sample": of(lambda x: x.roll(1, -1) - x, 5, 4),
    "distances to anchors": of(lambda x: torch.cdist(x, torch.zeros(5, 4, 3)), 5, 2, 3),
    "distances of samples to points": of(lambda x: torch.cdist(x, torch.ones(3, 4)), 5, 4),
    "distances of points to samples": of(lambda x: torch.cdist(torch.ones(30, 4), x).T, 5, 4),
    "GLU": of(F.glu, 5, 4),
    "written by index": of(lambda x: put(torch.zeros(5, 6), (None, torch.tensor([4, 1])), x[:, :2].sin()), 5, 4),
    "written by a table": of(
        lambda x: put(x, (None, torch.tensor([[0, 1], [2, 0]])), x[:, :2, None] * torch.ones(2), True),
        5,
        4,
    ),
    "one value written": of(lambda x: put(x, (None, torch.tensor([0, 2])), torch.ones(())), 5, 4),
    "written before the batch": of(
        lambda x: put(torch.zeros(3, 5, 4), (torch.tensor([2, 0]),), x).permute(1, 0, 2), 5, 4
    ),
    "added by index": of(lambda x: torch.zeros(5, 2).index_add(1, torch.tensor([0, 1, 1, 0]), x), 5, 4),
    "copied by index": of(lambda x: x.index_copy(1, torch.tensor([3, 1]), x[:, :2].exp()), 5, 4),
    "attention with a mask": of(lambda x: aten._safe_softmax(x @ x.mT - 1, -1) @ x, 5, 3, 4),
    "asks for a dtype": of(lambda x: x.sin().to(torch.promote_types(x.dtype, torch.float32)), 5, 4),
    "channel mixing": of(lambda x: (torch.ones(3, 3) @ x.mT).mT.flatten(1), 5, 4, 3),
    "batch taken apart": of(lambda x: F.layer_norm(x.view(2, 3, 4), (4,)).tanh().view(6, 4), 6, 4),
    "batch taken apart in three": of(lambda x: x.view(2, 3, 2, 4).softmax(-1).sum(-1).view(12), 12, 4),
    "batch taken apart and permuted": of(
        lambda x: (
            nn.functional.linear(x.view(2, 3, 4).permute(1, 0, 2), torch.ones(2, 4)).permute(1, 0, 2).reshape(6, 2)
        ),
        6,
        4,
    ),
}

COUPLED: dict[str, Build] = {
    "mean": of(lambda x: x - x.mean(0), 5, 4),
    "weak mean": of(lambda x: x + 1e-9 * x.mean(0), 5, 4),
    "dead mean": of(lambda x: x + (x.mean(0) - 1e3).relu(), 5, 4),
    "mean times zero": of(lambda x: x + 0 * x.mean(0), 5, 4),
    "sum": of(lambda x: x * x.sum(), 5, 4),
    "amax": of(lambda x: x - x.amax(0), 5, 4),
    "argmax": of(lambda x: x * x.argmax(0), 5, 4),
    "var": of(lambda x: x / x.std(0), 5, 4),
    "norm": of(lambda x: x / x.norm(), 5, 4),
    "softmax": of(lambda x: x.softmax(0), 5, 4),
    "log-softmax": of(lambda x: x.log_softmax(0), 5, 4),
    "softmax of the transposed": of(lambda x: x.T.softmax(-1).T, 5, 4),
    "logsumexp": of(lambda x: x - x.logsumexp(0), 5, 4),
    "BatchNorm": lambda: (nn.BatchNorm1d(4), torch.randn(5, 4)),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(2), torch.randn(5, 2, 3, 3)),
    "BatchNorm without statistics": lambda: (nn.BatchNorm1d(4, track_running_stats=False).eval(), torch.randn(5, 4)),
    "LayerNorm over all": of(lambda x: F.layer_norm(x, (5, 4)), 5, 4),
    "LayerNorm of the transposed": of(lambda x: F.layer_norm(x.T, (5,)).T, 5, 4),
    "roll": of(lambda x: x + x.roll(1, 0), 5, 4),
    "roll of all": of(lambda x: x + x.roll(1), 5, 4),
    "roll in a dead branch": of(lambda x: torch.where(x > 1e6, x.roll(1, 0), x), 5, 4),
    "flip": of(lambda x: x * x.flip(0), 5, 4),
    "sort": of(lambda x: x.sort(0).values, 5, 4),
    "topk": of(lambda x: x - x.topk(2, 0).values[0], 5, 4),
    "median": of(lambda x: x - x.median(0).values, 5, 4),
    "cumsum": of(lambda x: x.cumsum(0), 5, 4),
    "cumprod": of(lambda x: x.cumprod(0), 5, 4),
    "Gram matrix": of(lambda x: x @ x.T, 5, 4),
    "square Gram matrix": of(lambda x: (x @ x.T) @ x, 4, 4),
    "attention": of(lambda x: (x @ x.T).softmax(-1) @ x, 5, 4),
    "attention through einsum": of(lambda x: torch.einsum("id,jd,jk->ik", x, x, x), 5, 4),
    "scaled dot product": of(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], 5, 4),
    "covariance": of(lambda x: x @ (x.T @ x), 5, 4),
    "bmm over samples": of(lambda x: torch.bmm(x[None], (x.T @ x)[None])[0], 5, 4),
    "convolution along the batch": of(lambda x: F.conv1d(x.T[:, None], torch.ones(1, 1, 3), padding=1)[:, 0].T, 5, 4),
    "convolution over channels": of(lambda x: F.conv1d(x[None], torch.ones(5, 5, 1))[0], 5, 4),
    "pooling of the transposed": of(lambda x: F.avg_pool1d(x.T[None], 3, 1, 1)[0].T, 5, 4),
    "group norm over samples": of(lambda x: F.group_norm(x[None], 1)[0], 5, 4),
    "first sample": of(lambda x: x * x[0], 5, 4),
    "last sample": of(lambda x: x - x[-1:], 5, 4),
    "neighbours": of(lambda x: x + torch.cat([x[1:], x[:1]]), 5, 4),
    "index": of(lambda x: x * x[torch.tensor([1, 0, 3, 2, 4])], 5, 4),
    "index_select": of(lambda x: x * x.index_select(0, torch.tensor([1, 0, 3, 2, 4])), 5, 4),
    "gather along the batch": of(lambda x: x * x.gather(0, torch.zeros(5, 4, dtype=torch.long)), 5, 4),
    "groups": of(lambda x: (x.view(3, 2, 4) * x.view(3, 2, 4).sum(1, keepdim=True)).view(6, 4), 6, 4),
    "uneven reshape": of(lambda x: x.T.reshape(5, 4), 5, 4),
    "square reshape": of(lambda x: x.T.reshape(4, 4), 4, 4),
    "transposed back wrongly": of(lambda x: x.view(2, 2, 4).transpose(0, 1).reshape(4, 4), 4, 4),
    "transposed": of(lambda x: x + x.T, 4, 4),
    "broadcast against itself": of(lambda x: (x[:, None] - x[None]).square().sum(-1), 5, 4),
    "cdist": of(lambda x: torch.cdist(x, x), 5, 4),
    "cdist from behind": of(lambda x: torch.cdist(x, x.sin()).T, 30, 4),
    "cdist along features": of(lambda x: torch.cdist(torch.ones(2, 5), x.T).expand(5, 2, 4), 5, 4),
    "FFT along the batch": of(lambda x: torch.fft.fft(x, dim=0).real, 5, 4),
    "FFT of both axes": of(lambda x: torch.fft.fft2(x).abs(), 5, 4),
    "solve across samples": of(lambda x: torch.linalg.solve(torch.eye(5) + 0.1 * torch.ones(5, 5), x), 5, 4),
    "inverse of all": of(lambda x: torch.linalg.inv(x + 5 * torch.eye(4)), 4, 4),
    "detached mean": of(lambda x: x * x.mean(0).detach(), 5, 4),
    "mean under no_grad": of(lambda x: x * quietly(x.mean, 0), 5, 4),
    "branch on data": of(lambda x: x.roll(1, 0) if x.max() > 1e6 else x, 5, 4),
    "branch through NumPy": of(lambda x: x.roll(1, 0) if x.detach().numpy().max() > 1e6 else x, 5, 4),
    "branch through a list written in place": of(lambda x: x.roll(1, 0) if peak(x).tolist()[0] > 1e6 else x, 5, 4),
    "branch through a list": of(lambda x: x.roll(1, 0) if max(x.detach()[:, 0].tolist()) > 1e6 else x, 5, 4),
    "written into a copy": of(written, 5, 4),
    "unfolded batch": of(lambda x: F.pad(x, (0, 0, 1, 1)).unfold(0, 3, 1).sum(-1), 5, 4),
    "padded and cut": of(lambda x: F.pad(x, (0, 0, 1, 0))[:-1] + x, 5, 4),
    "triangular": of(lambda x: torch.ones(5, 5).tril() @ x, 5, 4),
    "repeated": of(lambda x: x.repeat(2, 1)[1::2], 5, 4),
    "solve with a right side for all": of(
        lambda x: torch.linalg.solve(x.view(2, 2, 2) @ x.view(2, 2, 2).mT + torch.eye(2), x).sum(-1), 2, 4
    ),
    "solve with samples as columns": of(lambda x: torch.linalg.solve(torch.eye(4) + x @ x.mT, x.mT).mT, 4, 4),
    "columns as samples": of(lambda x: x.unbind(1)[0] + x.unbind(0)[1], 4, 4),
    "view of a transposed copy": of(lambda x: x.T.contiguous().view(4, 4), 4, 4),
    "as_strided": of(lambda x: x.as_strided((4, 4), (1, 4)), 4, 4),
    "flattened and rolled": of(lambda x: x.flatten().roll(1).view(4, 4), 4, 4),
    "flattened and summed up": of(lambda x: x.flatten().cumsum(0).view(4, 4), 4, 4),
    "windows over all": of(lambda x: x.flatten().unfold(0, 4, 4) + x.flatten()[1:].unfold(0, 3, 4).sum(-1), 4, 4),
    "FFT of all": of(lambda x: torch.fft.rfft(x.flatten(), n=30).abs()[:16].view(4, 4), 4, 4),
    "pairs by broadcasting": of(lambda x: (x[:, :1] - x[:, 0]).cos(), 4, 4),
    "index by a neighbour": of(lambda x: x.gather(1, x.roll(1, 0).argsort(1)), 4, 4),
    "scatter into other samples": of(
        lambda x: torch.zeros_like(x).scatter_add(0, torch.tensor([[1], [2], [3], [0]]).expand(4, 4), x), 4, 4
    ),
    "scatter by permutation": of(lambda x: torch.zeros_like(x).index_add(0, torch.tensor([1, 0, 3, 2]), x), 4, 4),
    "diagonal of pairs": of(lambda x: (x[:, None] * x[None]).diagonal(1, 0, 1)[..., :1].T.expand(4, 4) + x, 4, 4),
    "expanded and reshaped": of(lambda x: x.expand(4, 4, 4).reshape(16, 4)[::4] * x, 4, 4),
    "repeat_interleave": of(lambda x: x.repeat_interleave(2, 0)[:4], 4, 4),
    "rot90": of(lambda x: x.rot90(), 4, 4),
    "Kronecker product": of(lambda x: torch.kron(x, torch.ones(2, 1))[1:5], 4, 4),
    "values for all samples": of(lambda x: put(x, (None, torch.tensor([0, 1])), x[1, :2]), 4, 4),
    "values of other samples": of(lambda x: put(x, (None, torch.tensor([0, 1, 2, 3])), x.T), 4, 4),
    "samples written where a value says": of(lambda x: put(x, (None, x[:, 0].argsort()), x), 4, 4),
    "slices written to samples": of(lambda x: put(x, (torch.tensor([1, 0, 3, 2]),), x), 4, 4),
    "slices of samples added": of(lambda x: torch.zeros(4, 4).index_add(1, torch.tensor([1, 0, 3, 2]), x.T) + x, 4, 4),
    "attention across samples with a mask": of(lambda x: aten._safe_softmax(x @ x.mT, -1) @ x, 4, 4),
    "safe softmax across samples": of(lambda x: aten._safe_softmax(x, 0), 5, 4),
    "written by rows": of(lambda x: x.clone().index_put_((torch.tensor([0, 1]),), x[2:].detach()), 4, 4),
    "in-place transposition": of(lambda x: x.clone().t_() * 2, 4, 4),
    "in-place sum with a flip": of(lambda x: x.clone().add_(x.flip(0)), 4, 4),
    "out=": of(lambda x: x * torch.add(x.detach(), x.detach().flip(0), out=torch.empty(4, 4)), 4, 4),
    "view_as_complex across samples": of(
        lambda x: torch.view_as_complex(x.T.reshape(4, 2, 2).contiguous()).abs().T.repeat(2, 1), 4, 4
    ),
    "GRU along the batch": lambda: (LastState(nn.GRU(4, 4)).recurrent_first, torch.randn(4, 4)),
    "multi-head attention along the batch": lambda: (Across(), torch.randn(4, 4)),
    "tokens as the batch": of(lambda x: x.transpose(0, 1).softmax(1).transpose(0, 1), 4, 4, 2),
    "pooling over samples": of(lambda x: F.max_pool2d(x[None], 3, 1, 1)[0], 4, 4),
    "parts of the batch changed over": of(lambda x: x.view(2, 3, 4).transpose(0, 1).reshape(6, 4) * 2, 6, 4),
    "square batch changed over": of(lambda x: x.view(2, 2, 4).transpose(0, 1).reshape(4, 4) * x, 4, 4),
    "softmax along a part of the batch": of(lambda x: x.view(2, 3, 4).softmax(1).view(6, 4), 6, 4),
    "softmax along the other part": of(lambda x: x.view(2, 3, 4).softmax(0).view(6, 4), 6, 4),
    "attention in parts of the batch": of(lambda x: (x.view(2, 3, 4) @ x.view(2, 3, 4).mT).view(6, 3), 6, 4),
    "diagonal of the parts": of(lambda x: x + x.view(2, 2, 4).diagonal(0, 0, 1).T.repeat(2, 1), 4, 4),
    "parts taken apart in two ways": of(
        lambda x: x * x.view(3, 2, 4).sin().view(6, 4).view(2, 3, 4).flip(1).view(6, 4), 6, 4
    ),
    "one part expanded over the other": of(lambda x: (x.view(2, 3, 4) * x.view(2, 3, 4)[:, :1]).view(6, 4), 6, 4),
    "pixel shuffle of samples": of(lambda x: F.pixel_shuffle(x, 2).view(4, 4), 4, 2, 2),
}
