"""Functions see the keyword arguments that their caller passed, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import autojac
from autojac.core.keywords import Keywords


@pytest.mark.parametrize("has_aux, randomness", [(True, "different"), (False, "same")])
def test_func_sees_the_callers_keywords_alone(has_aux: bool, randomness: Any) -> None:
    seen: list[dict[str, Any]] = []

    def func(x: Tensor, power: int, **keywords: Any) -> Any:
        seen.append(keywords)
        y = keywords["scale"] * x**power * torch.rand_like(x).ceil()
        return (y, power) if has_aux else y

    # a caller may use whatever names Python lets through
    options = {"scale": 2.0, "autojac aux": 1}
    x = torch.tensor([[3.0, 5.0]])
    J = autojac.AutoJacobian(func, has_aux=has_aux, randomness=randomness)(x, 2, **options)
    if has_aux:
        J, aux = J
        assert aux == 2
    torch.testing.assert_close(J, torch.diag_embed(4 * x))
    assert seen == [options] * len(seen)


def test_keywords_are_a_pytree_with_their_context() -> None:
    aux: list[Any] = []
    keywords = Keywords.of(Keywords({"a": 1}, {2: 3.0}), aux=aux, random_state={"cpu": 4})
    assert pytree.tree_leaves(keywords) == [1, 3.0]
    doubled = pytree.tree_map(lambda value: 2 * value, keywords)
    assert (doubled, doubled.constants, doubled.random_state) == ({"a": 2}, {2: 6.0}, {"cpu": 4})
    assert doubled.aux is aux
    assert Keywords({}, {0: 1.0})
    assert not Keywords({})
