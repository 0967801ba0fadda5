"""List the modules and tensors that a callable's result may depend on, and digest what it computes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from autojac.guards.assignments import AttributeMapping, BufferMapping, VariableMapping
from autojac.guards.compiled_functions import is_compiled
from autojac.guards.escapes import reads_unseen
from autojac.guards.provenance import is_core, is_library, own_names, slots
from autojac.guards.tensor_metadata import require_initialized
from autojac.guards.walker import Walk


@dataclass(frozen=True)
class Captures:
    """What a callable reaches besides its arguments.

    Attributes:
        modules: distinct modules, submodules included.
        tensors: distinct parameters, buffers and captured tensors, those without values left out.
        opaque: something could not be followed, so there may be more.
        compiled: some of it runs through torch.compile.
        places: where func may set something: attributes, containers and variables.
        digest: of what the callable computes, as `fingerprint` gives it; empty where it was not asked for.
        wrappers: of autojac, which have plans of their own.
    """

    modules: tuple[torch.nn.Module, ...]
    tensors: tuple[torch.Tensor, ...]
    opaque: bool
    compiled: bool = False
    places: tuple[Any, ...] = ()
    digest: str = ""
    wrappers: tuple[Any, ...] = ()


def captures(func: Callable[..., Any], without: Sequence[Any] = ()) -> Captures:
    """List what a callable reaches through closures, globals, defaults, attributes and helper functions.

    Args:
        func: a function, module, partial, bound method or callable object.
        without: objects that are not looked into.

    Returns:
        The modules and tensors in the order in which they were met.
    """
    walk = _Reach()
    for obj in without:
        walk.leave_out(obj)
    return walk.collect(func)


def fingerprint(func: Callable[..., Any], version: str = "") -> str:
    """Digest a callable's code, constants, closures, defaults, modules and captured indices.

    Integer and boolean tensors count by content, float tensors by shape and dtype: trained weights keep
    the fingerprint, an edited mask changes it. `training` flags do not count; a signature carries them.

    Args:
        func: a function, module, partial, bound method or callable object.
        version: changes the digest at will.

    Returns:
        64 hexadecimal digits, equal in every process that defines the callable alike.
    """
    return survey(func, version).digest


def survey(func: Callable[..., Any], version: str = "") -> Captures:
    """List what a callable reaches, and digest what it computes, in one walk."""
    walk = _Survey()
    walk.emit("version", version)
    return dataclasses.replace(walk.collect(func), digest=walk.hexdigest())


class _Reach(Walk):
    """A walk that lists where func may set something."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = False
        self.places: list[Any] = []
        self.wrappers: list[Any] = []

    def leave_out(self, obj: Any) -> None:
        """Mark an object as visited."""
        parts = (obj.__func__, obj.__self__) if isinstance(obj, types.MethodType) else (obj,)
        for part in parts:
            self._order.setdefault(id(part), len(self._order))
            self._alive.append(part)

    def collect(self, func: Callable[..., Any]) -> Captures:
        """Walk over a callable, and return what was met."""
        self.visit(func)
        # the skeleton of an ensemble is on the meta device: nothing to read, train or restore
        tensors = tuple(tensor for tensor in self.tensors if not tensor.is_meta)
        require_initialized(tensors)
        lists = tuple(self.modules), tensors, self.opaque, self.compiled, tuple(self.places)
        return Captures(*lists, wrappers=tuple(self.wrappers))

    def _dispatch(self, obj: Any, kind: type) -> None:
        if hasattr(kind, "__autojac_needs_no_check__"):
            self.wrappers.append(obj)
        if isinstance(obj, (torch.jit.ScriptFunction, torch.jit.ScriptModule)) and reads_unseen(obj):
            self.opaque = True  # another call may run other operators
        super()._dispatch(obj, kind)

    def _module(self, module: torch.nn.Module) -> None:
        self.compiled = self.compiled or is_compiled(module)
        # those of a scripted module are no dict
        if isinstance(module._buffers, dict):
            self.places += [vars(module), BufferMapping(module._buffers)]
        super()._module(module)

    def _function(self, function: types.FunctionType) -> None:
        self.compiled = self.compiled or is_compiled(function)
        if not is_library(function.__globals__.get("__name__")):
            self.places.append(vars(function))
        self.places += map(VariableMapping, function.__closure__ or ())
        super()._function(function)

    def _globals(self, names: Iterable[str], scope: Mapping[str, Any], inside: tuple[int, ...] = ()) -> None:
        names = set(names)
        if isinstance(scope, dict):
            # globals()["name"] names nothing that the code would tell
            self.places.append(scope if "globals" in names else VariableMapping(scope, names))
        super()._globals(names, scope, inside)

    def _class(self, kind: type) -> None:
        if not is_library(kind.__module__):
            self.places.append(AttributeMapping(kind, functools.partial(own_names, kind)))
        super()._class(kind)

    def _instance(self, obj: Any, kind: type) -> None:
        if isinstance(state := getattr(obj, "__dict__", None), dict):
            self.places.append(state)
        if slots(kind) and not is_core(kind.__module__):
            self.places.append(AttributeMapping(obj, functools.partial(slots, kind)))
        super()._instance(obj, kind)

    def _container(self, obj: Any, kind: type) -> None:
        if isinstance(obj, (dict, list, set, deque)):
            self.places.append(obj)
        super()._container(obj, kind)


class _Survey(_Reach):
    """A walk that also digests everything it meets."""

    def __init__(self) -> None:
        super().__init__()
        self._sha = hashlib.sha256()

    def emit(self, *tokens: object) -> None:
        self._sha.update(repr(tokens).encode("utf-8", "surrogatepass"))

    def content(self, tensor: torch.Tensor) -> None:
        self.emit("content", tuple(tensor.shape))
        if tensor.device.type == "meta" or tensor.numel() == 0:
            return
        # wrapped by a transform, fake or quantised: there are no bytes to read
        with suppress(RuntimeError):
            # of a copy: memory that NumPy has seen can't be resized any more
            data = tensor.detach().clone().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._sha.update(memoryview(data))

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
