"""Where the batch goes: follow its axis through a graph, operator by operator, by what each operator is known to do.

A tensor is free (it reads no sample), along (slice b of one axis reads sample b alone, given the shared tensors) or
shared (it reads several samples). An operator without a rule makes its result shared: that is never wrong, since a
shared tensor may be anything; it only proves nothing and cuts nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from autojac.graph.batch_axis.rules import rule_of
from autojac.graph.batch_axis.states import SHARED, SPREAD, BatchAxis, BatchAxisLost, Meets, RuleContext, State
from autojac.graph.ir import Graph
from autojac.graph.operator_facts import facts_of
from autojac.graph.operator_kinds import Axes, Kind

UNFORESEEN = "its rule fails"
FRONT = BatchAxis(0)


@dataclass(frozen=True)
class BatchFlow:
    """How the batch runs through a graph.

    Attributes:
        states: of each tensor.
        losses: for each operator at which samples meet, by position: why.
        meets: some operator is known to read several samples for one result.
        start: how the batch lies in the inputs that carry it.
    """

    graph: Graph
    batch: int
    states: Mapping[int, State]
    losses: Mapping[int, str]
    meets: bool = False
    start: BatchAxis = FRONT

    @functools.cached_property
    def independent(self) -> bool:
        """Whether every output has sample b alone behind its row b."""
        if not self.losses and not self.frontier and not self.lost_output:
            return True
        return len(self.axes) > 1 and all(flow.independent for flow in self.axes)

    @functools.cached_property
    def axes(self) -> tuple[BatchFlow, ...]:
        """How each of several axes runs through the graph that a view takes the batch apart into; none without one.

        Samples that are kept apart along every one of these axes are kept apart.
        """
        sizes = self._sizes_of_view() if self.start == FRONT else ()
        batched = [self.states.get(number) == self.start for number in self.graph.inputs]
        shared = [number for number in self.graph.inputs if self.states.get(number) == SHARED]
        starts = {
            BatchAxis(0, math.prod(sizes[:place]), math.prod(sizes[place + 1 :])): size
            for place, size in enumerate(sizes)
            if 1 < size < self.batch
        }
        return tuple(propagate_batch_axis(self.graph, starts[one], batched, shared, one) for one in starts)

    @functools.cached_property
    def together(self) -> BatchFlow:
        """The flow in which several `axes` together tell samples apart; this one where there are none.

        What reads sample i alone along one axis and j along another one reads sample (i, j) alone, given what is shared
        along either. Where that is read which samples share along some of the axes only, this one too: it grows with
        the number of samples.
        """
        if len(self.axes) < 2:
            return self
        states: dict[int, State] = {}
        partly = set[int]()
        for number in self.states:
            each = [(along.states[number], along.start) for along in self.axes]
            carried = [(state, start) for state, start in each if isinstance(state, BatchAxis)]
            if len(carried) == len(each):
                first = carried[0][0].axis
                is_flat = all(state == start._replace(axis=first) for state, start in carried)  # as the inputs are
                states[number] = BatchAxis(first) if is_flat else SPREAD
            else:
                states[number] = SHARED if any(state for state, _ in each) else None
                partly.update([number] * bool(carried))
        found = dataclasses.replace(self, states=states)
        return found if partly.isdisjoint(found.frontier) else self

    def _sizes_of_view(self) -> tuple[int, ...]:
        """Return the sizes of the axes that the first view of several takes the batch apart into."""
        for place in sorted(self.losses):
            operation = self.graph.operations[place]
            if facts_of(operation.target).axes is not Axes.REGROUPED or self.states[operation.sources[0]] != self.start:
                continue
            (made,) = operation.outputs
            after = self.graph.shapes[made] if made is not None else ()
            for count in range(2, len(after) + 1):
                if math.prod(after[:count]) == self.batch:
                    return after[:count]
        return ()

    @functools.cached_property
    def frontier(self) -> tuple[int, ...]:
        """The shared tensors that operators along the batch read, in the order in which they were made."""
        read: set[int] = set()
        for operation in self.graph.operations:
            if any(isinstance(self.states.get(y), BatchAxis) for y in operation.results):
                read.update(number for number in operation.sources if self.states.get(number) == SHARED)
        return tuple(sorted(read))

    @functools.cached_property
    def pure(self) -> frozenset[int]:
        """The tensors along the batch behind which no shared tensor stands: sample b of them reads sample b alone."""
        tainted = {number for number, state in self.states.items() if state == SHARED}
        for operation in self.graph.operations:
            if not tainted.isdisjoint(operation.sources):
                tainted.update(operation.results)
        return frozenset(
            number for number, state in self.states.items() if isinstance(state, BatchAxis) and number not in tainted
        )

    def width(self, tensors: Iterable[int]) -> int:
        """Return elements of one sample in tensors that carry the batch."""
        return sum(math.prod(self.graph.shapes[number]) for number in tensors) // self.batch

    @property
    def lost_output(self) -> bool:
        """Whether an output itself is shared, or has the batch elsewhere than the inputs have it, in front."""
        return any(self.states.get(y) not in (self.start, None) for y in self.graph.outputs)


def propagate_batch_axis(
    graph: Graph,
    batch: int,
    batched: Sequence[bool],
    shared: Collection[int] = (),
    start: BatchAxis = FRONT,
) -> BatchFlow:
    """Follow the batch from the leaves that carry it as `start` says; the `shared` ones among the rest count as shared.

    A start with `outer` turns or `inner` entries follows one of several axes that are flattened to one: samples are
    then all that have the same place along this axis.
    """
    states: dict[int, State] = {
        number: start if carries else None for number, carries in zip(graph.inputs, batched, strict=True)
    }
    states |= dict.fromkeys(shared, SHARED)
    losses: dict[int, str] = {}
    meets = False
    for place, operation in enumerate(graph.operations):
        context = RuleContext(graph, operation, states, batch)
        read = {states.get(number) for number in operation.sources}
        made: State | Sequence[State]
        if read <= {None} or facts_of(operation.target).kind is Kind.FACTORY:
            made = None
        elif not any(isinstance(state, BatchAxis) for state in read):
            made = _share(context)
        else:
            try:
                made = rule_of(operation)(context)
            except BatchAxisLost as lost:
                losses[place] = f"{operation.name}: {lost}"
                meets = meets or isinstance(lost, Meets)
                made = SHARED
            except Exception as error:  # a call that a rule did not think of proves nothing, and stops nobody
                losses[place] = f"{operation.name}: {UNFORESEEN}, {type(error).__name__}"
                made = SHARED
        for index, number in enumerate(operation.outputs):
            if number is not None:
                state = made[index] if isinstance(made, list) else made
                assert state is None or state == SHARED or isinstance(state, BatchAxis)
                states[number] = _check_size(graph, number, state, batch)
    return BatchFlow(graph, batch, states, losses, meets, start)


def _share(context: RuleContext) -> State:
    """Make shared tensors of shared ones; an expanded one has an axis that may count as the batch's."""
    if context.operation.name == "expand":
        before, after = context.shape(context.operation.args[0]), context.out
        before = (1,) * (len(after) - len(before)) + before
        for axis, (old, size) in enumerate(zip(before, after, strict=True)):
            if old == 1 and size == context.batch:
                return BatchAxis(axis)
    return SHARED


def _check_size(graph: Graph, number: int, state: State, batch: int) -> State:
    """Return the state, if the tensor's size allows it: some operators also return seeds or counters."""
    if isinstance(state, BatchAxis):
        shape = graph.shapes[number]
        if state.axis >= len(shape) or shape[state.axis] != state.outer * batch * state.inner:
            return SHARED
    return state
