"""Pictures show each entry once, in the color of its row or column."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from autojac import InputError, Pattern, UnsupportedError
from autojac.report import spy
from autojac.sparse.colorings import orthogonal


def test_picture_needs_plotly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'autojac\[report\]'"):
        spy(Pattern.diagonal(3), tmp_path / "picture.html")


def test_picture_holds_the_pattern(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pattern = Pattern.of(np.eye(5) + np.eye(5, k=1))
    target = spy(pattern, tmp_path / "folder" / "picture", orthogonal(pattern, "columns"), title="band")
    assert target == tmp_path / "folder" / "picture.html"
    text = target.read_text(encoding="utf-8")
    assert "9 entries, 2 colors of columns" in text
    cut = spy(pattern, tmp_path / "part.html", most=3).read_text(encoding="utf-8")
    assert "the first 3" in cut


def test_picture_refuses_colors_of_another_side(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    with pytest.raises(InputError, match="one color for each of the 4 rows"):
        spy(Pattern.full(4, 3), tmp_path / "picture", np.zeros(3, dtype=np.int32), side="rows")
