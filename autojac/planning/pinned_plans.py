"""A pinned set of plans: nothing else is used, nothing is searched, and a hash tells whether it is still the same."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from autojac.errors import StoreError

if TYPE_CHECKING:
    from autojac.store import PlanStore

VARIABLE = "AUTOJAC_PIN"
"""The environment variable that names a store whose plans are pinned in every process."""

_pinned: dict[str, PlanStore] = {}
_HERE = ""


def pin(plans: PlanStore | str | os.PathLike[str] | None) -> str:
    """Use the plans of a store and no others from now on, and return a hash of them.

    Nothing is searched, explored or stored while plans are pinned: the same calls are computed in the same way, to the
    last bit, in every process on such a machine. A call that the store has no plan for raises `PlanMissError`; tune
    ahead. The hash belongs into a checkpoint: it changes whenever a plan does. Wrappers that were called before keep
    the plans that they use. The environment variable `AUTOJAC_PIN` does the same for a whole process.

    Args:
        plans: a `PlanStore`, its path or URL; None to unpin.

    Returns:
        64 hexadecimal digits; "" for None.

    Raises:
        StoreError: there is no such store, or it can't be read.

    Example:
        >>> import torch
        >>> from autojac import AutoJacobian, PlanStore, pin
        >>> store = PlanStore(":memory:")
        >>> plan = AutoJacobian(torch.sin, store=store).tune(torch.rand(8, 3), budget_s=0.2)
        >>> digest = pin(store)
        >>> AutoJacobian(torch.sin).plan(torch.rand(8, 3)).method == plan.method
        True
        >>> pin(None)
        ''
    """
    _pinned.pop(_HERE, None)
    if plans is None:
        return ""
    store = _open(plans)
    digest = _digest(store)
    _pinned[_HERE] = store
    return digest


def pinned_store() -> PlanStore | None:
    """Return the store whose plans are pinned, by a call of `pin` or by the environment; None where none are."""
    if _HERE in _pinned:
        return _pinned[_HERE]
    place = os.environ.get(VARIABLE)
    if not place:
        return None
    if place not in _pinned:
        _pinned[place] = _open(place)
    return _pinned[place]


def _open(plans: PlanStore | str | os.PathLike[str]) -> PlanStore:
    from autojac.store import PlanStore  # SQLAlchemy takes 0.2 s to load

    if isinstance(plans, PlanStore):
        return plans
    text = os.fspath(plans)
    if "://" not in text and not Path(text).is_file():
        raise StoreError(f"there is no plan store at {text}, whose plans were to be pinned. Tune ahead: jac.tune(x)")
    return PlanStore(text)


def _digest(store: PlanStore) -> str:
    """Return a hash of all that decides how calls are computed: each plan's keys, method and structure."""
    rows = sorted(
        json.dumps([row.op.digest, row.env.digest, row.plan.method, row.plan.structure.to_json()], sort_keys=True)
        for row in store.listing()
        if row.refuted_reason is None
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
