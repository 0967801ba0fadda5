"""Parts that hold weights: layers within a sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parts.base import Fn, Shop, images, layer, made


def embedded(table: nn.Module, x: Tensor) -> Tensor:
    return x * table((x.detach() > 0).long().sum(1) % 3)  # type: ignore[no-any-return]


def attended(attention: nn.Module, x: Tensor, need_weights: bool) -> Tensor:
    tokens = x[:, :4].unflatten(1, (2, 2))
    return attention(tokens, tokens, tokens, need_weights=need_weights)[0].flatten(1)  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(2, 1, 3, 0.0, "gelu", layer_norm_eps=0.5, batch_first=True)


def weight(shop: Shop, width: int) -> Fn:
    w = shop.tensor(width, 2)
    return lambda x: x @ w


def bias(shop: Shop, width: int) -> Fn:
    b = shop.tensor(width)
    return lambda x: x + b


def product_weights(shop: Shop, width: int) -> Fn:
    u, v = shop.tensor(width, 2), shop.tensor(width, 2)
    return lambda x: (x @ u) * (x @ v).tanh()


def einsum_weights(shop: Shop, width: int) -> Fn:
    w = shop.tensor(width, 2, width)
    return lambda x: torch.einsum("bi,ijk,bk->bj", x, w, x.tanh())


def anchors(shop: Shop, width: int) -> Fn:
    points = 3 + shop.tensor(3, width)
    return lambda x: torch.cdist(x, points)


def sparse(shop: Shop, width: int) -> Fn:
    every_other = torch.arange(3 * width).view(3, width) % 2 == 0
    matrix = (shop.draw.normal(3, width) * every_other).to_sparse()
    return lambda x: torch.sparse.mm(matrix, x.T).T


def mapped(shop: Shop, width: int) -> Fn:
    w = shop.tensor(width, 2)
    return torch.vmap(lambda row: (row @ w).sin())


made(
    {
        "weight": weight,
        "bias": bias,
        "product_weights": product_weights,
        "einsum_weights": einsum_weights,
        "cdist": anchors,
        "sparse": sparse,
        "mapped": mapped,
        "linear": layer(lambda n: nn.Linear(n, 3), lambda m, x: m(x)),
        "linear_1": layer(lambda n: nn.Linear(n, 1), lambda m, x: m(x)),
        "bilinear": layer(lambda n: nn.Bilinear(n, n, 2), lambda m, x: m(x, x.sin())),
        "embedding": layer(lambda n: nn.Embedding(3, n), embedded),
        "mlp": layer(lambda n: nn.Sequential(nn.Linear(n, 4), nn.Tanh(), nn.Linear(4, 2)), lambda m, x: m(x)),
        "conv": layer(lambda n: nn.Conv1d(1, 2, 3, padding=1), lambda m, x: m(x.unsqueeze(1)).flatten(1)),
        "conv_transposed": layer(lambda n: nn.ConvTranspose1d(1, 1, 2), lambda m, x: m(x.unsqueeze(1)).flatten(1)),
        "frozen_norm": layer(lambda n: nn.BatchNorm1d(n, eps=0.5).eval(), lambda m, x: m(x)),
        "gru_cell": layer(lambda n: nn.GRUCell(n, 2), lambda m, x: m(x)),
        "lstm_cell": layer(lambda n: nn.LSTMCell(n, 2), lambda m, x: torch.cat(m(x), 1)),
        "gru": layer(lambda n: nn.GRU(1, 2, batch_first=True), lambda m, x: m(x.unsqueeze(2))[0].flatten(1)),
        "lstm": layer(lambda n: nn.LSTM(1, 2, batch_first=True), lambda m, x: m(x.unsqueeze(2))[0][:, -1]),
        "rnn": layer(lambda n: nn.RNN(1, 2, batch_first=True), lambda m, x: m(x.unsqueeze(2))[0][:, -1]),
    }
)
made(
    {
        "layer_norm": layer(lambda n: nn.LayerNorm(n, eps=0.5), lambda m, x: m(x)),
        "rms_norm": layer(lambda n: nn.RMSNorm(n, eps=0.5), lambda m, x: m(x)),
        "group_norm": layer(lambda n: nn.GroupNorm(1, 2, eps=0.5), lambda m, x: m(images(x)).flatten(1)),
        "multihead": layer(
            lambda n: nn.MultiheadAttention(2, 1, batch_first=True), lambda m, x: attended(m, x, need_weights=False)
        ),
        "multihead_weights": layer(
            lambda n: nn.MultiheadAttention(2, 1, batch_first=True), lambda m, x: attended(m, x, need_weights=True)
        ),
        "encoder": layer(lambda n: encoder(), lambda m, x: m(x[:, :4].unflatten(1, (2, 2))).flatten(1)),
    },
    least=4,
)
made(
    {
        "prelu": layer(lambda n: nn.PReLU(), lambda m, x: m(x)),
        "dropout": layer(lambda n: nn.Dropout(0.4), lambda m, x: m(x)),
    },
    smooth=False,
)
