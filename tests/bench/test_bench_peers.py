"""Peers run in processes of their own: the same functions, results compared, times taken in turns."""

from __future__ import annotations

import dataclasses
import math
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autojac.bench.coupled import brusselator
from autojac.bench.peers.client import Peer, PeerError
from autojac.bench.peers.program import program_of
from autojac.bench.peers.race import (
    OVER_JAX,
    OVER_TENSORFLOW,
    RACED,
    in_turns,
    jacobian_race,
    peer_cases,
    step_race,
)
from autojac.bench.peers.worker import LIBRARIES, Ops, Worker, one_thread
from autojac.bench.results import BenchResult, Figure, Report
from autojac.bench.run import Settings
from autojac.bench.summary import summarize
from autojac.bench.workloads import WORKLOADS, mlp, of_kind, pointwise, sine

# A peer that knows the derivative of the sine, and of a linear layer; its "jacfwd" is wrong, TensorFlow is missing.
FAKE = """
import json, sys, time
import numpy as np

name = sys.argv[1]
if name == "tensorflow":
    print(json.dumps({"error": "tensorflow is not installed there"}), flush=True)
    sys.exit()
print(json.dumps({"name": name, "version": "0.1"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "time":
        answer = {"seconds": 1e-3, "cores": 1.0}
    elif "jacfwd" in request["way"]:
        answer = {"error": "ValueError: no rule"}
    elif request["program"] == [["hang"]]:
        time.sleep(60)
    else:
        x = np.load(request["arrays"])["x"]
        np.savez(request["result"], J=np.einsum("bi,ij->bij", np.cos(x), np.eye(x.shape[1], dtype=x.dtype)))
        answer = {"seconds": 0.5}
    print(json.dumps(answer), flush=True)
"""
SETTINGS = Settings(effort="estimate", rounds=3, budget_s=0.2, shortest_s=1e-5, race_s=0.2)


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder of environments whose interpreters run the fake peer, whatever script they get."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    for library in ("jax", "tensorflow"):
        python = tmp_path / library / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "{script}" "$@"\n', encoding="utf-8")
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def numpy_ops() -> Ops:
    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def gelu(x: Any) -> Any:
        return x * np.vectorize(lambda z: (1 + math.erf(z / 2**0.5)) / 2, otypes=[x.dtype])(x)

    names = ("tanh", "sin", "roll", "matmul", "stack", "reshape")
    return Ops(SimpleNamespace(**{name: getattr(np, name) for name in names}), silu, gelu)


@pytest.mark.parametrize("name", [*RACED, *(workload.name for workload in of_kind("training"))])
def test_peers_get_the_same_function(name: str) -> None:
    func, x = WORKLOADS[name].make()
    program, weights = program_of(func)
    expected = func(x[:2]).detach()
    found = numpy_ops().run(program, weights, x[:2].numpy())
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    one = numpy_ops().run(program, weights, x[0].numpy())
    torch.testing.assert_close(torch.from_numpy(one), expected[0], rtol=1e-4, atol=1e-4)


def test_the_brusselator_is_the_same() -> None:
    x = torch.rand(2 * 25, dtype=torch.float64)
    found = numpy_ops().run([["brusselator", 5]], {}, x.numpy())
    torch.testing.assert_close(torch.from_numpy(found), brusselator(5)(x))


def test_what_is_not_written_for_others_is_refused_by_name() -> None:
    for func, name in ((nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "ReLU"), (torch.cos, "cos")):
        with pytest.raises(NotImplementedError, match=f"{name} is not written"):
            program_of(func)


def test_right_peers_are_timed_and_others_say_why_not(fake: Path) -> None:
    settings = dataclasses.replace(SETTINGS, peers=str(fake))
    result = jacobian_race(settings, pointwise("sin", "tiny", 4, 3, sine), 1)
    own, reverse, forward, *missing = result.outcomes
    assert [own.state, reverse.state, forward.state] == ["right", "right", "error"]
    assert forward.reason == "ValueError: no rule"
    assert {(o.state, o.reason) for o in missing} == {("skipped", "tensorflow is not installed there")}
    assert set(reverse.samples) == {1e-3}
    assert len(own.samples) == len(reverse.samples)
    assert [figure.what for figure in result.figures] == [OVER_JAX]
    assert (result.facts["jax"], result.facts["first call of jit(vmap(jacrev)), s"]) == ("0.1", 0.5)
    assert result.facts["threads"] == 1


def test_numbers_of_peers_are_compared(fake: Path) -> None:
    settings = dataclasses.replace(SETTINGS, peers=str(fake))
    result = jacobian_race(settings, mlp("net", "dense", 4, 3, 3), 1)
    assert [outcome.state for outcome in result.outcomes[:2]] == ["right", "wrong"]
    step = step_race(settings, mlp("net", "training", 4, 3, 4, 3), 1)
    assert [outcome.state for outcome in step.outcomes] == ["right", "error", "error"]


def test_where_there_is_no_environment_the_command_that_makes_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="make bench-peers"):
        Peer(str(tmp_path / "python"), "jax", 1)


def test_a_peer_that_ends_or_does_not_answer_is_no_hang(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake.py"
    with Peer(sys.executable, "jax", 1, script) as peer:
        monkeypatch.setattr("autojac.bench.peers.client.PATIENCE_S", 0.2)
        with pytest.raises(PeerError, match="ended"):
            peer.prepare("jacrev", [["hang"]], {"x": np.zeros((1, 1))})
        with pytest.raises(PeerError, match="ended"):
            peer.time("jacrev", 1)


class Doubling:
    """A library that doubles."""

    def build(self, way: str, program: Any, weights: Any, x: Any) -> Any:
        if way == "broken":
            raise ValueError("no\nmore")
        return lambda: 2 * x

    def numbers(self, found: Any) -> dict[str, Any]:
        return {"J": found}


def test_the_worker_builds_runs_writes_and_times(tmp_path: Path) -> None:
    worker, arrays, result = Worker(Doubling()), tmp_path / "a.npz", tmp_path / "r.npz"
    np.savez(arrays, x=np.ones(2))
    request = {"do": "prepare", "way": "a", "program": [], "arrays": str(arrays), "result": str(result)}
    assert worker.answer({**request})["seconds"] >= 0
    assert np.load(result)["J"].tolist() == [2, 2]
    assert worker.answer({"do": "time", "way": "a", "calls": 3})["seconds"] > 0
    assert worker.answer({**request, "way": "broken"}) == {"error": "ValueError: ['no']"}
    assert "error" in worker.answer({"do": "time", "way": "absent", "calls": 3})
    assert set(LIBRARIES) == {"jax", "asdex", "tensorflow"}
    assert one_thread()["NPROC"] == "1"


def test_turns_go_forth_and_back() -> None:
    order: list[str] = []

    def ticking(name: str) -> Any:
        def time(calls: int) -> float:
            order.append(name)
            return 1.0

        return time

    samples = in_turns({"a": ticking("a"), "b": ticking("b")}, SETTINGS)
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert "".join(order) == "ab" + "abbaab"


def test_races_are_with_one_thread_and_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    names = list(peer_cases())
    assert {name.rpartition(", ")[2] for name in names} == {"1 thread", "2 threads"}
    assert len(names) == 2 * (len(RACED) + len(of_kind("training")) + 1)


def peer_results(threads: int) -> Iterator[BenchResult]:
    facts = {"threads": threads, "kind": "dense"}
    yield BenchResult(f"a{threads}", (), (Figure(OVER_JAX, 0.5), Figure(OVER_TENSORFLOW, 0.25)), facts, "peers")
    yield BenchResult(f"b{threads}", (), (Figure(OVER_JAX, 2.0),), {**facts, "kind": "sparse"}, "peers")
    yield BenchResult(f"c{threads}", (), (Figure(OVER_JAX, 1.2),), {**facts, "kind": "training"}, "peers")


def test_the_summary_tells_one_thread_from_all() -> None:
    report = Report({}, {}, (*peer_results(1), *peer_results(2)))
    found = {figure.what: figure for figure in summarize(report)}
    jax = found["1 thread: times faster than jitted JAX, dense, geometric mean of 1"]
    assert (jax.value, jax.bound) == (2.0, 1.3)
    assert found["2 threads: times faster than jitted JAX, dense, geometric mean of 1"].bound is None
    assert found["1 thread: times faster than TensorFlow, geometric mean of 1"].value == 4
    assert found["1 thread: whole training step over a jitted JAX step, worst (c1)"].missed
