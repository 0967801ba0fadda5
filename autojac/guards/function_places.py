"""List the places of functions and of what they look up: code, defaults, closures, globals, modules."""

from __future__ import annotations

import operator
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from autojac.guards.assignments import CONTAINERS, VariableMapping
from autojac.guards.bytecode import NamesUsed, names_used
from autojac.guards.escapes import ESCAPES
from autojac.guards.places import (
    FUNCTION_FIELDS,
    Attributes,
    Callables,
    Cells,
    Fields,
    FixedTensor,
    Items,
    Members,
    Names,
    Place,
    cell_contents,
)
from autojac.guards.provenance import is_core, is_installed, is_package
from autojac.guards.purity import c_reason, is_inside, unseen
from autojac.guards.tokens import SCALARS
from autojac.guards.walker import Walk

_CODE: Final = tuple((name, operator.attrgetter(attribute)) for name, attribute in FUNCTION_FIELDS.items())
_PROCESS: Final = frozenset({"sys", "os", "builtins", "gc", "time", "random"})


class FunctionPlaces(Walk):
    """A walk that lists what functions hold and look up.

    The user's functions are followed wherever they are met; those of installed packages where they ran, since a walk
    through all of a package would find no end.

    Args:
        ran: the code of installed packages that ran.
        narrow: whether packages of the user's are followed like installed ones, as far as they ran. They may contain
            much that no guard can list and no call of the function uses.

    Attributes:
        places: the places, each once.
        codes: the code of the functions that were followed.
        reason: why there may be more than the places; empty if there is not.
        settable: where packages that ran may set something: variables, attributes of classes, containers.
        labels: a human-readable name of each object, by its id.
        backwards: the code of derivatives that autograd may run in other threads, which are not monitored.
    """

    def __init__(self, ran: Collection[types.CodeType] = (), narrow: bool = False) -> None:
        super().__init__()
        self._is_package = is_package if narrow else is_installed
        self._ran = {id(code) for code in ran}
        self._looked_up = frozenset(name for code in ran for name in names_used(code).attributes)
        self.places: list[Place] = []
        self._codes: dict[int, types.CodeType] = {}
        self.reason = ""
        self.labels: dict[int, str] = {}
        self.settable: list[Any] = []
        self.backwards: list[types.CodeType] = []
        self._known: set[tuple[int, type]] = set()
        self._scope: types.FunctionType | None = None

    def refuse(self, reason: str) -> None:
        """Record why the places are not everything that is read; the first reason counts."""
        self.reason = self.reason or reason

    def _place(self, place: Place) -> None:
        if not isinstance(place, (Names, FixedTensor)):
            key = (id(place.owner), type(place))
            if key in self._known:
                return
            self._known.add(key)
        self.places.append(place)
        if isinstance(place, Items) and isinstance(place.owner, OrderedDict) and len(dict.keys(place.owner)):
            self.places.append(Members(place.owner, place.name))
        for name, value in zip(*place.read(), strict=True):
            if type(value) not in SCALARS:
                self.labels.setdefault(id(value), place.label(name))

    def _function(self, function: types.FunctionType) -> None:
        if "_torchdynamo_orig_callable" in vars(function):  # the original counts; a run shows whether it runs
            super()._function(function)
            return
        if function is os.getenv:
            self._environment()
        name = function.__name__
        if function.__closure__:
            self._place(Cells(function.__closure__, "variable {}", function.__code__.co_freevars))
        if self._follows(function):
            self._place(Fields(function, f"{{}} of {name}", _CODE))
            self._place(Items(vars(function), f"attribute {{}} of {name}"))
            self._scope = function
        super()._function(function)

    def _follows(self, function: types.FunctionType) -> bool:
        home = function.__globals__.get("__name__")
        return id(function.__code__) in self._ran or not (is_core(home) or self._is_package(home))

    @property
    def codes(self) -> tuple[types.CodeType, ...]:
        """The code of each of the user's functions; equal code counts twice, as that of a cell that ran twice."""
        return tuple(self._codes.values())

    def _code(self, code: types.CodeType) -> None:
        self._codes[id(code)] = code
        super()._code(code)

    def _globals(self, names: Iterable[str], scope: Mapping[str, Any], inside: tuple[int, ...] = ()) -> None:
        function, self._scope = self._scope, None
        assert function is not None
        uses = names_used(function.__code__)
        scope = function.__globals__
        untyped: Any = function  # not every release of the type stubs knows `__builtins__`
        builtins: dict[str, Any] = untyped.__builtins__
        if uses.scope and self._is_package(scope.get("__name__")):
            self._place(Attributes(scope, f"{scope['__name__']}.{{}}"))
            if isinstance(scope, dict):
                self.settable.append(VariableMapping(scope, uses.scope))
                self.settable += [reached for name in uses.scope if type(reached := scope.get(name)) in CONTAINERS]
        elif uses.scope:
            self._place(Names(scope, "global {}", uses.scope))
        if builtin_names := tuple(name for name in uses.scope if name not in scope and name in builtins):
            self._place(Names(builtins, "builtin {}", builtin_names))
        reached = [scope[name] for name in uses.scope if name in scope and not _shows_in_runs(scope[name], name, uses)]
        reached += [value for value in cell_contents(function) if isinstance(value, types.ModuleType)]
        for name in builtin_names:
            if name in uses.values and isinstance(builtins[name], types.BuiltinFunctionType):
                self.refuse(c_reason(builtins[name]))
        reached += [
            builtins[name] for name in builtin_names if not is_core(getattr(builtins[name], "__module__", "builtins"))
        ]
        # a package has names such as `storage` and `_version` for much else
        if uses.state and (uses.state in ("grad", "grad_fn") or not is_installed(scope.get("__name__"))):
            self.refuse(f"{function.__name__} reads values of a tensor or of its gradient ({uses.state})")
        if "methodcaller" in uses.attributes and (escapes := ESCAPES & uses.attributes):
            self.refuse(f"{function.__name__} may read values of a tensor ({min(escapes)})")
        for name in _imported_modules(uses, scope):
            # one that is not there yet is listed as absent
            self._place(Names(sys.modules, "module {}", (name,)))
            if name in sys.modules:
                reached.append(sys.modules[name])
        for value in reached:
            if isinstance(value, types.ModuleType):
                self._used_module(value, uses, ())
            else:
                self.visit(value)

    def _used_module(self, module: Any, uses: NamesUsed, inside: tuple[int, ...]) -> None:
        if id(module) in inside:
            return
        home = module.__name__
        core, installed = is_core(home), self._is_package(home)
        if is_inside(home, ("torch.backends",)) and type(module) is not types.ModuleType:
            self._flags(module, uses)
        scope = module.__dict__
        if uses.dynamic and not core:
            self._whole_module(module)
            if not installed:
                return
        # a name that is not there yet matters where it may be asked for, as by hasattr
        may_be_asked_for = uses.dynamic or not (core or installed)
        names = tuple(sorted(name for name in uses.attributes if name in scope or may_be_asked_for))
        if installed:
            self._place(Attributes(scope, f"{home}.{{}}"))
        elif names:
            self._place(Names(scope, f"{home}.{{}}", names))
        for name in names:
            value = scope.get(name)
            if value is os.environ or value is os.getenv:
                self._environment()
            elif isinstance(value, types.ModuleType):
                self._used_module(value, uses, (*inside, id(module)))
            elif not core or not is_core(getattr(value, "__module__", None) or "torch"):
                self.visit(value)
            elif name in uses.values and isinstance(value, types.BuiltinFunctionType):
                self.refuse(c_reason(value))
            elif unseen(home, value):
                self.refuse(f"it may read {home}.{name}, which no guard sees")
            elif isinstance(value, type) or not callable(value):
                self.visit(value)

    def _environment(self) -> None:
        self._place(Items(vars(os.environ)["_data"], "environment variable {}"))

    def _flags(self, module: Any, uses: NamesUsed) -> None:
        """List torch's flags that look like attributes of a module and are properties of its class."""
        for name in sorted(uses.attributes & vars(type(module)).keys()):
            if not name.startswith("__"):
                self.places.append(Fields(module, f"{module.__name__}.{{}}", ((name, operator.attrgetter(name)),)))

    def _whole_module(self, module: Any) -> None:
        if is_core(module.__name__):
            if module.__name__ in _PROCESS:
                self.refuse(f"it holds the module {module.__name__}, which shows the state of the process")
            self._place(Callables(module.__dict__, f"{module.__name__}.{{}}"))
            return
        scope = module.__dict__
        names = sorted(name for name in scope if not (name.startswith("__") and name.endswith("__")))
        if self._is_package(module.__name__):
            names = [name for name in names if self._may_be_used(name, scope[name])]
        self._place(Attributes(scope, f"{module.__name__}.{{}}"))
        for name in names:
            self.visit(scope[name])

    def _may_be_used(self, name: str, value: Any) -> bool:
        """Check whether an attribute of a package's module or class may be looked up by what ran."""
        ran = isinstance(value, types.FunctionType) and id(value.__code__) in self._ran
        return ran or name in self._looked_up or isinstance(value, (dict, list, set))


def _shows_in_runs(value: Any, name: str, uses: NamesUsed) -> bool:
    """Check whether a function made in C, such as `random.random`, is only ever called where a run shows that."""
    return isinstance(value, types.BuiltinFunctionType) and name not in uses.values and bool(c_reason(value))


def _imported_modules(uses: NamesUsed, scope: Mapping[str, Any]) -> Iterator[str]:
    """Return the full names of the modules that a function imports as it runs."""
    for level, name, parts in uses.imported:
        full = name
        if level:
            home = str(scope.get("__package__") or scope.get("__name__", "").rpartition(".")[0])
            full = ".".join(filter(None, (*home.split(".")[: len(home.split(".")) - level + 1], name)))
        yield full
        yield from (f"{full}.{part}" for part in parts if f"{full}.{part}" in sys.modules)
