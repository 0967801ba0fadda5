"""How many times longer than the cost model says methods of each kind took, by the trials of a machine."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from autojac.core.plan import Trial

ENOUGH = 30
"""A kind's own median counts as much as that of all kinds once it has so many trials.

With 3 the medians of 14 workloads led to worse first choices on 10 others (1.20 times the best instead of 1.19).
"""
LARGEST = 10.0
"""The largest correction: what took longer than that was held up, or is another problem."""


def correction_kind(spec: Mapping[str, Any]) -> str:
    """Return the kind by which a method is corrected: what goes around what, by which engine or mode."""
    inner = spec.get("inner")
    engine = str(spec.get("engine") or spec.get("mode") or "")
    inside = correction_kind(inner) if isinstance(inner, Mapping) else ""
    return "/".join(part for part in (str(spec["method"]), engine, inside) if part)


def corrections_from(trials: Iterable[Trial]) -> dict[str, float]:
    """Return for each kind of method how many times longer than predicted it took; "" stands for all other kinds.

    The median of the logarithms, which a few trials next to a busy process do not move; that of a kind with few trials
    is drawn towards that of all.
    """
    ratios: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.seconds and trial.predicted:
            ratios[correction_kind(trial.method)].append(math.log(trial.seconds / trial.predicted))
    if not ratios:
        return {}
    overall = statistics.median(ratio for of_kind in ratios.values() for ratio in of_kind)
    medians = {
        kind: (len(of_kind) * statistics.median(of_kind) + ENOUGH * overall) / (len(of_kind) + ENOUGH)
        for kind, of_kind in ratios.items()
    }
    most = math.log(LARGEST)
    return {kind: math.exp(min(max(value, -most), most)) for kind, value in {"": overall, **medians}.items()}
