"""Evaluation without side effects: random state, captured tensors and what func sets are restored.

Probing, tuning and checking call func many times. `Sandbox` gives each of those calls the same random state, the same
captured tensors and the same attributes, and puts all back afterwards.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final

import torch
from torch import Tensor

from autojac.autodiff.open_modes import isolate_saved_tensors
from autojac.core.tensor_kinds import not_dense
from autojac.guards.assignments import Snapshot
from autojac.guards.escapes import home
from autojac.torch_internals import preserve_version

GENERATORS: Final = ("cpu", "cuda", "python", "numpy")
"""Every generator of the process that a function may draw from: torch's, Python's and NumPy's."""

State = Mapping[str, Any]


def random_state(generators: Iterable[str] = GENERATORS) -> State:
    """Return the state of generators by name: NumPy has none before it is imported, a GPU none before it is used."""
    state: dict[str, Any] = {}
    for name in generators:
        if name == "cpu":
            state[name] = torch.get_rng_state()
        elif name == "cuda" and torch.cuda.is_initialized():
            state[name] = torch.cuda.get_rng_state_all()
        elif name == "python":
            state[name] = random.getstate()
        # another thread may be importing it
        elif name == "numpy" and hasattr(sys.modules.get("numpy.random"), "get_state"):
            state[name] = sys.modules["numpy.random"].get_state()
    return state


def restore_random_state(state: State) -> None:
    """Set generators back."""
    for name, value in state.items():
        if name == "cpu":
            torch.set_rng_state(value)
        elif name == "cuda":
            torch.cuda.set_rng_state_all(value)
        elif name == "python":
            random.setstate(value)
        else:
            sys.modules["numpy.random"].set_state(value)


def generators_drawn_from(one: State, other: State) -> tuple[str, ...]:
    """Return the generators that were drawn from between two states; one that was only imported was not."""
    return tuple(name for name in one if not _same_state(one[name], other[name]))


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return all(map(torch.equal, one, other))
    if isinstance(one[1], tuple):  # Python's
        return bool(one == other)
    # NumPy's holds an array, the generator's words, in its second place
    return bool((one[1] == other[1]).all()) and one[2:] == other[2:]


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the user's tensor hooks from firing on gradients that tuning computes."""
    with_hooks = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in with_hooks:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in with_hooks:
            tensor._backward_hooks = hooks


def same_bits(copy: Tensor, leaf: Tensor) -> bool:
    """Check whether two tensors hold the same bytes, nan included; of one that is not dense only its version tells."""
    if not copy.numel() or any(not_dense(copy)):
        return True
    # a single element counts as contiguous whatever its strides, but can't be viewed as bytes with them
    dense = (t.detach().resolve_conj().resolve_neg().contiguous() for t in (copy, leaf))
    flat = (t.as_strided((t.numel(),), (1,)) for t in dense)
    one, other = (t.view(torch.uint8) for t in flat)
    return torch.equal(one, other)


def without_graph(tensors: Sequence[Tensor]) -> None:
    """Detach tensors that func wrote into from its graph: what they keep is numbers, which train nothing."""
    for tensor in tensors:
        if tensor.requires_grad:
            with suppress(RuntimeError):  # a view has the graph of what it is a view of
                tensor.detach_()


def _fits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


class Sandbox:
    """Evaluations of func that leave random state, captured tensors and what func sets as they were.

    Args:
        captured: tensors that func reaches and might write into.
        state: random state that every evaluation starts from; generators that it does not name are left alone.
        places: attributes, containers and variables that func might set; see `Snapshot`.
        trained: leaves whose `.grad` a backward of func's own might write.

    Attributes:
        written: the captured tensors that an evaluation wrote into, or gave other memory; those of the sandbox that a
            `closer` one was derived from are included.
        exchanged: whether one was given other memory.
        converted: whether one was given another dtype or device, which it keeps.
        kept: the places that an evaluation set something in, included in the same way.
    """

    def __init__(
        self,
        captured: Sequence[Tensor],
        state: State | None = None,
        places: Sequence[Any] = (),
        trained: Sequence[Tensor] = (),
    ) -> None:
        self.captured = [tensor for tensor in captured if not (tensor.is_inference() or tensor.is_meta)]
        self.state: State = {} if state is None else state
        self.places = tuple(places)
        self.trained = tuple(trained)
        self.written: list[Tensor] = []
        self.exchanged = False
        self.converted = False
        self.kept: list[Any] = []
        self._every: tuple[list[Tensor], tuple[Any, ...]] = self.captured, self.places

    def now(self, generators: Iterable[str] | None = None, others: Sequence[Tensor] = ()) -> Sandbox:
        """Return a sandbox that starts from the current random state of these generators, or else of those known.

        Args:
            generators: names of generators.
            others: tensors that are saved too.
        """
        state = random_state(self.state if generators is None else generators)
        ids = {id(tensor) for tensor in self.captured}
        captured = [*self.captured, *(tensor for tensor in others if id(tensor) not in ids)]
        sandbox = Sandbox(captured, state, self.places, self.trained)
        sandbox.written = [*self.written, *others]
        return sandbox

    def closer(self, state: State) -> Sandbox:
        """Return a sandbox that restores only what evaluations so far have changed, with another random state."""
        sandbox = Sandbox(self.written, state, self.kept, self.trained)
        sandbox.written, sandbox.kept = list(self.written), list(self.kept)
        sandbox._every = self._every
        return sandbox

    def widen(self) -> None:
        """Restore all that func may change again: at other values it may take a branch that no evaluation took yet."""
        self.captured, self.places = self._every

    @contextmanager
    def __call__(self) -> Iterator[None]:
        outside = random_state(self.state)
        hooks = isolate_saved_tensors()
        restore = self.save()
        for tensor in self.trained:
            if tensor.grad is not None:
                # a backward would accumulate into what is there
                tensor.grad = None
        restore_random_state(self.state)
        try:
            with hooks:
                yield
        finally:
            restore_random_state(outside)
            restore()

    def save(self) -> Callable[[], None]:
        """Save the tensors and the places, and return what puts them back."""
        versions = [tensor._version for tensor in self.captured]
        plain = [tensor for tensor in self.captured if not tensor.requires_grad]
        copies = [tensor.detach().clone() for tensor in self.captured]
        memory = [(home(tensor), tensor.data) for tensor in self.captured]
        snapshot = Snapshot(self.places)
        grads = [tensor.grad for tensor in self.trained]

        def restore() -> None:
            for place in snapshot.restore():
                if not any(place is known for known in self.kept):
                    self.kept.append(place)
            with torch.no_grad():
                for tensor, version, copy, (place, data) in zip(self.captured, versions, copies, memory, strict=True):
                    has_other_memory = home(tensor) != place
                    if has_other_memory:
                        self.exchanged = True
                        # a graph that holds the tensor would read the memory before as if it had the dtype after
                        fits = _fits(data, tensor)
                        self.converted = self.converted or not fits
                        if fits or data.shape != tensor.shape:
                            tensor.data = data.to(tensor)
                    # Batch norm's kernel writes its running statistics without moving their version, and they are put
                    # back so too: graphs that have saved them stay what they were.
                    is_written = has_other_memory or tensor._version != version
                    if is_written or not same_bits(tensor, copy):
                        if not any(tensor is known for known in self.written):
                            self.written.append(tensor)
                        with nullcontext() if is_written else preserve_version(tensor):
                            tensor.detach().copy_(copy)
            without_graph(plain)
            for tensor, grad in zip(self.trained, grads, strict=True):
                if grad is not None and not _fits(grad, tensor):
                    grad.data = grad.data.to(tensor)  # as `Module.to` does
                if tensor.grad is not grad:
                    tensor.grad = grad

        return restore
