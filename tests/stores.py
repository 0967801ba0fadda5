"""Keys, plans and processes for the tests of the store."""

from __future__ import annotations

import os
import signal
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autojac.core.pattern import Pattern, Sparsity
from autojac.core.plan import Plan, Trial
from autojac.core.structure import Structure
from autojac.errors import StoreWarning
from autojac.store import Key, PlanStore

OP = Key.of({"function": "f"})
ENV = Key.of({"device": "cpu"})
METHOD = {"method": "batch_chunk", "inner": {"method": "pull", "seeds": "shared", "chunk": 16}, "size": 8192}
TRIALS = (
    Trial(METHOD, "complete", seconds=1e-3, dispersion=0.05, memory_bytes=4096),
    Trial({"method": "push"}, "rejected", reason="error 0.1 against the reference"),
)
PLAN = Plan(METHOD, Structure("independent"), (True, False), "quick", 1e-3, 2e-3, 4096, 0.5, trials=TRIALS)
SAMPLES, FEATURES = Pattern.of(np.eye(64, k=1) + np.eye(64)), Pattern.of(np.tri(5, 3))
SPARSE_PLAN = replace(PLAN, structure=Structure("sparse", sparsity=Sparsity(SAMPLES, FEATURES)))


def as_found(plan: Plan) -> Plan:
    return replace(plan, source="store", trials=())


def filled(path: Path) -> Path:
    """A database with one plan, closed."""
    PlanStore(path).save(OP, ENV, PLAN, "f")
    return path


def execute(path: Path, statement: str, *values: Any) -> list[Any]:
    """What a statement returns from a database that is opened without the store."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


@contextmanager
def warned(*texts: str) -> Iterator[None]:
    """Exactly these StoreWarnings, in this order, and no other warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [entry.category for entry in caught] == [StoreWarning] * len(texts), [str(entry.message) for entry in caught]
    for entry, text in zip(caught, texts, strict=True):
        assert text in str(entry.message)


def forked(*works: Callable[[], object]) -> list[int]:
    """Run each work in a process of its own, all at once; exit codes, negative for a signal."""
    children = []
    for work in works:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the children only do SQL
            child = os.fork()
        if child == 0:
            signal.alarm(60)
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
