"""Tune ahead with the command line, then train in a fresh process without a single trial.

What it shows: a plan is made once for a function, its shapes and the device, and any later process finds it. First

    autojac tune examples/plan_reuse.py:make_model --shape 512x3

searches and keeps the plan. Then a process of its own trains with `on_miss="error"`: a call that no plan is known for
would raise instead of searching, so whatever runs there was decided beforehand. The last, smaller batch of each epoch
needs no plan of its own. A larger batch than was tuned for is refused by name.

The network learns y = sin(W x) from values and slopes (Sobolev training: Czarnecki et al., 2017).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autojac import AutoJacobian, PlanMissError

CACHE = Path(__file__).resolve().parents[1] / "cache" / "autojac.db"
SIZE = 3


class Model(nn.Module):
    """A smooth map of R³, (B, 3) -> (B, 3)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(SIZE, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, SIZE)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def make_model() -> nn.Module:
    """What the command line tunes and the training trains."""
    torch.manual_seed(0)
    return Model()


def tune_ahead(options: argparse.Namespace) -> dict[str, Any]:
    """Run `autojac tune` in a process of its own, and return the plan it prints."""
    command = [sys.executable, "-m", "autojac", "tune", f"{Path(__file__).resolve()}:make_model"]
    command += ["--shape", f"{options.batch}x{SIZE}", "--effort", options.effort, "--budget", f"{options.budget}s"]
    command += ["--store", options.store, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["plans"][0]


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train by a plan that is there already."""
    model = make_model()
    jac = AutoJacobian(model, on_miss="error", effort=options.effort, store=options.store)
    matrix = torch.randn(SIZE, SIZE)
    x = torch.randn(3 * options.batch + options.batch // 3, SIZE)
    y, slopes = torch.sin(x @ matrix.T), torch.cos(x @ matrix.T)[:, :, None] * matrix

    start = time.perf_counter()
    plan = jac.plan(x[: options.batch])
    ready_s = time.perf_counter() - start

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in range(options.epochs):
        total = 0.0
        for chosen in torch.randperm(len(x)).split(options.batch):
            values, jacobian = jac.value_and_jacobian(x[chosen])
            loss = (values - y[chosen]).square().mean() + (jacobian - slopes[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen) / len(x)
        losses.append(total)
    training_s = time.perf_counter() - start

    last = jac.plan(x[: len(x) % options.batch])
    try:
        jac(x.repeat(2, 1))
        refused = ""
    except PlanMissError as error:
        refused = str(error)
    return {
        "plan": str(plan),
        "source": plan.source,
        "last_batch_source": last.source,
        "trials": len(plan.trials),
        "refused": refused,
        "ready_s": ready_s,
        "training_s": training_s,
        "losses": losses,
    }


def train_in_fresh_process(options: argparse.Namespace) -> dict[str, Any]:
    """Run this file again, for the training alone, and return its figures."""
    command = [sys.executable, str(Path(__file__).resolve()), "--train-only", "--store", options.store]
    command += ["--batch", str(options.batch), "--epochs", str(options.epochs), "--effort", options.effort]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Tune ahead with the command line, train without a trial.")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--effort", default="quick", choices=["quick", "measure", "exhaustive"])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds that the search may take")
    parser.add_argument("--store", default=os.environ.get("AUTOJAC_STORE", str(CACHE)))
    parser.add_argument("--train-only", action="store_true", help="train by the stored plan, and print JSON")
    options = parser.parse_args(argv)

    if options.train_only:
        figures = train(options)
        print(json.dumps(figures))
        return figures

    tuned = tune_ahead(options)
    trained = train_in_fresh_process(options)
    losses = trained["losses"]
    print(f"tuned ahead: {tuned['expression']} of {len(tuned['trials'])} candidates in {tuned['tuning_seconds']:.1f} s")
    print(f"fresh process: {trained['plan']} from {trained['source']} after {trained['ready_s']:.2f} s, no trial")
    print(f"  {options.epochs} epochs in {trained['training_s']:.1f} s, loss {losses[0]:.3g} -> {losses[-1]:.3g}")
    print(f"  last batch of an epoch: plan from {trained['last_batch_source']}")
    print(f"  a larger batch: {trained['refused']}")
    return {"tuned": tuned, **trained}


if __name__ == "__main__":
    main()
