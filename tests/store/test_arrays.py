"""Patterns and colorings in the store: kept beside the plans that need them, and never trusted."""

from __future__ import annotations

import io
import os
import sqlite3
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from click.testing import CliRunner

import autojac.store
from autojac.cli import main
from autojac.core.pattern import Pattern, Sparsity, pack, unpack
from autojac.core.plan import Plan
from autojac.core.structure import Structure
from autojac.errors import OptionError
from autojac.sparse.colorings import Colorings
from autojac.store import Key, PlanStore
from stores import ENV, FEATURES, OP, PLAN, SAMPLES, SPARSE_PLAN, as_found, execute, forked, warned

FOUND = as_found(SPARSE_PLAN)
OTHER = Key.of({"function": "other"})
KEY = f"{SAMPLES.key}:apart"
COLORS = {"samples": np.arange(64, dtype=np.int32) % 2}


def is_kept(store: PlanStore) -> bool:
    kept = store.coloring(KEY)
    return kept is not None and kept.keys() == COLORS.keys() and (kept["samples"] == COLORS["samples"]).all()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with a plan, its patterns and a coloring."""
    store = PlanStore(tmp_path / "plans.db")
    store.save(OP, ENV, SPARSE_PLAN, "f")
    store.save_coloring(KEY, COLORS)
    return tmp_path / "plans.db"


def kept_arrays(path: Path) -> set[tuple[str, str]]:
    return set(execute(path, "SELECT pattern, kind FROM arrays"))


@pytest.mark.parametrize("location", ["file", ":memory:"])
def test_a_plan_is_found_with_its_patterns(location: str, tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "plans.db" if location == "file" else location)
    store.save(OP, ENV, SPARSE_PLAN, "f")
    assert store.find(OP, ENV) == FOUND
    assert store.hints(OP) == [FOUND]
    (stored,) = store.listing()
    assert stored == store.get(stored.id)
    assert stored.plan == replace(SPARSE_PLAN, source="store")
    store.save(OP, ENV, PLAN, "f")
    assert store.find(OP, ENV) == as_found(PLAN)


def test_a_plans_json_holds_keys_in_the_place_of_patterns(path: Path) -> None:
    data = SPARSE_PLAN.to_json()
    assert data["structure"]["sparsity"] == {"samples": SAMPLES.key, "features": FEATURES.key}
    assert "sparsity" not in PLAN.to_json()["structure"]
    patterns = {SAMPLES.key: SAMPLES, FEATURES.key: FEATURES}.__getitem__
    assert Plan.from_json(data, patterns=patterns) == FOUND
    assert Plan.from_json(PLAN.to_json()) == as_found(PLAN)
    with pytest.raises(OptionError, match="no patterns were passed"):
        Plan.from_json(data)
    for sparsity in (["x"], {"sample": SAMPLES.key}):
        with pytest.raises(OptionError, match="must name patterns"):
            Structure.from_json({**data["structure"], "sparsity": sparsity}, patterns)
    nothing_known = Structure("sparse", sparsity=Sparsity())
    assert Structure.from_json(nothing_known.to_json(), patterns) == nothing_known


def test_a_coloring_is_found(path: Path) -> None:
    store = PlanStore(path)
    assert is_kept(store)
    assert store.coloring(f"{SAMPLES.key}:rows") is None
    assert store.coloring(f"{FEATURES.key}:apart") is None
    assert PlanStore(path.with_name("absent.db")).coloring(KEY) is None


def test_a_store_backs_colorings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Colorings(PlanStore(path)).orthogonal(FEATURES, "rows")
    monkeypatch.setattr("autojac.sparse.colorings.orthogonal", lambda *_: pytest.fail("it is known already"))
    assert (Colorings(PlanStore(path)).orthogonal(FEATURES, "rows") == made).all()


def test_patterns_go_with_the_last_plan_that_names_them(path: Path) -> None:
    store = PlanStore(path)
    samples_alone = replace(PLAN, structure=Structure("sparse", sparsity=Sparsity(SAMPLES)))
    store.save(OTHER, ENV, samples_alone, "g")
    assert kept_arrays(path) == {(SAMPLES.key, "pattern"), (FEATURES.key, "pattern"), (SAMPLES.key, "apart")}
    first, second = (stored.id for stored in reversed(store.listing()))
    store.remove(first)
    assert kept_arrays(path) == {(SAMPLES.key, "pattern"), (SAMPLES.key, "apart")}
    assert store.find(OTHER, ENV) == as_found(samples_alone)
    store.remove(second)
    assert kept_arrays(path) == set()
    assert execute(path, "SELECT * FROM plan_patterns") == []


def test_patterns_go_with_the_plan_that_is_replaced(path: Path) -> None:
    PlanStore(path).save(OP, ENV, PLAN, "f")
    assert kept_arrays(path) == set()


def test_a_plan_of_less_effort_brings_no_patterns(path: Path) -> None:
    store = PlanStore(path)
    store.save(OP, ENV, replace(PLAN, effort="exhaustive"), "f")
    store.save(OP, ENV, SPARSE_PLAN, "f")
    assert kept_arrays(path) == set()


def test_clearing_leaves_nothing(path: Path) -> None:
    store = PlanStore(path)
    store.save_coloring(f"{'0' * 64}:rows", COLORS)
    store.clear()
    assert kept_arrays(path) == set()
    assert execute(path, "SELECT * FROM plan_patterns") == []


def hostile_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, shape=np.array([[1]], dtype=object), starts=np.zeros(1), columns=np.zeros(1))
    return buffer.getvalue()


def floats_for_indices() -> bytes:
    arrays = unpack(SAMPLES.to_bytes())
    return pack(**{**arrays, "columns": arrays["columns"].astype(float)})


SPOILT = {
    "nothing": b"",
    "garbage": b"garbage" * 100,
    "cut short": SAMPLES.to_bytes()[:-30],
    "text": "PK",
    "a number": 10**15,
    "another pattern": FEATURES.to_bytes(),
    "pickled objects": hostile_archive(),
    "floats": floats_for_indices(),
    "negative rows": pack(shape=np.array([-1, 3]), starts=np.zeros(0, np.int64), columns=np.zeros(0, np.int32)),
    "other arrays": pack(colors=np.zeros(3)),
}


@pytest.mark.parametrize("data", SPOILT.values(), ids=SPOILT)
def test_a_plan_with_a_spoilt_pattern_is_none_until_saved_anew(data: object, path: Path) -> None:
    PlanStore(path).save(OTHER, ENV, PLAN, "g")
    execute(path, "UPDATE arrays SET data = ? WHERE pattern = ? AND kind = 'pattern'", data, SAMPLES.key)
    store = PlanStore(path)
    with warned("a row that can't be used"):
        assert store.find(OP, ENV) is None
        assert store.hints(OP) == []
        assert [stored.function_name for stored in store.listing()] == ["g"]
        assert store.find(OTHER, ENV) == as_found(PLAN)
        store.save(OP, ENV, SPARSE_PLAN, "f")
        assert store.find(OP, ENV) == FOUND


def test_a_plan_without_its_pattern_is_none(path: Path) -> None:
    execute(path, "DELETE FROM arrays WHERE kind = 'pattern'")
    store = PlanStore(path)
    with warned(f"its pattern {SAMPLES.key[:12]} is not stored"):
        assert store.find(OP, ENV) is None


def test_a_plan_that_names_no_text_is_none(path: Path) -> None:
    execute(path, "UPDATE plans SET plan = replace(plan, ?, '[]')", f'"{SAMPLES.key}"')
    store = PlanStore(path)
    with warned("a row that can't be used"):
        assert store.find(OP, ENV) is None


@pytest.mark.parametrize("name", ["nothing", "garbage", "text", "a number", "pickled objects"])
def test_a_spoilt_coloring_is_none_until_saved_anew(name: str, path: Path) -> None:
    execute(path, "UPDATE arrays SET data = ? WHERE kind = 'apart'", SPOILT[name])
    store = PlanStore(path)
    with warned("a row that can't be used"):
        assert store.coloring(KEY) is None
        assert store.find(OP, ENV) == FOUND
        store.save_coloring(KEY, COLORS)
        assert is_kept(store)


def test_what_can_not_be_written_lives_in_memory(path: Path) -> None:
    store = PlanStore(path, timeout_s=0.05)
    pattern = Pattern.of(np.eye(3))
    plan = replace(PLAN, structure=Structure("sparse", sparsity=Sparsity(pattern)))
    with closing(sqlite3.connect(path, isolation_level=None)) as holder, warned("database is locked"):
        holder.execute("BEGIN IMMEDIATE")
        store.save_coloring(f"{pattern.key}:rows", COLORS)
        store.save(OTHER, ENV, plan, "g")
        assert store.coloring(f"{pattern.key}:rows") is not None
        assert store.find(OTHER, ENV) == as_found(plan)
        assert is_kept(store)
        assert store.find(OP, ENV) == FOUND


def test_a_store_that_can_not_be_made_keeps_colorings_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = PlanStore(tmp_path / "file" / "plans.db")
    with warned("live in memory"):
        assert store.coloring(KEY) is None
        store.save_coloring(KEY, COLORS)
        assert is_kept(store)


def test_a_corrupt_file_is_quarantined_by_a_coloring(path: Path) -> None:
    path.write_bytes(b"This is no database.\n" * 500)
    store = PlanStore(path)
    with warned("plans.db.corrupt-1"):
        assert store.coloring(KEY) is None
        store.save_coloring(KEY, COLORS)
        assert is_kept(store)
    assert is_kept(PlanStore(path))


def test_shared_plans_bring_their_patterns(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOJAC_PLAN_PATH", str(path))
    store = PlanStore(tmp_path / "own.db")
    assert store.find(OP, ENV) == FOUND
    assert is_kept(store)
    store.refute(OP, ENV, "sample 3 reads sample 9")
    assert store.find(OP, ENV) is None
    assert store.listing()[0].plan.structure == SPARSE_PLAN.structure
    store.save(OP, ENV, SPARSE_PLAN, "f")
    monkeypatch.delenv("AUTOJAC_PLAN_PATH")
    assert PlanStore(tmp_path / "own.db").find(OP, ENV) == FOUND


@pytest.fixture
def older(path: Path, tmp_path: Path) -> Path:
    """A database as the first schema had it, with a plan."""
    older = tmp_path / "older.db"
    config = Config()
    config.set_main_option("script_location", str(Path(autojac.store.__file__).parent / "migrations"))
    engine = sa.create_engine(f"sqlite:///{older}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    PlanStore(path).save(OP, ENV, PLAN, "f")
    columns, *_ = [", ".join(name for _, name, *_ in execute(older, "PRAGMA table_info(plans)"))]
    (row,) = execute(path, f"SELECT {columns} FROM plans")
    execute(older, f"INSERT INTO plans ({columns}) VALUES ({', '.join('?' * len(row))})", *row)
    return older


def test_an_older_store_is_read_and_then_brought_up_to_date(older: Path) -> None:
    before = older.read_bytes()
    store = PlanStore(older)
    with warned():
        assert store.find(OP, ENV) == as_found(PLAN)
        assert store.coloring(KEY) is None
        assert older.read_bytes() == before
        store.save_coloring(KEY, COLORS)
        store.save(OTHER, ENV, SPARSE_PLAN, "g")
    fresh = PlanStore(older)
    assert fresh.find(OP, ENV) == as_found(PLAN)
    assert fresh.find(OTHER, ENV) == FOUND
    assert is_kept(fresh)


def test_an_older_shared_store_is_read_as_it_is(older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOJAC_PLAN_PATH", str(older))
    before = older.read_bytes()
    store = PlanStore(tmp_path / "own.db")
    with warned():
        assert store.find(OP, ENV) == as_found(PLAN)
        assert store.coloring(KEY) is None
        assert store.trials(OP, ENV) == ()
    assert older.read_bytes() == before


def test_processes_meet_one_older_store(older: Path) -> None:
    keys = [Key.of({"function": str(number)}) for number in range(4)]

    def child(key: Key) -> None:
        warnings.simplefilter("error")
        store = PlanStore(older)
        store.save(key, ENV, SPARSE_PLAN, "f")
        assert store.find(key, ENV) == FOUND
        assert store.find(OP, ENV) == as_found(PLAN)

    assert forked(*(lambda key=key: child(key) for key in keys)) == [0] * 4
    assert len(PlanStore(older).listing()) == 5


def test_a_forked_process_reads_what_its_parent_kept(path: Path) -> None:
    store = PlanStore(path)
    assert is_kept(store)
    assert forked(lambda: os._exit(0 if is_kept(store) else 1)) == [0]


def test_the_command_shows_patterns(path: Path) -> None:
    shown = CliRunner().invoke(main, ["plans", "show", "1", "--store", str(path)])
    assert shown.exit_code == 0
    assert "samples: 127 entries in 64 x 64 (0.031 of all)" in shown.output
    assert "features: 12 entries in 5 x 3" in shown.output
    listed = CliRunner().invoke(main, ["plans", "show", "1", "--json", "--store", str(path)])
    assert SAMPLES.key in listed.output
