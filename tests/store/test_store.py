"""The plan store when nothing goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import autojac.store
from autojac.core.plan import EFFORTS
from autojac.errors import StoreError
from autojac.store import Key, PlanStore
from autojac.store.tables import METADATA, SCHEMA_VERSIONS
from stores import ENV, METHOD, OP, PLAN, TRIALS, as_found, execute, filled

OTHER_ENV = Key.of({"device": "cuda"})


@pytest.fixture(params=["file", "memory", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PlanStore:
    path = tmp_path / "deep" / "er" / "plans 100%?#.db"
    return PlanStore({"file": path, "memory": ":memory:", "url": f"sqlite:///{tmp_path}/plans.db"}[request.param])


def test_an_empty_store_answers_with_nothing(store: PlanStore) -> None:
    assert store.find(OP, ENV) is None
    assert store.hints(OP) == []
    assert store.trials(OP, ENV) == ()
    assert store.listing() == []


def test_reading_creates_no_file(tmp_path: Path) -> None:
    PlanStore(tmp_path / "plans.db").find(OP, ENV)
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_found(store: PlanStore) -> None:
    store.save(OP, ENV, PLAN, "module.f")
    assert store.find(OP, ENV) == as_found(PLAN)
    assert store.find(OP, OTHER_ENV) is None
    assert store.find(Key.of({"function": "g"}), ENV) is None
    assert store.trials(OP, ENV) == TRIALS
    (stored,) = store.listing()
    assert stored == store.get(stored.id)
    assert (stored.function_name, stored.op, stored.env) == ("module.f", OP, ENV)
    assert (stored.op.fields, stored.env.fields) == (OP.fields, ENV.fields)
    assert stored.plan == replace(PLAN, source="store")
    assert stored.refuted_reason is None
    assert stored.created_at == stored.updated_at
    assert stored.created_at.tzinfo is not None


def test_plans_of_autojac_0_1_are_read(tmp_path: Path) -> None:
    plan = replace(PLAN, structure=replace(PLAN.structure, depends_on_arguments=True))
    PlanStore(tmp_path / "plans.db").save(OP, ENV, plan, "f")
    execute(tmp_path / "plans.db", "UPDATE plans SET plan = replace(plan, 'depends_on_arguments', 'watched')")
    assert execute(tmp_path / "plans.db", "SELECT count(*) FROM plans WHERE plan LIKE '%watched%'") == [(1,)]
    assert PlanStore(tmp_path / "plans.db").find(OP, ENV) == as_found(plan)


def test_a_second_save_replaces_plan_and_trials(store: PlanStore) -> None:
    store.save(OP, ENV, PLAN, "f")
    created = store.listing()[0].created_at
    store.save(OP, ENV, replace(PLAN, method={"method": "push"}, trials=TRIALS[1:]), "f")
    (stored,) = store.listing()
    assert stored.plan.method == {"method": "push"}
    assert stored.plan.trials == TRIALS[1:]
    assert stored.created_at == created < stored.updated_at


@pytest.mark.parametrize("kept", EFFORTS)
@pytest.mark.parametrize("new", EFFORTS)
def test_a_higher_effort_is_not_overwritten(kept: str, new: str) -> None:
    store = PlanStore(":memory:")
    store.save(OP, ENV, replace(PLAN, effort=kept), "f")
    store.save(OP, ENV, replace(PLAN, effort=new, trials=()), "f")
    higher = EFFORTS.index(kept) > EFFORTS.index(new)
    (stored,) = store.listing()
    assert stored.plan.effort == (kept if higher else new)
    assert stored.plan.trials == (TRIALS if higher else ())


def test_a_refuted_plan_is_not_found_until_saved_anew(store: PlanStore) -> None:
    store.save(OP, ENV, replace(PLAN, effort="exhaustive"), "f")
    store.refute(OP, ENV, "sample 3 read sample 4")
    assert store.find(OP, ENV) is None
    assert store.hints(OP) == []
    assert store.listing()[0].refuted_reason == "sample 3 read sample 4"
    store.save(OP, ENV, PLAN, "f")
    assert store.find(OP, ENV) == as_found(PLAN)


def test_refuting_what_is_not_stored_is_no_error(store: PlanStore) -> None:
    store.refute(OP, ENV, "never seen")
    assert store.listing() == []


def test_hints_are_the_plans_of_all_environments_latest_first(store: PlanStore) -> None:
    store.save(OP, OTHER_ENV, replace(PLAN, method={"method": "push"}), "f")
    store.save(OP, ENV, PLAN, "f")
    assert [plan.method for plan in store.hints(OP)] == [METHOD, {"method": "push"}]


def test_removing_and_clearing(store: PlanStore) -> None:
    store.save(OP, ENV, PLAN, "f")
    store.save(OP, OTHER_ENV, PLAN, "f")
    first = store.listing()[0].id
    store.remove(first)
    for unknown in (store.get, store.remove):
        with pytest.raises(StoreError, match=f"no plan {first}"):
            unknown(first)
    store.clear()
    assert store.listing() == []
    assert store.trials(OP, OTHER_ENV) == ()


def test_nan_and_infinity_become_null(store: PlanStore) -> None:
    plan = replace(PLAN, seconds=float("nan"), trials=(replace(TRIALS[0], seconds=1.0, dispersion=float("inf")),))
    store.save(OP, ENV, plan, "f")
    found = store.find(OP, ENV)
    assert found is not None
    assert found.seconds is None
    assert store.trials(OP, ENV)[0].dispersion is None


def test_memory_is_shared_by_the_threads_of_a_process() -> None:
    store = PlanStore(":memory:")
    keys = [Key.of({"function": str(number)}) for number in range(8)]
    threads = [threading.Thread(target=store.save, args=(key, ENV, PLAN, "f")) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(store.find(key, ENV) == as_found(PLAN) for key in keys)


def test_location_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOJAC_STORE", str(tmp_path / "told.db"))
    assert PlanStore().description == str(tmp_path / "told.db")
    monkeypatch.setenv("AUTOJAC_STORE", "postgresql+psycopg://me:secret@host/plans")
    assert PlanStore().description == "postgresql+psycopg://me:***@host/plans"
    monkeypatch.delenv("AUTOJAC_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert PlanStore().description == str(tmp_path / "autojac" / "plans.db")


def test_shared_plans_are_read_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = filled(tmp_path / "shared.db")
    before = shared.read_bytes()
    monkeypatch.setenv("AUTOJAC_PLAN_PATH", f"{tmp_path / 'absent.db'}:{shared}")
    store = PlanStore(tmp_path / "own.db")
    assert store.find(OP, ENV) == as_found(PLAN)
    assert store.trials(OP, ENV) == TRIALS
    assert store.hints(OP) == [as_found(PLAN)]
    assert store.listing() == []
    store.refute(OP, ENV, "wrong here")
    assert store.find(OP, ENV) is None
    assert PlanStore(tmp_path / "own.db").find(OP, ENV) is None
    assert store.listing()[0].refuted_reason == "wrong here"
    store.save(OP, ENV, replace(PLAN, method={"method": "push"}), "f")
    found = store.find(OP, ENV)
    assert found is not None
    assert found.method == {"method": "push"}
    assert shared.read_bytes() == before


def test_files_keep_a_write_ahead_log(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    with sa.create_engine(f"sqlite:///{path}").connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == SCHEMA_VERSIONS[-1]
    connection.engine.dispose()


def test_no_write_ahead_log_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.store.location._file_system", lambda path: "nfs4")
    path = filled(tmp_path / "plans.db")
    assert path.read_bytes()[18] == 1  # the header's file format: 2 is a write-ahead log


def test_the_schema_constant_is_alembics_history() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(autojac.store.__file__).parent / "migrations"))
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(revisions)) == SCHEMA_VERSIONS


def test_migrations_make_the_tables_of_a_fresh_store(tmp_path: Path) -> None:
    fresh = sa.create_engine(f"sqlite:///{filled(tmp_path / 'fresh.db')}")
    migrated = sa.create_engine(f"sqlite:///{tmp_path / 'migrated.db'}")
    config = Config()
    config.set_main_option("script_location", str(Path(autojac.store.__file__).parent / "migrations"))
    with migrated.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    found = []
    for engine in (fresh, migrated):
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
            inspector = sa.inspect(connection)
            names = sorted(inspector.get_table_names())
            assert "alembic_version" in names
            found.append(
                [
                    (
                        name,
                        [str(column) for column in inspector.get_columns(name)],
                        inspector.get_pk_constraint(name),
                        sorted(map(str, inspector.get_foreign_keys(name))),
                        sorted(map(str, inspector.get_unique_constraints(name))),
                        sorted(map(str, inspector.get_indexes(name))),
                    )
                    for name in names
                ]
            )
        engine.dispose()
    assert found[0] == found[1]


def test_a_hit_imports_neither_alembic_nor_filelock_nor_the_orm(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    script = f"""
import sys
from autojac.store import Key
assert "sqlalchemy" not in sys.modules, "the package is light until a store is made"
from autojac.store import PlanStore
op, env = Key({OP.digest!r}, {{}}), Key({ENV.digest!r}, {{}})
store = PlanStore({str(path)!r})
assert store.find(op, env) is not None
assert not {{"alembic", "filelock", "optuna", "sqlalchemy.orm"}} & set(sys.modules)
assert PlanStore({str(tmp_path / "new.db")!r}).clear() is None
assert not {{"alembic", "optuna", "sqlalchemy.orm"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], env=child_env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def child_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def test_rows_survive_a_column_of_the_wrong_type(tmp_path: Path) -> None:
    path = filled(tmp_path / "plans.db")
    execute(path, "UPDATE plans SET seconds = 'fast'")
    assert PlanStore(path).find(OP, ENV) == as_found(PLAN)
