"""Jacobians of coordinates that attention couples across the batch: exact (B, 3, 3) blocks, never (B, 3, B, 3).

From https://discuss.pytorch.org ("How to calculate Jacobians for a batch"): a physics-informed model is called as
`out1, out2 = model(x1, x2, mask1, mask2)`, attention makes every sample depend on every other, the Jacobian of out1
with respect to x1 is wanted sample by sample, and out1 and out2 are needed afterwards.

What it shows: the probe sees the coupling, so summing over the batch is out and exact passes are streamed; `explain`
says which way and at what cost. One block is held against plain autograd, row by row, and against what the trick of
summing over the batch would have given. Then the model trains: out1 fits a displacement field whose divergence, from
the Jacobian, is to vanish, and out2 the weight of each coordinate.
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


class Model(nn.Module):
    """Coordinates x1 (B, 3) look at each other and at the sources x2 (B, 3), each where its mask (B,) allows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift1, self.lift2 = nn.Linear(3, width), nn.Linear(3, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head1, self.head2 = nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, x1: Tensor, x2: Tensor, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        h1, h2 = torch.tanh(self.lift1(x1)), torch.tanh(self.lift2(x2))
        seen, allowed = torch.cat([h1, h2]), torch.cat([mask1, mask2])
        scores = self.query(h1) @ self.key(seen).T / h1.shape[1] ** 0.5
        mixed = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=1) @ self.value(seen)
        h = torch.tanh(h1 + mixed)
        return self.head1(h), self.head2(h)


def block_by_rows(model: Model, inputs: tuple[Tensor, ...], sample: int) -> Tensor:
    """∂out1[sample]/∂x1[sample] by plain autograd, a row at a time, shape (3, 3)."""
    x1 = inputs[0].detach().clone().requires_grad_()
    out1, _ = model(x1, *inputs[1:])
    return torch.stack([torch.autograd.grad(value, x1, retain_graph=True)[0][sample] for value in out1[sample]])


def block_of_sums(model: Model, inputs: tuple[Tensor, ...], sample: int) -> Tensor:
    """The same block as if samples were independent: gradients of out1 summed over the batch, shape (3, 3)."""
    x1 = inputs[0].detach().clone().requires_grad_()
    out1, _ = model(x1, *inputs[1:])
    return torch.stack([torch.autograd.grad(total, x1, retain_graph=True)[0][sample] for total in out1.sum(0)])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Exact Jacobian blocks of coordinates that attention couples.")
    parser.add_argument("--samples", type=int, default=96, help="coordinates in the evaluation")
    parser.add_argument("--batch", type=int, default=32, help="coordinates in a training step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--memory-limit", default="16MiB", help="what a method may take for the evaluation")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds that each of the two searches may take")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Model(options.width)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mask1, mask2 = torch.rand(2, count) < 0.8
        mask1[0] = True  # a softmax over nothing is nan
        return torch.randn(count, 3), torch.randn(count, 3), mask1, mask2

    jac = AutoJacobian(
        model, memory_limit=options.memory_limit, on_miss="tune", budget_s=options.budget, store=options.store
    )
    inputs = draw(options.samples)
    with torch.no_grad():
        explanation = jac.explain(*inputs)
        (out1, _), (jacobian, _) = jac.value_and_jacobian(*inputs)
        plan = jac.plan(*inputs)
    sample = 0  # which its mask lets all others see
    rows = block_by_rows(model, inputs, sample)
    scale = rows.abs().max()
    block_error = float((jacobian[sample] - rows).abs().max() / scale)
    sum_error = float((block_of_sums(model, inputs, sample) - rows).abs().max() / scale)
    whole_bytes = (3 * options.samples) ** 2 * jacobian.element_size()
    # what jacrev holds at the least while it pulls all 3B rows at once: the gradient of the (B, 2B) scores for each
    jacrev_bytes = 3 * options.samples * 2 * options.samples**2 * jacobian.element_size()

    mebibytes = 2**20
    print(explanation)
    print(f"out1 {tuple(out1.shape)}, its J by x1 {tuple(jacobian.shape)}")
    print(f"block {sample} against autograd row by row: relative error {block_error:.1e}")
    print(f"  if out1 had been summed over the batch: {sum_error:.1e}")
    print(f"peak {(plan.memory_bytes or 0) / mebibytes:.2f} MiB, {options.memory_limit} allowed")
    print(f"  the (B, 3, B, 3) tensor: {whole_bytes / mebibytes:.2f} MiB")
    print(f"  jacrev, while it makes that: {jacrev_bytes / mebibytes:.0f} MiB at the least")

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs = draw(options.batch)
    start = time.perf_counter()
    training_plan = jac.plan(*inputs)
    tuning_s = time.perf_counter() - start
    # swirling about the third axis, which has no divergence
    x1 = inputs[0]
    field = torch.stack([-x1[:, 1], x1[:, 0], torch.zeros_like(x1[:, 2])], dim=1)
    weight = x1.square().sum(1, keepdim=True).neg().exp()
    losses: list[float] = []
    divergences: list[float] = []
    start = time.perf_counter()
    for _ in range(options.steps):
        (out1, out2), (jacobian, _) = jac.value_and_jacobian(*inputs)
        divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1)
        loss = (out1 - field).square().mean() + (out2 - weight).square().mean() + divergence.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        divergences.append(divergence.square().mean().sqrt().item())
    training_s = time.perf_counter() - start

    print(f"training plan {training_plan}, from {training_plan.source}, ready after {tuning_s:.1f} s")
    print(f"{options.steps} steps in {training_s:.1f} s, loss {losses[0]:.3g} -> {losses[-1]:.3g}")
    print(f"root mean square divergence {max(divergences):.3g} at its largest, {divergences[-1]:.3g} at the end")
    return {
        "plan": plan,
        "training_plan": training_plan,
        "explanation": explanation,
        "block_error": block_error,
        "sum_error": sum_error,
        "peak_bytes": plan.memory_bytes,
        "whole_bytes": whole_bytes,
        "jacrev_bytes": jacrev_bytes,
        "losses": losses,
        "divergences": divergences,
        "training_s": training_s,
    }


if __name__ == "__main__":
    main()
