"""A batch over several axes, flattened to one around the function, so that everything else sees one batch axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from autojac.core import pytree
from autojac.core.nests import is_differentiable
from autojac.core.settable_arguments import NestCopies
from autojac.errors import MutationError, OutputError


@dataclass(frozen=True)
class BatchGrid:
    """The batch axes of one kind of call.

    Attributes:
        sizes: of the batch axes.
        carriers: for each leaf of the positional arguments whether it has these axes in front.
        has_aux: func returns a pair (output, aux).
    """

    sizes: tuple[int, ...]
    carriers: tuple[bool, ...]
    has_aux: bool = False

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return what makes two of them do the same: the first size varies as the number of samples does."""
        return {"sizes": self.sizes[1:], "carriers": self.carriers, "has_aux": self.has_aux}

    def flat_leaves(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves of the arguments with one batch axis."""
        last = len(self.sizes) - 1
        return [x.flatten(0, last) if has else x for x, has in zip(leaves, self.carriers, strict=True)]

    def sizes_of(self, samples: int) -> tuple[int, ...]:
        """Return the sizes of the batch axes for a number of samples.

        Several copies of the batch are stacked along the first axis. Other numbers of samples are picked from anywhere
        and have no neighbors, which reveals a function for which neighbors matter.
        """
        whole = prod(self.sizes)
        if samples == whole:
            return self.sizes
        if whole and samples % whole == 0:
            return (samples // whole * self.sizes[0], *self.sizes[1:])
        return (samples, *[1] * (len(self.sizes) - 1))

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what func returns, with one batch axis, for arguments with one batch axis."""
        leaves, spec = pytree.tree_flatten(tuple(args))
        samples = next(len(x) for x, carries in zip(leaves, self.carriers, strict=True) if carries)
        sizes = self.sizes_of(samples)
        unflattened = [split_axis(x, 0, sizes) if has else x for x, has in zip(leaves, self.carriers, strict=True)]
        nests = pytree.tree_unflatten(unflattened, spec)
        copies = NestCopies(tuple(args), nests)
        out = func(*nests, **kwargs)
        if copies.changes():
            raise MutationError(
                f"func sets something in its arguments, which batch_dims={len(sizes)} makes copies of. Pass what it "
                "sets by keyword, return it as aux with has_aux=True, or flatten the batch and leave batch_dims out"
            )
        if self.has_aux and isinstance(out, tuple) and len(out) == 2:
            return self._output(out[0], sizes), out[1]
        return self._output(out, sizes)

    def _output(self, out: Any, sizes: tuple[int, ...]) -> Any:
        return pytree.tree_map(lambda y: self._flat_value(y, sizes) if is_differentiable(y) else y, out)

    def _flat_value(self, value: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if value.shape[: len(sizes)] != sizes:
            raise OutputError(
                f"batch_dims={len(sizes)} expects func's outputs to have the batch axes {sizes} in front, got shape "
                f"{tuple(value.shape)}. Return (*batch, *out), or select the output that has them; say by in_dims "
                "which arguments have these axes, or lower batch_dims"
            )
        return value.flatten(0, len(sizes) - 1)


def split_axis(tensor: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """Return a view with several axes instead of one; `Tensor.unflatten` takes three times as long."""
    shape = tensor.shape
    return tensor.view((*shape[:axis], *sizes, *shape[axis + 1 :]))
