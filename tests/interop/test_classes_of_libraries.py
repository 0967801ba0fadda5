"""Tensor classes of other libraries as arguments, as outputs and inside: right numbers, or a sentence why not.

Skipped, by name, where a library isn't installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import autojac
from autojac import AutoJacobian
from harness import compare
from oracle import jacobian_blocks

pytestmark = pytest.mark.filterwarnings("ignore")


def points() -> Tensor:
    return 0.3 * torch.randn(4, 3, dtype=torch.float64)


def agrees(func: Callable[[Tensor], Tensor], x: Tensor, given: Any = None) -> None:
    """Compare with one VJP per row of func on plain tensors; `given` is what autojac gets in place of x."""
    right = jacobian_blocks(lambda x: func(x).as_subclass(Tensor), (x,), 0)
    for effort in ("estimate", "quick"):
        jac = AutoJacobian(func, store=":memory:", on_miss="tune", effort=effort, budget_s=0.3)  # type: ignore[arg-type]
        for _ in range(3):
            y, J = jac.value_and_jacobian(x if given is None else given)
            assert (type(y), type(J)) == (Tensor, Tensor)
            compare(J.detach(), right)


def test_metatensor() -> None:
    data = pytest.importorskip("monai.data")
    x, held = points(), data.MetaTensor(torch.rand(3, dtype=torch.float64), meta={"gain": 2.0})
    agrees(lambda x: x.sin() * 2, x, data.MetaTensor(x, meta={"name": "a"}))
    agrees(lambda x: data.MetaTensor(x).sin(), x)
    agrees(lambda x: x.sin() * held * held.meta["gain"], x)


def test_lietensor() -> None:
    pp = pytest.importorskip("pypose")
    x, pose = points(), pp.randn_SO3(1, dtype=torch.float64)
    trained = pp.Parameter(pose.clone())
    agrees(lambda x: pp.so3(x).Exp().matrix(), x, pp.so3(x))
    agrees(lambda x: pp.so3(x).Exp(), x)
    agrees(pose.Act, x)
    agrees(lambda x: trained @ x, x)


def test_tensordict() -> None:
    TensorDict = pytest.importorskip("tensordict").TensorDict
    x = points()
    held, given = TensorDict({"w": torch.rand(3, dtype=torch.float64)}), TensorDict({"a": x, "b": x.exp()}, [4])
    agrees(lambda x: x.sin() * held["w"], x)
    agrees(lambda x: TensorDict({"y": x.sin()}, [4])["y"], x)
    jac = AutoJacobian(lambda given: given["a"].sin() + given["b"] ** 2, store=":memory:", on_miss="tune", budget_s=0.3)
    nested = AutoJacobian(lambda x: TensorDict({"y": x.sin()}, [4]), store=":memory:", on_miss="tune", budget_s=0.3)
    for _ in range(3):
        J = jac(given)
        assert isinstance(J, TensorDict)
        compare(J["a"], torch.diag_embed(x.cos()))
        compare(J["b"], torch.diag_embed(2 * x.exp()))
        compare(nested(x)["y"], torch.diag_embed(x.cos()))


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    dist = pytest.importorskip("torch.distributed.tensor")
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor(mesh: Any) -> None:
    dist = torch.distributed.tensor
    DTensor, Replicate, Shard = dist.DTensor, dist.Replicate, dist.Shard
    x = points()
    weight = dist.distribute_tensor(torch.rand(3, dtype=torch.float64), mesh, [Replicate()])
    linear = dist.distribute_module(torch.nn.Linear(3, 3, dtype=torch.float64), mesh)
    agrees(lambda x: DTensor.from_local(x, mesh, [Shard(0)]).sin().to_local(), x)
    agrees(lambda x: x.sin() * weight.to_local(), x)
    agrees(lambda x: linear(DTensor.from_local(x, mesh, [Replicate()])).to_local(), x)
    with pytest.raises(autojac.InputError, match=r"is a DTensor, which is made of other tensors"):
        AutoJacobian(torch.sin, store=":memory:")(dist.distribute_tensor(x, mesh, [Shard(0)]))
    with pytest.raises(autojac.OutputError, match=r"is a DTensor.*to_local"):
        AutoJacobian(lambda x: DTensor.from_local(x, mesh, [Shard(0)]).sin(), store=":memory:")(x)
