"""Patterns and colorings in the tables. Each function takes a connection inside a transaction."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autojac.core.pattern import Indices, Pattern, unpack
from autojac.core.plan import Plan
from autojac.store.records import BadRowError, timestamp
from autojac.store.tables import ARRAYS, PLAN_PATTERNS

_PATTERN: Final = "pattern"
"""The kind of the row that holds a pattern itself."""


def insert_into(connection: Connection, table: sa.FromClause) -> Any:
    """Return an insertion that can update the row that is there; both databases' dialects have their own."""
    # PostgreSQL's takes 60 ms to import, which a process that uses SQLite should not pay
    return importlib.import_module(f"sqlalchemy.dialects.{connection.dialect.name}").insert(table)


class Patterns:
    """The stored patterns by their keys, each read once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._read: dict[str, Pattern] = {}

    def __call__(self, key: str) -> Pattern:
        """Return the pattern of a key.

        Raises:
            BadRowError: it is not stored, or not what the key says.
        """
        if key not in self._read:
            data = _load(self._connection, key, _PATTERN)
            if data is None:
                raise BadRowError(f"its pattern {str(key)[:12]} is not stored")
            try:
                pattern = Pattern.from_bytes(data)
            except ValueError as error:
                raise BadRowError(f"its pattern {key[:12]} can't be used: {error}") from error
            if pattern.key != key:
                raise BadRowError(f"its pattern {key[:12]} is another one")
            self._read[key] = pattern
        return self._read[key]


def pack_patterns(plan: Plan) -> dict[str, bytes]:
    """Return the patterns of a plan by their keys, as they are stored."""
    sparsity = plan.structure.sparsity
    return {pattern.key: pattern.to_bytes() for pattern in (sparsity.parts() if sparsity else {}).values()}


def save_patterns(connection: Connection, plan_id: int, patterns: Mapping[str, bytes]) -> None:
    """Keep the patterns of a plan instead of those that it had."""
    before = forget(connection, plan_id)
    for key, data in patterns.items():
        _save(connection, key, _PATTERN, data)
        connection.execute(sa.insert(PLAN_PATTERNS).values(plan_id=plan_id, pattern=key))
    remove_unnamed(connection, before)


def forget(connection: Connection, plan_id: int) -> list[str]:
    """Delete which patterns a plan names, and return their keys."""
    those = PLAN_PATTERNS.c.plan_id == plan_id
    keys = list(connection.execute(sa.select(PLAN_PATTERNS.c.pattern).where(those)).scalars())
    connection.execute(sa.delete(PLAN_PATTERNS).where(those))
    return keys


def remove_unnamed(connection: Connection, keys: Iterable[str]) -> None:
    """Delete those of some patterns, with their colorings, that no plan names."""
    unnamed = ARRAYS.c.pattern.not_in(sa.select(PLAN_PATTERNS.c.pattern))
    connection.execute(sa.delete(ARRAYS).where(ARRAYS.c.pattern.in_(list(keys)), unnamed))


def clear(connection: Connection) -> None:
    """Delete everything."""
    connection.execute(sa.delete(PLAN_PATTERNS))
    connection.execute(sa.delete(ARRAYS))


def coloring(connection: Connection, key: str) -> dict[str, Indices] | None:
    """Return the arrays of a coloring; None if there is none.

    Args:
        connection: to the database.
        key: the pattern's key, a colon, and the kind of coloring.

    Raises:
        BadRowError: it can't be read.
    """
    pattern, _, kind = key.partition(":")
    data = _load(connection, pattern, kind)
    try:
        return None if data is None else unpack(data)
    except ValueError as error:
        raise BadRowError(f"a coloring can't be used: {error}") from error


def save_coloring(connection: Connection, key: str, data: bytes) -> None:
    """Keep a packed coloring."""
    pattern, _, kind = key.partition(":")
    _save(connection, pattern, kind, data)


def _load(connection: Connection, pattern: str, kind: str) -> bytes | None:
    # Untyped, since SQLAlchemy would turn a number in the place of bytes into as many zeros.
    column: sa.ColumnElement[Any] = sa.type_coerce(ARRAYS.c.data, sa.types.NullType())
    data = connection.execute(sa.select(column).where(ARRAYS.c.pattern == pattern, ARRAYS.c.kind == kind)).scalar()
    if data is not None and not isinstance(data, bytes):
        raise BadRowError(f"its arrays are stored as {type(data).__name__}")
    return data


def _save(connection: Connection, pattern: str, kind: str, data: bytes) -> None:
    # What was there may be damaged, so it is replaced although the key says what is in it.
    values = {"pattern": pattern, "kind": kind, "data": data, "created_at": timestamp()}
    connection.execute(
        insert_into(connection, ARRAYS)
        .values(values)
        .on_conflict_do_update(
            index_elements=[ARRAYS.c.pattern, ARRAYS.c.kind],
            set_={name: values[name] for name in ("data", "created_at")},
        )
    )
