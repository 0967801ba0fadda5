"""Jacobians in a module's parameters, sample by sample."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autojac.again import never
from autojac.autocast import outside_autocast
from autojac.autodiff import call_with, pulled_back, saved_tensors_apart
from autojac.autodiff.own_weights import through_sources
from autojac.autojacobian import AutoJacobian
from autojac.captures import Captures
from autojac.entry import Entry
from autojac.errors import InputError, OptionError, StructureChangedWarning, UnsupportedError, kind_of
from autojac.frame import recording
from autojac.plan import Effort, Plan
from autojac.problem import Result
from autojac.quiet import Quiet
from autojac.tolerance import disagreement

_locks: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def lock_of(module: torch.nn.Module) -> Any:
    """Return the one lock of a module, whichever wrapper asks."""
    with _making:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def swapped(module: torch.nn.Module, replacements: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of a module's parameters, and each parameter back where it was.

    A parameter is replaced wherever it is registered, once at each place: torch's `functional_call` visits a layer
    that is registered twice twice, and takes what it has put there for the original.
    """
    named = dict(module.named_parameters())
    by_id = {id(named[name]): tensor for name, tensor in replacements.items()}
    places = [
        (registered, name, parameter)
        for registered in [one._parameters for one in module.modules()]
        for name, parameter in registered.items()
        if id(parameter) in by_id
    ]
    try:
        for registered, name, parameter in places:
            registered[name] = by_id[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        _put_back(places)


def _put_back(places: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
    """Restore every place, also where an interrupt comes meanwhile, which is raised afterwards."""
    interrupt: BaseException | None = None
    while True:
        try:
            for registered, name, parameter in places:
                registered[name] = parameter
            break
        except BaseException as error:  # Ctrl-C, or a time limit that ends just now
            interrupt = error
    if interrupt is not None:
        raise interrupt


def require_no_checkpoint(outputs: Sequence[Tensor]) -> None:
    """Refuse reentrant checkpoints, which give parameters their gradients in `backward()` alone.

    Raises:
        UnsupportedError: if one is in the graph.
    """
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UnsupportedError(
                "the module uses a reentrant checkpoint, through which autograd.grad does not reach parameters: their "
                "derivatives would be zero. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        todo += [following for following, _ in node.next_functions]


class ModuleFunction:
    """A module as a function of its parameters: `f(parameters, args, **kwargs)`.

    Args:
        module: its parameters are put aside for the length of a call.

    Attributes:
        lock: held while they are put aside, so that no other thread calls the module or looks at it then.
        in_place: the module reaches its weights by other ways than its registered parameters, so that it runs with
            its own ones and these are differentiated.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.lock = lock_of(module)
        self.in_place = False

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
            if self.in_place:
                return self._in_place(parameters, args, kwargs)
            with swapped(self.module, parameters):
                return self.module(*args, **kwargs)

    def _in_place(self, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = dict(self.module.named_parameters())
        others = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        flat: list[Any] = []
        places: list[int] = []
        spec: Any = None

        def run() -> list[Tensor]:
            nonlocal spec
            values, spec = pytree.tree_flatten(self.module(*args, **kwargs))
            flat.extend(values)
            places.extend(i for i, value in enumerate(flat) if isinstance(value, Tensor) and value.is_floating_point())
            return [flat[place] for place in places]

        outputs = through_sources(run, [own[name] for name in parameters], list(parameters.values()), others)
        for place, output in zip(places, outputs, strict=True):
            flat[place] = output
        return pytree.tree_unflatten(flat, spec)

    def reached_otherwise(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], quiet: Quiet) -> bool:
        """Whether a plain VJP on the module's own weights differs from one on tensors in their place."""
        own = self.parameters()
        with self.lock, torch.enable_grad(), outside_autocast(), saved_tensors_apart():
            given = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
            pulled = []
            for sources in (own, given):
                with quiet():
                    with swapped(self.module, sources):
                        values = pytree.tree_leaves(self.module(*args, **kwargs))
                    outputs = [y for y in values if isinstance(y, Tensor) and y.is_floating_point()]
                    generator = torch.Generator().manual_seed(0)
                    seeds = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
                    pairs = [(y, seed) for y, seed in zip(outputs, seeds, strict=True) if y.requires_grad]
                    require_no_checkpoint(outputs)
                    found: Sequence[Tensor | None] = [None] * len(sources)
                    if pairs:
                        found = pulled_back([y for y, _ in pairs], list(sources.values()), [seed for _, seed in pairs])
                    pulled.append(
                        [
                            torch.zeros_like(p) if g is None else g.detach()
                            for p, g in zip(own.values(), found, strict=True)
                        ]
                    )
        largest = max(float(g.nan_to_num(0, 0, 0).abs().max()) if g.numel() else 0.0 for g in pulled[0])
        return any(
            disagreement(theirs.reshape(1, -1), mine.reshape(1, -1), floor=largest * 64 * torch.finfo(mine.dtype).eps)
            is not None
            for mine, theirs in zip(*pulled, strict=True)
            if mine.numel() and bool(mine.isfinite().all())
        )


class ParameterJacobian(AutoJacobian):
    """The wrapper that `AutoJacobian.of_parameters` makes: called with the module's own arguments.

    Args:
        module: what to differentiate in the parameters of.
        options: those of `AutoJacobian` but for `argnums`; `in_dims` is about the module's own arguments.

    Raises:
        InputError: if it is no module or a scripted one, or when called if no parameter requires grad.
        OptionError: for an unknown option or a value that is not accepted.
    """

    func: ModuleFunction

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"a torch.nn.Module was expected, got {kind_of(module)}")
        scripted = next(
            (name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)), None
        )
        if scripted is not None:
            raise InputError(
                f"{scripted or type(module).__name__} is a scripted or traced module, whose parameters TorchScript "
                "holds itself, so that none can be put in their place. Pass the module that it was made from"
            )
        if "argnums" in options:
            raise OptionError("of_parameters differentiates in the parameters; for arguments wrap the module itself")
        in_dims = options.pop("in_dims", "auto")
        own = tuple(in_dims) if isinstance(in_dims, list) else in_dims
        super().__init__(ModuleFunction(module), in_dims=(None, own), **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = self.func.lock

    def tune(self, *args: Any, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any) -> Plan:
        with self._lock, recording(self._given(args), kwargs) as call:
            self._find_weights(*call)
        return super().tune(*args, effort=effort, budget_s=budget_s, **kwargs)

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Entry, Result]:
        with self._lock:
            return super()._run(args, kwargs)

    def _entry(self, key: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Entry:
        with self._lock:
            if key not in self._entries:
                self._find_weights(args, kwargs)
            return super()._entry(key, args, kwargs)

    def _checked(self, key: Any, entry: Entry, leaves: Any, args: Any, kwargs: Any, noticed: Any) -> Any:
        if entry.calls > 1 and self._find_weights(args, kwargs):
            self._entries.clear()
            self._again = never
            entry = self._entry(key, args, kwargs)
            entry.calls += 1
            warnings.warn(
                f"{self._planner.stored.function_name} reaches weights past its registered parameters now; they are "
                f"differentiated in place from here on, and this Jacobian is right. Now in use: {entry.plan}",
                StructureChangedWarning,
                stacklevel=4,
            )
        return super()._checked(key, entry, leaves, args, kwargs, noticed)

    def _find_weights(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Look whether the module reaches its weights otherwise; whether that is new."""
        if self.func.in_place:
            return False
        named = {name: value for name, value in kwargs.items() if not name.startswith("autojac ")}
        self.func.in_place = self.func.reached_otherwise(args[1], named, Quiet(self._reach().tensors))
        return self.func.in_place

    def _reach(self) -> Captures:
        with self._lock:
            return super()._reach()

    def _given(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return self.func.parameters(), tuple(args)
