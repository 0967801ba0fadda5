"""Hoisting: what a program computes from captured tensors alone is reused while those stay as they are.

Views of a parameter show its numbers whatever they become, so they are made again only when it gets other memory.
Results are made again when a number differs: `p.data.mul_(2)` moves no version counter, so versions would not do.
Comparing costs something itself, and where it costs more than computing, results are not hoisted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx

from autojac.replay.codegen import Run, emit
from autojac.replay.passes.ordering import immovable_operators

ROUNDS = 5
WORTHWHILE = 2.0
"""How many times as long as comparing captured tensors it must take to compute what is hoisted."""
HoistedInputs = Callable[[], tuple[Tensor, ...]]
# torch's own metaclass makes looking it up in the class slower than calling it
_data_ptr: Final = Tensor.data_ptr


@dataclass(frozen=True)
class Hoist:
    """A part of a program that reads captured tensors and constants alone.

    Attributes:
        views, results: from the captured tensors to what it hands to the rest, views first.
        memory: positions, among the captured tensors, of those whose memory the views show.
        sources: positions of what `results` are computed from.
    """

    views: Run
    results: Run | None
    memory: tuple[int, ...]
    sources: tuple[int, ...]


class Part(NamedTuple):
    """A part of a graph that can be hoisted: its programs, and the nodes that it hands to the rest.

    The programs are what lasts: nodes lead to every tensor of the recorded run.
    """

    hoist: Hoist
    nodes: tuple[fx.Node, ...]


def hoist_part(graph: fx.Graph, captured: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> Part | None:
    """Return the part of a graph that can be hoisted; None if there is none.

    Args:
        graph: what is run in each call.
        captured: the nodes of captured tensors.
        wanted: the outputs of the graph.
    """
    views, results = _find_hoistable(graph, captured)
    if not views and not results:
        return None
    if results and not _pays(captured, views, results):
        results = []
    inside = {*views, *results}
    used = {source for node in graph.nodes if node not in inside for source in node.all_input_nodes} | set(wanted)
    handed = [node for node in views if node in used], [node for node in results if node in used]
    homes = {node.meta["storage"] for node in captured}
    shown = [node for group in handed for node in group if node.meta["storage"] in homes]
    memory = tuple(place for place, node in enumerate(captured) if _leads(node, shown))
    sources = tuple(place for place, node in enumerate(captured) if _leads(node, results))
    run = emit(captured, handed[1], [*views, *results], below=True) if results else None
    hoist = Hoist(emit(captured, handed[0], views, below=True), run, memory, sources)
    return Part(hoist, (*handed[0], *handed[1]))


def _find_hoistable(graph: fx.Graph, captured: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return views of captured tensors, and results that depend on captured tensors and constants alone."""
    unsteady = immovable_operators(graph)
    faces = {node for node in captured if node.meta["value"].layout == torch.strided}
    known = set(faces)
    views, results = [], []
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["role"] in ("constant", "literal"):
            known.add(node)
        if node.op != "call_function" or node in unsteady or node.meta["phase"]:
            continue
        sources = node.all_input_nodes
        if not sources or not known.issuperset(sources):
            continue
        known.add(node)
        if faces.issuperset(sources) and node.meta["storage"] in {source.meta["storage"] for source in sources}:
            faces.add(node)
            views.append(node)
        else:
            results.append(node)
    return views, results


def _leads(node: fx.Node, ends: Sequence[fx.Node]) -> bool:
    todo, wanted, seen = [node], set(ends), set[fx.Node]()
    while todo:
        for user in todo.pop().users:
            if user in wanted:
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _pays(captured: Sequence[fx.Node], views: Sequence[fx.Node], results: Sequence[fx.Node]) -> bool:
    """Check whether computing takes longer than finding out whether that is needed."""
    tensors = [node.meta["value"].detach() for node in captured]
    compute = emit(captured, list(results[-1:]), [*views, *results], below=True)
    sources = [t for t, node in zip(tensors, captured, strict=True) if _leads(node, results)]
    copies = [tensor.clone() for tensor in sources]
    with torch.no_grad():
        computing = _seconds(lambda: compute(*tensors))
        comparing = _seconds(lambda: [torch.equal(a, b) for a, b in zip(sources, copies, strict=True)])
    return computing > WORTHWHILE * comparing


def _seconds(run: Callable[[], object]) -> float:
    run()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def hoisted_inputs(hoist: Hoist, captured: Sequence[Tensor]) -> HoistedInputs:
    """Return a function that returns the captured tensors and what is hoisted, computed again where that is needed.

    These are all that the rest of a program reads besides arguments.

    Args:
        hoist: the programs.
        captured: the tensors, as they are now.
    """
    shown = tuple(captured[place] for place in hoist.memory)
    sources = tuple(captured[place] for place in hoist.sources)

    def compute() -> tuple[Tensor, ...]:
        memory = list(map(_data_ptr, shown))
        copies = tuple(tensor.detach().clone() for tensor in sources)
        with torch.no_grad():
            values = hoist.views(*captured)
            if hoist.results is not None:
                values += hoist.results(*captured)
        values = (*captured, *values)
        # in one store: another thread may read it
        state[:] = [(values, memory, copies)]
        return values

    def are_equal(copies: Sequence[Tensor]) -> bool:
        # nan is not equal to itself: then it is computed again
        return all(map(torch.equal, copies, sources))

    state: list[tuple[tuple[Tensor, ...], list[int], tuple[Tensor, ...]]] = []
    compute()
    inputs: HoistedInputs = _compile_comparison(len(shown))(state, compute, are_equal, _data_ptr, *shown)
    return inputs


@functools.lru_cache(maxsize=64)
def _compile_comparison(count: int) -> Callable[..., HoistedInputs]:
    """Compile what compares where so many tensors have their memory: a loop over two takes twice as long."""
    names = [f"t{place}" for place in range(count)]
    terms = [f"data_ptr({name}) == memory[{place}]" for place, name in enumerate(names)]
    lines = [
        f"def outer({', '.join(['state', 'compute', 'are_equal', 'data_ptr', *names])}):",
        " def inputs():",
        "  values, memory, copies = state[0]",
        f"  return values if {' and '.join([*terms, '(not copies or are_equal(copies))'])} else compute()",
        " return inputs",
    ]
    scope: dict[str, Any] = {"__name__": __name__}
    exec(compile("\n".join(lines), "<autojac hoisting>", "exec"), scope)
    outer: Callable[..., HoistedInputs] = scope["outer"]
    return outer
