"""Objects that reach nothing further, as tokens of a digest, and what containers hold."""

from __future__ import annotations

import copyreg
import enum
import types
from collections import OrderedDict, deque
from typing import Any, Final

import torch

from autojac.torch_internals import OPERATORS_HOME

C_CALLABLES: Final = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
SCALARS: Final = frozenset({type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)})
_TORCH_CONSTANTS: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo)
# Objects of these modules do their work besides the computation (logging, locking, typing).
_INERT: Final = frozenset(
    {"logging", "threading", "_thread", "warnings", "typing", "abc", "_abc", "contextvars", "_contextvars", "os"}
)


def leaf_tokens(obj: Any) -> tuple[object, ...] | None:
    """Return the tokens of a constant, an enum member, a NumPy scalar or a logger; None if obj may reach more."""
    kind = type(obj)
    if isinstance(obj, type):  # one with a metaclass of `abc` or `typing` is the user's code all the same
        return None
    if isinstance(obj, enum.Enum):
        return "enum", kind.__qualname__, obj.name
    if isinstance(obj, _TORCH_CONSTANTS) or kind.__module__ == OPERATORS_HOME:
        return "torch", str(obj)
    if isinstance(obj, types.ModuleType):
        return "module", obj.__name__
    if isinstance(obj, (range, bytearray)):
        return kind.__name__, repr(obj)
    if isinstance(obj, torch.jit.ScriptFunction):
        return "source", obj.code
    home = kind.__module__.partition(".")[0]
    if isinstance(obj, str) and home == "torch":  # its version
        return "torch", str(obj)
    if home in _INERT:
        return "inert", kind.__module__, kind.__qualname__
    return _numpy_tokens(obj) if home == "numpy" else None


def _numpy_tokens(obj: Any) -> tuple[object, ...] | None:
    # By its attributes: numpy is imported only where the caller did.
    dtype = getattr(obj, "dtype", None)
    if dtype is not None and hasattr(obj, "tobytes"):
        if dtype.hasobject:
            return None
        by_content = dtype.kind not in "fc" or obj.ndim == 0
        return "numpy", obj.shape, str(dtype), obj.tobytes() if by_content else b""
    if callable(obj) and hasattr(obj, "__name__") and not isinstance(obj, type):
        return "numpy", obj.__name__
    return ("numpy", str(obj)) if type(obj).__qualname__.endswith("DType") else None


def reduce(obj: Any) -> Any:
    """Return what pickle would write of an object."""
    reducer = copyreg.dispatch_table.get(type(obj))
    return reducer(obj) if reducer else obj.__reduce_ex__(2)


def sort_key(item: Any) -> str:
    """Return a key that sorts elements of one type in a set alike in every process."""
    return repr(item) if type(item) in SCALARS else str(getattr(item, "__qualname__", ""))


def contents(obj: Any) -> list[Any]:
    """Return what a container holds, pairs for a mapping, without the code of subclasses."""
    if isinstance(obj, types.MappingProxyType):
        return list(obj.items())
    if isinstance(obj, dict):
        return list((OrderedDict if isinstance(obj, OrderedDict) else dict).items(obj))
    base: Any = next(base for base in (list, tuple, set, frozenset, deque) if isinstance(obj, base))
    return list(base.__iter__(obj))
