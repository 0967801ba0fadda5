"""Whether a Jacobian itself fits the memory limit, before a method is searched for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np

from autojac.core.options import format_bytes
from autojac.core.signature import Layout
from autojac.errors import SearchError
from autojac.problem.problem import Problem


def require_room(problem: Problem) -> None:
    """Raise `SearchError` if the Jacobian alone exceeds the memory limit, naming the layouts that would fit."""
    if problem.result_bytes <= problem.memory_limit:
        return
    pairs = itertools.product(range(len(problem.outputs)), problem.inputs)
    shapes = " and ".join(str(problem.jacobian_shape(*pair)) for pair in pairs)
    fitting = "; ".join(_fitting(problem))
    raise SearchError(
        f"the Jacobian alone takes {format_bytes(problem.result_bytes)} in layout='{problem.layout}', of shape "
        f"{shapes}; {format_bytes(problem.memory_limit)} are allowed. "
        + (f"Choose another layout ({fitting})" if fitting else "Differentiate fewer samples per call")
        + ", take it in parts by jac.chunks(x, bytes=..., out=...), or raise memory_limit"
    )


def _fitting(problem: Problem) -> Iterator[str]:
    """Describe the layouts that would fit: how much each takes, and whether it holds all that is not zero."""
    structure = problem.structure
    features = structure.sparsity.features if structure.sparsity else None
    diagonal = features is not None and features.count == np.count_nonzero(features.rows == features.columns)
    square = len(problem.outputs) == len(problem.inputs) == 1 and problem.out_size == problem.in_size
    complete = {
        "blocks": structure.independent,
        "full": True,
        "sparse": True,
        "diagonal": structure.independent and diagonal and square,
    }
    layouts: tuple[Layout, ...] = get_args(Layout)
    for layout in layouts:
        # where no pattern is known a sparse matrix holds every entry, and is no smaller
        unknown = layout == "sparse" and features is None
        if layout == problem.layout or unknown or (layout == "diagonal" and not square):
            continue
        needed = dataclasses.replace(problem, layout=layout).result_bytes
        if needed <= problem.memory_limit:
            holds = "every entry that can be nonzero" if complete[layout] else "a part of them only"
            yield f"'{layout}' takes {format_bytes(needed)} and holds {holds}"
