"""Parts within a sample that have every derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parts.base import apart, images, matrix, plain
from parts.functions import PairProduct, SoftClip


def fresh_zeros(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = x.sum(1)
    out[:, 1:] = x[:, 1:] * x[:, :-1].tanh()
    return out


def scattered(x: Tensor) -> Tensor:
    index = (torch.arange(x.shape[1], device=x.device) * 2) % x.shape[1]
    return torch.zeros_like(x).index_add(1, index, x.sin())


def roundabout(x: Tensor) -> Tensor:
    """A loop in which each column needs the one before."""
    columns = [x[:, 0]]
    for k in range(1, x.shape[1]):
        columns.append((columns[-1] + x[:, k]).tanh())
    return torch.stack(columns, 1)


def own_attention(x: Tensor) -> Tensor:
    tokens = x.unsqueeze(2)
    return ((tokens @ tokens.mT).softmax(2) @ tokens.sin()).flatten(1)


def fused_attention(x: Tensor) -> Tensor:
    heads = images(x).unsqueeze(1)
    return F.scaled_dot_product_attention(heads, heads.sin(), 0.5 * heads).flatten(1)


plain(
    {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "sin": torch.sin,
        "cos": torch.cos,
        "softplus": F.softplus,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "mish": F.mish,
        "erf": torch.erf,
        "atan": torch.atan,
        "asinh": torch.asinh,
        "logsigmoid": F.logsigmoid,
        "gauss": lambda x: (-x * x).exp(),
        "sinc": lambda x: torch.sinc(x.sigmoid()),
        "tanhshrink": F.tanhshrink,
        "log1p": lambda x: (x * x).log1p(),
        "rsqrt": lambda x: (1 + x * x).rsqrt(),
        "lgamma": lambda x: torch.lgamma(1.5 + x.sigmoid()),
        "digamma": lambda x: torch.digamma(1.5 + x.sigmoid()),
        "logit": lambda x: torch.logit(0.1 + 0.8 * x.sigmoid()),
        "erfinv": lambda x: torch.erfinv(0.8 * x.tanh()),
        "expm1": lambda x: torch.expm1(x.tanh()),
        "sqrt": lambda x: (1 + x * x).sqrt(),
        "pow": lambda x: (2 + x.tanh()) ** 1.7,
        "power_of": lambda x: 1.3 ** x.tanh(),
        "asin": lambda x: torch.asin(0.8 * x.tanh()),
        "i0e": torch.special.i0e,
        "ndtr": torch.special.ndtr,
        "xlogy": lambda x: torch.xlogy(x.sigmoid(), 1 + x * x),
        "logaddexp": lambda x: torch.logaddexp(x, x.flip(1)),
        "atan2": lambda x: torch.atan2(x, 2 + x.flip(1).tanh()),
        "hypot": lambda x: torch.hypot(x, 1 + x.flip(1) ** 2),
        "lerp": lambda x: torch.lerp(x, x.sin(), x.sigmoid()),
        "divide": lambda x: x / (1.5 + x.flip(1).tanh()),
        "addcmul": lambda x: torch.addcmul(x, x.sin(), x.flip(1), value=0.5),
        "addcdiv": lambda x: torch.addcdiv(x, x.sin(), 2 + x.flip(1).tanh(), value=0.5),
        "soft_clip": SoftClip.apply,
        "same": lambda x: x,
        "clone": torch.clone,
        "half": lambda x: 0.5 * x,
        "shift": lambda x: x + 0.3,
        "complex": lambda x: (torch.complex(x, x.sin()) * torch.tensor(0.6 + 0.8j)).real,
        "complex_abs": lambda x: torch.complex(x.sin(), 1.5 + x.tanh()).abs(),
        "angle": lambda x: torch.complex(2 + x.sin(), x.tanh()).angle(),
    }
)
plain(
    {
        "softmax": lambda x: x.softmax(1) * x,
        "log_softmax": lambda x: x.log_softmax(1),
        "cumsum": lambda x: x.cumsum(1),
        "cumprod": lambda x: (1.2 + 0.5 * x.tanh()).cumprod(1),
        "logcumsumexp": lambda x: x.logcumsumexp(1),
        "flip": lambda x: x.flip(1),
        "roll": lambda x: x.roll(1, 1),
        "reverse_slice": lambda x: x[:, 1:] * x[:, :-1].sin(),
        "strides": lambda x: x[:, ::2],
        "drop_last": lambda x: x[:, :-1],
        "outer": lambda x: (x[:, :2, None] * x[:, None, -2:].sin()).flatten(1),
        "gather": lambda x: x.gather(1, torch.tensor([[1, 0, 1]]).expand(len(x), 3)),
        "index": lambda x: x[:, [1, 0, 1]],
        "index_select": lambda x: x.index_select(1, torch.tensor([1, 1, 0])),
        "take_along": lambda x: torch.take_along_dim(x, torch.tensor([[0, 1, 0]]), 1),
        "scattered": scattered,
        "fresh_zeros": fresh_zeros,
        "scatter_add": lambda x: torch.zeros(len(x), 2, dtype=x.dtype).scatter_add(
            1, (torch.arange(x.shape[1]) % 2).expand_as(x), x.sin()
        ),
        "scatter_mean": lambda x: torch.ones(len(x), 2, dtype=x.dtype).scatter_reduce(
            1, (torch.arange(x.shape[1]) % 2).expand_as(x), x.sin(), "mean"
        ),
        "scatter_prod": lambda x: torch.ones(len(x), 2, dtype=x.dtype).scatter_reduce(
            1, (torch.arange(x.shape[1]) % 2).expand_as(x), 1.5 + 0.5 * x.tanh(), "prod"
        ),
        "index_put": lambda x: (
            torch.zeros_like(x).index_put((torch.arange(len(x)), torch.tensor(1)), x[:, 0].sin(), True) + x
        ),
        "sum": lambda x: x.sum(1, keepdim=True),
        "mean": lambda x: x - x.mean(1, keepdim=True) / 2,
        "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
        "prod": lambda x: (1.2 + 0.5 * x.sin()).prod(1, keepdim=True),
        "prod_raw": lambda x: x.tanh().prod(1, keepdim=True),
        "norm": lambda x: (x - 0.31).norm(dim=1, keepdim=True),
        "vector_norm": lambda x: torch.linalg.vector_norm(x - 0.31, 3, dim=1, keepdim=True),
        "std": lambda x: apart(x).std(1, keepdim=True),
        "var": lambda x: x.var(1, keepdim=True, correction=0) + x,
        "normalize": lambda x: F.normalize(x - 0.31, dim=1),
        "cosine": lambda x: F.cosine_similarity(x + 1.1, x.flip(1).sin() + 2, dim=1).unsqueeze(1),
        "einsum": lambda x: torch.einsum("bi,bj->bij", x, x.sin())[:, 0],
        "bmm": lambda x: torch.bmm(images(x), images(x).mT.sin()).flatten(1),
        "transpose": lambda x: images(x).mT.flatten(1),
        "expand": lambda x: x[:, :1].expand(-1, 3) * x[:, -1:],
        "tile": lambda x: torch.cat([x, x.sin()], 1),
        "stack": lambda x: torch.stack([x, x.cos()], 2).flatten(1),
        "pad": lambda x: F.pad(x, (1, 0)),
        "reflect": lambda x: F.pad(x.unsqueeze(1), (1, 1), "reflect").squeeze(1),
        "circular": lambda x: F.pad(x.unsqueeze(1), (1, 1), "circular").squeeze(1),
        "replicate_pad": lambda x: F.pad(x.unsqueeze(1), (2, 0), "replicate").squeeze(1),
        "unfold": lambda x: x.unfold(1, 2, 1).prod(2),
        "diff": lambda x: x.diff(dim=1),
        "cumulative_trapezoid": lambda x: torch.cumulative_trapezoid(x, dim=1),
        "avg_pool": lambda x: F.avg_pool1d(x.unsqueeze(1), 2, 1).squeeze(1),
        "adaptive_pool": lambda x: F.adaptive_avg_pool1d(x.unsqueeze(1), 2).squeeze(1),
        "interpolate": lambda x: F.interpolate(x.unsqueeze(1), 3, mode="linear").squeeze(1),
        "nearest": lambda x: F.interpolate(x.unsqueeze(1), 3).squeeze(1),
        "bicubic": lambda x: F.interpolate(images(x).unsqueeze(1), (2, 3), mode="bicubic").flatten(1),
        "fft": lambda x: torch.fft.fft(x, dim=1).imag + x,
        "rfft": lambda x: torch.fft.rfft(x, dim=1).real,
        "fft_filter": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * 0.5, n=x.shape[1], dim=1),
        "glu": lambda x: F.glu(x[:, : x.shape[1] // 2 * 2], 1),
        "tril": lambda x: torch.tril(images(x)).flatten(1),
        "diag_embed": lambda x: torch.diag_embed(x[:, :2]).flatten(1),
        "trace": lambda x: matrix(x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True),
        "det": lambda x: torch.linalg.det(matrix(x)).unsqueeze(1),
        "slogdet": lambda x: torch.linalg.slogdet(matrix(x)).logabsdet.unsqueeze(1),
        "inv": lambda x: torch.linalg.inv(matrix(x)).flatten(1),
        "solve": lambda x: torch.linalg.solve(matrix(x), x[:, :2].unsqueeze(2)).flatten(1),
        "solve_rows": lambda x: torch.linalg.solve(matrix(x), x[:, :2, None].sin(), left=True).squeeze(2),
        "triangular": lambda x: torch.linalg.solve_triangular(
            matrix(x).triu(), x[:, :2].unsqueeze(2), upper=True
        ).flatten(1),
        "cholesky": lambda x: torch.linalg.cholesky(matrix(x) @ matrix(x).mT).flatten(1),
        "pinv": lambda x: torch.linalg.pinv(matrix(x)).flatten(1),
        "matrix_exp": lambda x: torch.linalg.matrix_exp(0.3 * matrix(x)).flatten(1),
        "eigvalsh": lambda x: torch.linalg.eigvalsh(matrix(x) @ matrix(x).mT),
        "svdvals": lambda x: torch.linalg.svdvals(matrix(x)),
        "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(matrix(x)), x[:, :2].unsqueeze(2)).flatten(
            1
        ),
        "qr": lambda x: torch.linalg.qr(matrix(x)).R.flatten(1),
        "matrix_power": lambda x: torch.linalg.matrix_power(matrix(x) / 2, 3).flatten(1),
        "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, :3].sin() + 1),
        "kron": lambda x: torch.stack([torch.kron(row[:2], row[-2:].sin()) for row in x]),
        "roundabout": roundabout,
        "own_attention": own_attention,
        "fused_attention": fused_attention,
        "pair_function": lambda x: PairProduct.apply(x.sin()).sin(),
        "as_strided": lambda x: x.contiguous().as_strided((len(x), 2), (x.shape[1], 1)) * 1.5,
        "view_as_complex": lambda x: torch.view_as_real(
            torch.view_as_complex(x[:, :2].contiguous()).exp() * 0.2
        ).flatten(1),
        "movedim": lambda x: images(x).movedim(1, 2).reshape(len(x), -1),
        "split": lambda x: torch.cat([p.sin() for p in x.split(1, 1)][::-1], 1),
        "chunked": lambda x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0] * 2], 1),
        "nll": lambda x: F.nll_loss(
            x.log_softmax(1), torch.ones(len(x), dtype=torch.int64), reduction="none"
        ).unsqueeze(1),
        "cross_entropy": lambda x: F.cross_entropy(
            x, torch.zeros(len(x), dtype=torch.int64), reduction="none"
        ).unsqueeze(1),
        "kl": lambda x: F.kl_div(x.log_softmax(1), x.flip(1).softmax(1), reduction="none"),
        "bce": lambda x: F.binary_cross_entropy_with_logits(x, x.flip(1).sigmoid(), reduction="none"),
        "local_response": lambda x: F.local_response_norm(x.unsqueeze(2), 2, alpha=0.5).squeeze(2),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4].view(len(x), 4, 1, 1), 2).flatten(1),
        "instance_norm": lambda x: F.instance_norm(apart(x).unsqueeze(1), eps=0.5).squeeze(1),
        "gumbel_free": lambda x: F.softmin(x, dim=1) + x,
        "tensordot": lambda x: (
            torch.tensordot(x, torch.tensor([[0.5, -0.2], [0.1, 0.9]], dtype=x.dtype), dims=([1], [0]))
            if x.shape[1] == 2
            else x.sin()
        ),
        "cdist_own": lambda x: torch.cdist(apart(x).unsqueeze(2), apart(x).unsqueeze(2).detach() + 0.11).flatten(1)[
            :, :4
        ],
        "pdist_own": lambda x: torch.linalg.vector_norm(apart(x)[:, :, None] - apart(x)[:, None, :] - 0.21, dim=2),
    },
    least=4,
)
