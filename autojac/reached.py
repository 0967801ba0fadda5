"""A walk that lists every place where what a callable does is kept, or says why there is no such list."""

from __future__ import annotations

import enum
import functools
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from autojac.held import (
    Bytes,
    Cells,
    Fields,
    Items,
    Members,
    Names,
    Pinned,
    Place,
    class_dict,
    hidden_state,
    slot_readers,
    state_reader,
)
from autojac.leaves import SCALARS
from autojac.names import Used, used
from autojac.origin import is_library
from autojac.outside import c_reason, unseen
from autojac.walk import HOOKS, Walk

MOST_BYTES: Final = 4096
"""An array of numpy's is compared with its copy in every call up to this size."""

MOST_ITEMS: Final = 10_000
"""A container is compared element by element in every call up to this size."""

_CODE: Final = tuple(
    (name, operator.attrgetter(attribute))
    for name, attribute in (
        ("code", "__code__"),
        ("defaults", "__defaults__"),
        ("keyword defaults", "__kwdefaults__"),
        ("attributes", "__dict__"),
    )
)
_PARTS: Final = tuple((name, operator.attrgetter(name)) for name in ("func", "args", "keywords"))
_TENSORS: Final = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_HOOKS_OF_ALL: Final = [
    (name, hooks)
    for name, hooks in sorted(vars(torch.nn.modules.module).items())
    if name.startswith("_global_") and isinstance(hooks, dict) and ("forward" in name or "backward" in name)
]
_IMMUTABLE: Final = (
    *("operator.", "re.Pattern", "decimal.Decimal", "datetime.", "fractions.Fraction", "pathlib.", "uuid.UUID"),
    "_collections._tuplegetter",
)
_OUT_OF_SIGHT: Final = frozenset({"_contextvars", "contextvars", "_thread", "threading"})
_PLAIN_NUMPY: Final = ("ufunc", "_ArrayFunctionDispatcher")
_LOCKS: Final = ("_thread.lock", "_thread.RLock")
_PROCESS: Final = frozenset({"sys", "os", "builtins", "gc", "time", "random"})


class Reached(Walk):
    """Everything that a callable holds, by place.

    Attributes:
        places: the places, each once.
        codes: the code of the user's functions.
        reason: why there may be more than the places; empty if there is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []
        self.codes: set[types.CodeType] = set()
        self.reason = ""
        self._known: set[tuple[int, type]] = set()
        self.called: dict[int, str] = {}
        self._weak: list[Any] = []
        self._scope: types.FunctionType | None = None

    def follow(self, func: Any) -> None:
        """Visit a callable, and what of torch's is called for every module."""
        for _, hooks in _HOOKS_OF_ALL:
            self._place(Items(hooks, "hook of all modules"))
            self.visit(hooks)
        self._place(Fields(torch, "{}", (("default dtype", _default_dtype),)))
        self.visit(func)
        if any(id(referent) not in self._order for referent in self._weak):
            self.refuse("it holds a weak reference to what nothing else of it holds")

    def refuse(self, reason: str) -> None:
        """Say why the places are not all that is read; the first reason is kept."""
        self.reason = self.reason or reason

    def _place(self, place: Place) -> None:
        if not isinstance(place, (Names, Pinned)):
            key = (id(place.owner), type(place))
            if key in self._known:
                return
            self._known.add(key)
        self.places.append(place)
        if isinstance(place, Items) and isinstance(place.owner, OrderedDict) and len(dict.keys(place.owner)):
            self.places.append(Members(place.owner, place.name))
        for name, value in zip(*place.look(), strict=True):
            if type(value) not in SCALARS:
                self.called.setdefault(id(value), place.label(name))

    def _named(self, label: str, /, **parts: Any) -> None:
        for part in parts.values():
            if isinstance(part, Tensor):
                self._place(Pinned(None, label, part))
        super()._named(label, **parts)

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
        elif isinstance(obj, torch.jit.ScriptFunction):
            self.refuse("it calls what torch.jit.script has compiled")
        elif isinstance(obj, (bytearray, memoryview)) or (
            home in _OUT_OF_SIGHT and f"{home}.{kind.__qualname__}" not in _LOCKS
        ):
            self._give_up(kind)
        elif home.partition(".")[0] == "numpy":
            self._of_numpy(obj, kind)
        elif isinstance(obj, enum.Enum):
            self._instance(obj, kind)
        elif isinstance(obj, functools.partial):
            self._place(Fields(obj, f"{{}} of {self.called.get(id(obj), 'a partial')}", _PARTS))
            self._place(Items(vars(obj), "attribute {} of a partial"))
            self._named("partial", function=obj.func, args=obj.args, keywords=obj.keywords)
            self.visit(vars(obj))
        else:
            super()._dispatch(obj, kind)

    def _of_numpy(self, obj: Any, kind: type) -> None:
        if kind.__name__ == "ndarray":
            if obj.dtype.hasobject:
                self._give_up(kind)
            elif obj.nbytes > MOST_BYTES:
                self.refuse(f"it holds an array of numpy's of {obj.nbytes} bytes; make it a tensor")
            else:
                self._place(Bytes(obj, self.called.get(id(obj), "array")))
        elif kind.__name__ not in _PLAIN_NUMPY and not hasattr(kind, "dtype") and "dtypes" not in kind.__module__:
            self._instance(obj, kind)

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
            return
        if kind.__module__ == "torch._dynamo.eval_frame":
            self.refuse("it calls what torch.compile has compiled")
            return
        name = kind.__name__
        kept = vars(module)
        self._place(Items(kept, f"attribute {{}} of {name}"))
        self._place(Fields(module, f"{{}} of {name}", (("class", type), *self._own_fields(kind))))
        for field, label in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", "module")):
            self._place(Items(kept[field], f"{label} {{}} of {name}"))
        for hooks in HOOKS:
            if kept.get(hooks) is not None:
                self._place(Items(kept[hooks], "hook"))
        for base in kind.__mro__[:-1]:
            if is_library(base.__module__):
                self._place(Items(class_dict(base), f"{{}} of class {base.__name__}"))
                if base.__module__ == "torch.fx.graph_module" and "forward" in vars(base):
                    self.visit(vars(base)["forward"])
        super()._module(module)

    def _own_fields(self, kind: type) -> tuple[tuple[str, Any], ...]:
        if is_library(kind.__module__):
            return ()
        reader = state_reader(kind)
        return (() if reader is None else (("__dict__", reader),)) + slot_readers(kind)

    def _function(self, function: types.FunctionType) -> None:
        if vars(function).get("_torchdynamo_orig_callable") is not None:
            self.refuse("it calls what torch.compile has compiled")
            return
        name = function.__name__
        if function.__closure__:
            self._place(Cells(function.__closure__, "variable {}", function.__code__.co_freevars))
        if not is_library(function.__globals__.get("__name__")):
            self._place(Fields(function, f"{{}} of {name}", _CODE))
            self._place(Items(vars(function), f"attribute {{}} of {name}"))
            self._scope = function
        super()._function(function)

    def _code(self, code: types.CodeType) -> None:
        self.codes.add(code)
        super()._code(code)

    def _globals(self, names: Iterable[str], scope: Mapping[str, Any], inside: tuple[int, ...] = ()) -> None:
        function, self._scope = self._scope, None
        assert function is not None
        uses = used(function.__code__)
        scope = function.__globals__
        builtins: dict[str, Any] = function.__builtins__  # type: ignore[attr-defined]
        if uses.scope:
            self._place(Names(function.__globals__, "global {}", uses.scope))
        if found := tuple(name for name in uses.scope if name not in scope and name in builtins):
            self._place(Names(builtins, "builtin {}", found))
        held = [scope[name] for name in uses.scope if name in scope]
        for name in found:
            if name in uses.values and isinstance(builtins[name], types.BuiltinFunctionType):
                self.refuse(c_reason(builtins[name]))
        held += [builtins[name] for name in found if not is_library(getattr(builtins[name], "__module__", "builtins"))]
        if uses.state:
            self.refuse(f"{function.__name__} reads {uses.state} of a tensor")
        if uses.relative:
            self.refuse(f"{function.__name__} imports relatively as it runs; import at the top of its file")
        for name in uses.imported:
            if name in sys.modules:
                self._place(Names(sys.modules, "module {}", (name,)))
                held.append(sys.modules[name])
            elif not is_library(name) and name.rpartition(".")[0] not in sys.modules:
                self.refuse(f"{function.__name__} imports {name} as it runs; import at the top of its file")
        for value in held:
            if isinstance(value, types.ModuleType):
                self._used_module(value, uses, ())
            else:
                self.visit(value)

    def _used_module(self, module: Any, uses: Used, inside: tuple[int, ...]) -> None:
        if id(module) in inside:
            return
        home = module.__name__
        library = is_library(home)
        kept = module.__dict__
        if uses.dynamic and not library:
            self._whole_module(module)
            return
        looked = tuple(sorted(name for name in uses.attributes if name in kept or not library))
        if looked:
            self._place(Names(kept, f"{home}.{{}}", looked))
        for name in looked:
            value = kept.get(name)
            if isinstance(value, types.ModuleType):
                self._used_module(value, uses, (*inside, id(module)))
            elif not library or not is_library(getattr(value, "__module__", None) or "torch"):
                self.visit(value)
            elif name in uses.values and isinstance(value, types.BuiltinFunctionType):
                self.refuse(c_reason(value))
            elif unseen(home, value):
                self.refuse(f"it may read {home}.{name}, which no guard sees")

    def _whole_module(self, module: Any) -> None:
        if is_library(module.__name__):
            if module.__name__ in _PROCESS:
                self.refuse(f"it holds the module {module.__name__}, which shows the state of the process")
            return
        kept = module.__dict__
        names = tuple(sorted(name for name in kept if not (name.startswith("__") and name.endswith("__"))))
        self._place(Items(kept, f"{module.__name__}.{{}}"))
        for name in names:
            self.visit(kept[name])

    def _class(self, kind: type) -> None:
        if not is_library(kind.__module__):
            self._place(Items(class_dict(kind), f"{{}} of class {kind.__name__}"))
            self._place(Fields(kind, f"{{}} of class {kind.__name__}", (("class", type), ("bases", _bases))))
            if type(kind) is not type:
                self.visit(type(kind))
        super()._class(kind)

    def _c_callable(self, obj: Any) -> None:
        instance = getattr(obj, "__self__", None)
        if isinstance(instance, Tensor):
            self._place(Pinned(None, "method of a tensor", instance))
        self.refuse(c_reason(obj))
        super()._c_callable(obj)

    def _container(self, obj: Any, kind: type) -> None:
        name = self.called.get(id(obj), kind.__name__)
        if len(obj) > MOST_ITEMS:
            self.refuse(f"it holds a {kind.__name__} of {len(obj)} elements; make it a tensor")
            return
        if isinstance(obj, dict):
            self._place(Items(obj, name))
        elif isinstance(obj, types.MappingProxyType):
            self._give_up(kind)
        else:
            self._place(Members(obj, name))
        super()._container(obj, kind)

    def _instance(self, obj: Any, kind: type) -> None:
        if _immutable(kind):
            super()._instance(obj, kind)
            return
        reader = state_reader(kind)
        slots = slot_readers(kind)
        unread = reader is None and any("__dict__" in vars(base) for base in kind.__mro__)
        if unread or ((reader or slots) and hidden_state(kind)):
            self._give_up(kind)
            return
        name = kind.__name__
        fields: tuple[tuple[str, Any], ...] = (("class", type),)
        if reader is not None:
            state = reader(obj)
            self._place(Items(state, f"attribute {{}} of {name}"))
            fields += (("__dict__", reader),)
        if reader is not None or slots:
            self._place(Fields(obj, f"attribute {{}} of {name}", fields + slots))
        super()._instance(obj, kind)

    def _reduced(self, obj: Any, kind: type) -> None:
        if _immutable(kind):
            super()._reduced(obj, kind)
        else:
            self._give_up(kind)


def _immutable(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}".startswith(_IMMUTABLE)


def _default_dtype(owner: Any) -> torch.dtype:
    return torch.get_default_dtype()


def _bases(kind: type) -> Any:
    return type.__dict__["__mro__"].__get__(kind)
