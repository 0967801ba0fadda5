"""What was measured of environments, and how trials there agreed with predictions, in the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autojac.core.plan import Trial
from autojac.store.arrays import insert_into
from autojac.store.keys import Key
from autojac.store.queries import QueryResult
from autojac.store.records import BadRowError, decode, encode, read_all, read_trial, timestamp
from autojac.store.tables import ENVIRONMENTS, PLANS, TRIALS


def read_environment(connection: Connection, env: Key) -> QueryResult[dict[str, Any] | None]:
    """Return what was measured of an environment."""
    query = sa.select(ENVIRONMENTS.c.measured).where(ENVIRONMENTS.c.env_key == env.digest)
    text = connection.execute(query).scalar()
    try:
        return QueryResult(None if text is None else decode(text))
    except BadRowError as error:
        return QueryResult(None, problem=str(error))


def write_environment(connection: Connection, env: Key, measured: Mapping[str, Any]) -> None:
    """Keep what was measured of an environment instead of what was before."""
    values = {"env": encode(env.fields), "measured": encode(measured), "updated_at": timestamp()}
    connection.execute(
        insert_into(connection, ENVIRONMENTS)
        .values(env_key=env.digest, **values)
        .on_conflict_do_update(index_elements=[ENVIRONMENTS.c.env_key], set_=values)
    )


def predictions(connection: Connection, env: Key, most: int) -> QueryResult[tuple[Trial, ...] | None]:
    """Return the latest trials in an environment that were both predicted and timed; None where there are none."""
    here = sa.select(PLANS.c.id).where(PLANS.c.env_key == env.digest)
    both = sa.and_(TRIALS.c.predicted.is_not(None), TRIALS.c.seconds.is_not(None))
    query = sa.select(TRIALS).where(TRIALS.c.plan_id.in_(here), both).order_by(TRIALS.c.id.desc()).limit(most)
    found, problem = read_all(connection.execute(query), lambda row: read_trial(row._asdict()))
    return QueryResult(tuple(found) or None, problem=problem)
