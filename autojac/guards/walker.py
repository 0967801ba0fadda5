"""A walk over everything that a callable reaches: modules, closures, globals, defaults, attributes."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from autojac.guards.places import ABSENT, cell_contents
from autojac.guards.provenance import (
    UNSTABLE,
    code_names,
    followed_fields,
    home_of,
    is_library,
    library_version,
    slots,
    source_of,
)
from autojac.guards.tensor_contents import dense_parts
from autojac.guards.tokens import C_CALLABLES, SCALARS, contents, leaf_tokens, reduce, sort_key
from autojac.torch_internals import COMPILED_HOME

MODULE_FIELDS: Final = frozenset(vars(torch.nn.Module()))
HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_DEPTH: Final = 100
_VISITS: Final = 200_000


class Walk:
    """Visits every object once, in an order that is the same in every process.

    Subclasses override `emit` and `content` to turn the visit into a digest.

    Attributes:
        modules: distinct modules, submodules included.
        tensors: distinct parameters, buffers and captured tensors.
        opaque: something was met that can't be followed.
    """

    def __init__(self) -> None:
        self.modules: list[torch.nn.Module] = []
        self.tensors: list[torch.Tensor] = []
        self.opaque = False
        self._order: dict[int, int] = {}
        self._alive: list[Any] = []
        self._depth = 0
        self._visits = 0

    def emit(self, *tokens: object) -> None:
        """Record what was met; tokens are strings, numbers, bytes and containers of them."""

    def content(self, tensor: torch.Tensor) -> None:
        """Record the entries of an integer or boolean tensor."""

    def visit(self, obj: Any) -> None:
        """Visit an object and all that it reaches."""
        kind = type(obj)
        if kind in SCALARS:
            self.emit(obj)
            return
        self._visits += 1
        if self._depth >= _DEPTH or self._visits > _VISITS:
            self._give_up(kind)
            return
        # A tuple can't hold itself but through something mutable, and equal constants may or may not be one object.
        if not isinstance(obj, (tuple, types.MethodType, *C_CALLABLES)):
            if id(obj) in self._order:
                self.emit("seen", self._order[id(obj)])
                return
            self._order[id(obj)] = len(self._order)
            self._alive.append(obj)
        self._depth += 1
        try:
            self._dispatch(obj, kind)
        except Exception:  # reading attributes may run any code
            self._give_up(kind)
        finally:
            self._depth -= 1

    def _dispatch(self, obj: Any, kind: type) -> None:
        if (tokens := leaf_tokens(obj)) is not None:
            self.emit(*tokens)
        elif isinstance(obj, torch.Tensor):
            if obj.is_nested:  # has no shape, and may have no memory of its own
                self._give_up(kind)
            else:
                self._tensor(obj)
        elif hasattr(kind, "__autojac_reach__"):  # what a wrapper is made of, without what it learns as it runs
            self._walk_named("wrapper", name=kind.__qualname__, **obj.__autojac_reach__())
        elif isinstance(obj, torch.nn.Module):
            self._module(obj)
        elif isinstance(obj, types.FunctionType):
            self._function(obj)
        elif isinstance(obj, type):
            self._class(obj)
        elif isinstance(obj, types.MethodType):
            self._walk_named("method", function=obj.__func__, instance=obj.__self__)
        elif isinstance(obj, (functools.partial, functools.partialmethod)):
            self._walk_named("partial", function=obj.func, args=obj.args, keywords=dict(sorted(obj.keywords.items())))
        elif isinstance(obj, C_CALLABLES):
            self._c_callable(obj)
        elif isinstance(obj, (dict, types.MappingProxyType, list, tuple, set, frozenset, deque)):
            self._container(obj, kind)
        elif isinstance(obj, (staticmethod, classmethod)):
            self._walk_named(kind.__name__, function=obj.__func__)
        elif isinstance(obj, property):
            self._walk_named("property", get=obj.fget, set=obj.fset, delete=obj.fdel)
        elif isinstance(obj, (types.GenericAlias, types.UnionType)):  # an annotation, which can't change
            self._walk_named("alias", origin=getattr(obj, "__origin__", None), args=obj.__args__)
        elif isinstance(obj, weakref.ref):
            self._walk_named("weak", referent=obj())
        elif isinstance(obj, slice):
            self._walk_named("slice", start=obj.start, stop=obj.stop, step=obj.step)
        else:
            self._instance(obj, kind)

    def _walk_named(self, label: str, /, **parts: Any) -> None:
        self.emit(label, len(parts))
        for name, part in parts.items():
            self.emit(name)
            self.visit(part)

    def _give_up(self, kind: type) -> None:
        self.opaque = True
        self.emit("opaque", home_of(kind), kind.__qualname__)

    def _tensor(self, tensor: torch.Tensor, by_content: bool = True) -> None:
        self.tensors.append(tensor)
        self.emit("tensor", tuple(tensor.shape), str(tensor.dtype), str(tensor.layout))
        if tensor.layout is not torch.strided:
            for indices in dense_parts(tensor.detach())[:-1]:
                self.content(indices)
        elif by_content and not (tensor.is_floating_point() or tensor.is_complex()):
            self.content(tensor)

    def _module(self, module: torch.nn.Module) -> None:
        self.modules.append(module)
        kind = type(module)
        self.visit(kind)
        source = source_of(module)
        self.visit(source)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            self.emit("parameter", name)
            self.visit(parameter)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            self.emit("buffer", name)
            if name == "num_batches_tracked" and id(buffer) not in self._order:  # counts the calls, decides nothing
                self._tensor(buffer, by_content=False)
            else:
                self.visit(buffer)
        for name, child in module._modules.items():
            self.emit("child", name)
            self.visit(child)
        if kind.__module__ == COMPILED_HOME:  # torch.compile's wrapper: the original is its child
            return
        for hooks in HOOKS:
            self.emit(hooks)
            for hook in getattr(module, hooks, {}).values():
                self.visit(hook)
        for name, value in sorted(vars(module).items()):
            if name not in MODULE_FIELDS and (source is None or isinstance(value, torch.Tensor)):
                self.emit(name)
                self.visit(value)

    def _function(self, function: types.FunctionType) -> None:
        original = vars(function).get("_torchdynamo_orig_callable")
        if original is not None:  # made by torch.compile
            self._walk_named("compiled", function=original)
            return
        code = function.__code__
        # Not function.__module__: functools.wraps gives a library's wrapper the name of what it wraps.
        home = function.__globals__.get("__name__")
        if not self._follows(function):
            name = code.co_qualname
            self.emit("library function", home, name, library_version(home))
        else:
            self._code(code)
            self._globals(code_names(code), function.__globals__)
            self._walk_named("defaults", args=function.__defaults__, keywords=function.__kwdefaults__)
            self._mapping("attributes", sorted(vars(function).items()))
        for name, value in zip(code.co_freevars, cell_contents(function), strict=False):
            self.emit("cell", name)
            if value is not ABSENT:
                self.visit(value)

    def _follows(self, function: types.FunctionType) -> bool:
        """Check whether a function counts by its code, not by its name and version."""
        return not is_library(function.__globals__.get("__name__"))

    def _follows_class(self, kind: type) -> bool:
        """Check whether a class counts by its attributes, not by its name and version."""
        return not is_library(kind.__module__)

    def _attributes(self, kind: type) -> Iterable[tuple[str, Any]]:
        """Return the attributes of a class that count."""
        return vars(kind).items()

    def _code(self, code: types.CodeType) -> None:
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.emit("code", code.co_code, code.co_flags, code.co_posonlyargcount, code.co_argcount, arguments)
        self.emit(code.co_names, code.co_freevars, code.co_cellvars, code.co_exceptiontable)
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                self._code(const)
            else:
                self.visit(const)

    def _globals(self, names: Iterable[str], scope: Mapping[str, Any], inside: tuple[int, ...] = ()) -> None:
        for name in sorted(names):
            if name not in scope:
                continue
            value = scope[name]
            self.emit("global", name)
            if not isinstance(value, types.ModuleType) or is_library(value.__name__):
                self.visit(value)
            elif id(value) not in inside:
                self._globals(names, vars(value), (*inside, id(value)))

    def _class(self, kind: type) -> None:
        if not self._follows_class(kind):
            self.emit("library class", kind.__module__, kind.__qualname__, library_version(kind.__module__))
            return
        self.emit("class", kind.__qualname__)
        for base in kind.__bases__:
            self.visit(base)
        for name, value in sorted(self._attributes(kind)):
            dunder = name.startswith("__") and name.endswith("__")
            if name not in UNSTABLE and (
                not dunder or isinstance(value, (types.FunctionType, staticmethod, classmethod))
            ):
                self.emit(name)
                self.visit(value)

    def _c_callable(self, obj: Any) -> None:
        owner = getattr(obj, "__objclass__", None)
        home = getattr(obj, "__module__", None) or getattr(owner, "__module__", None)
        self.emit("builtin", home, getattr(obj, "__qualname__", obj.__name__))
        instance = getattr(obj, "__self__", None)
        if instance is not None and not isinstance(instance, (types.ModuleType, type)):
            self.visit(instance)

    def _container(self, obj: Any, kind: type) -> None:
        items = contents(obj)
        self.emit("container", home_of(kind), kind.__qualname__, len(items))
        if kind.__module__ != "builtins":  # a subclass may do more than hold
            self._walk_named("subclass", kind=kind, state=getattr(obj, "__dict__", None))
            self.visit(getattr(obj, "default_factory", None))
        if isinstance(obj, (dict, types.MappingProxyType)):
            self._mapping("items", items)
        elif isinstance(obj, (set, frozenset)):
            if any(type(item) not in SCALARS for item in items):
                self.opaque = True  # nothing orders functions or tensors
            for item in sorted(items, key=lambda item: (type(item).__qualname__, sort_key(item))):
                self.visit(item)
        elif all(type(item) in SCALARS for item in items):
            self.emit(items)
        else:
            for item in items:
                self.visit(item)

    def _mapping(self, label: str, items: Iterable[tuple[Any, Any]]) -> None:
        self.emit(label)
        for key, value in items:
            self.visit(key)
            self.visit(value)

    def _instance(self, obj: Any, kind: type) -> None:
        if fields := followed_fields(kind):
            self._walk_named(kind.__qualname__, **{name: getattr(obj, name, None) for name in fields})
            return
        state = getattr(obj, "__dict__", None)
        if state is None and not slots(kind):
            self._walk_reduced(obj, kind)
            return
        self.emit("instance")
        self.visit(kind)
        in_slots = {name: getattr(obj, name) for name in slots(kind) if hasattr(obj, name)}
        self._mapping("state", sorted({**in_slots, **(state or {})}.items(), key=lambda item: str(item[0])))

    def _walk_reduced(self, obj: Any, kind: type) -> None:
        # operator.itemgetter, re.Pattern, Decimal, ...: what pickle would write is all they hold.
        iterates = hasattr(kind, "__next__")  # what it yields next differs from call to call
        if iterates or not is_library(kind.__module__) or kind.__module__.startswith(("torch", "numpy.random")):
            self._give_up(kind)
            return
        try:
            reduced = reduce(obj)
        except Exception:  # whatever an object raises that can't be pickled
            self._give_up(kind)
            return
        self.emit("reduced", kind.__module__, kind.__qualname__)
        self.visit(reduced)
