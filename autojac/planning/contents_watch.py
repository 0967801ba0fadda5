"""The tensors whose values decide whether a plan holds: masks, indices, constants of func."""

from __future__ import annotations

import functools

from torch import Tensor

from autojac.core import pytree
from autojac.guards.captures import Captures
from autojac.guards.tensor_contents import TensorContents
from autojac.planning.call import Call
from autojac.problem.problem import Problem


class ContentsWatch:
    """The values of the tensors that a structure was read from, compared with those of calls that were checked.

    Args:
        problem: its structure was read from the values.
        captured: what func reaches.
    """

    def __init__(self, problem: Problem, captured: Captures) -> None:
        self._problem = problem
        self._contents = TensorContents()
        self._version = -1
        if problem.function_state is not None:
            problem.function_state.watch_tensors()
        self.hold(captured)

    def hold(self, captured: Captures) -> None:
        """Watch from now on the constants that func reaches."""
        self.constants = tuple(tensor for tensor in captured.tensors if not tensor.requires_grad)

    def refresh(self, captured: Captures) -> bool:
        """Watch what func reaches now if that has changed; return whether it has."""
        function_state = self._problem.function_state
        if function_state is None or self._version == function_state.version:
            return False
        self._version = function_state.version
        self.hold(captured)
        return True

    def digest(self, call: Call) -> bytes:
        """Return a digest of all values that decide."""
        tensors = list(self.constants)
        numbers: tuple[float, ...] = ()
        if self._problem.structure.depends_on_arguments:
            tensors += [call.leaves[position] for position in self.arguments]
            if call.keywords:
                values = pytree.tree_leaves(call.keywords)
                tensors += [value for value in values if isinstance(value, Tensor)]
                numbers = tuple(value for value in values if isinstance(value, float))
        return self._contents.contents(tensors, numbers)

    def is_new(self, digest: bytes) -> bool:
        """Check whether no check has passed with these values, though one has with others."""
        return self._contents.unseen(digest)

    def accept(self, digest: bytes) -> None:
        """Remember that the plan holds with these values."""
        self._contents.accept(digest)

    @functools.cached_property
    def arguments(self) -> tuple[int, ...]:
        """The arguments by position whose values may decide what couples with what.

        Scheduled checks cover a float that carries the batch and belongs to its sample, as slices show, like an input.
        """
        structure, leaves = self._problem.structure, self._problem.leaves
        return tuple(
            position
            for position, leaf in enumerate(leaves)
            if structure.depends_on_arguments
            and not leaf.differentiated
            and not (leaf.batched and structure.sliceable and leaf.dtype.startswith(("float", "bfloat", "complex")))
        )
