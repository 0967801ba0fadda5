"""One backward pass through a graph that exists already, recorded as operators on its cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from autojac.graph.ir import Graph
from autojac.graph.recorder import Recorder


def record_backward(pull: Callable[[Sequence[Tensor]], Sequence[Tensor]], cotangents: Sequence[Tensor]) -> Graph | None:
    """Pull once, and return the operators that lead from the cotangents to the gradients; None if not all are seen.

    What the graph has saved is constant to a pass.
    """
    recorder = BackwardRecorder(cotangents)
    with recorder:
        gradients = tuple(pull(cotangents))
    recorder.finish()
    numbers = [recorder.numbers.get(id(gradient)) for gradient in gradients]
    outputs = tuple(number for number in numbers if number is not None)
    stale = any(id(gradient) in recorder.stale for gradient in gradients)
    if recorder.reason or stale or len(outputs) < len(gradients):
        return None
    notes = recorder.shapes, recorder.dtypes, recorder.reads_data
    whole = Graph(tuple(recorder.operations), recorder.inputs, outputs, {}, *notes)
    operations = tuple(whole.operations[place] for place in whole.find_needed(outputs, frozenset(recorder.inputs)))
    read = {number for operation in operations for number in operation.sources}
    constants = {number: tensor for number, tensor in recorder.constants.items() if number in read}
    return Graph(operations, recorder.inputs, outputs, constants, *notes)


class BackwardRecorder(Recorder):
    """Writes down a backward pass, in which autograd brings back what it has saved."""

    def _capture(self, tensor: Tensor) -> None:
        """Number a tensor that was saved; it may be another face of others that were, but of no gradient."""
        places = {number: operation for operation in self.operations for number in operation.results}
        waiting = [self.numbers[id(other)] for other in self._sharing_with(tensor)]
        seen: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number in self.inputs:
                self.refuse("a pass makes a tensor of another's memory where no operator is seen")
            if number in places and number not in seen:
                seen.add(number)
                waiting += places[number].sources
        self.constants[self.number(tensor)] = tensor
