"""The tables of a plan store."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSIONS = ("0001", "0002", "0003")
"""Alembic's revisions from first to head, so that a store is recognised and made without importing Alembic."""
VERSION_TABLE = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""Where Alembic keeps the revision of a schema, as it makes it itself."""


class Base(DeclarativeBase):
    """The tables' common registry; constraints have names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class PlanRow(Base):
    """One plan. JSON and times are text, so that one bad value can't keep the other rows from being read."""

    __tablename__ = "plans"
    __table_args__ = (UniqueConstraint("op_key", "env_key"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    op_key: Mapped[str] = mapped_column(String(64))
    env_key: Mapped[str] = mapped_column(String(64))
    op: Mapped[str] = mapped_column(Text)
    env: Mapped[str] = mapped_column(Text)
    function_name: Mapped[str] = mapped_column(Text)
    plan: Mapped[str] = mapped_column(Text)
    effort: Mapped[str] = mapped_column(String(16))
    seconds: Mapped[float | None] = mapped_column(Float)
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[str] = mapped_column(String(40))
    updated_at: Mapped[str] = mapped_column(String(40))
    refuted_reason: Mapped[str | None] = mapped_column(Text)
    finished: Mapped[bool] = mapped_column(Boolean, server_default=sa.true())


class TrialRow(Base):
    """One candidate's fate in the search that made a plan."""

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("plan_id", "ordinal"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    plan_id: Mapped[int] = mapped_column(ForeignKey("plans.id", ondelete="CASCADE"))
    ordinal: Mapped[int] = mapped_column(Integer)
    method: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    seconds: Mapped[float | None] = mapped_column(Float)
    dispersion: Mapped[float | None] = mapped_column(Float)
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    reason: Mapped[str | None] = mapped_column(Text)
    predicted: Mapped[float | None] = mapped_column(Float)


class EnvironmentRow(Base):
    """What was measured of a processor, an accelerator and a version of torch, for the cost model."""

    __tablename__ = "environments"

    env_key: Mapped[str] = mapped_column(String(64), primary_key=True)
    env: Mapped[str] = mapped_column(Text)
    measured: Mapped[str] = mapped_column(Text)
    updated_at: Mapped[str] = mapped_column(String(40))


class ArraysRow(Base):
    """A pattern of zeros, or a coloring of one, as an archive of plain arrays."""

    __tablename__ = "arrays"

    pattern: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[str] = mapped_column(String(40))


class PlanPatternRow(Base):
    """A pattern that a plan's structure names; what no plan names any more is deleted."""

    __tablename__ = "plan_patterns"

    plan_id: Mapped[int] = mapped_column(ForeignKey("plans.id", ondelete="CASCADE"), primary_key=True)
    pattern: Mapped[str] = mapped_column(String(64), primary_key=True)
