"""Nests that hold what has no derivative besides what has one."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autojac import AutoJacobian, InputError, OutputError, verify
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


@dataclasses.dataclass
class Output:
    """What models of libraries return: not registered with torch, with a scalar and None besides."""

    logits: Tensor
    loss: Tensor
    cache: None = None
    states: tuple[Any, ...] = ()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Output:
        y = self.linear(x).tanh()
        return Output(y, y.sum(), states=("first", {"hidden": y.exp()}))


@pytest.mark.parametrize("select", ["logits", lambda out: out.logits], ids=["path", "function"])
def test_a_part_of_the_output_is_picked(select: Any) -> None:
    head, x = Head(), torch.randn(4, 3, dtype=torch.float64)
    right = jacobian_blocks(lambda x: head(x).logits, (x,))
    jac = estimated(head, select=select)
    for _ in range(2):
        y, J, output = jac.value_and_jacobian(x)
        assert isinstance(output, Output) and output.states[0] == "first"
        compare([y, J, output.loss], [head(x).logits, right, head(x).loss])
        compare(jac(x)[0], right)
    compare(jac.jvp(x, x)[0], torch.einsum("bmn,bn->bm", right, x))


def test_paths_lead_through_positions_keys_and_attributes() -> None:
    head, x = Head(), torch.randn(4, 3, dtype=torch.float64)
    right = jacobian_blocks(lambda x: head(x).states[1]["hidden"], (x,))
    compare(estimated(head, select="states.1.hidden")(x)[0], right)
    compare(estimated(head, select="states.-1")(x)[0], {"hidden": right})
    with pytest.raises(OutputError, match="has no 'hiden'"):
        estimated(head, select="states.1.hiden")(x)
    with pytest.raises(OutputError, match="is None"):
        estimated(head, select="cache")(x)


def test_parts_are_picked_of_modules_in_their_parameters_too() -> None:
    head, x = Head(), torch.randn(4, 3, dtype=torch.float64)
    jac = AutoJacobian.of_parameters(head, select="logits", names="*.bias", on_miss="estimate", store=":memory:")
    J, output = jac(x)
    compare(J["linear.bias"], torch.diag_embed(1 - head(x).logits ** 2))
    assert isinstance(output, Output)
    compare(jac.vjp(x, output.logits)[0]["linear.bias"], output.logits * (1 - output.logits**2))
    assert isinstance(pickle.loads(pickle.dumps(jac))(x)[1], Output)


def test_outputs_hold_ids_none_and_strings_too() -> None:
    def func(x: Tensor, w: Tensor) -> dict[str, Any]:
        y = (x @ w).sin()
        return {"name": "y", "y": y, "best": y.argmax(1), "cache": None, "pair": (3, y.sum(1))}

    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    parts = (lambda x: func(x, w)["y"], lambda x: func(x, w)["pair"][1])
    rights = [jacobian_blocks(part, (x,)) for part in parts]
    for options in ({}, {"effort": "quick", "on_miss": "tune", "budget_s": 0.2}):
        jac = estimated(func, in_dims=(0, None), **options)
        for scale in (1, 2, -1):
            y, J = jac.value_and_jacobian(scale * x, w)
            expected = func(scale * x, w)
            assert y["name"] == "y" and y["cache"] is None and y["pair"][0] == 3
            compare([y["y"], y["best"], y["pair"][1]], [expected["y"], expected["best"], expected["pair"][1]])
            assert J["best"] is None and J["name"] is None and J["pair"][0] is None
        compare([jac(x, w)["y"], jac(x, w)["pair"][1]], rights)
    verify(jac(x, w), func, x, w, in_dims=(0, None))
    along = jac.jvp(x, w, x)
    assert along["best"] is None
    compare(
        [along["y"], along["pair"][1]], [(J @ x[..., None])[..., 0] if J.dim() == 3 else (J * x).sum(1) for J in rights]
    )
    u = {**along, "best": None}
    pulled = torch.einsum("bmn,bm->bn", rights[0], u["y"]) + rights[1] * u["pair"][1][:, None]
    compare(jac.vjp(x, w, u), pulled)
    compare(jac.norm(x, w), torch.cat([rights[0], rights[1][:, None]], 1).flatten(1).norm(dim=1))
    compare(torch.cat([part["y"] for _, part in jac.chunks(x, w, bytes=250)]), rights[0])
    for refused in (3.5, object()):
        with pytest.raises(OutputError, match="output 1 of func is"):
            estimated(lambda x, refused=refused: (x, refused))(x)
