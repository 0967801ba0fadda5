"""Find operators that read values of tensors where a recording does not see it, among all that torch has samples of.

Fake tensors have no values, so what fails with them and not with real ones has read some. Run as a script, in a process
of its own: torch's samples set flags of the process. Prints JSON: of torch's entries that read values, those that no
operator shows (`hidden`), and those of them that nothing shows (`unseen`).
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autojac.graph.operators import reads_data
from autojac.guards.escapes import MonitoredMode
from forward_formulas import entries

MOST_SAMPLES = 25
SAYS = ("data pointer", "data is not allocated", "data-dependent", "DataDependent", "DynamicOutputShape")
"""What torch's errors say of values that are not there."""


class Look(MonitoredMode):
    """Notes whether a call is seen to read values."""

    def __init__(self, watched: bool) -> None:
        super().__init__(watched)
        self.reads = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads |= reads_data(func, args)
        return func(*args, **(kwargs or {}))


def samples(entry: Any) -> Iterator[Any]:
    dtype = torch.float64 if torch.float64 in entry.dtypes else next(iter(entry.dtypes), None)
    return islice(entry.sample_inputs("cpu", dtype), MOST_SAMPLES) if dtype is not None else iter(())


def is_seen(entry: Any, sample: Any, watched: bool) -> bool:
    with Look(watched) as look:
        entry.op(sample.input, *sample.args, **sample.kwargs)
    return look.reads or bool(look.monitor.escaped)


def reads_values(entry: Any, sample: Any) -> bool:
    try:
        with FakeTensorMode() as mode:
            call = (sample.input, sample.args, sample.kwargs)
            first, args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, call)
            entry.op(first, *args, **kwargs)
    except Exception as error:
        return any(part in f"{type(error).__name__} {error}" for part in SAYS)
    return False


def hides(entry: Any, sample: Any) -> bool:
    """Whether a call reads values and no operator shows it; not where it fails, for want of a kernel perhaps."""
    try:
        seen = is_seen(entry, sample, False)
    except Exception:
        return False
    return not seen and reads_values(entry, sample)


def main(names: list[str]) -> None:
    hidden, unseen = set(), set()
    for entry in entries():
        if names and entry.name not in names:
            continue
        for sample in filter(functools.partial(hides, entry), samples(entry)):
            hidden.add(entry.name)
            unseen |= set() if is_seen(entry, sample, True) else {entry.name}
    print(json.dumps({"hidden": sorted(hidden), "unseen": sorted(unseen)}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
