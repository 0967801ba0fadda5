"""One database: how it is opened, what its faults mean, how its schema is made."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import NullPool, StaticPool

from autojac.store.location import on_network
from autojac.store.tables import METADATA, SCHEMA_VERSIONS, VERSION_TABLE
from autojac.store.uninterruptible import run_uninterrupted

T = TypeVar("T")
Fault = Literal["corrupt", "missing", "readonly", "unreachable"]
Mode = Literal["rw", "rwc", "ro", "immutable"]


class NewerSchemaError(Exception):
    """The database was written by a later autojac."""


def fault_of(error: BaseException) -> Fault:
    """Return what kind of fault a database error is."""
    text = str(getattr(error, "orig", None) or error).lower()
    if "not a database" in text or "malformed" in text:
        return "corrupt"
    if "no such table" in text or "no such column" in text or "does not exist" in text:
        return "missing"
    if isinstance(error, PermissionError) or "readonly" in text or "read-only" in text or "unable to open" in text:
        return "readonly"
    return "unreachable"


class Database:
    """A SQLite file, an in-memory SQLite database or a database server, with no connection kept open.

    Args:
        url: where it is; `sqlite://` is memory.
        timeout_s: how long to wait for another process's lock.
        writable: whether this process may write; a shared plan path is only read.

    Attributes:
        newer: the revision of a schema that only a later autojac knows; such tables are read, not written.
    """

    def __init__(self, url: URL, timeout_s: float, writable: bool = True) -> None:
        self.url = url
        self.writable = writable
        self.timeout_s = timeout_s
        sqlite = url.get_backend_name() == "sqlite"
        self.in_memory = sqlite and url.database in (None, "", ":memory:")
        self.path = Path(url.database).absolute() if sqlite and not self.in_memory and url.database else None
        self._guard: AbstractContextManager[Any] = threading.RLock() if self.in_memory else nullcontext()
        self._engines: dict[Mode, Engine] = {}
        self._current = False
        self.newer: str | None = None

    def read(self, work: Callable[[Connection], T], empty: T) -> T:
        """Run a query; `empty` is the answer of a database that does not exist yet.

        Raises:
            NewerSchemaError, sqlalchemy.exc.SQLAlchemyError, OSError: it can't be read.
        """
        return run_uninterrupted(lambda: self._read(work, empty)) if self._exists() else empty

    def _exists(self) -> bool:
        """Check whether there may be tables to read."""
        if self.in_memory:
            return self._current
        return self.path is None or (self.path.exists() and self.path.stat().st_size > 0)

    def _read(self, work: Callable[[Connection], T], empty: T) -> T:
        modes: tuple[Mode, ...] = ("rw", "ro", "immutable") if self.writable else ("ro", "immutable")
        for mode in modes:
            try:
                with self._connect(mode, immediate=False) as connection:
                    if self._current or self._find_schema(connection):
                        return work(connection)
                    return empty
            except sa.exc.DatabaseError as error:
                fault = fault_of(error)
                gone = fault == "readonly" and self.path is not None and not self.path.exists()
                if fault == "missing" or gone:  # moved away, or replaced by a file without our tables
                    self._current = False
                    return empty
                if self.path is None or mode == modes[-1] or fault != "readonly":
                    raise
        raise AssertionError("the last mode returns or raises")

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run a change in one transaction, making or upgrading the schema first where needed.

        Raises:
            NewerSchemaError, sqlalchemy.exc.SQLAlchemyError, OSError: it can't be written.
        """
        return run_uninterrupted(lambda: self._change(work))

    def _change(self, work: Callable[[Connection], T]) -> T:
        if self.path is not None and not self.path.exists():
            self._current = False
        try:
            if self._current or self._has_current_schema():
                return self._write(work)
        except sa.exc.DatabaseError as error:
            # What can't be opened may have been moved away at this moment; behind the lock it is seen for sure.
            if fault_of(error) not in ("missing", "readonly"):
                raise
        self._make_schema()
        return self._write(work)

    def _write(self, work: Callable[[Connection], T]) -> T:
        with self._connect("rw", immediate=True) as connection:
            return work(connection)

    def _find_schema(self, connection: Connection) -> bool:
        """Check whether there are tables to read; note whether they are this version's."""
        version = self._schema_version(connection)
        self._current = version == SCHEMA_VERSIONS[-1]
        if version is not None and version not in SCHEMA_VERSIONS:
            self.newer = version[:40]
        return version is not None

    def _schema_version(self, connection: Connection) -> str | None:
        try:
            version = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        except sa.exc.DatabaseError as error:
            if fault_of(error) != "missing":
                raise
            return None
        return None if version is None else str(version)

    def _has_current_schema(self) -> bool:
        if not self._exists():
            return False
        with self._connect("rw", immediate=False) as connection:
            self._find_schema(connection)
        if self.newer:
            raise NewerSchemaError(f"it has schema {self.newer!r} and this autojac knows up to {SCHEMA_VERSIONS[-1]!r}")
        return self._current

    def quarantine(self) -> Path | None:
        """Move a corrupt file out of the way, unless another process already did.

        Returns:
            Where it is now; None if the file is sound again.

        Raises:
            OSError: it can't be moved.
        """
        return run_uninterrupted(self._quarantine)

    def _quarantine(self) -> Path | None:
        assert self.path is not None
        with self._schema_lock():
            if self._is_sound():
                return None
            number = 1
            while (target := self.path.with_name(f"{self.path.name}.corrupt-{number}")).exists():
                number += 1
            self.path.replace(target)
            for suffix in ("-wal", "-shm", "-journal"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self._current = False
        return target

    def _is_sound(self) -> bool:
        try:
            with self._connect("rw", immediate=False) as connection:
                return bool(connection.execute(sa.text("PRAGMA quick_check(1)")).scalar() == "ok")
        except sa.exc.DatabaseError as error:
            return fault_of(error) != "corrupt"

    def _make_schema(self) -> None:
        if self.in_memory:
            with self._guard:
                if not self._current:
                    with self._connect("rwc", immediate=True) as connection:
                        METADATA.create_all(connection, checkfirst=False)
                    self._current = True
            return
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._schema_lock():
            if not self._has_current_schema():
                if self.path is not None:
                    self._choose_journal()
                try:
                    self._migrate()
                except sa.exc.DatabaseError:  # the lock does not reach another host that migrates the same server
                    if not self._has_current_schema():
                        raise
        self._current = True

    def _migrate(self) -> None:
        """Make the tables, or bring those of an earlier autojac up to date."""
        with self._connect("rwc", immediate=True) as connection:
            if not {*METADATA.tables, VERSION_TABLE.name} & {*sa.inspect(connection).get_table_names()}:
                METADATA.create_all(connection)
                VERSION_TABLE.create(connection)
                connection.execute(VERSION_TABLE.insert().values(version_num=SCHEMA_VERSIONS[-1]))
                return
            # takes as long to import as a small search
            from alembic import command
            from alembic.config import Config

            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _choose_journal(self) -> None:
        # With a write-ahead log readers and writers don't wait for each other, but it needs memory shared by them all.
        if self.path is None or on_network(self.path):
            return
        # Where a log can't be had, the journal that SQLite has by default does.
        with (
            suppress(sqlite3.OperationalError),
            closing(sqlite3.connect(self.path, timeout=self.timeout_s)) as connection,
        ):
            connection.execute("PRAGMA journal_mode=WAL")

    @contextmanager
    def _schema_lock(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        if self.path is not None:
            file = self.path.with_name(self.path.name + ".lock")
        else:
            name = sha256(self.url.render_as_string(hide_password=True).encode()).hexdigest()[:16]
            file = Path(tempfile.gettempdir()) / f"autojac-{name}.lock"
        file.touch()  # FileLock waits for a file that can't be made, as if another process held it
        try:
            with FileLock(file, timeout=self.timeout_s):
                yield
        except Timeout as error:
            raise TimeoutError(f"another process held {file.name} for {self.timeout_s:g} s") from error

    @contextmanager
    def _connect(self, mode: Mode, immediate: bool) -> Iterator[Connection]:
        with self._guard, self._engine(mode).connect() as connection:
            connection.execution_options(immediate=immediate)
            with connection.begin():
                yield connection

    def _engine(self, mode: Mode) -> Engine:
        if self.in_memory:
            mode = "rwc"
        if mode not in self._engines:
            self._engines[mode] = self._make_engine(mode)
        return self._engines[mode]

    def _make_engine(self, mode: Mode) -> Engine:
        if self.path is None and not self.in_memory:
            # No pool: connections must not outlive a fork, and a look-up happens once a signature.
            wait = max(2, min(10, round(self.timeout_s)))
            options = {"connect_timeout": wait} if self.url.get_backend_name() == "postgresql" else {}
            return sa.create_engine(self.url, poolclass=NullPool, connect_args=options)
        target = ":memory:" if self.path is None else f"{self.path.as_uri()}?{_URI_QUERY[mode]}"
        timeout_s = self.timeout_s

        def connect() -> sqlite3.Connection:
            # No implicit transactions: `begin` says which kind each one is.
            connection = sqlite3.connect(
                target, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )
            try:
                connection.execute("PRAGMA foreign_keys=ON")
                connection.execute("PRAGMA synchronous=NORMAL")
            except BaseException:  # a corrupt file is opened without complaint
                connection.close()
                raise
            return connection

        def begin(connection: Connection) -> None:
            immediate = connection.get_execution_options().get("immediate")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

        engine = sa.create_engine("sqlite://", creator=connect, poolclass=StaticPool if self.in_memory else NullPool)
        sa.event.listen(engine, "begin", begin)
        if self.in_memory:  # its one connection stays open as long as the database; what is closed late warns
            weakref.finalize(self, engine.dispose)
        return engine


_URI_QUERY: Final[dict[Mode, str]] = {
    "rw": "mode=rw",
    "rwc": "mode=rwc",
    "ro": "mode=ro",
    "immutable": "mode=ro&immutable=1",
}
