"""A report as a page of plots that needs no network. It needs plotly: `pip install 'autojac[report]'`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from autojac.bench.baselines import DEFAULT
from autojac.bench.jacobians import OVER_BEST, OVER_DEFAULT, OWN, ROOFLINE
from autojac.bench.peers.race import OVER_ASDEX, OVER_JAX, OVER_TENSORFLOW
from autojac.bench.results import BenchResult, Report
from autojac.bench.summary import figures_of, summarize
from autojac.bench.table import Sheet, heading, sheets
from autojac.bench.training import OF_WHOLE
from autojac.report.spy import require_plotly

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 3em; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: 3px 10px; text-align: left; vertical-align: top }
td.missed { color: #b00020 }
"""
BARS: tuple[tuple[str, dict[str, str], str], ...] = (
    ("jacobians", {OVER_DEFAULT: OVER_DEFAULT, OVER_BEST: OVER_BEST}, "Jacobians: times faster"),
    ("training", {OVER_BEST: "J + backward", OF_WHOLE: "whole step"}, "training steps: times faster than torch's best"),
    ("second", {OVER_BEST: OVER_BEST}, "second derivatives, steps and products: times faster"),
    ("peers", {OVER_JAX: "JAX", OVER_TENSORFLOW: "TensorFlow", OVER_ASDEX: "asdex"}, "times faster than peers"),
)
"""Suite, its figures with their labels, and the title of a plot of times faster."""


def write_page(report: Report, path: str | Path) -> Path:
    """Write a report's plots, and below them its tables, as one page.

    Args:
        report: what was measured.
        path: where to write; `.html` is added where it has no suffix.

    Returns:
        Where it was written.

    Raises:
        UnsupportedError: if plotly is not installed.
    """
    graph_objects = require_plotly()
    from plotly.offline import get_plotlyjs

    plots = [
        graph_objects.Figure(data, layout).to_html(full_html=False, include_plotlyjs=False)
        for data, layout in make_plots(report)
    ]
    parts = [f"<h1>autojac bench</h1><p>{escape(heading(report))}</p>", *plots, *map(_table, sheets(report))]
    head = f'<meta charset="utf-8"><title>autojac bench</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>'
    target = Path(path)
    target = target if target.suffix else target.with_suffix(".html")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>", encoding="utf-8")
    return target


def make_plots(report: Report) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return the plots that a report has the numbers for, each as plotly's data and layout."""
    found = [_plot_asked(report), *(_bars(report.of(suite), labels, title) for suite, labels, title in BARS)]
    found += [_roofline(report.of("jacobians")), _growth(report.of("growth"))]
    return [plot for plot in found if plot[0]]


def _plot_asked(report: Report) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return each figure as a share of what was asked: below one it is kept."""
    kept = [figure for figure in summarize(report) if figure.bound and math.isfinite(figure.value) and figure.value > 0]
    shares = [f.bound / f.value if f.least else f.value / f.bound for f in kept if f.bound]
    data = {
        "type": "bar",
        "orientation": "h",
        "x": shares,
        "y": [figure.what for figure in kept],
        "marker": {"color": ["#b00020" if figure.missed else "#2e7d32" for figure in kept]},
    }
    title = "measured over asked; up to 1 the promise is kept"
    return ([data] if kept else []), _layout(title, {"type": "log"}, height=200 + 22 * len(kept), wide=True)


def _bars(
    results: Sequence[BenchResult], figures: dict[str, str], title: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the inverse of ratios as bars, one for each result and figure."""
    data = []
    for what, label in figures.items():
        found = figures_of(results, what)
        if found:
            data.append({"type": "bar", "name": label, "x": list(found), "y": [1 / value for value in found.values()]})
    return data, {**_layout(title, {}), "yaxis": {"type": "log", "title": "times"}}


def _roofline(results: Sequence[BenchResult]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    found = {r.name: float(r.facts[ROOFLINE]) for r in results if ROOFLINE in r.facts}
    data = {"type": "bar", "x": list(found), "y": list(found.values())}
    title = "time over the least that arithmetic and memory traffic take on this machine"
    return ([data] if found else []), {**_layout(title, {}), "yaxis": {"type": "log"}}


def _growth(results: Sequence[BenchResult]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return time against the number of samples, a line for each function and way."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        function = result.name.partition(" at ")[0]
        for outcome in result.outcomes:
            if outcome.state == "right" and outcome.seconds and outcome.name in (OWN, DEFAULT):
                lines.setdefault(f"{function}: {outcome.name}", []).append((float(result.facts["B"]), outcome.seconds))
    data = [
        {"type": "scatter", "name": name, "x": [b for b, _ in points], "y": [1e3 * s for _, s in points]}
        for name, points in lines.items()
    ]
    layout = _layout("time against the number of samples", {"type": "log", "title": "samples"})
    return data, {**layout, "yaxis": {"type": "log", "title": "ms"}}


def _layout(title: str, xaxis: dict[str, Any], height: int = 480, wide: bool = False) -> dict[str, Any]:
    layout = {"title": {"text": title}, "height": height, "template": "simple_white", "xaxis": xaxis}
    return {**layout, "margin": {"l": 480}} if wide else layout


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in sheet.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in sheet.rows)
    return f"<h2>{escape(sheet.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def _cell(text: str) -> str:
    mark = ' class="missed"' if text.endswith("missed") else ""
    return f"<td{mark}>{escape(text)}</td>"
