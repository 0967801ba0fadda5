"""Where plans are kept: what a location means, and which one is meant when nobody says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote, quote_plus

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

HIDDEN: Final = "***"
_EXPECTED: Final = "expected a path, ':memory:' or a URL such as postgresql+psycopg://user:password@host:5432/database"
_SCHEME: Final = re.compile(r"[A-Za-z]\w+(?=[\w+]*://)")
# What was meant for a URL, by its slashes, its user in front of a host (behind no drive letter), or its parameters.
_MAY_HIDE: Final = re.compile(r"://|(?<!^[A-Za-z]):.*@|(?:pass\w*|pwd|token|secret)\s*=", re.I | re.S)
_PLAIN: Final = re.compile(r"[\w.,:/ ~+-]*")
_PLACES: Final = frozenset({"host", "hostaddr", "port"})
"""Query parameters of a URL that say where a server is; all others may be secrets, or lead to them."""

_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"}
)


def default_location() -> str | None:
    """Return AUTOJAC_STORE, else a file in the user's cache directory; None for a user without a home."""
    if told := os.environ.get("AUTOJAC_STORE"):
        return told
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("autojac", appauthor=False)
    except (RuntimeError, OSError):
        return None
    # Without HOME and without an entry for the user, "~" stays as it is.
    return str(folder / "plans.db") if folder.is_absolute() else None


def shared_urls() -> list[URL]:
    """Return the read-only databases of AUTOJAC_PLAN_PATH, in order."""
    return [_file_url(entry) for entry in os.environ.get("AUTOJAC_PLAN_PATH", "").split(os.pathsep) if entry]


def database_url(location: str) -> URL:
    """Return the URL of a path, of `:memory:`, or of what is a URL already.

    Raises:
        sqlalchemy.exc.ArgumentError: it is none of these; the message does not repeat it.
    """
    if location == ":memory:":
        return URL.create("sqlite")
    if re.match(r"[\w+]+://", location):
        try:
            return make_url(location)
        except (ArgumentError, ValueError):
            pass  # raised again outside, since what is raised here quotes parts of the URL
    elif not _MAY_HIDE.search(location):
        return _file_url(location)
    raise ArgumentError(f"{_EXPECTED}, with @ : / in a password written as %40 %3A %2F; check its spelling and port")


def _file_url(path: str) -> URL:
    return URL.create("sqlite", database=str(Path(path).expanduser().absolute()))


def readable_location(location: str | URL) -> str:
    """Return a human-readable location, without a password: the one way in which locations are shown.

    Of a URL, it is the scheme, the user, the host and the database, each only where nothing hints at a misplaced
    password, and of the query what says where a server is. Of what can't be parsed, it is the scheme.
    """
    try:
        url = database_url(location) if isinstance(location, str) else location
    except ArgumentError:
        scheme = _SCHEME.match(str(location))
        return f"{scheme[0]}://{HIDDEN}" if scheme else HIDDEN
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            return ":memory:"
        path = str(Path(url.database).absolute())
        return f"sqlite:///{HIDDEN}" if _MAY_HIDE.search(path) else path
    places = {key: value for key, value in url.query.items() if _is_place(key, value)}
    parts = (url.host or "", url.database or "", url.username or "")
    if not _plain(*parts):
        return f"{url.drivername}://{HIDDEN}"
    known = URL.create(url.drivername, host=url.host, port=url.port, database=url.database, query=places)
    text = known.render_as_string()
    if url.username or url.password:
        # alone, what stands where a user's name is expected may be a token
        user = f"{url.username}:{HIDDEN}" if url.username and url.password else HIDDEN
        text = text.replace("://", f"://{user}@", 1)
    if len(places) < len(url.query):
        text += f"{'&' if places else '?'}{HIDDEN}"
    return text


def without_passwords(text: str) -> str:
    """Return a message with each URL of a database in it as it is shown."""
    return re.sub(r"\b(?!https?:)[\w+]+://(?:.*[@?])?\S*", lambda found: readable_location(found[0]), text, flags=re.S)


def hider(location: str | URL) -> Callable[[str], str]:
    """Return what removes a location's secrets from messages: drivers and SQLAlchemy quote what they can't use."""
    try:
        url = database_url(location) if isinstance(location, str) else location
    except ArgumentError:
        return lambda text: text  # nothing was ever done with it
    hidden = [value for key, value in url.query.items() if not _is_place(key, value)]
    secrets = [url.password or url.username, *(v for value in hidden for v in _list_setting(value))]
    if not _plain(url.host or "", url.database or "", url.username or ""):
        secrets += [url.host, url.database, url.username]
    forms = {form for secret in secrets if secret for form in _forms(str(secret))}
    # Short ones only as words of their own: everything else would be full of stars.
    listed = [re.escape(form) if len(form) > 3 else rf"(?<!\w){re.escape(form)}(?!\w)" for form in forms]
    pattern = re.compile("|".join(sorted(listed, key=len, reverse=True)))
    return lambda text: pattern.sub(HIDDEN, text) if listed else text


def _forms(secret: str) -> set[str]:
    """Return how a secret may be spelled in a message."""
    return {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1]}


def _is_place(key: str, value: str | tuple[str, ...]) -> bool:
    return key in _PLACES and _plain(*_list_setting(value))


def _list_setting(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _plain(*parts: str) -> bool:
    return all(_PLAIN.fullmatch(part) for part in parts)


def on_network(path: Path) -> bool:
    """Check whether a file lies on a file system that processes on several machines may share."""
    kind = _file_system(path)
    return kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")


def _file_system(path: Path) -> str:
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return ""
    folder = path.parent.resolve()
    holding = [entry for entry in mounts if folder.is_relative_to(entry[1])]
    return max(holding, key=lambda entry: len(entry[1]), default=["", "", ""])[2]
