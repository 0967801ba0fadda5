"""The plan store: what a training loop may rely on, whatever happens to the file underneath."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from autojac.core.pattern import Indices, pack
from autojac.core.plan import Plan, Trial
from autojac.errors import StoreError, StoreWarning, warn
from autojac.store import arrays, environments, queries
from autojac.store.database import Database, NewerSchemaError, fault_of
from autojac.store.faults import FAULTS, DatabaseFault, value_or_fault
from autojac.store.keys import Key
from autojac.store.location import database_url, default_location, hider, readable_location, shared_urls
from autojac.store.records import StoredPlan

T = TypeVar("T")


class PlanStore:
    """Plans by operation and environment, in a database that may fail without stopping anybody.

    `listing`, `get`, `remove` and `clear` are what people call at a prompt, and raise `StoreError` for a fault of the
    database. All else never raises for one: it is told once as a `StoreWarning`, and this process goes on in memory.
    Nothing is opened before it is needed.

    Args:
        location: path of a SQLite file, `:memory:`, or a database URL; by default what AUTOJAC_STORE says, else
            a file in the platform's cache directory.
        timeout_s: how long to wait for another process's lock.
    """

    def __init__(self, location: str | os.PathLike[str] | None = None, *, timeout_s: float = 30.0) -> None:
        self._location = location
        self._timeout_s = timeout_s
        self._told: set[str] = set()
        self._memory = Database(database_url(":memory:"), timeout_s)
        self._overlaid = False
        self._read_only = False
        self._fault: str | None = None
        self._main: Database | None = None
        self._shared = [Database(url, timeout_s, writable=False) for url in shared_urls()]
        text = default_location() if location is None else os.fspath(location)
        self._name = readable_location(text) if text else "the user's cache directory"
        self._hide = hider(text or "")
        try:
            if text is None:
                raise FileNotFoundError("this user has no home directory; set AUTOJAC_STORE to a path")
            self._main = Database(database_url(text), timeout_s)
        except FAULTS as error:
            self._fault = self._sentence(error)

    def __repr__(self) -> str:
        return f"PlanStore({self.description!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same place in another process; a connection does not travel."""
        return functools.partial(PlanStore, timeout_s=self._timeout_s), (self._location,)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanStore:
        """Return the store itself: it is a place, and its copies would be too."""
        return self

    @property
    def description(self) -> str:
        """Where the plans live, for messages, without a password in it."""
        if self._main is None:
            return f"memory, because {self._name} can't be used ({self._fault})"
        if self._read_only:
            return f"{self._name}, read-only"
        return self._name

    def find(self, op: Key, env: Key) -> Plan | None:
        """Return the plan for an operation in an environment, without its trials; None if there is none to trust."""
        return self._first(lambda connection: queries.find(connection, op, env))

    def hints(self, op: Key) -> list[Plan]:
        """Return plans for the same operation in any environment, latest first: worth trying, not worth trusting."""
        kept: dict[str, Plan] = {}
        nothing: queries.QueryResult[list[Plan]] = queries.QueryResult([])
        for base in self._bases():
            for plan in self._tell(self._safely(base, lambda connection: queries.hints(connection, op), nothing)):
                kept.setdefault(str(plan.method), plan)
        return list(kept.values())

    def trials(self, op: Key, env: Key) -> tuple[Trial, ...]:
        """Return the trials of the search that made a plan, in the order they were run."""
        return self._first(lambda connection: queries.trials(connection, op, env)) or ()

    def save(self, op: Key, env: Key, plan: Plan, function_name: str) -> None:
        """Keep a plan with its trials and patterns, unless one of higher effort that still stands is kept already.

        Args:
            op, env: what it computes and where.
            plan: the plan; its trials and patterns replace those kept before.
            function_name: human-readable.
        """
        patterns = arrays.pack_patterns(plan)  # which takes a second for a million samples, and others would wait
        self._write(lambda connection: queries.save(connection, op, env, plan, function_name, patterns))

    def refute(self, op: Key, env: Key, reason: str) -> None:
        """Never find a plan again, unless it is saved again.

        Args:
            op, env: what it computes and where.
            reason: what was seen, as a sentence.
        """
        standing = self._first(lambda connection: queries.find_row(connection, op, env))
        self._write(lambda connection: queries.refute(connection, op, env, reason, standing))

    def coloring(self, key: str) -> dict[str, Indices] | None:
        """Return the arrays of a coloring; None if there is none that can be read.

        Args:
            key: the pattern's key, a colon, and the kind of coloring.
        """
        return self._first(lambda connection: queries.coloring(connection, key))

    def save_coloring(self, key: str, colors: Mapping[str, Indices]) -> None:
        """Keep a coloring until the last plan that names its pattern is removed.

        Args:
            key: the pattern's key, a colon, and the kind of coloring, of 16 characters at most.
            colors: arrays by name.
        """
        data = pack(**colors)
        self._write(lambda connection: arrays.save_coloring(connection, key, data))

    def environment(self, env: Key) -> dict[str, Any] | None:
        """Return what was measured of an environment, as plain JSON types; None if nothing was, or can be read."""
        return self._first(lambda connection: environments.read_environment(connection, env))

    def save_environment(self, env: Key, measured: Mapping[str, Any]) -> None:
        """Keep what was measured of an environment, plain JSON types, instead of what was before."""
        self._write(lambda connection: environments.write_environment(connection, env, measured))

    def predictions(self, env: Key, most: int = 500) -> tuple[Trial, ...]:
        """Return the latest trials in an environment that were both predicted and timed."""
        return self._first(lambda connection: environments.predictions(connection, env, most)) or ()

    def listing(self) -> list[StoredPlan]:
        """Return every plan kept, latest first, with its trials.

        Raises:
            StoreError: the store can't be read.
        """
        nothing: queries.QueryResult[list[StoredPlan]] = queries.QueryResult([])
        base = self._require()
        kept = self._tell(self._ask(lambda: base.read(queries.listing, nothing)))
        own = self._memory.read(queries.listing, nothing).value if self._overlaid and base is not self._memory else []
        return [replace(plan, id=-plan.id) for plan in own] + kept

    def get(self, plan_id: int) -> StoredPlan:
        """Return one plan with its trials.

        Raises:
            StoreError: there is no such plan, or the store can't be read.
        """
        base, number = self._row(plan_id)
        nothing: queries.QueryResult[StoredPlan | None] = queries.QueryResult(None)
        plan = self._tell(self._ask(lambda: base.read(lambda c: queries.get(c, number), nothing)))
        if plan is None:
            raise self._unknown(plan_id)
        return replace(plan, id=plan_id)

    def remove(self, plan_id: int) -> None:
        """Forget one plan with its trials, and the patterns and colorings that no other plan needs.

        Raises:
            StoreError: there is no such plan, or the store can't be written.
        """
        base, number = self._row(plan_id)
        if not self._ask(lambda: base.write(lambda connection: queries.remove(connection, number))):
            raise self._unknown(plan_id)

    def clear(self) -> None:
        """Forget every plan, pattern and coloring.

        Raises:
            StoreError: the store can't be written.
        """
        if self._overlaid:
            self._memory.write(queries.clear)
        self._ask(lambda: self._require().write(queries.clear))

    def _bases(self) -> list[Database]:
        # Memory first: it holds what this process could not write, refutations included.
        own = [self._main] if self._main else []
        return [*([self._memory] if self._overlaid or not own else []), *own, *self._shared]

    def _first(self, query: Callable[[Connection], queries.QueryResult[T | None]]) -> T | None:
        if self._main is None:
            self._warn("fault", f"{self._name} can't be used ({self._fault}); plans live in memory for this process")
        nothing: queries.QueryResult[T | None] = queries.QueryResult(None)
        for base in self._bases():
            found = self._safely(base, query, nothing)
            value = self._tell(found)
            if value is not None or found.final:
                return value
        return None

    def _safely(self, base: Database, query: Callable[[Connection], T], empty: T) -> T:
        result = value_or_fault(lambda: base.read(query, empty))
        if not isinstance(result, DatabaseFault):
            if base is self._main and base.newer and not self._read_only:
                self._main_failed(base, NewerSchemaError(f"it has schema {base.newer!r}, made by a later autojac"))
            return result
        if base is self._main:
            self._main_failed(base, result.error, reading=True)
        else:
            self._shared = [other for other in self._shared if other is not base]
            why = f"the shared plans in {readable_location(base.url)} can't be read ({self._sentence(result.error)})"
            self._warn("shared", f"{why}; they are ignored. Correct AUTOJAC_PLAN_PATH")
        return empty

    def _write(self, change: Callable[[Connection], Any]) -> None:
        for _ in range(2):  # once more where a fresh file took the place of a corrupt one
            if self._main is None or self._read_only:
                break
            result = value_or_fault(functools.partial(self._main.write, change))
            if not isinstance(result, DatabaseFault):
                return
            self._main_failed(self._main, result.error)
        self._overlaid = True
        self._memory.write(change)
        if self._main is None:
            self._warn("fault", f"{self._name} can't be used ({self._fault}); plans live in memory for this process")

    def _main_failed(self, main: Database, error: Exception, reading: bool = False) -> None:
        """Settle what becomes of the main database, then warn: a warning may be made an error by a filter."""
        if main.path is not None and fault_of(error) == "corrupt":
            try:
                moved = main.quarantine()
            except FAULTS as problem:
                error = problem
            else:
                if moved is not None:
                    now = Path(readable_location(str(moved))).name
                    self._warn("corrupt", f"{self._name} was corrupt; it is now {now} and a new store was started")
                    return
                if "corrupt" not in self._told:  # another process put it right
                    self._told.add("corrupt")
                    return
        self._fault = self._sentence(error)
        if reading:
            self._main = None
            self._warn("fault", f"{self._name} can't be read ({self._fault}); plans live in memory for this process")
        else:
            self._read_only = True
            self._warn("fault", f"{self._name} can't be written ({self._fault}); new plans live in memory")

    def _tell(self, found: queries.QueryResult[T]) -> T:
        if found.problem:
            self._warn("row", f"{self._name} holds a row that can't be used: {found.problem}; it is ignored")
        return found.value

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warn(message, StoreWarning)

    def _require(self) -> Database:
        if self._main is not None:
            return self._main
        if self._overlaid:
            return self._memory
        raise StoreError(f"{self._name} can't be used as a plan store: {self._fault}. Use another")

    def _row(self, plan_id: int) -> tuple[Database, int]:
        return (self._memory, -plan_id) if plan_id < 0 and self._overlaid else (self._require(), plan_id)

    def _unknown(self, plan_id: int) -> StoreError:
        return StoreError(f"{self._name} has no plan {plan_id}; `autojac plans list` shows those it has")

    def _ask(self, action: Callable[[], T]) -> T:
        result = value_or_fault(action)
        if isinstance(result, DatabaseFault):
            raise StoreError(f"{self._name} can't be used as a plan store: {self._sentence(result.error)}. Use another")
        return result

    def _sentence(self, error: BaseException) -> str:
        text = str(getattr(error, "orig", None) or error)
        if isinstance(error, OSError) and error.filename:
            text = error.strerror or ""  # without the path, which the store's name says
        text = self._hide(text).strip()
        return text.splitlines()[0][:200] if text else type(error).__name__
