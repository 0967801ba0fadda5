"""Jacobians in a module's parameters, sample by sample."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from autojac.errors import InputError, kind_of

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
    """Put other tensors in the place of a module's parameters, wherever each is registered, and put those back.

    `torch.func.functional_call` leaves its tensors in a module whose layers are registered twice.

    Args:
        module: the module.
        replacements: by the names of `named_parameters()`.
    """
    own = dict(module.named_parameters())
    others = {id(own[name]): tensor for name, tensor in replacements.items() if tensor is not own[name]}
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
            registered, name, parameter, replacement = undo[-1]
            # the module may have registered a parameter of its own choice meanwhile
            if registered.get(name) is replacement:
                registered[name] = parameter
            undo.pop()


class ModuleFunction:
    """A module as a function of its parameters: `f(parameters, args, **kwargs)`.

    Args:
        module: its parameters are put aside for the length of a call, unless they are what is passed.

    Attributes:
        lock: held while they are put aside, so that no other thread calls the module or looks at it then.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.lock = ModuleLock(module)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters to differentiate in, by the names of `named_parameters()`: tied ones once.

        Left out are frozen ones, and those on the meta device, which a template has: they have no values.
        """
        with self.lock:
            named = self.module.named_parameters()
            found: dict[str, Tensor] = {name: p for name, p in named if p.requires_grad and not p.is_meta}
        if not found:
            raise InputError(
                f"parameters that require grad were expected, but {type(self.module).__name__} has none. Call "
                "module.requires_grad_()"
            )
        return found

    def __autojac_originals__(self) -> tuple[Tensor, ...]:
        """Return the module's own tensors behind the differentiated arguments, in their order."""
        return tuple(self.parameters().values())

    def arguments(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Return the arguments of this function for a call of the module's."""
        return self.parameters(), tuple(args)

    def __call__(self, parameters: dict[str, Tensor], args: tuple[Any, ...], **kwargs: Any) -> Any:
        with self.lock, parameters_replaced(self.module, parameters):
            return self.module(*args, **kwargs)


def module_function(module: torch.nn.Module) -> ModuleFunction:
    """Return a module as a function of its parameters.

    Raises:
        InputError: if it is no module, or a scripted one.
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
    return ModuleFunction(module)
