"""What is asked of the tables. Each function takes a connection inside a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autojac.core.pattern import Indices
from autojac.core.plan import EFFORTS, Plan, Trial, effort_rank
from autojac.store import arrays
from autojac.store.keys import Key
from autojac.store.records import (
    BadRowError,
    StoredPlan,
    plan_values,
    read_all,
    read_plan,
    read_stored,
    read_trial,
    timestamp,
    trial_values,
)
from autojac.store.tables import PLANS, TRIALS

T = TypeVar("T")


@dataclass(frozen=True)
class QueryResult(Generic[T]):
    """What a query found.

    Attributes:
        value: the answer.
        final: later databases need not be asked, although the answer is None.
        problem: why a row is ignored.
    """

    value: T
    final: bool = False
    problem: str | None = None


def find(connection: Connection, op: Key, env: Key) -> QueryResult[Plan | None]:
    """Return the plan of a key pair; final and None where it is refuted."""
    row = connection.execute(sa.select(PLANS.c.plan, PLANS.c.refuted_reason).where(_is(op, env))).first()
    if row is None:
        return QueryResult(None)
    if row.refuted_reason is not None:
        return QueryResult(None, final=True)
    try:
        return QueryResult(read_plan(row.plan, arrays.Patterns(connection)))
    except BadRowError as error:
        return QueryResult(None, problem=str(error))


def hints(connection: Connection, op: Key) -> QueryResult[list[Plan]]:
    """Return all plans of an operation that stand, latest first."""
    query = sa.select(PLANS.c.plan).where(PLANS.c.op_key == op.digest, PLANS.c.refuted_reason.is_(None))
    rows = connection.execute(query.order_by(PLANS.c.updated_at.desc(), PLANS.c.id.desc()))
    patterns = arrays.Patterns(connection)
    plans, problem = read_all(rows, lambda row: read_plan(row.plan, patterns))
    return QueryResult(plans, problem=problem)


def trials(connection: Connection, op: Key, env: Key) -> QueryResult[tuple[Trial, ...] | None]:
    """Return the trials of a key pair; None where it has no plan."""
    plan_id = connection.execute(sa.select(PLANS.c.id).where(_is(op, env))).scalar()
    if plan_id is None:
        return QueryResult(None)
    by_plan = _trials(connection, TRIALS.c.plan_id == plan_id)
    return QueryResult(tuple(by_plan.value.get(plan_id, ())), problem=by_plan.problem)


def find_row(connection: Connection, op: Key, env: Key) -> QueryResult[StoredPlan | None]:
    """Return the whole row of a key pair."""
    found = _find_rows(connection, _is(op, env))
    return QueryResult(found.value[0] if found.value else None, problem=found.problem)


def get(connection: Connection, plan_id: int) -> QueryResult[StoredPlan | None]:
    """Return the row of a number."""
    found = _find_rows(connection, PLANS.c.id == plan_id)
    return QueryResult(found.value[0] if found.value else None, problem=found.problem)


def listing(connection: Connection) -> QueryResult[list[StoredPlan]]:
    """Return every row that can be read, latest first."""
    return _find_rows(connection, sa.true())


def save(
    connection: Connection, op: Key, env: Key, plan: Plan, function_name: str, patterns: Mapping[str, bytes]
) -> None:
    """Insert or update a plan and replace its trials and patterns, unless one of a better search stands.

    Of a higher effort, or of the same one where that search was finished and this one was not.
    """
    values = plan_values(op, env, plan, function_name)
    stored_rank = sa.case({name: effort_rank(name) for name in EFFORTS}, value=PLANS.c.effort, else_=-1)
    plan_id = connection.execute(
        arrays.insert_into(connection, PLANS)
        .values(values)
        .on_conflict_do_update(
            index_elements=[PLANS.c.op_key, PLANS.c.env_key],
            set_={name: value for name, value in values.items() if name not in ("op_key", "env_key", "created_at")},
            where=sa.or_(
                PLANS.c.refuted_reason.is_not(None),
                stored_rank < effort_rank(plan.effort),
                sa.and_(
                    stored_rank == effort_rank(plan.effort),
                    sa.or_(sa.literal(plan.finished), sa.not_(PLANS.c.finished)),
                ),
            ),
        )
        .returning(PLANS.c.id)
    ).scalar()
    if plan_id is not None:
        connection.execute(sa.delete(TRIALS).where(TRIALS.c.plan_id == plan_id))
        if plan.trials:
            connection.execute(sa.insert(TRIALS), trial_values(plan_id, plan.trials))
        arrays.save_patterns(connection, plan_id, patterns)


def refute(connection: Connection, op: Key, env: Key, reason: str, standing: StoredPlan | None) -> None:
    """Mark a plan as refuted; one that only another database has is copied here first."""
    mark = sa.update(PLANS).where(_is(op, env)).values(refuted_reason=reason, updated_at=timestamp())
    if not connection.execute(mark).rowcount and standing is not None:
        save(connection, op, env, standing.plan, standing.function_name, arrays.pack_patterns(standing.plan))
        connection.execute(mark)


def remove(connection: Connection, plan_id: int) -> bool:
    """Delete one plan with its trials; return whether there was one."""
    connection.execute(sa.delete(TRIALS).where(TRIALS.c.plan_id == plan_id))
    named = arrays.forget(connection, plan_id)
    found = bool(connection.execute(sa.delete(PLANS).where(PLANS.c.id == plan_id)).rowcount)
    arrays.remove_unnamed(connection, named)
    return found


def clear(connection: Connection) -> None:
    """Delete everything."""
    arrays.clear(connection)
    connection.execute(sa.delete(TRIALS))
    connection.execute(sa.delete(PLANS))


def coloring(connection: Connection, key: str) -> QueryResult[dict[str, Indices] | None]:
    """Return the arrays of a coloring."""
    try:
        return QueryResult(arrays.coloring(connection, key))
    except BadRowError as error:
        return QueryResult(None, problem=str(error))


def _is(op: Key, env: Key) -> sa.ColumnElement[bool]:
    return sa.and_(PLANS.c.op_key == op.digest, PLANS.c.env_key == env.digest)


def _trials(connection: Connection, condition: sa.ColumnElement[bool]) -> QueryResult[dict[int, list[Trial]]]:
    rows = connection.execute(sa.select(TRIALS).where(condition).order_by(TRIALS.c.plan_id, TRIALS.c.ordinal))
    pairs, problem = read_all(rows, lambda row: (row.plan_id, read_trial(row._asdict())))
    by_plan: dict[int, list[Trial]] = {}
    for plan_id, trial in pairs:
        by_plan.setdefault(plan_id, []).append(trial)
    return QueryResult(by_plan, problem=problem)


def _find_rows(connection: Connection, condition: sa.ColumnElement[bool]) -> QueryResult[list[StoredPlan]]:
    by_plan = _trials(connection, TRIALS.c.plan_id.in_(sa.select(PLANS.c.id).where(condition)))
    patterns = arrays.Patterns(connection)
    query = sa.select(PLANS).where(condition).order_by(PLANS.c.updated_at.desc(), PLANS.c.id.desc())
    plans, problem = read_all(
        connection.execute(query),
        lambda row: read_stored(row._asdict(), patterns, tuple(by_plan.value.get(row.id, ()))),
    )
    return QueryResult(plans, problem=problem or by_plan.problem)
