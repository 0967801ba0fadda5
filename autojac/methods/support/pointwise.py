"""Derivatives of functions of one number, of any order: in closed form for the usual ones, else by nested VJPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autojac.autodiff.primitives import functional_vjp

Factors = Callable[[Tensor, Tensor, int], Tensor]
"""From x, f(x) and k the k-th derivative of f at x."""


def derivatives_of(name: str, function: Callable[[Tensor], tuple[Tensor, ...]]) -> Factors:
    """Return the derivatives of a pointwise operator.

    Args:
        name: of the aten operator.
        function: applies it.
    """
    return CLOSED[name] if name in CLOSED else _by_vjps(function)


def _by_vjps(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Factors:
    def factor(x: Tensor, y: Tensor, order: int) -> Tensor:
        derivative = function
        for _ in range(order):
            derivative = _differentiate(derivative)
        return derivative(x)[0]

    return factor


def _differentiate(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def derivative(x: Tensor) -> tuple[Tensor, ...]:
        (value,), pull = functional_vjp(function, (x,))
        pulled: tuple[Tensor, ...] = pull((torch.ones_like(value),))
        return pulled

    return derivative


def _by_polynomial(first: Sequence[float]) -> Factors:
    """Return the derivatives of a function whose first one is a polynomial p of its own value: y' = p(y)."""

    def factor(x: Tensor, y: Tensor, order: int) -> Tensor:
        polynomial = list(first)
        for _ in range(order - 1):
            slope = [power * number for power, number in enumerate(polynomial)][1:]
            product = [0.0] * (len(slope) + len(first) - 1)
            for place, number in enumerate(slope):
                for other, coefficient in enumerate(first):
                    product[place + other] += number * coefficient
            polynomial = product
        return _horner(polynomial, y)

    return factor


def _horner(polynomial: Sequence[float], y: Tensor) -> Tensor:
    total: Tensor | float = polynomial[-1]
    for number in reversed(polynomial[:-1]):
        total = total * y
        total = total + number if number else total
    assert isinstance(total, Tensor)
    return total


def _cycle(x: Tensor, y: Tensor, order: int, start: int) -> Tensor:
    place = (start + order) % 4
    value = torch.sin(x) if place % 2 == 0 else torch.cos(x)
    return -value if place > 1 else value


def _tanh(x: Tensor, y: Tensor, order: int) -> Tensor:
    if order > 2:
        return _by_polynomial((1.0, 0.0, -1.0))(x, y, order)
    first = 1 - y * y
    return first if order == 1 else y * first * -2


def _sigmoid(x: Tensor, y: Tensor, order: int) -> Tensor:
    if order > 2:
        return _by_polynomial((0.0, 1.0, -1.0))(x, y, order)
    first = y - y * y
    return first if order == 1 else first * (1 - 2 * y)


CLOSED: dict[str, Factors] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "exp": lambda x, y, order: y,
    "sin": lambda x, y, order: _cycle(x, y, order, 0),
    "cos": lambda x, y, order: _cycle(x, y, order, 1),
}
"""Derivatives that take fewer operators than torch's formulas differentiated."""
