"""Parts of drawn architectures, all by name in `KINDS`."""

from __future__ import annotations

from parts import coupled, kinks, smooth, weights
from parts.base import KINDS, Fn, Kind, Shop

__all__ = ["KINDS", "Fn", "Kind", "Shop", "coupled", "kinks", "smooth", "weights"]
