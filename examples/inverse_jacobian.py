"""Train through the inverse Jacobian of a network's block, for the whole batch at once.

From https://discuss.pytorch.org ("Computing batch Jacobian efficiently"): the Jacobian of the output of an
intermediate layer, `net.block1(x)`, with respect to the input, and its pseudo-inverse, inside a training loop; without
a loop over samples, and without `sys.exit` when one sample of the batch is not finite.

What it shows: `value_and_jacobian` gives the block's output, which the rest of the network goes on with, and J of shape
(B, n, n), through which a loss on `torch.linalg.pinv(J)` reaches the parameters. Here block1 learns a warp y = g(x)
from what a field looks like after the warp and from g's inverse Jacobian. Some samples of the data are broken: they
are named and left out, and the smaller batch that is left runs with the plan that is there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autojac import AutoJacobian

CACHE = Path(__file__).resolve().parents[1] / "cache" / "autojac.db"


class Displace(nn.Module):
    """Move coordinates (B, n) a little, so that the Jacobian of the untrained block is far from singular."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.move = nn.Sequential(
            nn.Linear(size, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.move(x)


class Net(nn.Module):
    """A warp of the coordinates, block1 (B, n) -> (B, n), and a field on the warped ones, block2 (B, n) -> (B, 1)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.block1 = Displace(size, width)
        self.block2 = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, 1))


class Warp:
    """The warp to learn: g(x) = x + 0.3 sin(A x), with its inverse Jacobian."""

    def __init__(self, size: int) -> None:
        self.matrix = torch.linalg.qr(torch.randn(size, size))[0] * 1.5

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x @ self.matrix.T)

    def inverse_jacobian(self, x: Tensor) -> Tensor:
        slopes = 0.3 * torch.cos(x @ self.matrix.T)
        return torch.linalg.inv(torch.eye(x.shape[1]) + slopes[:, :, None] * self.matrix)


def finite_samples(jacobian: Tensor) -> Tensor:
    """Which samples of J (B, n, n) hold neither nan nor infinity, shape (B,)."""
    return jacobian.detach().isfinite().flatten(1).all(1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Train through the inverse Jacobian of a block of a network.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--size", type=int, default=3, help="coordinates of a sample")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--broken", type=int, default=2, help="samples of the data that hold a nan")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds that the search may take")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    net, warp = Net(options.size, options.width), Warp(options.size)
    data, unseen = torch.rand(options.samples + options.batch, options.size).mul(2).sub(1).split(options.samples)
    inverse_target, field_target = warp.inverse_jacobian(data), warp(data).sin().sum(1, keepdim=True)
    data = data.clone()
    data[torch.randperm(options.samples)[: options.broken], 0] = torch.nan

    jac = AutoJacobian(net.block1, on_miss="tune", budget_s=options.budget, store=options.store)
    start = time.perf_counter()
    plan = jac.plan(unseen)
    tuning_s = time.perf_counter() - start

    def inverse_error() -> float:
        with torch.no_grad():
            wanted = warp.inverse_jacobian(unseen)
            return float((torch.linalg.pinv(jac(unseen)) - wanted).norm() / wanted.norm())

    error_before = inverse_error()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    named: set[int] = set()
    losses: list[float] = []
    start = time.perf_counter()
    order = torch.randperm(options.samples)
    for step in range(options.steps):
        chosen = order.roll(-step * options.batch)[: options.batch]
        y, jacobian = jac.value_and_jacobian(data[chosen])
        finite = finite_samples(jacobian)
        if not finite.all():
            named.update(chosen[~finite].tolist())
            # masking J would not do: zero times nan is nan in the backward pass, so these samples must not enter
            chosen = chosen[finite]
            y, jacobian = jac.value_and_jacobian(data[chosen])
        inverse = torch.linalg.pinv(jacobian)
        field_loss = (net.block2(y) - field_target[chosen]).square().mean()
        loss = field_loss + (inverse - inverse_target[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    training_s = time.perf_counter() - start
    error = inverse_error()

    print(f"plan {plan}, from {plan.source}, ready after {tuning_s:.1f} s")
    print(f"{options.steps} steps in {training_s:.1f} s, loss {losses[0]:.3g} -> {losses[-1]:.3g}")
    print(f"samples left out because their Jacobian is not finite: {sorted(named)}")
    print(f"relative error of the inverse Jacobian on unseen samples {error_before:.1%} -> {error:.1%}")
    return {
        "plan": plan,
        "tuning_s": tuning_s,
        "training_s": training_s,
        "losses": losses,
        "left_out": sorted(named),
        "broken": sorted(data.isnan().any(1).nonzero().flatten().tolist()),
        "error_before": error_before,
        "error": error,
        "net": net,
        "jac": jac,
    }


if __name__ == "__main__":
    main()
