"""Where plans are kept: what a location means, and which one is meant when nobody says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL, make_url

_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"}
)


def default_location() -> str | None:
    """AUTOJAC_STORE, else a file in the user's cache directory; None for a user without a home."""
    if told := os.environ.get("AUTOJAC_STORE"):
        return told
    from platformdirs import user_cache_path  # noqa: PLC0415

    try:
        folder = user_cache_path("autojac", appauthor=False)
    except (RuntimeError, OSError):
        return None
    # Without HOME and without an entry for the user, "~" stays as it is.
    return str(folder / "plans.db") if folder.is_absolute() else None


def shared_locations() -> list[str]:
    """The read-only databases of AUTOJAC_PLAN_PATH, in order."""
    entries = os.environ.get("AUTOJAC_PLAN_PATH", "").split(os.pathsep)
    return [str(Path(entry).expanduser()) for entry in entries if entry]


def database_url(location: str) -> URL:
    """The URL of a path, of `:memory:`, or of what is a URL already.

    Raises:
        sqlalchemy.exc.ArgumentError: it is none of these.
    """
    if location == ":memory:":
        return URL.create("sqlite")
    if re.match(r"[\w+]+://", location):
        return make_url(location)
    return URL.create("sqlite", database=str(Path(location).expanduser().absolute()))


def on_network(path: Path) -> bool:
    """Whether a file lies on a file system that processes on several machines may share."""
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
