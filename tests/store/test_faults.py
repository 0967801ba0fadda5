"""The plan store when things go wrong: training never notices, and people are told once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from autojac.core.plan import Trial
from autojac.errors import StoreError, StoreWarning
from autojac.store import Key, PlanStore
from stores import ENV, OP, PLAN, TRIALS, as_found, execute, filled, forked, warned

FOUND = as_found(PLAN)
OTHER = Key.of({"function": "other"})


def works(store: PlanStore) -> None:
    """A save and a find go through, wherever the plan is kept."""
    store.save(OP, ENV, PLAN, "f")
    assert store.find(OP, ENV) == FOUND
    assert store.trials(OP, ENV) == TRIALS


def garbage(path: Path) -> None:
    path.write_bytes(b"This is no database.\n" * 500)


def truncated_in_a_page(path: Path) -> None:
    os.truncate(path, 6000)


def truncated_in_the_header(path: Path) -> None:
    os.truncate(path, 50)


def pages_overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


CORRUPTIONS = [garbage, truncated_in_a_page, truncated_in_the_header, pages_overwritten]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_corrupt_file_is_quarantined_and_a_fresh_store_begun(corrupt, tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    corrupt(path)
    damaged = path.read_bytes()
    store = PlanStore(path)
    with warned("plans.db.corrupt-1"):
        assert store.find(OP, ENV) is None
        works(store)
    assert (tmp_path / "plans.db.corrupt-1").read_bytes() == damaged
    assert PlanStore(path).find(OP, ENV) == FOUND


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_saving_into_a_corrupt_file(corrupt, tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    corrupt(path)
    (tmp_path / "plans.db.corrupt-1").write_text("an earlier one")
    with warned("plans.db.corrupt-2"):
        works(PlanStore(path))
    assert PlanStore(path).find(OP, ENV) == FOUND


def test_people_are_told_of_a_corrupt_file_in_a_sentence(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    garbage(path)
    store = PlanStore(path)
    for ask in (store.listing, store.clear, lambda: store.get(1), lambda: store.remove(1)):
        with pytest.raises(StoreError, match=r"plans\.db can't be used as a plan store: file is not a database"):
            ask()


def test_a_zero_length_file_is_fresh(tmp_path: Path) -> None:
    (path := tmp_path / "plans.db").touch()
    store = PlanStore(path)
    with warned():
        assert store.find(OP, ENV) is None
        assert store.listing() == []
        works(store)


def test_any_single_page_may_be_flipped(tmp_path: Path) -> None:
    sound = filled(tmp_path / "sound.db").read_bytes()
    for page in range(len(sound) // 4096):
        path = tmp_path / f"{page}.db"
        data = bytearray(sound)
        data[page * 4096 : (page + 1) * 4096] = bytes(byte ^ 0xFF for byte in data[page * 4096 : (page + 1) * 4096])
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)
            store = PlanStore(path)
            assert store.find(OP, ENV) in (None, FOUND)
            works(store)


HOSTILE = {
    "not JSON": "{",
    "deep": "[" * 200_000,
    "a list": "[1, 2]",
    "null": "null",
    "a huge number": '{"seconds": ' + "9" * 10_000 + "}",
    "NaN": json.dumps({**PLAN.to_json(), "seconds": float("nan")}),
    "unknown field": json.dumps({**PLAN.to_json(), "trials": []}),
    "unknown effort": json.dumps({**PLAN.to_json(), "effort": "heroic"}),
    "method is text": json.dumps({**PLAN.to_json(), "method": "__import__('os').system('true')"}),
    "nested method": json.dumps({**PLAN.to_json(), "method": {"method": "chunk", "inner": {"method": 3}}}),
    "no structure": json.dumps({**PLAN.to_json(), "structure": None}),
    "odd structure": json.dumps({**PLAN.to_json(), "structure": {**PLAN.structure.to_json(), "effects": "updates"}}),
    "batched is text": json.dumps({**PLAN.to_json(), "batched": "yes"}),
    "seconds is text": json.dumps({**PLAN.to_json(), "seconds": "1"}),
    "pickle": b"\x80\x04\x95\x1e\x00\x00\x00",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_bad_row_is_a_miss_and_the_others_are_found(text: str | bytes, tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    PlanStore(path).save(OTHER, ENV, PLAN, "g")
    execute(path, "UPDATE plans SET plan = ? WHERE op_key = ?", text, OP.digest)
    store = PlanStore(path)
    with warned("a row that can't be used"):
        assert store.find(OP, ENV) is None
        assert store.hints(OP) == []
        assert store.find(OTHER, ENV) == FOUND
        assert [stored.function_name for stored in store.listing()] == ["g"]
        works(store)


@pytest.mark.parametrize("column", ["op", "created_at", "op_key", "function_name"])
def test_a_bad_column_is_passed_over_in_a_listing(column: str, tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    PlanStore(path).save(OTHER, ENV, PLAN, "g")
    execute(path, f"UPDATE plans SET {column} = x'ff00' WHERE op_key = ?", OP.digest)
    store = PlanStore(path)
    with warned("a row that can't be used"):
        assert [stored.function_name for stored in store.listing()] == ["g"]


def test_a_bad_trial_is_passed_over(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    execute(path, "UPDATE trials SET method = 'x' WHERE ordinal = 0")
    store = PlanStore(path)
    with warned("a row that can't be used"):
        assert store.trials(OP, ENV) == TRIALS[1:]
        assert store.listing()[0].plan.trials == TRIALS[1:]


@pytest.mark.parametrize("content", [b"", b"garbage" * 2000], ids=["empty", "garbage"])
@pytest.mark.parametrize("kept", [True, False], ids=["with its database", "without"])
def test_an_orphaned_log(content: bytes, kept: bool, tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    if not kept:
        path.unlink()
    (tmp_path / "plans.db-wal").write_bytes(content)
    store = PlanStore(path)
    with warned():
        assert store.find(OP, ENV) == (FOUND if kept else None)
        works(store)


def test_the_log_of_another_database(tmp_path: Path) -> None:
    other = filled(tmp_path / "other.db")
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("UPDATE plans SET function_name = 'other'")
        connection.commit()
        shutil.copy(tmp_path / "other.db-wal", tmp_path / "plans.db-wal")
    path = tmp_path / "elsewhere.db"
    PlanStore(path).save(OTHER, ENV, PLAN, "g")
    path.rename(tmp_path / "plans.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        works(PlanStore(tmp_path / "plans.db"))


def as_nobody(path: Path, mode_of_file: int, mode_of_folder: int) -> None:
    """Give up root's right to write anywhere, where the tests run as root."""
    path.chmod(mode_of_file)
    path.parent.chmod(mode_of_folder)
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    assert not os.access(path, os.W_OK)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter; pytest's own is closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="autojac-test-"))
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


@pytest.mark.parametrize("folder_mode", [0o555, 0o777], ids=["read-only folder", "read-only file"])
@pytest.mark.parametrize("network", [False, True], ids=["wal", "delete"])
def test_read_only_plans_are_read_and_new_ones_live_in_memory(
    folder_mode: int, network: bool, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autojac.store.location._file_system", lambda path: "nfs" if network else "ext4")
    path = filled(open_folder / "plans.db")

    def child() -> None:
        as_nobody(path, 0o444, folder_mode)
        store = PlanStore(path)
        with warned("new plans live in memory"):
            assert store.find(OP, ENV) == FOUND
            store.save(OTHER, ENV, PLAN, "g")
            assert store.find(OTHER, ENV) == FOUND
            store.refute(OP, ENV, "wrong")
            assert store.find(OP, ENV) is None
            store.save(OP, ENV, PLAN, "f")
            assert store.find(OP, ENV) == FOUND
            assert [stored.id for stored in store.listing()] == [-2, -1, 1]
            assert store.get(-1).function_name == "g"
        fresh = PlanStore(path)
        assert len(fresh.listing()) == 1
        with pytest.raises(StoreError, match="can't be used"):
            fresh.remove(1)

    assert forked(child) == [0]


def test_a_store_that_can_not_be_made_lives_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = PlanStore(tmp_path / "file" / "plans.db")
    with warned("plans live in memory"):
        works(store)
        works(store)
    assert "file" in store.description


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    with warned("in memory"):
        works(store)


@pytest.mark.parametrize("url", ["nonsense://host/db", "postgresql+psycopg://nobody@localhost:1/db"])
def test_a_url_that_can_not_be_used(url: str) -> None:
    store = PlanStore(url, timeout_s=0.1)
    with warned("in memory"):
        assert store.find(OP, ENV) is None
        works(store)
    with pytest.raises(StoreError, match="can't be used as a plan store"):
        PlanStore(url).listing()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "AUTOJAC_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError("no entry")))
    store = PlanStore()
    with warned("no home directory"):
        works(store)
    with pytest.raises(StoreError, match="no home directory"):
        PlanStore().listing()


def test_a_full_disk_keeps_what_was_found_readable(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    store = PlanStore(path)
    assert store._main is not None
    sa.event.listen(store._main._engine("rw"), "connect", lambda raw, _: raw.execute("PRAGMA max_page_count=1"))
    bulky = replace(PLAN, trials=(Trial({"method": "x" * 100_000}, "complete"),))
    with warned("full"):
        store.save(OTHER, ENV, bulky, "g")
        assert store.find(OTHER, ENV) == FOUND
        assert store.find(OP, ENV) == FOUND


def test_a_held_lock(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    store = PlanStore(path, timeout_s=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder, warned("database is locked"):
        holder.execute("BEGIN IMMEDIATE")
        assert store.find(OP, ENV) == FOUND
        store.save(OTHER, ENV, PLAN, "g")
        assert store.find(OTHER, ENV) == FOUND
        holder.execute("ROLLBACK")
        works(store)


def test_an_exclusive_lock(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    execute(path, "PRAGMA journal_mode=DELETE")
    store = PlanStore(path, timeout_s=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder, warned("database is locked"):
        holder.execute("BEGIN EXCLUSIVE")
        assert store.find(OP, ENV) is None
        works(store)


def test_killed_in_a_transaction(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")

    def die(connection: sa.Connection) -> None:
        connection.execute(sa.text("DELETE FROM plans"))
        os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        main = PlanStore(path)._main
        assert main is not None
        main.write(die)

    assert forked(child) == [-signal.SIGKILL]
    store = PlanStore(path)
    with warned():
        assert store.find(OP, ENV) == FOUND
        works(store)


def test_killed_while_making_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"

    def die(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "CREATE TABLE trials" in statement:
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        sa.event.listen(sa.Engine, "after_cursor_execute", die)
        PlanStore(path).save(OP, ENV, PLAN, "f")

    assert forked(child) == [-signal.SIGKILL]
    store = PlanStore(path)
    with warned():
        assert store.find(OP, ENV) is None
        works(store)
    assert PlanStore(path).find(OP, ENV) == FOUND


def test_eight_processes_at_a_cold_start(tmp_path: Path) -> None:
    path = tmp_path / "plans.db"
    keys = [Key.of({"function": str(number)}) for number in range(8)]

    def child(key: Key) -> None:
        warnings.simplefilter("error")
        store = PlanStore(path)
        assert store.find(key, ENV) is None
        store.save(key, ENV, PLAN, "f")
        assert store.find(key, ENV) == FOUND

    assert forked(*(lambda key=key: child(key) for key in keys)) == [0] * 8
    assert len(PlanStore(path).listing()) == 8


def test_eight_writers_on_one_key(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")

    def child(number: int) -> None:
        warnings.simplefilter("error")
        store = PlanStore(path)
        for turn in range(10):
            trials = tuple(Trial({"method": f"{number}-{turn}"}, "complete") for _ in range(3))
            store.save(OP, ENV, replace(PLAN, method={"method": f"{number}-{turn}"}, trials=trials), "f")
            assert store.find(OP, ENV) is not None

    assert forked(*(lambda number=number: child(number) for number in range(8))) == [0] * 8
    (stored,) = PlanStore(path).listing()
    assert [trial.method for trial in stored.plan.trials] == [stored.plan.method] * 3


def test_eight_processes_meet_one_corrupt_file(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    garbage(path)

    def child(key: Key) -> None:
        warnings.simplefilter("ignore", StoreWarning)
        PlanStore(path).save(key, ENV, PLAN, "f")

    keys = [Key.of({"function": str(number)}) for number in range(8)]
    assert forked(*(lambda key=key: child(key) for key in keys)) == [0] * 8
    assert len(PlanStore(path).listing()) == 8
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1


@pytest.mark.parametrize("location", ["file", ":memory:"])
def test_fork_with_an_open_store(location: str, tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "plans.db" if location == "file" else location)
    store.save(OP, ENV, PLAN, "f")

    def child() -> None:
        warnings.simplefilter("error")
        assert store.find(OP, ENV) == FOUND
        store.save(OTHER, ENV, PLAN, "g")
        assert store.find(OTHER, ENV) == FOUND

    assert forked(*[child] * 4) == [0] * 4
    assert store.find(OTHER, ENV) == (FOUND if location == "file" else None)
    works(store)


def test_the_file_is_deleted_while_open(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    store = PlanStore(path)
    assert store.find(OP, ENV) == FOUND
    shutil.rmtree(tmp_path)
    with warned():
        assert store.find(OP, ENV) is None
        works(store)
    assert path.exists()


@pytest.mark.parametrize("kind", ["another store", "another database", "zero length"])
def test_the_file_is_replaced_while_open(kind: str, tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    store = PlanStore(path)
    store.save(OP, ENV, PLAN, "f")
    replacement = tmp_path / "new.db"
    if kind == "another store":
        PlanStore(replacement).save(OTHER, ENV, PLAN, "g")
    elif kind == "another database":
        execute(replacement, "CREATE TABLE birds (name TEXT)")
    else:
        replacement.touch()
    replacement.replace(path)
    with warned():
        assert store.find(OP, ENV) is None
        assert store.find(OTHER, ENV) == (FOUND if kind == "another store" else None)
        works(store)


def test_a_newer_schema_is_read_and_not_written(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    execute(path, "ALTER TABLE plans ADD COLUMN mood TEXT NOT NULL DEFAULT 'good'")
    execute(path, "UPDATE alembic_version SET version_num = '0042'")
    before = path.read_bytes()
    for first in ("find", "save"):
        store = PlanStore(path)
        with warned("'0042'"):
            if first == "find":
                assert store.find(OP, ENV) == FOUND
            store.save(OTHER, ENV, PLAN, "g")
            assert store.find(OP, ENV) == FOUND
            assert store.find(OTHER, ENV) == FOUND
    assert path.read_bytes() == before
    store = PlanStore(path)
    assert len(store.listing()) == 1
    with pytest.raises(StoreError, match="0042"):
        store.remove(1)


def test_a_newer_schema_without_our_columns_is_empty(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    execute(path, "ALTER TABLE plans RENAME COLUMN plan TO recipe")
    execute(path, "UPDATE alembic_version SET version_num = '0042'")
    store = PlanStore(path)
    with warned("'0042'"):
        assert store.find(OP, ENV) is None
        works(store)


def test_a_bad_shared_database_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage(shared := tmp_path / "shared.db")
    monkeypatch.setenv("AUTOJAC_PLAN_PATH", str(shared))
    store = PlanStore(tmp_path / "plans.db")
    with warned("shared plans"):
        assert store.find(OP, ENV) is None
        assert store.find(OTHER, ENV) is None
        works(store)
    assert shared.exists()


def test_a_warning_made_an_error_leaves_a_store_that_works(tmp_path: Path) -> None:
    garbage(path := tmp_path / "plans.db")
    store = PlanStore(path)
    with pytest.raises(StoreWarning):
        store.find(OP, ENV)
    works(store)


def test_times_do_not_matter_to_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "plans.db")
    monkeypatch.setattr("autojac.store.records.timestamp", lambda: "1999-01-01T00:00:00+00:00")
    store = PlanStore(path)
    store.save(OP, ENV, replace(PLAN, method={"method": "push"}), "f")
    found = store.find(OP, ENV)
    assert found is not None
    assert found.method == {"method": "push"}
