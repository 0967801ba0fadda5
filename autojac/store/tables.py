"""The tables of a plan store, in SQLAlchemy's core alone: a first call should not wait for its ORM to be imported."""

from __future__ import annotations

import functools
from typing import Final

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Integer, LargeBinary, String, Text

SCHEMA_VERSIONS = ("0001", "0002", "0003")
"""Alembic's revisions from first to head, so that a store is recognised and made without importing Alembic."""
VERSION_TABLE = sa.Table(
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""Where Alembic keeps the revision of a schema, as it makes it itself."""

METADATA: Final = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)
"""All tables but Alembic's; constraints have names, so that migrations can change them."""

_required = functools.partial(sa.Column, nullable=False)

PLANS: Final = sa.Table(
    "plans",
    METADATA,
    sa.Column("id", Integer, primary_key=True),
    _required("op_key", String(64)),
    _required("env_key", String(64)),
    _required("op", Text),
    _required("env", Text),
    _required("function_name", Text),
    _required("plan", Text),
    _required("effort", String(16)),
    sa.Column("seconds", Float),
    sa.Column("memory_bytes", BigInteger),
    _required("created_at", String(40)),
    _required("updated_at", String(40)),
    sa.Column("refuted_reason", Text),
    _required("finished", Boolean, server_default=sa.true()),
    sa.UniqueConstraint("op_key", "env_key"),
)
"""One plan per row. JSON and times are text, so that one bad value can't keep the other rows from being read."""

TRIALS: Final = sa.Table(
    "trials",
    METADATA,
    sa.Column("id", Integer, primary_key=True),
    _required("plan_id", ForeignKey("plans.id", ondelete="CASCADE")),
    _required("ordinal", Integer),
    _required("method", Text),
    _required("state", String(16)),
    sa.Column("seconds", Float),
    sa.Column("dispersion", Float),
    sa.Column("memory_bytes", BigInteger),
    sa.Column("reason", Text),
    sa.Column("predicted", Float),
    sa.UniqueConstraint("plan_id", "ordinal"),
)
"""One candidate's fate per row, in the search that made a plan."""

ENVIRONMENTS: Final = sa.Table(
    "environments",
    METADATA,
    sa.Column("env_key", String(64), primary_key=True),
    _required("env", Text),
    _required("measured", Text),
    _required("updated_at", String(40)),
)
"""What was measured of a processor, an accelerator and a version of torch, for the cost model."""

ARRAYS: Final = sa.Table(
    "arrays",
    METADATA,
    sa.Column("pattern", String(64), primary_key=True),
    sa.Column("kind", String(16), primary_key=True),
    _required("data", LargeBinary),
    _required("created_at", String(40)),
)
"""A pattern of zeros, or a coloring of one, as an archive of plain arrays."""

PLAN_PATTERNS: Final = sa.Table(
    "plan_patterns",
    METADATA,
    sa.Column("plan_id", ForeignKey("plans.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("pattern", String(64), primary_key=True),
)
"""A pattern that a plan's structure names; what no plan names any more is deleted."""
