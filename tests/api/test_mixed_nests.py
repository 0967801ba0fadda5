"""Nests that hold what has no derivative besides what has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autojac import AutoJacobian, InputError, verify
from harness import compare
from oracle import jacobian_blocks

KINDS = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]])
TABLE = torch.tensor([0.5, 2.0], dtype=torch.float64)


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def energies(graph: dict[str, Any]) -> Tensor:
    """Energies of four atoms by their kinds: (B, 4)."""
    weights = TABLE[graph["kinds"]] * graph["mask"]
    x = graph["positions"] * graph["scale"]
    return torch.stack([(x * weights).sum(1), (x.square() * weights).sum(1), x.sin().prod(1), x[:, 0]], 1)


def positions_alone(x: Tensor) -> Tensor:
    return energies({"kinds": KINDS, "mask": KINDS > -1, "scale": 2, "positions": x})


@pytest.fixture
def graph() -> dict[str, Any]:
    x = torch.randn(4, 3, dtype=torch.float64)
    return {"kinds": KINDS, "name": "water", "positions": x, "mask": KINDS > -1, "scale": 2, "nothing": None}


def test_ids_masks_and_constants_pass_through(graph: dict[str, Any]) -> None:
    jac, right = estimated(energies), jacobian_blocks(positions_alone, (graph["positions"],))
    for _ in range(2):
        J = jac(graph)
        assert {name for name, part in J.items() if part is not None} == {"positions"} and list(J) == list(graph)
        compare(J["positions"], right)
    verify(J, energies, graph)
    other = {**graph, "kinds": 1 - KINDS}
    assert (jac(other)["positions"] - right).abs().max() > 0.1


def test_products_and_parts_pass_them_by(graph: dict[str, Any]) -> None:
    jac, J = estimated(energies), jacobian_blocks(positions_alone, (graph["positions"],))
    v, u = torch.randn(4, 3, dtype=J.dtype), torch.randn(4, 4, dtype=J.dtype)
    compare(jac.jvp(graph, {**graph, "positions": v}), torch.einsum("bmn,bn->bm", J, v))
    compare(
        jac.jvp(graph, {**dict.fromkeys(graph), "positions": torch.stack([v, v])})[1], torch.einsum("bmn,bn->bm", J, v)
    )
    pulled = jac.vjp(graph, u)
    assert pulled["kinds"] is None
    compare(pulled["positions"], torch.einsum("bmn,bm->bn", J, u))
    compare(jac.gram(graph), J.mT @ J)
    step = jac.solve(graph, u, damping=0.1)
    identity = torch.eye(3, dtype=J.dtype)
    compare(step["positions"], -torch.linalg.solve(J.mT @ J + 0.1 * identity, (J.mT @ u[..., None]))[..., 0])
    compare(torch.cat([part["positions"] for _, part in jac.chunks(graph, bytes=100)]), J)
    coupled = estimated(lambda graph: energies(graph) + graph["positions"].mean())
    compare(torch.cat([part["positions"] for _, part in coupled.chunks(graph, bytes=100)]), coupled(graph)["positions"])
    compare(jac.linear_operator(graph) @ v, torch.einsum("bmn,bn->bm", J, v))


def test_several_arguments_hold_them_too(graph: dict[str, Any]) -> None:
    def func(pair: tuple[Tensor, str, Tensor], graph: dict[str, Any]) -> Tensor:
        return energies(graph) * pair[0] + pair[2][:, None]

    s, ids = torch.randn(4, 1, dtype=torch.float64), torch.arange(4)
    J = estimated(func, argnums=(1, 0))((s, "by sample", ids), graph)
    x = graph["positions"]
    right = jacobian_blocks(lambda x, s: positions_alone(x) * s + ids[:, None], (x, s), (0, 1))
    compare([J[0]["positions"], J[1][0]], right)
    assert J[1][1:] == (None, None) and J[0]["mask"] is None


def test_nests_without_a_derivative_are_refused(graph: dict[str, Any]) -> None:
    for nest in ({"name": "water"}, {}, {"kinds": KINDS, "name": "water"}, {"kinds": KINDS}):
        with pytest.raises(InputError, match=r"holds|no derivative"):
            estimated(lambda nest: graph["positions"])(nest)
