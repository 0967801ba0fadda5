"""Where plans are remembered, from one process to the next and from one machine to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autojac.store.keys import Key, environment_key, operation_key

if TYPE_CHECKING:
    from autojac.store.records import StoredPlan
    from autojac.store.store import PlanStore

__all__ = ["Key", "PlanStore", "StoredPlan", "environment_key", "operation_key"]


def __getattr__(name: str) -> Any:
    # SQLAlchemy takes 0.2 s to import, and keys are made without it.
    if name == "PlanStore":
        from autojac.store.store import PlanStore

        return PlanStore
    if name == "StoredPlan":
        from autojac.store.records import StoredPlan

        return StoredPlan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
