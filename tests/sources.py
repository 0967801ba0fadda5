"""The package's own sources, each parsed once for all tests that look at them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "autojac"


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file, its module first."""
    return tuple(ast.walk(ast.parse(path.read_text())))
