"""What every test can count on: known threads, the same random numbers each time, a plan store of its own."""

from __future__ import annotations

import gc
import itertools
import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

# threads that spin while they wait slow each other down a hundredfold on a busy machine; read when torch loads
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import numpy as np
import pytest
import torch

from autojac.problem.machine import DEFAULT

# a busy machine may hold up any example
hypothesis.settings.register_profile("autojac", deadline=None)
hypothesis.settings.load_profile("autojac")

# at its first use it loads modules that register types with pytree, which a guard notices: the next call traces anew
torch.testing.assert_close(torch.ones(1), torch.ones(1))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("by_day"):
            if _at_night(item, *mark.args):
                item.add_marker(pytest.mark.nightly)
    for item in items:
        drawn = getattr(item, "callspec", None)
        scenario = drawn.params.get("scenario") if drawn is not None else None
        if "modes_differ" in getattr(scenario, "traits", ()):
            # autojac tells it, and is tested for that in test_modes.py
            item.add_marker(pytest.mark.filterwarnings("ignore::autojac.ModesDisagreeWarning"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    # every collection of garbage would look at half a million objects of torch and of these tests again
    gc.collect()
    gc.freeze()


def _at_night(item: pytest.Item, of: int, turn: int = 0) -> bool:
    """Check whether a combination waits for the night; tests of different turns choose different names."""
    assert isinstance(item, pytest.Function)
    return (zlib.crc32(item.callspec.id.encode()) + turn) % of != 0


@pytest.fixture(autouse=True, scope="session")
def known_threads() -> None:
    # plans are keyed by it; subprocesses read the same variable
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def known_machine() -> Iterator[None]:
    # the order of candidates follows from it, and would follow from how busy the machine is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autojac.planning.search.calibrate.measured_machine", lambda device, threads, large: DEFAULT)
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # else each device would take down the stack, to be seeded later
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def no_code_known() -> None:
    """Tests of one process share lambdas, and are not told that they wrap them anew."""
    if "autojac.planning.same_code" in sys.modules:
        sys.modules["autojac.planning.same_code"]._codes.clear()


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Paths of folders that don't exist yet: few tests store anything, and a folder for each takes half a minute."""
    top = tmp_path_factory.mktemp("stores")
    return (top / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_store(stores: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of the test's own, in place of the user's; subprocesses inherit it."""
    path = next(stores) / "store.db"
    monkeypatch.setenv("AUTOJAC_STORE", str(path))
    monkeypatch.delenv("AUTOJAC_PLAN_PATH", raising=False)
    yield path
