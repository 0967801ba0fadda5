"""A picture of a pattern and of its coloring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autojac.core.pattern import Indices, Pattern
from autojac.errors import InputError, UnsupportedError
from autojac.sparse.colorings import Side

MOST = 512
"""Rows and columns beyond which a picture shows nothing but dust."""


def require_plotly() -> Any:
    """Return plotly's figures.

    Raises:
        UnsupportedError: if plotly is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise UnsupportedError(
            "pictures need plotly, which is not installed. Run pip install 'autojac[report]'"
        ) from error
    return graph_objects


def spy(
    pattern: Pattern,
    path: str | Path,
    colors: Indices | None = None,
    side: Side = "columns",
    title: str = "",
    most: int = MOST,
) -> Path:
    """Write a picture of a pattern, each entry in the color of its column or row, as a page that needs no network.

    Args:
        pattern: what to draw; of a large one the first rows and columns.
        path: where to write; `.html` is added where it has no suffix.
        colors: of each row or column, (rows,) or (columns,); -1 for one that needs no seed. One color for all if None.
        side: what `colors` belongs to.
        title: what stands above; the number of entries and colors is added.
        most: rows and columns that are drawn at most.

    Returns:
        Where it was written.

    Raises:
        InputError: if there is not one color for each row or column.
        UnsupportedError: if plotly is not installed.
    """
    graph_objects = require_plotly()
    size = pattern.shape[side == "columns"]
    if colors is not None and len(colors) != size:
        raise InputError(
            f"one color for each of the {size} {side} was expected, got {len(colors)}. Pass those of this pattern, or "
            f"side={'rows' if side == 'columns' else 'columns'!r}"
        )
    shown = (pattern.rows < most) & (pattern.columns < most)
    rows, columns = pattern.rows[shown], pattern.columns[shown]
    owner = columns if side == "columns" else rows
    marked = np.zeros(len(rows), dtype=np.int64) if colors is None else colors[owner].astype(np.int64)
    # one cell an entry, and nothing (nan) where there is none
    cells = np.full(tuple(min(extent, most) for extent in pattern.shape), np.nan, dtype=np.float32)
    cells[rows, columns] = marked
    part = "" if pattern.count == len(rows) else f" (the first {cells.shape[0]} × {cells.shape[1]} are shown)"
    counted = "" if colors is None else f", {int(colors.max(initial=-1)) + 1} colors of {side}"
    text = f"{pattern.shape[0]} × {pattern.shape[1]}, {pattern.count} entries{counted}{part}"
    figure = graph_objects.Figure(
        graph_objects.Heatmap(
            z=cells,
            colorscale="Turbo",
            showscale=colors is not None,
            colorbar={"title": "color"},
            hovertemplate="row %{y}, column %{x}: color %{z}<extra></extra>",
        )
    )
    figure.update_layout(title=f"{title}<br>{text}" if title else text, width=900, height=900, template="simple_white")
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain", title="output")
    figure.update_xaxes(constrain="domain", title="input")
    target = Path(path)
    target = target if target.suffix else target.with_suffix(".html")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(target, include_plotlyjs=True)
    return target
