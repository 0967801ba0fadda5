"""Modules as functions of their parameters."""

from __future__ import annotations

import fnmatch
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from autojac.autodiff.pullback import Pullback
from autojac.core.batch_grid import BatchGrid
from autojac.core.nests import tensor_leaves
from autojac.core.selection import pick
from autojac.errors import InputError, OptionError, kind_of, nearest

_locks: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_naming = threading.Lock()


class ModuleLock:
    """A lock on a module and all inside it: wrappers of one module, or of modules that share a layer, share locks.

    Reentrant, to be used as a context manager.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._entered: list[ExitStack] = []

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return nothing: who holds the lock changes no result."""
        return {}

    def __enter__(self) -> Self:
        with _naming:
            locks = {id(inner): _locks.setdefault(inner, threading.RLock()) for inner in self._module.modules()}
        with ExitStack() as stack:
            # one order for all threads, so that none waits for another that waits for it
            for number in sorted(locks):
                stack.enter_context(locks[number])
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()


@contextmanager
def parameters_replaced(module: torch.nn.Module, replacements: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace a module's parameters by other tensors, wherever each is registered, and restore them.

    `torch.func.functional_call` leaves its tensors in a module whose layers are registered twice.

    Args:
        module: the module.
        replacements: by the names of `named_parameters()`.
    """
    parameters = dict(module.named_parameters())
    others = {id(parameters[name]): tensor for name, tensor in replacements.items() if tensor is not parameters[name]}
    undo: list[tuple[dict[str, Any], str, Any, Tensor]] = []
    try:
        for inner in module.modules() if others else ():
            for name, parameter in inner._parameters.items():
                if id(parameter) in others:
                    undo.append((inner._parameters, name, parameter, others[id(parameter)]))
                    inner._parameters[name] = others[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        while undo:
            registry, name, parameter, replacement = undo[-1]
            # the module may have registered a parameter of its own choice meanwhile
            if registry.get(name) is replacement:
                registry[name] = parameter
            undo.pop()


class ModuleFunction:
    """A module as a function of its parameters: `f(parameters, args, **kwargs)`.

    Args:
        module: its parameters are replaced by those that are passed, for the length of a call.
        select: picks what of the module's output is differentiated, and the whole is returned besides; None for all.
        names: patterns of the names of those to differentiate in, as `fnmatch` reads them; None for all that require
            grad.
        grid: how one batch axis of the arguments represents several of the module's; None where it has one.

    Attributes:
        lock: held while they are replaced, so that no other thread calls or inspects the module then.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        names: tuple[str, ...] | None = None,
        select: Any = None,
        grid: BatchGrid | None = None,
    ) -> None:
        self.module = module
        self.names = names
        self.select = select
        self.grid = grid
        self.lock = ModuleLock(module)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "names": self.names, "select": self.select, "grid": self.grid}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def over(self, grid: BatchGrid) -> ModuleFunction:
        """Return the same function of arguments with one batch axis, instead of the module's several."""
        return ModuleFunction(self.module, self.names, self.select, grid)

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters to differentiate in, by the names of `named_parameters()`: tied ones once.

        Left out are frozen ones, and those on the meta device, which a template has: they have no values.
        """
        with self.lock:
            named = self.module.named_parameters()
            parameters: dict[str, Tensor] = {name: p for name, p in named if p.requires_grad and not p.is_meta}
            if self.names is not None:
                parameters = _choose(self.module, parameters, self.names)
        for name, parameter in parameters.items():
            if parameter.is_complex():
                raise InputError(
                    f"parameter {name} is {parameter.dtype}; a real Jacobian needs real parameters. Hold its real and "
                    "imaginary part as one real parameter, and call torch.view_as_complex in forward; or leave it out "
                    "by names="
                )
        if not parameters:
            raise InputError(
                f"parameters that require grad were expected, but {type(self.module).__name__} has none. Call "
                "module.requires_grad_()"
            )
        return parameters

    def __autojac_originals__(self) -> tuple[Tensor, ...]:
        """Return the module's own tensors behind the differentiated arguments, in their order."""
        return tuple(self.parameters().values())

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the positional arguments of this function for a call of the module's.

        Raises:
            InputError: if they are parameters or were computed from them, so that a derivative in these would go
                through the arguments as well.
        """
        parameters = self.parameters()
        differentiable = [value for value in tensor_leaves((tuple(args), dict(kwargs))) if value.requires_grad]
        if differentiable:
            targets, ids = list(parameters.values()), set(map(id, parameters.values()))
            derived = [value for value in differentiable if value.grad_fn is not None and torch.is_grad_enabled()]
            leads = bool(derived) and len(Pullback.of_graph(derived, targets, False).unused_inputs()) < len(targets)
            if leads or any(id(value) in ids for value in differentiable):
                raise InputError(
                    f"arguments that do not depend on the parameters of {type(self.module).__name__} were expected, "
                    "but one was computed from them, and its graph would count. Pass x.detach(), or wrap a module that "
                    "computes it inside"
                )
        return parameters, tuple(args)

    def __call__(self, parameters: dict[str, Tensor], args: tuple[Any, ...], **kwargs: Any) -> Any:
        with self.lock, parameters_replaced(self.module, parameters):
            return self._output(*args, **kwargs) if self.grid is None else self.grid.call(self._output, args, kwargs)

    def _output(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        return output if self.select is None else (pick(output, self.select), output)


def _choose(module: torch.nn.Module, parameters: dict[str, Tensor], patterns: Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters that patterns name, by any of the names that tied ones have."""
    every = dict(module.named_parameters(remove_duplicate=False))
    ids: set[int] = set()
    for pattern in patterns:
        matches = [name for name in every if fnmatch.fnmatchcase(name, pattern)]
        usable = [id(every[name]) for name in matches if any(every[name] is p for p in parameters.values())]
        if not usable:
            what = f"{matches[0]}, which is frozen" if matches else f"nothing{nearest(pattern, every)}"
            raise InputError(
                f"names was expected to match parameters of {type(module).__name__} that require grad, but {pattern!r} "
                f"matches {what}. Pass names of named_parameters(), or patterns such as '*.weight'"
            )
        ids.update(usable)
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in ids}


def module_function(module: torch.nn.Module, names: str | Sequence[str] | None = None) -> ModuleFunction:
    """Return a module as a function of its parameters, or of those that `names` match.

    Raises:
        InputError: if it is no module, or a scripted one, or no parameter has such a name.
    """
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"a torch.nn.Module was expected, got {kind_of(module)}. For derivatives in a function's arguments use "
            "AutoJacobian(func)"
        )
    scripted = [name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            f"{scripted[0] or type(module).__name__} is a scripted or traced module, whose parameters TorchScript "
            "holds itself, so that none can be put in their place. Pass the module that it was made from"
        )
    if names is None:
        return ModuleFunction(module)
    patterns = (names,) if isinstance(names, str) else tuple(names)
    if not patterns or not all(isinstance(name, str) for name in patterns):
        raise OptionError(
            f"names must be a name or a pattern, or a sequence of these, got {names!r}. Leave it out for all parameters"
        )
    function = ModuleFunction(module, patterns)
    function.parameters()
    return function
