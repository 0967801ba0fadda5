"""Calls of a database whose faults are values, so that nothing raised later carries a driver's message along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import sqlalchemy as sa

from autojac.store.database import NewerSchemaError

T = TypeVar("T")
FAULTS: Final = (sa.exc.SQLAlchemyError, NewerSchemaError, OSError, ImportError, ValueError)


@dataclass(frozen=True)
class DatabaseFault:
    """What a database raised."""

    error: Exception


def value_or_fault(action: Callable[[], T]) -> T | DatabaseFault:
    """Return what an action returns, or the fault of a database that it raised.

    To be handled outside of the `except`: whatever is raised inside, a warning too, carries the fault as its context,
    and so the message as a driver wrote it, passwords included.
    """
    try:
        return action()
    except FAULTS as error:
        return DatabaseFault(error)
