"""What no operator shows: a tensor's values given to other code, and memory written or exchanged under a tensor."""

from __future__ import annotations

import numbers
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autojac.errors import UnsupportedError
from autojac.guards.provenance import is_core
from autojac.torch_internals import DispatchKey, TorchDispatchMode, excluded_keys, is_wrapped_by_transform

ESCAPES: Final = frozenset(
    {
        *("item", "tolist", "numpy", "__array__", "__array_interface__", "__cuda_array_interface__"),
        *("__dlpack__", "__dlpack_device__", "to_dlpack", "data_ptr", "storage", "untyped_storage", "_typed_storage"),
        *("share_memory_", "is_shared", "__reduce_ex__", "__reduce__", "__deepcopy__", "__setstate__"),
        *("__repr__", "__str__", "__format__", "apply_", "map_", "map2_"),
    }
)
"""Methods of a tensor that read or write its memory, or give it away, where no operator is seen."""
_NUMBERS: Final = frozenset({"item", "__float__", "__int__", "__index__", "__bool__", "__complex__"})
"""Methods that are an operator, unless torch calls them while dispatch modes are switched off."""
AS_OPERATORS: Final = frozenset({"item", "tolist"})
"""Those of `ESCAPES` that a `Monitor` makes visible as operators, where it can."""
MOST_LISTED: Final = 256
"""Entries up to which a tensor's `tolist` is replaced by an operator for each entry."""
READ_BELOW: Final[Mapping[str, tuple[tuple[int, str], ...]]] = {
    "tensor_split": ((1, "tensor_indices_or_sections"),),
    "_pack_padded_sequence": ((1, "lengths"),),
    "_pad_packed_sequence": ((1, "batch_sizes"),),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), ((1, "batch_sizes"),)),
    **dict.fromkeys(("ctc_loss",), ((2, "input_lengths"), (3, "target_lengths"))),
    "sparse_coo_tensor": ((0, "indices"),),
}
"""Functions of torch that consist of operators, and the integer arguments that they read in C++ to choose these."""
HISTORY: Final = frozenset({"grad", "grad_fn", "_version", "_grad"})
"""Attributes of a tensor that show what else was done with it."""
_BACKWARD: Final = frozenset({"grad", "backward"})
_FIXED: Final = (
    *(bool, int, float, complex, str, bytes, numbers.Number, type(None), type(...), slice, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
)
_PYTHON: Final = DispatchKey.Python


class Monitor(TorchFunctionMode):
    """A mode that notices what dispatch modes can't see.

    Attributes:
        escaped: the first of `ESCAPES` that was called; empty if none was.
        exchanges: whether something was assigned to the `data` of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.escaped = ""
        self.exchanges = False
        self._running: tuple[str, Sequence[Any], Mapping[str, Any]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # an overload's name has two parts
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in _NUMBERS:
            # the legacy constructors ask each element for its number below every dispatch mode
            if excluded_keys().has(_PYTHON):
                self.escaped = self.escaped or name
        elif name == "tolist" and _is_readable(args[0]) and args[0].numel() <= MOST_LISTED:
            return _to_list(args[0])
        elif read := _tensors_read_below(name, args, kwargs):
            if not all(map(_shows, read)):
                self.escaped = self.escaped or name
        elif name in ESCAPES:
            if not _caller().startswith("autojac."):
                self.escaped = self.escaped or name
        elif name == "__get__" and func.__self__.__name__ in HISTORY:
            if not is_core(_caller()):
                self.escaped = self.escaped or func.__self__.__name__
        elif name == "__set__" and getattr(func.__self__, "__name__", "") == "data":
            self.exchanges = True
        before, self._running = self._running, (name, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._running = before

    @property
    def literal(self) -> str:
        """The function that is creating a literal, perhaps from values of tensors; empty if it has Python data alone.

        torch reads tensors among the elements of a list in C++, and then lifts the result as it does any literal.
        """
        if self._running is None:
            return ""
        name, args, kwargs = self._running
        if name in ("__getitem__", "__setitem__"):
            # tensors in a tuple are an index each; those in a list become one tensor
            args = args[1] if isinstance(args[1], tuple) else args[1:2]
            args = [part for part in args if not isinstance(part, Tensor)]
        # code of the user's may run in a backward pass, and is not seen there
        may_hold_tensors = name in _BACKWARD or any(_holds_tensor(value) for value in (*args, *kwargs.values()))
        return name if may_hold_tensors else ""


def _tensors_read_below(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of integers that a function of `READ_BELOW` reads."""
    if name == "sparse_coo_tensor" and (len(args) > 2 or kwargs.get("size") is not None):
        return []  # the size follows from the indices only where it is not given
    arguments = [kwargs.get(key, args[at] if at < len(args) else None) for at, key in READ_BELOW.get(name, ())]
    return [one for one in arguments if isinstance(one, Tensor) and not one.is_floating_point()]


def reads_unseen(scripted: Any) -> str:
    """Return which function that reads tensors in C++, unseen by modes, scripted code calls; empty if none."""
    graph = getattr(scripted, "inlined_graph", None)  # absent where there is no forward
    kinds = ("prim::tolist", *(f"aten::{name}" for name in READ_BELOW))
    return next((k.partition("::")[2] for k in kinds if graph is not None and graph.findAllNodes(k)), "")


def _shows(tensor: Tensor) -> bool:
    """Read all values of a tensor of integers by an operator, which modes see; return False where none can."""
    if not _is_readable(tensor):
        return False
    now = tensor.detach()
    return torch.equal(now, torch.tensor(now.tolist(), dtype=now.dtype, device=now.device))


def _is_readable(tensor: Tensor) -> bool:
    """Check whether dispatch modes see an operator that reads a tensor, and the values that it reads."""
    if tensor.layout != torch.strided or tensor.is_nested or excluded_keys().has(_PYTHON):
        return False
    return not is_wrapped_by_transform(tensor)


def _to_list(tensor: Tensor) -> Any:
    """Return what `tolist` returns, by an operator for each entry."""
    return [_to_list(part) for part in tensor.detach().unbind()] if tensor.dim() else tensor.item()


def _holds_tensor(value: Any, inside: bool = False) -> bool:
    """Check whether a number inside a nest of sequences may come from a tensor."""
    if isinstance(value, Tensor):
        return inside
    if isinstance(value, _FIXED):
        return False
    if type(value).__module__ == "numpy":
        return bool(getattr(getattr(value, "dtype", None), "hasobject", False))
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return any(_holds_tensor(part, True) for part in (value.values() if isinstance(value, Mapping) else value))
    return hasattr(value, "__float__") or hasattr(value, "__index__")


def _caller() -> str:
    """Return the module that has called a tensor's method or looked up an attribute, whatever modes lie between."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _hands_on(frame):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


def _hands_on(frame: types.FrameType) -> bool:
    """Check whether a frame belongs to a mode, such as `NoData`, which passes a call on to the next one."""
    return frame.f_code.co_name == "__torch_function__" or frame.f_globals.get("__name__") == "torch.overrides"


class DataAssignedError(UnsupportedError):
    """Function assigns a transform's tensor to the `data` of a plain one, which torch accepts and then crashes on."""


class NoData(TorchFunctionMode):
    """A mode that raises `DataAssignedError` before such an assignment."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sets_data = getattr(func, "__name__", "") == "__set__" and getattr(func.__self__, "__name__", "") == "data"
        if sets_data and is_wrapped_by_transform(args[1]) and not is_wrapped_by_transform(args[0]):
            raise DataAssignedError("func assigns to .data, which torch.func's transforms can't do")
        return func(*args, **kwargs) if kwargs else func(*args)


def without_data(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, to be called by a transform, that refuses to assign to `.data`."""

    def run(*args: Any) -> Any:
        with NoData():
            return fn(*args)

    return run


class MonitoredMode(TorchDispatchMode):
    """A dispatch mode that comes with a monitor of what it can't see.

    Args:
        watched: whether the monitor is entered too; it costs a microsecond or two for each function of torch.
    """

    def __init__(self, watched: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.monitor = Monitor()
        self.watched = watched

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load its compiler (1 s) to keep it away from this mode
        return False

    def __enter__(self) -> Self:
        if self.watched:
            self.monitor.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self.watched:
            self.monitor.__exit__(*error)  # type: ignore[no-untyped-call]


def home(tensor: Tensor) -> tuple[Any, ...]:
    """Return what identifies a tensor's memory and layout, which Python may exchange without any operator."""
    if tensor.layout != torch.strided or tensor._is_zerotensor():
        return (tensor._cdata,)
    try:
        storage = tensor.untyped_storage()._cdata
    except RuntimeError:  # a wrapper of another tensor
        return (tensor._cdata,)
    return tensor._cdata, storage, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
