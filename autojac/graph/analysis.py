"""What the graph of one call shows, computed when first asked for: whether a cut exists, and how the batch runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from autojac.core import pytree
from autojac.core.sandbox import Sandbox
from autojac.core.structure import Branches
from autojac.graph.batch_axis.propagation import BatchFlow, propagate_batch_axis
from autojac.graph.cuts.accumulation import Accumulation, ChainProduct, accumulate, products
from autojac.graph.cuts.shared_tensors import SharedTensors, find_shared_tensors
from autojac.graph.ir import Graph
from autojac.graph.operators import custom_functions
from autojac.graph.recorder import FunctionRecording, record
from autojac.graph.work import Work
from autojac.guards.captures import Captures

Fn = Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, ...]]
Cut = TypeVar("Cut")
MOST_KEYS = 256


class GraphAnalysis:
    """The graph of a call, without its tensors.

    Attributes:
        state: what another call may change without a trace in its graph; empty if nothing.
        branches: as of `Structure`; "perhaps" as long as the call was not made, or where it can't be watched.
        pass_bytes: what one plain evaluation and one VJP take at their peak; 0 as long as that is not known.

    Args:
        call: fn, leaves and keyword arguments; the call is made once, without a trace, when something is first asked.
        differentiated: indices of the leaves to differentiate.
        batched: which leaves carry the batch.
        batch: number of samples.
        sandbox: how to evaluate without a trace.
        captured: what func reaches, to call tensors by the names of their modules.
    """

    def __init__(
        self,
        call: tuple[Fn, Sequence[Tensor], Mapping[str, Any]],
        differentiated: Sequence[int],
        batched: Sequence[bool],
        batch: int,
        sandbox: Sandbox,
        captured: Captures,
    ) -> None:
        fn, leaves, kwargs = call
        self._call: Any = (fn, tuple(leaf.detach() for leaf in leaves), kwargs, sandbox, captured.modules)
        self.state = "something that can't be followed" if captured.opaque else ""
        if any(isinstance(value, float) for value in pytree.tree_leaves(kwargs)):
            # not part of a plan's key
            self.state = "a Python float among the arguments"
        self._chains: dict[tuple[bool, bool], Accumulation | None] = {}
        self._owners: dict[int, str] = {}
        self.captured: tuple[Tensor, ...] = ()
        self.escaped = ""
        self.branches: Branches = "perhaps"
        self.pass_bytes = 0
        self.differentiated = tuple(differentiated)
        self.batched = tuple(batched)
        self.batch = batch

    @functools.cached_property
    def recording(self) -> FunctionRecording | str:
        """The call, made once; or why it can't be watched, as a sentence."""
        if self._call is None:
            return "func was not recorded"
        fn, leaves, kwargs, sandbox, modules = self._call
        self._call = None
        try:
            with sandbox():
                recording = record(fn, leaves, kwargs, self.differentiated, named=True)
        except Exception as error:  # whatever func raises when it is watched
            return (
                f"func can't be recorded, it raises {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            )
        self._owners = _paths(recording, modules)
        self.captured, self.escaped, self.branches = recording.captured, recording.escaped, recording.branches
        self.pass_bytes = recording.pass_bytes()
        return recording

    @functools.cached_property
    def has_custom_backward(self) -> bool:
        """Whether a backward of the user's own stands behind the outputs, or may."""
        recording = self.recording
        return isinstance(recording, str) or bool(custom_functions(recording.values))

    @functools.cached_property
    def flow_or_reason(self) -> BatchFlow | str:
        """How the batch runs through the graph; or why there is none, as a sentence."""
        recording = self.recording
        if isinstance(recording, str):
            return recording
        if recording.graph is None:
            return recording.reason
        return flow_of(recording.graph, self.batched, self.batch)

    def assign(self, batched: Sequence[bool]) -> None:
        """Reassign which leaves carry the batch."""
        if self.batched != tuple(batched):
            self.batched = tuple(batched)
            self._chains.clear()
            for known in ("flow_or_reason", "read_pool", "least_pool"):
                vars(self).pop(known, None)

    def let_go(self) -> None:
        """Release the tensors of the call, once its graph is followed."""
        if isinstance(vars(self).get("recording"), FunctionRecording):
            assert self.flow_or_reason is not None  # made while there are tensors
            vars(self)["recording"] = "the tensors of the call are gone"
        self.captured = ()

    def close(self) -> None:
        """Release the call: what was not asked for by now stays unknown."""
        self.let_go()
        self._call = None

    def names(self, numbers: Sequence[int]) -> str:
        """Return tensors in human-readable form: by module the operators that they come from, with their shapes."""
        flow = self.flow
        assert flow is not None
        graph, grouped = flow.graph, dict[str, list[str]]()
        for number in numbers:
            place = graph.producers.get(number)
            made = "input" if place is None else graph.operations[place].name
            what = f"{graph.marks.get(number, made)} {graph.shapes[number]}"
            grouped.setdefault(self._owners.get(number, ""), []).append(what)
        lists = ((owner, ", ".join(parts)) for owner, parts in grouped.items())
        return "; ".join(f"{owner}: {parts}" if owner else parts for owner, parts in lists)

    def lines(self, rows: int) -> list[str]:
        """Return the cuts in human-readable form, for so many elements of one sample's outputs."""
        lines = []
        if self._chains and (chain := self.chain(recursive=True) or self.chain()) is not None:
            lines += [self._line(product, product is chain.tree) for product in products(chain.tree)]
        if "read_pool" in vars(self) and self.read_pool is not None:
            passes = f"{rows} + {self.read_pool.size} passes instead of {rows * self.batch}"
            lines.append(f"cut: samples meet in {self.meeting_place}: {passes}")
        return lines

    def _line(self, product: ChainProduct, whole: bool) -> str:
        flow = self.flow
        assert flow is not None
        outputs = {y: f"output {place} {flow.graph.shapes[y]}" for place, y in enumerate(flow.graph.outputs)}
        cut, sources, targets = (
            " and ".join(outputs.get(number) or self.names([number]) for number in ends)
            for ends in (product.cut, product.sources, product.targets)
        )
        between = "" if whole else f" from {sources} to {targets}"
        instead = min(flow.width(product.sources), flow.width(product.targets))
        passes = f"{product.late.passes} + {product.early.passes} passes instead of {instead}"
        return f"cut: every path{between} runs through {cut}: {passes}"

    @property
    def meeting_place(self) -> str:
        """The shared tensors in human-readable form: nearest to where samples meet, unless those are more numbers."""
        read, least = self.read_pool, self.least_pool
        assert read is not None
        nearest = least if least is not None and least.size <= read.size else read
        return self.names(nearest.tensors) or "none that a derivative runs through"

    @property
    def obstacle(self) -> str:
        """The operator at which samples first meet."""
        flow = self.flow
        if flow is None:
            return str(self.reason)
        # along that of several axes at which they do
        flow = next((along for along in flow.axes if not along.independent), flow)
        if flow.losses:
            place = min(flow.losses)
            shapes = ", ".join(str(flow.graph.shapes[number]) for number in flow.graph.operations[place].sources)
            return f"it stops at {flow.losses[place]} (operator {place} of {len(flow.graph.operations)}, of {shapes})"
        return "an output has the batch elsewhere than in front"

    @property
    def flow(self) -> BatchFlow | None:
        return None if isinstance(self.flow_or_reason, str) else self.flow_or_reason

    @functools.cached_property
    def work(self) -> Work | None:
        """What one evaluation does; None where there is no graph."""
        return None if self.flow is None else Work.of(self.flow.graph)

    @property
    def reason(self) -> str | None:
        """Why there is no graph."""
        return self.flow_or_reason if isinstance(self.flow_or_reason, str) else None

    def chain(self, recursive: bool = False, forward: bool = True) -> Accumulation | None:
        """Return the chain rule through cuts, by `accumulate`; None if it has no cut, or none that one had not."""
        key = recursive, forward
        if key not in self._chains:
            flow = self.flow
            self._chains[key] = None
            if flow is not None:
                ends = inputs_of(flow.graph, self.differentiated)
                chain = accumulate(flow, ends, recursive=recursive, forward=forward)
                self._chains[key] = None if recursive and chain == self.chain(False, forward) else chain
        return self._chains[key]

    @functools.cached_property
    def read_pool(self) -> SharedTensors | None:
        """The shared tensors where they are read."""
        flow = self.flow
        return find_shared_tensors(flow, inputs_of(flow.graph, self.differentiated), least=False) if flow else None

    @functools.cached_property
    def least_pool(self) -> SharedTensors | None:
        """As few shared elements as possible."""
        flow = self.flow
        return find_shared_tensors(flow, inputs_of(flow.graph, self.differentiated), least=True) if flow else None


@dataclass(eq=False)
class RecordAndCut(Generic[Cut]):
    """Records each call and finds its cut; calls of one structure are analyzed once.

    Attributes:
        fn: the function.
        differentiated, batched, batch: as in `GraphAnalysis`.
        find: from the flow of a graph and the numbers of its inputs to a cut.
        differentiable: whether what is recorded stays connected to the caller's tensors.
    """

    fn: Fn
    differentiated: Sequence[int]
    batched: Sequence[bool]
    batch: int
    find: Callable[[BatchFlow, Sequence[int]], Cut | None]
    differentiable: bool
    _known: dict[int, Cut | None] = dataclasses.field(default_factory=dict)

    def __call__(self, leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> tuple[FunctionRecording, Cut | None]:
        """Call the function once; the cut is None where there is none, and the recording is right whatever it is."""
        recording = record(self.fn, leaves, kwargs, self.differentiated, self.differentiable, watched=False)
        graph = recording.graph
        if graph is None:
            return recording, None
        if graph.key not in self._known:
            if len(self._known) >= MOST_KEYS:
                self._known.clear()
            flow = flow_of(graph, self.batched, self.batch)
            self._known[graph.key] = self.find(flow, inputs_of(graph, self.differentiated))
        return recording, self._known[graph.key]


def flow_of(graph: Graph, batched: Sequence[bool], batch: int) -> BatchFlow:
    """Return how the batch runs through a graph, which is kept without its tensors."""
    graph = dataclasses.replace(graph, constants=dict.fromkeys(graph.constants, _NOTHING))
    return propagate_batch_axis(graph, batch, batched)


def inputs_of(graph: Graph, differentiated: Sequence[int]) -> tuple[int, ...]:
    return tuple(graph.inputs[position] for position in differentiated)


def _paths(recording: FunctionRecording, modules: Sequence[torch.nn.Module]) -> dict[int, str]:
    """Return for tensors that the code of a module made its kind, and its path from the first module that has it."""
    paths: dict[int, str] = {}
    for root in modules:
        for path, module in root.named_modules():
            paths.setdefault(id(module), f"{type(module).__name__} at {path}" if path else type(module).__name__)
    return {number: paths[owner] for number, owner in recording.owners.items() if owner in paths}


_NOTHING = torch.empty(0)
