"""A search leaves the process as it found it, and says nothing on the terminal."""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import subprocess
import sys
import threading
import warnings
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import autojac
from autojac import AutoJacobian, ModesDisagreeWarning
from autojac.errors import kind_of
from autojac.guards.process_state import ignore_warnings
from autojac.planning.search.memory import peak_bytes
from autojac.planning.search.propose import _quiet_optuna
from harness import compare
from oracle import jacobian_blocks

SEARCH = """
import logging, os, sys, threading, warnings
import torch
from autojac import AutoJacobian

logging.getLogger("optuna").setLevel(logging.WARNING)

def state():
    loggers = {name: one.level for name, one in logging.root.manager.loggerDict.items() if hasattr(one, "level")}
    return dict(os.environ), list(warnings.filters), loggers, threading.enumerate(), logging.root.level

class Keeps(torch.nn.Module):
    last = loss = None
    def forward(self, x):
        self.last = x.sin()
        # torch warns of it where x requires grad
        self.loss = float(x.detach().sum()) if sys.argv[1] == "quick" else float(x.sum())
        return self.last * x.cumsum(1)

before = state()
jac = AutoJacobian(Keeps(), on_miss="tune", effort=sys.argv[1], budget_s=0.5, store=":memory:")
for _ in range(3):
    jac(torch.randn(16, 3, requires_grad=sys.argv[1] == "quick"))
after = state()
assert after[0] == before[0], set(after[0].items()) ^ set(before[0].items())
assert after[1] == before[1], after[1]
assert {name: after[2][name] for name in before[2]} == before[2]
assert after[3:] == before[3:], after[3:]
"""


@pytest.mark.parametrize("effort", ["quick", pytest.param("estimate", marks=pytest.mark.nightly)])
def test_a_first_call_leaves_the_process_as_it_was_and_says_nothing(effort: str) -> None:
    script = [sys.executable, "-c", SEARCH, effort]
    environment = {**os.environ, "KINETO_LOG_LEVEL": ""}
    for name in ("KINETO_LOG_LEVEL", "TORCHINDUCTOR_CACHE_DIR"):
        environment.pop(name, None)
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)


def test_memory_that_was_there_before_is_freed_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    held: list[Tensor] = []

    def run() -> Tensor:
        held[:] = [torch.randn(2000)]
        return held[0] * 2

    run()
    for _ in range(3):
        assert peak_bytes(run, torch.device("cpu")) >= 8000
    assert capfd.readouterr().err == ""


PROFILES = """
import threading, torch
from autojac.planning.search.memory import peak_bytes

def measure(size):
    for _ in range(30):
        assert peak_bytes(lambda: torch.rand(size).sin().cos(), torch.device("cpu")) >= 8 * size

threads = [threading.Thread(target=measure, args=(1000 * k,)) for k in (1, 2, 3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("measured")
"""


def test_threads_measure_memory_one_after_the_other() -> None:
    done = subprocess.run([sys.executable, "-c", PROFILES], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("measured\n", 0)


def test_no_memory_is_measured_beside_the_profiler_of_another_thread() -> None:
    profiling, measured = threading.Event(), threading.Event()

    def profile() -> None:
        with torch.autograd.profiler.profile():
            profiling.set()
            measured.wait(60)

    thread = threading.Thread(target=profile)
    thread.start()
    profiling.wait(60)
    jac = AutoJacobian(torch.sin, store=":memory:", on_miss="tune", budget_s=0.2)
    x = torch.rand(4, 3)
    compare(jac(x), torch.diag_embed(x.cos()))
    assert peak_bytes(x.sin, x.device) is None
    measured.set()
    thread.join()
    assert jac.plan(x).memory_bytes is None


def test_two_threads_that_ignore_warnings_leave_no_filter() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with ignore_warnings():
            entered.set()
            left.wait(5)

    before = list(warnings.filters)
    thread = threading.Thread(target=other)
    with ignore_warnings():
        thread.start()
        entered.wait(5)
        warnings.warn("not shown", UserWarning, stacklevel=1)
    left.set()
    thread.join()
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning):
        warnings.warn("shown", UserWarning, stacklevel=1)


def test_what_optuna_logs_elsewhere_is_kept() -> None:
    level, logger = optuna.logging.get_verbosity(), logging.getLogger("optuna")
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    logger.addHandler(handler)
    try:
        with _quiet_optuna():
            optuna.create_study()
            thread = threading.Thread(target=lambda: optuna.create_study(study_name="theirs"))
            thread.start()
            thread.join()
        assert optuna.logging.get_verbosity() == level
        assert not records.empty()
        while not records.empty():
            assert "theirs" in records.get().getMessage()
    finally:
        logger.removeHandler(handler)


CANCELS = {
    "sum of a softmax": lambda x: torch.softmax(x, -1).sum(-1, keepdim=True),
    "unit length": lambda x: nn.functional.normalize(x, dim=-1).pow(2).sum(-1),
    "cosine of itself": lambda x: nn.functional.cosine_similarity(x, 2 * x, dim=-1),
    "normalized twice": lambda x: torch.logsumexp(x - torch.logsumexp(x, -1, keepdim=True), -1),
    "sin² + cos²": lambda x: x.sin() ** 2 + x.cos() ** 2,
}


@pytest.mark.parametrize("name", CANCELS)
def test_rounding_is_no_disagreement_of_modes(name: str) -> None:
    torch.manual_seed(0)
    for size, scale in ((1, 1e-3), (3, 1.0), (8, 1e3)):
        x = scale * torch.randn(7, size)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ModesDisagreeWarning)
            AutoJacobian(CANCELS[name], on_miss="estimate", store=":memory:")(x)


def test_modes_that_disagree_in_single_precision_are_told() -> None:
    # the weights of a layer keep func from running in float64
    for gate in (nn.Linear(3, 3), torch.exp):

        def gated(x: Tensor, gate: Any = gate) -> Tensor:
            with torch.no_grad():
                factor = gate(x)
            return x * factor

        with pytest.warns(ModesDisagreeWarning):
            AutoJacobian(gated, on_miss="estimate", store=":memory:")(torch.randn(5, 3))


def test_messages_name_types_in_plain_english() -> None:
    assert [kind_of(value) for value in (3, None, {}, 1j)] == ["an int", "None", "a dict", "a complex"]
    x = torch.randn(4, 3)
    for func, named in ((lambda x: 3, "an int"), (lambda x: None, "None")):
        with pytest.raises(autojac.OutputError, match=f"is {named};"):
            AutoJacobian(func, store=":memory:")(x)
    with pytest.raises(autojac.InputError, match="got an int"):
        AutoJacobian(3, store=":memory:")  # type: ignore[arg-type]


def test_ids_of_an_embedding_are_not_to_be_made_floats() -> None:
    with pytest.raises(autojac.InputError, match="of_parameters") as refused:
        AutoJacobian(nn.Embedding(5, 3), store=":memory:")(torch.tensor([0, 1]))
    assert ".float()" not in str(refused.value)


def test_torch_compile_around_a_call_leaves_autojac_alone(capfd: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_(False)
    jac = AutoJacobian(net, on_miss="estimate", store=":memory:")
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="eager")
    def step(x: Tensor) -> tuple[Any, ...]:
        y, jacobian = jac.value_and_jacobian(x)
        return 2 * jac(x) + 1, (3 * jacobian).sum(), y

    for _ in range(12):
        x = torch.randn(5, 3, dtype=torch.float64)
        twice, total, value = step(x)
        right = jacobian_blocks(net, (x,), 0)
        compare(twice, 2 * right + 1)
        compare(total, 3 * right.sum())
        compare(value, net(x))
    broken = [reason for reason in counters["graph_break"] if "AutoJacobian" not in reason]
    assert not broken
    assert counters["frames"]["total"] < 10
    assert "recompile_limit" not in capfd.readouterr().err
    torch._dynamo.reset()
