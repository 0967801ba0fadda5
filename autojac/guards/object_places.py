"""List every place where a callable's behaviour is kept: objects, modules, tensors and containers."""

from __future__ import annotations

import abc
import enum
import functools
import gc
import inspect
import operator
import types
import weakref
from collections.abc import Collection, Iterable
from typing import Any, Final

import torch
from torch import Tensor

from autojac.guards.assignments import CONTAINERS, AttributeMapping
from autojac.guards.escapes import ESCAPES, reads_unseen
from autojac.guards.library_places import LibraryPlaces
from autojac.guards.places import (
    Attributes,
    Callables,
    Fields,
    FixedTensor,
    Items,
    Members,
    class_dict,
    hidden_state,
    slot_readers,
    state_reader,
)
from autojac.guards.provenance import is_core, is_installed, own_names
from autojac.guards.purity import c_reason
from autojac.guards.tokens import contents
from autojac.guards.walker import HOOKS
from autojac.torch_internals import pytree

MOST_ITEMS: Final = 10_000
"""A longer container is compared in every call like any other, but nothing is replayed."""
_PARTS: Final = tuple((name, operator.attrgetter(name)) for name in ("func", "args", "keywords"))
_TENSORS: Final = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_HOOKS_OF_ALL: Final = [
    (name, hooks)
    for name, hooks in sorted(vars(torch.nn.modules.module).items())
    if name.startswith("_global_") and isinstance(hooks, dict) and ("forward" in name or "backward" in name)
]
_IMMUTABLE: Final = (
    *("operator.", "re.Pattern", "datetime.", "fractions.Fraction", "pathlib.", "uuid.UUID"),
    *("_collections._tuplegetter", "collections._tuplegetter", "inspect.Parameter", "inspect.Signature"),
    "inspect._ParameterKind",
)
_OUT_OF_SIGHT: Final = frozenset({"_contextvars", "contextvars", "_thread", "threading", "os"})
# Results depend on the thread's context, which operators read unseen.
_BY_CONTEXT: Final = frozenset({"decimal"})
# The functions by which modules compute, wherever they are called from.
_OF_ALL_CODE: Final = ((torch, "torch.{}"), (torch.nn.functional, "torch.nn.functional.{}"))
_FIXED_TYPE: Final = 1 << 8
"""Flag of classes made in C, whose attributes can't be set."""
_LOCKS: Final = ("lock", "RLock")
_FUNCTION: Final = "torch.autograd.function.Function"
_DERIVATIVES: Final = ("backward", "vjp", "jvp")
"""The methods of a Function that autograd calls."""


class ObjectPlaces(LibraryPlaces):
    """Everything that a callable holds: functions, as `FunctionPlaces` lists them, and objects, modules and tensors."""

    def __init__(self, ran: Collection[types.CodeType] = (), narrow: bool = False) -> None:
        super().__init__(ran, narrow)
        self._weak: list[Any] = []

    def follow(self, func: Any) -> None:
        """Visit a callable, and what torch calls for every module and tensor."""
        for _, hooks in _HOOKS_OF_ALL:
            self._place(Items(hooks, "hook of all modules"))
            self.visit(hooks)
        self._place(Fields(torch, "{}", (("default dtype", _default_dtype),)))
        self._place(Items(pytree.SUPPORTED_NODES, "pytree node {}"))
        self._library_class(Tensor)
        # not by `_place`, which would label thousands of functions
        self.places += [Callables(vars(module), name) for module, name in _OF_ALL_CODE]
        self.visit(func)
        for referent in self._weak:  # grows meanwhile
            if id(referent) not in self._order:
                self.refuse("it holds a weak reference to what nothing else of it holds")
                self.visit(referent)

    def _walk_named(self, label: str, /, **parts: Any) -> None:
        for part in parts.values():
            if isinstance(part, Tensor):
                self._place(FixedTensor(None, label, part))
        super()._walk_named(label, **parts)

    def _give_up(self, kind: type) -> None:
        self.refuse(f"it holds a {kind.__module__}.{kind.__qualname__}, whose state can't be compared")
        super()._give_up(kind)

    def _dispatch(self, obj: Any, kind: type) -> None:
        home = kind.__module__
        if isinstance(obj, types.ModuleType):
            self._whole_module(obj)
        elif isinstance(obj, type):  # whatever the home of its metaclass
            self._class(obj)
        elif isinstance(obj, weakref.ref):
            if obj() is not None:
                self._weak.append(obj())
        elif self._of_python(obj, kind):
            pass
        elif isinstance(obj, torch.jit.ScriptFunction):
            if found := reads_unseen(obj):  # all else are operators, and the graph can't change
                self.refuse(f"it calls a scripted function that reads values of a tensor ({found})")
        elif isinstance(obj, (bytearray, memoryview)) or (home in _OUT_OF_SIGHT and kind.__qualname__ not in _LOCKS):
            self._give_up(kind)
        elif home.partition(".")[0] == "torch" and hasattr(kind, "__members__"):  # an enumeration of torch's made in C
            pass
        elif home.partition(".")[0] == "numpy":
            self._of_numpy(obj, kind)
        elif isinstance(obj, enum.Enum):
            self._instance(obj, kind)
        elif isinstance(obj, functools.partial):
            self._place(Fields(obj, f"{{}} of {self.labels.get(id(obj), 'a partial')}", _PARTS))
            self._place(Items(vars(obj), "attribute {} of a partial"))
            self._walk_named("partial", function=obj.func, args=obj.args, keywords=obj.keywords)
            self.visit(vars(obj))
        else:
            super()._dispatch(obj, kind)

    def _tensor(self, tensor: Tensor, by_content: bool = True) -> None:
        if id(tensor) not in self._order:  # num_batches_tracked comes here unvisited
            self._order[id(tensor)] = len(self._order)
            self._alive.append(tensor)
        self.tensors.append(tensor)
        if type(tensor) not in _TENSORS:
            self.refuse(f"it holds a {type(tensor).__qualname__}, a tensor of a kind of its own")
            return
        state = tensor.__dict__
        self._place(Items(state, "attribute {} of a tensor"))
        for value in state.values():
            self.visit(value)
        if tensor._backward_hooks:
            self._place(Items(tensor._backward_hooks, "hook of a tensor"))

    def _module(self, module: torch.nn.Module) -> None:
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            self.refuse("it calls what torch.jit has compiled")
            super()._module(module)
            return
        name = kind.__name__
        state = vars(module)
        self._place(Items(state, f"attribute {{}} of {name}"))
        self._place(Fields(module, f"{{}} of {name}", (("class", type), *self._own_fields(kind))))
        for field, label in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", "module")):
            self._place(Items(state[field], f"{label} {{}} of {name}"))
        for hooks in HOOKS:
            if state.get(hooks) is not None:
                self._place(Items(state[hooks], "hook"))
        for base in kind.__mro__[:-1]:
            if is_core(base.__module__):
                self._library_class(base)
                if base.__module__ == "torch.fx.graph_module" and "forward" in vars(base):
                    self.visit(vars(base)["forward"])
        super()._module(module)

    def _own_fields(self, kind: type) -> tuple[tuple[str, Any], ...]:
        if is_core(kind.__module__) or is_installed(kind.__module__):
            return ()
        reader = state_reader(kind)
        return (() if reader is None else (("__dict__", reader),)) + slot_readers(kind)

    def _class(self, kind: type) -> None:
        if not is_core(kind.__module__) and any(f"{b.__module__}.{b.__name__}" == _FUNCTION for b in kind.__mro__):
            derivatives = [inspect.unwrap(getattr(kind, name)) for name in _DERIVATIVES]
            self.backwards += [one.__code__ for one in derivatives if not is_core(one.__module__)]
        if isinstance(kind, abc.ABCMeta):
            self._place(Fields(abc, "{}", (("what is registered with abstract classes", _registrations),)))
        if kind.__module__ in _BY_CONTEXT:
            self.refuse(f"it may compute with {kind.__module__}, whose results depend on the context of the thread")
        if is_core(kind.__module__):
            for base in kind.__mro__:
                self._library_class(base)
        elif self._is_package(kind.__module__):
            self._library_class(kind)
            if type(kind) is not type:
                self.visit(type(kind))
        else:
            self._library_class(kind)
            self._place(Fields(kind, f"{{}} of class {kind.__name__}", (("class", type), ("bases", _bases))))
            if type(kind) is not type:
                self.visit(type(kind))
        super()._class(kind)

    def _follows_class(self, kind: type) -> bool:
        return not is_core(kind.__module__)

    def _attributes(self, kind: type) -> Iterable[tuple[str, Any]]:
        every = super()._attributes(kind)
        if not self._is_package(kind.__module__):
            return every
        self.settable.append(AttributeMapping(kind, functools.partial(own_names, kind)))
        self.settable += [value for _, value in every if type(value) in CONTAINERS]
        wrappers = (staticmethod, classmethod, property, functools.cached_property, functools.partialmethod)
        return [one for one in every if isinstance(one[1], wrappers) or self._may_be_used(*one)]

    def _library_class(self, kind: type) -> None:
        if not kind.__flags__ & _FIXED_TYPE:
            self._place(Attributes(class_dict(kind), f"{{}} of class {kind.__name__}"))
        if is_core(kind.__module__):  # what a package has put there
            for value in vars(kind).values():
                if self._ran and isinstance(value, types.FunctionType) and id(value.__code__) in self._ran:
                    self.visit(value)

    def _c_callable(self, obj: Any) -> None:
        instance = getattr(obj, "__self__", None)
        if isinstance(instance, Tensor):
            self._place(FixedTensor(None, "method of a tensor", instance))
        self.refuse(c_reason(obj))
        super()._c_callable(obj)

    def _container(self, obj: Any, kind: type) -> None:
        name = self.labels.get(id(obj), kind.__name__)
        if (size := len(contents(obj))) > MOST_ITEMS:
            self.refuse(f"it holds a {kind.__name__} of {size} elements; make it a tensor")
        if isinstance(obj, dict):
            self._place(Items(obj, name))
        elif isinstance(obj, types.MappingProxyType):
            (behind,) = gc.get_referents(obj)
            if not isinstance(behind, dict):
                self._give_up(kind)
                return
            self._place(Items(behind, name))
        else:
            self._place(Members(obj, name))
            if isinstance(obj, (set, frozenset)) and all(isinstance(one, type) for one in contents(obj)):
                return  # classes in a set are asked for, not called
        super()._container(obj, kind)

    def _instance(self, obj: Any, kind: type) -> None:
        if kind is object:  # a sentinel
            return
        if kind is inspect.Signature:  # can't change
            self.visit(tuple(obj.parameters.values()))
            return
        if kind in weakref.ProxyTypes:
            self._give_up(kind)
            return
        if issubclass(kind, BaseException):
            self._place(Fields(obj, f"{{}} of {kind.__name__}", (("args", operator.attrgetter("args")),)))
            self.visit(obj.args)
        if _immutable(kind):
            super()._instance(obj, kind)
            return
        reader = state_reader(kind)
        slots = slot_readers(kind)
        if reader is None and any("__dict__" in vars(base) for base in kind.__mro__):
            self._give_up(kind)
            return
        if (reader or slots) and hidden_state(kind):
            self._give_up(kind)
        name = kind.__name__
        fields: tuple[tuple[str, Any], ...] = (("class", type),)
        if reader is not None:
            state = reader(obj)
            self._place(Items(state, f"attribute {{}} of {name}"))
            fields += (("__dict__", reader),)
        if reader is not None or slots:
            self._place(Fields(obj, f"attribute {{}} of {name}", fields + slots))
        super()._instance(obj, kind)

    def _walk_reduced(self, obj: Any, kind: type) -> None:
        if isinstance(obj, operator.methodcaller) and ESCAPES & set(obj.__reduce__()[1]):
            self.refuse("it may read values of a tensor")
        if not _immutable(kind):
            self._give_up(kind)
        super()._walk_reduced(obj, kind)


def _immutable(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}".startswith(_IMMUTABLE)


def _default_dtype(owner: Any) -> torch.dtype:
    return torch.get_default_dtype()


def _registrations(owner: Any) -> int:
    """Return a count of registrations, as one object per number: places are compared by identity."""
    token = abc.get_cache_token()
    assert isinstance(token, int)
    return _TOKENS.setdefault(token, token)


_TOKENS: Final[dict[int, int]] = {}


def _bases(kind: type) -> Any:
    return type.__dict__["__mro__"].__get__(kind)
