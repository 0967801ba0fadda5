"""Jacobians in a module's parameters, sample by sample."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.autodiff import call_with
from autojac.autojacobian import AutoJacobian
from autojac.captures import Captures
from autojac.entry import Entry
from autojac.errors import InputError, OptionError, kind_of
from autojac.problem import Result


class ModuleFunction:
    """A module as a function of its parameters: `f(parameters, args, **kwargs)`.

    Args:
        module: its parameters are put aside for the length of a call.

    Attributes:
        lock: held while they are put aside, so that no other thread calls the module or looks at it then.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def parameters(self) -> dict[str, Tensor]:
        """Those to differentiate in, by the names of `named_parameters()`: tied ones once, frozen ones left out."""
        with self.lock:
            found: dict[str, Tensor] = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not found:
            raise InputError(f"{type(self.module).__name__} has no parameter that requires grad, so it has no Jacobian")
        return found

    def __call__(self, parameters: dict[str, Tensor], args: tuple[Any, ...], **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # nothing runs yet, and a lock can't be traced
            return call_with(self.module, parameters, args, kwargs)
        with self.lock:
            return call_with(self.module, parameters, args, kwargs)


class ParameterJacobian(AutoJacobian):
    """The wrapper that `AutoJacobian.of_parameters` makes: called with the module's own arguments.

    Args:
        module: what to differentiate in the parameters of.
        options: those of `AutoJacobian` but for `argnums`; `in_dims` is about the module's own arguments.

    Raises:
        InputError: if it is no module, or when called if no parameter requires grad.
        OptionError: for an unknown option or a value that is not accepted.
    """

    func: ModuleFunction

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"a torch.nn.Module was expected, got {kind_of(module)}")
        if "argnums" in options:
            raise OptionError("of_parameters differentiates in the parameters; for arguments wrap the module itself")
        in_dims = options.pop("in_dims", "auto")
        own = tuple(in_dims) if isinstance(in_dims, list) else in_dims
        super().__init__(ModuleFunction(module), in_dims=(None, own), **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = self.func.lock

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Entry, Result]:
        with self._lock:
            return super()._run(args, kwargs)

    def _reach(self) -> Captures:
        with self._lock:
            return super()._reach()

    def _given(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return self.func.parameters(), tuple(args)
