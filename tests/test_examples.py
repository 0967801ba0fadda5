"""Every example runs at a small size and shows what its docstring says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from autojac import Pattern

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example_explains_itself_and_is_run_here(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example(path.stem)
    assert module.__doc__ and "What it shows:" in module.__doc__
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert "--store" in capsys.readouterr().out
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")


def test_pinn_learns_and_its_second_derivatives_are_autograds() -> None:
    found = example("pinn_burgers").main(["--steps=80", "--points=64", "--width=12", "--budget=0.5"])
    assert found["losses"][-1] < 0.6 * found["losses"][0]
    assert found["error"] < 0.8 * found["error_before"]
    points = torch.rand(64, 2)
    values = found["derivatives"](points)
    points.requires_grad_()
    u = found["model"](points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (curvature,) = torch.autograd.grad(first[:, 0].sum(), points)
    for value, expected in zip(values, (u, first[:, 1:], first[:, :1], curvature[:, :1]), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("viscosity", [0.05, 0.01 / math.pi])
def test_cole_hopf_solves_burgers(viscosity: float) -> None:
    cole_hopf = example("pinn_burgers").cole_hopf
    points = torch.rand(200, 2, dtype=torch.float64) * torch.tensor([1.8, 0.25]) + torch.tensor([-0.9, 0.01])
    points.requires_grad_()

    def derivative(y: Tensor) -> Tensor:
        return torch.autograd.grad(y.sum(), points, create_graph=True)[0]

    u = cole_hopf(points, viscosity)
    u_x, u_t = derivative(u).unbind(1)
    residual = u_t + u * u_x - viscosity * derivative(u_x)[:, 0]
    assert residual.abs().max() < 1e-6 * u_t.abs().max()
    start = torch.tensor([[0.3, 1e-9]], dtype=torch.float64)
    assert cole_hopf(start, viscosity).item() == pytest.approx(-math.sin(0.3 * math.pi), abs=1e-6)


def test_inverse_jacobian_is_learned_and_broken_samples_are_named() -> None:
    found = example("inverse_jacobian").main(
        ["--steps=40", "--batch=32", "--samples=64", "--size=2", "--width=12", "--budget=0.5"]
    )
    assert found["left_out"] == found["broken"] and len(found["broken"]) == 2
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["error"] < found["error_before"]
    assert all(parameter.isfinite().all() for parameter in found["net"].parameters())
    x = torch.rand(32, 2)
    jacobian = found["jac"](x)
    x.requires_grad_()
    rows = [torch.autograd.grad(total, x, retain_graph=True)[0] for total in found["net"].block1(x).sum(0)]
    torch.testing.assert_close(jacobian, torch.stack(rows, dim=1))


def test_attention_gives_exact_blocks_and_trains() -> None:
    found = example("attention_coordinates").main(
        ["--samples=24", "--batch=8", "--steps=15", "--width=8", "--budget=0.5"]
    )
    assert "structure: dense" in found["explanation"]
    assert found["block_error"] < 1e-5
    assert found["sum_error"] > 1e-3
    assert 0 < found["peak_bytes"] <= 16 * 2**20
    assert found["losses"][-1] < 0.8 * found["losses"][0]


@pytest.mark.nightly  # four processes
def test_plan_is_reused_without_a_trial() -> None:
    found = example("plan_reuse").main(["--batch=32", "--epochs=5", "--budget=0.5"])
    assert found["source"] == "store"
    assert found["trials"] == 0
    assert found["plan"] == found["tuned"]["expression"]
    assert found["tuned"]["trials"]
    assert found["last_batch_source"] == "neighbour"
    assert "autojac tune" in found["refused"]
    assert found["losses"][-1] < found["losses"][0]


def test_implicit_steps_agree_with_dense_ones_and_are_of_second_order(tmp_path: Path) -> None:
    module = example("stiff_brusselator")
    arguments = ["--size=8", "--steps=4", "--until=0.1", "--budget=0.5", f"--picture={tmp_path / 'pattern'}"]
    found = module.main(arguments)
    assert found["pattern"].count == 12 * 64
    assert found["difference"] < 1e-9
    assert "colors: passes for" in found["explanation"]
    rate = module.Brusselator(8)
    jacrev = torch.func.jacrev(rate)
    ends = [module.integrate(rate, jacrev, module.factor_dense, 0.1, steps)[0] for steps in (40, 80, 160, 640)]
    errors = [float((end - ends[-1]).norm()) for end in ends[:3]]
    assert 3 < errors[0] / errors[1] < 5.5
    assert 3 < errors[1] / errors[2] < 5.5


def test_points_get_exact_blocks_and_their_graph_is_kept(tmp_path: Path) -> None:
    found = example("million_points").main(
        ["--points=400", "--neighbours=4", f"--store={tmp_path / 'plans.db'}", f"--picture={tmp_path / 'points.html'}"]
    )
    assert found["graph"].count == 5 * 400
    assert found["block_error"] < 1e-5
    assert found["sum_error"] > 1e-2
    assert found["source"] == "store"
    assert "index" in found["explanation"]
    assert found["blocks"].shape == (400, 3, 3)


@pytest.mark.parametrize("name", ["stiff_brusselator", "million_points"])
def test_pictures_are_left_out_where_plotly_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    target = tmp_path / "picture.html"
    assert "autojac[report]" in example(name).draw(Pattern.diagonal(3), str(target))
    assert not target.exists()


def test_camera_poses_are_found_as_by_hand() -> None:
    found = example("camera_pose").main(["--cameras=24", "--landmarks=20", "--budget=0.5"])
    ours, theirs = found["autojac"], found["vmap(jacrev) and lstsq"]
    assert (ours["pose"] - found["truth"]).abs().max() < 1e-2 < (found["start"] - found["truth"]).abs().max()
    torch.testing.assert_close(ours["pose"], theirs["pose"], rtol=1e-3, atol=1e-3)
    assert abs(ours["iterations"] - theirs["iterations"]) <= 2 < ours["iterations"]
