"""Rows to plans and back. JSON only, and nothing in a row is trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from autojac.core.pattern import Pattern
from autojac.core.plan import Plan, Trial
from autojac.errors import AutojacError, kind_of
from autojac.store.keys import Key

R = TypeVar("R")
T = TypeVar("T")


class BadRowError(ValueError):
    """A row of the store does not hold what this version writes."""


@dataclass(frozen=True)
class StoredPlan:
    """A plan as the store keeps it.

    Attributes:
        id: number of the row; negative for a plan that only this process's memory holds.
        function_name: the function it was made for.
        op, env: what it computes and where; `.fields` are human-readable.
        plan: the plan, with its trials.
        created_at, updated_at: in UTC.
        refuted_reason: why it may not be used any more; None if it may.
    """

    id: int
    function_name: str
    op: Key
    env: Key
    plan: Plan
    created_at: datetime
    updated_at: datetime
    refuted_reason: str | None


def timestamp() -> str:
    """Return this moment as the store writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def plan_values(op: Key, env: Key, plan: Plan, function_name: str) -> dict[str, Any]:
    """Return the columns of a plan's row."""
    written = timestamp()
    return {
        "op_key": op.digest,
        "env_key": env.digest,
        "op": encode(op.fields),
        "env": encode(env.fields),
        "function_name": function_name,
        "plan": encode(plan.to_json()),
        "effort": plan.effort,
        "seconds": _finite(plan.seconds),
        "memory_bytes": plan.memory_bytes,
        "created_at": written,
        "updated_at": written,
        "refuted_reason": None,
        "finished": plan.finished,
    }


def trial_values(plan_id: int, trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Return the columns of a plan's trial rows."""
    return [
        {
            "plan_id": plan_id,
            "ordinal": ordinal,
            **trial.to_json(),
            "method": encode(trial.method),
            "dispersion": _finite(trial.dispersion),
            "predicted": _finite(trial.predicted),
        }
        for ordinal, trial in enumerate(trials)
    ]


def read_all(rows: Iterable[R], read: Callable[[R], T]) -> tuple[list[T], str | None]:
    """Return what is read from the rows that can be, and why the last of the others can't; None if there are none."""
    found, problem = [], None
    for row in rows:
        try:
            found.append(read(row))
        except BadRowError as error:
            problem = str(error)
    return found, problem


def read_plan(text: Any, patterns: Callable[[str], Pattern], trials: tuple[Trial, ...] = ()) -> Plan:
    """Return the plan in a row's JSON; `patterns` gives those that it names.

    Raises:
        BadRowError: it is not one.
    """
    data = decode(text)
    _check_method(data.get("method"))
    _check_numbers(data, "seconds", "default_seconds", "memory_bytes", "tuning_seconds", "jitter")
    if type(data.get("finished", True)) is not bool:
        raise BadRowError("`finished` is no boolean")
    batched, structure = data.get("batched"), data.get("structure")
    if not isinstance(batched, list) or not all(type(flag) is bool for flag in batched):
        raise BadRowError("`batched` is not a list of booleans")
    if not isinstance(structure, dict) or type(structure.get("sliceable")) is not bool:
        raise BadRowError("`structure` is not a structure")
    if not all(_is_texts(structure.get(name)) for name in ("effects", "evidence")):
        raise BadRowError("`structure` lists something other than text")
    try:
        return Plan.from_json(data, source="store", trials=trials, patterns=patterns)
    except (AutojacError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRowError(f"it does not describe a plan: {error}") from error


def read_trial(row: Mapping[str, Any]) -> Trial:
    """Return the trial in a row.

    Raises:
        BadRowError: it is not one.
    """
    method = decode(row["method"])
    _check_method(method)
    _check_numbers(row, "seconds", "dispersion", "memory_bytes", "predicted")
    if not isinstance(row["state"], str) or not isinstance(row["reason"], (str, type(None))):
        raise BadRowError("a trial's state or reason is not text")
    fields = {name: row[name] for name in ("state", "seconds", "dispersion", "memory_bytes", "reason", "predicted")}
    return Trial(method=method, **fields)


def read_stored(row: Mapping[str, Any], patterns: Callable[[str], Pattern], trials: tuple[Trial, ...]) -> StoredPlan:
    """Return the stored plan in a row.

    Raises:
        BadRowError: it is not one.
    """
    if not _is_texts([row[name] for name in ("op_key", "env_key", "function_name")]):
        raise BadRowError("a key or the function's name is not text")
    try:
        created, updated = (datetime.fromisoformat(row[name]) for name in ("created_at", "updated_at"))
    except (TypeError, ValueError) as error:
        raise BadRowError(f"a time can't be read: {error}") from error
    return StoredPlan(
        id=row["id"],
        function_name=row["function_name"],
        op=Key(row["op_key"], decode(row["op"])),
        env=Key(row["env_key"], decode(row["env"])),
        plan=read_plan(row["plan"], patterns, trials),
        created_at=created,
        updated_at=updated,
        refuted_reason=row["refuted_reason"],
    )


def encode(value: Any) -> str:
    """Return plain types as JSON, with None in the place of NaN and infinity."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    """Return the value with NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def decode(text: Any) -> dict[str, Any]:
    """Return the object in a JSON text.

    Raises:
        BadRowError: there is none.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"its JSON can't be read: {error}") from error
    if not isinstance(data, dict):
        raise BadRowError(f"its JSON holds {kind_of(data)}, not an object")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_method(method: Any) -> None:
    if not isinstance(method, dict) or not isinstance(method.get("method"), str):
        raise BadRowError("it names no method")
    for value in method.values():
        if isinstance(value, dict):
            _check_method(value)


def _check_numbers(data: Mapping[str, Any], *names: str) -> None:
    for name in names:
        value = data.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise BadRowError(f"`{name}` is {str(value)[:40]!r}, not a number")
