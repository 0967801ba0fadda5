"""Several ranks: what communicates is evaluated equally often by all of them, so that none waits for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import datetime, json, sys, time, warnings
import torch
import torch.distributed as dist
from torch import nn
from autojac import AutoJacobian, StructureChangedWarning

kinds, rank, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
limit = datetime.timedelta(seconds=20)  # what hangs fails
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2, timeout=limit)
def run(kind):
    torch.manual_seed(0)
    calls = 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.on = False
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            nonlocal calls
            calls += 1
            # a clock shows other times to each rank
            time.sleep(0.005 * rank)
            if kind == "synchronized":
                shared = x.detach().mean(0)
                dist.all_reduce(shared)
                x = x - shared / 2
            y = self.body(x)
            if self.on:
                return y + x.mean() * x[:, :2]
            return y

    net = Net().double()
    plain = net if kind == "synchronized" else nn.parallel.DistributedDataParallel(net)
    if kind in ("eval", "changes"):
        plain.eval()
    seen = []
    jac = AutoJacobian(lambda x: plain(x), effort="quick", budget_s=0.3, store=":memory:", verify="auto")
    generator = torch.Generator().manual_seed(rank)

    def oracle(x):
        twin = [b.clone() for b in net.buffers()]
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            y = plain(x)
            rows = [[torch.autograd.grad(y[b, i], x, retain_graph=True)[0][b] for i in range(2)] for b in range(len(x))]
        for buffer, before in zip(net.buffers(), twin):
            buffer.data.copy_(before)
        return torch.stack([torch.stack(row) for row in rows])

    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (6, 6, 6, 5, 9):
            x = torch.randn(batch, 3, dtype=torch.float64, generator=generator)
            if kind == "changes" and rank == 1 and seen:
                net.on = True  # this rank alone finds out that its plan does not hold
            before, counted = calls, len(seen)
            J = jac(x)
            seen.append(calls - before)
            if kind != "synchronized":
                torch.testing.assert_close(J, oracle(x))
        if kind == "train":
            jac.tune(torch.randn(7, 3, dtype=torch.float64, generator=generator), effort="measure", budget_s=0.2)
    dist.barrier()
    # the user's own training goes on
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    plain(x).sum().backward()
    total = sum(float(p.grad.sum()) for p in net.parameters())
    told = sum(issubclass(w.category, StructureChangedWarning) for w in caught)
    print(json.dumps([seen, told, total]))


for kind in kinds.split():
    run(kind)
dist.destroy_process_group()
"""


def ranks(kinds: str, place: Path) -> list[list[Any]]:
    """What each rank prints of each kind."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, kinds, str(rank), str(place / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, ends, strict=True):
        assert process.returncode == 0, errors
    return [[json.loads(line) for line in out.splitlines() if line.startswith("[")] for out, _ in ends]


@pytest.mark.parametrize("kinds", ["train changes", pytest.param("synchronized", marks=pytest.mark.nightly)])
def test_ranks_evaluate_equally_often_and_none_waits_for_ever(kinds: str, tmp_path: Path) -> None:
    ours, others = ranks(kinds, tmp_path)
    for kind, (seen, told, total), (other_seen, other_told, other_total) in zip(
        kinds.split(), ours, others, strict=True
    ):
        assert kind == "synchronized" or total == pytest.approx(other_total)
        assert told == 0
        if kind == "changes":
            assert other_told
        else:
            assert not other_told
            assert seen == other_seen
