"""What a method did in one run, as programs of plain operators: forward, and where J is differentiable backward too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from autojac.autodiff.program_function import PullProgram
from autojac.autodiff.tolerance import disagreement
from autojac.errors import UnsupportedError
from autojac.replay.codegen import Run, emit, operators_of
from autojac.replay.hoisting import Hoist, Part, hoist_part, hoisted_inputs
from autojac.replay.passes.node_facts import overlapping


class ProgramInputs(NamedTuple):
    """What is known of a program's inputs.

    Attributes:
        captured: positions of what func holds, such as parameters and buffers; the others come with each call.
        written: whether an operator writes into some of them.
    """

    captured: range
    written: bool


Lower = Callable[[Run, ProgramInputs], Run]
Sandboxed = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Trace:
    """What a method does for one signature and one state of the function.

    All tensors are passed flat, the inputs: the leaves of a call, the tensors among its keyword arguments, and what
    was captured.

    Attributes:
        forward: from the inputs to the outputs, and what the backward programs read besides them.
        outputs: how many there are, values first.
        captured: where each captured tensor stands among those of the function's state.
        pulls: what pulls cotangents of the outputs back.
        hoist: what is computed from captured tensors alone; the forward program takes it after the inputs.
        read: tensors of the function's state whose values Python has read: where each stands, and its values.
        constant: positions of the outputs that have no derivative.
    """

    forward: Run
    outputs: int
    captured: tuple[int, ...]
    pulls: tuple[PullProgram, ...] = ()
    constant: tuple[int, ...] = ()
    hoist: Hoist | None = None
    read: tuple[tuple[int, Tensor], ...] = ()

    @property
    def operators(self) -> int | None:
        """How many operators it runs, forward and backward; None for what a compiler made."""
        counts = [operators_of(run) for run in (self.forward, *(pull.run for pull in self.pulls))]
        return None if None in counts else sum(filter(None, counts))


@dataclass(frozen=True)
class RecordedVjp:
    """One pull through the recorded outputs.

    Attributes:
        outputs: positions of the outputs that were pulled.
        cotangents: one for each, as they were recorded.
        gradients: for each source what came of it, or None.
    """

    outputs: tuple[int, ...]
    cotangents: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class RecordedGraph:
    """A simplified graph and what its tensors were in the recorded run.

    Attributes:
        graph: its output node lists the outputs, then all gradients that are tensors.
        inputs: nodes and recorded tensors of the inputs.
        outputs: the recorded outputs.
        pulls: backward phases, the first one phase 1.
        cotangents: for each pull the nodes of its cotangents.
        sources: positions, among the inputs, of what was pulled back to.
    """

    graph: fx.Graph
    inputs: Sequence[tuple[fx.Node, Tensor]]
    outputs: Sequence[Tensor]
    pulls: Sequence[RecordedVjp]
    cotangents: Sequence[Sequence[fx.Node]]
    sources: Sequence[int]

    def trace(
        self, captured: Sequence[int], in_sandbox: Sandboxed, hoists: bool = True, lower: Lower | None = None
    ) -> Trace:
        """Return programs that do what was recorded, checked against it in one run.

        Args:
            captured: as in `Trace`.
            in_sandbox: a context in which a run starts from the state that the recorded one did, and leaves no trace.
            hoists: whether to hoist what depends on captured tensors alone.
            lower: what to make of each program, such as compiling it.
        """
        inputs = [tensor.detach() for _, tensor in self.inputs]
        if any(node.op == "call_function" and node.meta["draws"] for node in self.graph.nodes):
            # a compiler draws other numbers, and from a generator of its own
            lower = None
        hoisted = None
        given = len(inputs) - len(captured)
        if hoists and not self.pulls and lower is None:
            hoisted = hoist_part(self.graph, [node for node, _ in self.inputs[given:]], self._ends[: len(self.outputs)])
        if hoisted is not None:
            inputs = [*inputs[:given], *hoisted_inputs(hoisted.hoist, inputs[given:])()]
        trace = self._programs(captured, (), hoisted)
        with torch.no_grad():
            with in_sandbox():
                outputs = trace.forward(*inputs)
            lasting = [*inputs, *self._constants()]
            aliased = _sharing(outputs, trace.outputs, lasting)
            if aliased or lower is not None:
                trace = self._programs(captured, aliased, hoisted, lower)
                with in_sandbox():
                    outputs = trace.forward(*inputs)
                if _sharing(outputs, trace.outputs, lasting):
                    raise UnsupportedError("Inductor returned aliased outputs")
            self._check(outputs, self.outputs)
            saved = outputs[trace.outputs :]
            for pull, program in zip(self.pulls, trace.pulls, strict=True):
                with in_sandbox():
                    pulled = program.run(*inputs, *saved, *(c.detach() for c in pull.cotangents))
                self._check(pulled, [g for g in pull.gradients if g is not None])
        return trace

    @property
    def _ends(self) -> Sequence[fx.Node]:
        """The outputs, then all gradients that are tensors."""
        *_, last = self.graph.nodes
        ends: Sequence[fx.Node] = last.args[0]
        return ends

    def _check(self, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for one, other in zip(tensors, expected, strict=False):
            if differs(one, other):
                raise UnsupportedError("its recorded operators, run again, give other numbers than the recorded run")

    def _constants(self) -> list[Tensor]:
        return [node.meta["value"] for node in self.graph.nodes if node.meta.get("role") in ("constant", "literal")]

    def _programs(
        self, captured: Sequence[int], aliased: Sequence[int], hoisted: Part | None, lower: Lower | None = None
    ) -> Trace:
        """Return the programs; `aliased` lists outputs to copy, which share memory with what outlives the call."""
        results, gradients = self._ends[: len(self.outputs)], iter(self._ends[len(self.outputs) :])
        nodes = [node for node in self.graph.nodes if node.op == "call_function"]
        early = [node for node in nodes if node.meta["phase"] == 0]
        inputs = [node for node, _ in self.inputs]
        parts = []
        saved: dict[fx.Node, None] = {}
        for phase, pull in enumerate(self.pulls, 1):
            pulled = [next(gradients) if g is not None else None for g in pull.gradients]
            ending = [node for node in pulled if node is not None]
            part = list(_closure(nodes, ending, phase))
            needed = [*ending, *(source for node in part for source in node.all_input_nodes)]
            saved |= dict.fromkeys(n for n in needed if n.op == "call_function" and n.meta["phase"] == 0)
            parts.append((pull, part, ending, [p for p, g in zip(self.sources, pulled, strict=True) if g is not None]))

        written = frozenset[int]().union(*(node.meta["writes"] for node in nodes))
        of_inputs = ProgramInputs(
            captured=range(len(inputs) - len(captured), len(inputs)),
            written=any(node.meta["storage"] in written for node in inputs),
        )

        def program(*parts: Any, **options: Any) -> Run:
            return emit(*parts, **options, below=True) if lower is None else lower(emit(*parts, **options), of_inputs)

        pulls = tuple(
            PullProgram(
                program([*inputs, *saved, *nodes_of], ending, part),
                pull.outputs,
                tuple(c.stride() for c in pull.cotangents),
                tuple(given),
            )
            for (pull, part, ending, given), nodes_of in zip(parts, self.cotangents, strict=True)
        )
        known = hoisted.nodes if hoisted is not None else ()
        ends = [*results, *saved]
        forward = program([*inputs, *known], ends, _leading(early, ends, known), copied=aliased)
        constant = tuple(place for place, y in enumerate(self.outputs) if not y.requires_grad)
        return Trace(forward, len(results), tuple(captured), pulls, constant, hoisted and hoisted.hoist)


def differs(one: Tensor, other: Tensor) -> bool:
    """Check whether two tensors are not the same but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    return disagreement(one.reshape(1, -1), other.reshape(1, -1)) is not None


def _closure(nodes: Sequence[fx.Node], ends: Sequence[fx.Node], phase: int) -> Iterator[fx.Node]:
    """Return the operators of a phase, with what they need that another one has computed and this one without."""
    wanted = {*ends, *(n for n in nodes if n.meta["phase"] == phase)}
    for node in reversed(nodes):
        if node in wanted and node.meta["phase"]:
            wanted |= set(node.all_input_nodes)
    return (node for node in nodes if node in wanted and node.meta["phase"])


def _leading(nodes: Sequence[fx.Node], ends: Sequence[fx.Node], given: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the operators that lead to some nodes from others that are given, and those that do more than return."""
    wanted, known = set(ends) - set(given), set(given)
    for node in reversed(nodes):
        if node in wanted or node.meta["draws"] or node.meta["writes"]:
            wanted |= {node, *(source for source in node.all_input_nodes if source not in known)}
    return [node for node in nodes if node in wanted and node not in known]


def _sharing(results: Sequence[Tensor], count: int, lasting: Sequence[Tensor]) -> list[int]:
    """Return positions of the outputs that share memory with something before them, or with what outlives the call."""
    saved = results[count:]
    return [
        place
        for place, y in enumerate(results[:count])
        if _shares(y, [*lasting, *results[:place], *(tensor for tensor in saved if tensor is not y)])
    ]


def _shares(one: Tensor, lasting: Sequence[Tensor]) -> bool:
    """Check whether writing into a tensor changes others, which outlive the call, or entries of its own."""
    if one.layout != torch.strided:
        return False
    if overlapping(one):
        return True
    home = one.untyped_storage().data_ptr()
    strided = (t for t in lasting if t.layout == torch.strided and not t._is_zerotensor())
    return one.numel() > 0 and any(t.untyped_storage().data_ptr() == home for t in strided)
