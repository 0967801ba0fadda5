"""A flat graph as a Python function: one call per operator, each intermediate result released after its last use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autojac.replay.overwriting import find_overwritable, name_of, writes_into
from autojac.torch_internals import BelowAutograd, OpOverload

Run = Callable[..., tuple[Tensor, ...]]
FILENAME = "<autojac program>"
NAMED = (bool, int, str, type(None))
"""Kinds of arguments that are written out as they are."""
ARITHMETIC = (
    "abs add addcdiv addcmul addmm amax amin baddbmm bmm cos cosh cumsum div eq erf exp exp2 expm1 floor ge gt le log "
    "log1p logical_and logical_not logical_or lt matmul maximum mean minimum mm mul mv ne neg pow prod reciprocal "
    "rsqrt sigmoid sign sin sinh sqrt sub sum tan tanh where"
)
SHAPES = (
    "cat clone diag_embed diagonal flip gather index_select permute roll select squeeze stack t transpose tril triu "
    "unbind unsqueeze"
)
BOUND = frozenset(f"{ARITHMETIC} {SHAPES}".split())
"""Operators that torch's own Python functions take alike: those are parsed in half the time."""
METHODS = frozenset({"view", "expand", "masked_fill"})
"""The same for methods of tensors."""


def emit(
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    *,
    copied: Sequence[int] = (),
    below: bool = False,
) -> Run:
    """Return the function that computes some nodes of a graph from others.

    Args:
        inputs: what the function takes, in this order.
        outputs: what it returns, as a tuple.
        nodes: operators to run, in this order.
        copied: positions of outputs to return copies of.
        below: run beneath autograd and autocast, which have nothing to do for operators recorded there.
    """
    return _Writer(inputs, below).function(nodes, outputs, copied)


class _Writer:
    """Writes a function, with what it needs besides its arguments as its global variables."""

    def __init__(self, inputs: Sequence[fx.Node], below: bool) -> None:
        self.below = below
        self.scope: dict[str, Any] = {"__name__": __name__}
        self.names: dict[fx.Node, str] = {node: f"x{place}" for place, node in enumerate(inputs)}
        self.header = ", ".join(self.names.values())
        self.bound: dict[int, str] = {}
        self.over: dict[fx.Node, fx.Node] = {}

    def function(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], copied: Sequence[int]) -> Run:
        last: dict[fx.Node, int] = {}
        for place, node in enumerate(nodes):
            last |= dict.fromkeys((node, *node.all_input_nodes), place)
        for node in outputs:
            last.pop(node, None)
        dying: dict[int, list[str]] = {}
        lines = []
        # a compiler decides that by itself
        self.over = find_overwritable(nodes, outputs) if self.below else {}
        for place, node in enumerate(nodes):
            lines.append(f"{self.define(node, place)} = {self.call(node)}")
            dying[place] = []
        for node, place in last.items():
            if node in self.names and node.op == "call_function":
                dying[place].append(self.names[node])
        for place, names in dying.items():
            if names:
                lines[place] += f"; {' = '.join(names)} = None"
        returned = [self.argument(node) for node in outputs]
        for place in copied:
            returned[place] = f"{self.keep(_copy, 'f')}({returned[place]})"
        lines.append(f"return ({', '.join(returned)}{',' if len(outputs) == 1 else ''})")
        indent = "    "
        source = f"def program({self.header}):\n"
        if self.below:
            source += f"    with {self.keep(BelowAutograd, 'f')}():\n"
            indent *= 2
        source += "".join(f"{indent}{line}\n" for line in lines)
        exec(compile(source, FILENAME, "exec"), self.scope)
        program: Run = self.scope["program"]
        return program

    def define(self, node: fx.Node, place: int) -> str:
        self.names[node] = f"v{place}"
        return self.names[node]

    def call(self, node: fx.Node) -> str:
        if node.target is operator.getitem:
            source, place = node.args
            return f"{self.argument(source)}[{place!r}]"
        parts = [self.argument(value) for value in node.args]
        parts += [f"{name}={self.argument(value)}" for name, value in node.kwargs.items()]
        # a compiler knows operators by their overloads
        target = callable_of(node.target) if self.below else node.target
        writing = writes_into(node.target) if node in self.over else None
        if writing is not None:
            overload, result = writing
            target = target if name_of(node.target) in BOUND else overload._op
            parts.append(f"{result}={self.argument(self.over[node])}")
        return f"{self.keep(target, 'f')}({', '.join(parts)})"

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value not in self.names:
                return self.keep(value.meta["value"], "c")
            return self.names[value]
        if type(value) in NAMED:
            return repr(value)
        if isinstance(value, (tuple, list)):
            # fx has its own immutable lists, which operators take more slowly
            parts = [self.argument(part) for part in value]
            comma = "," if len(parts) == 1 else ""
            return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)}{comma})"
        return self.keep(value, "k")

    def keep(self, value: Any, kind: str) -> str:
        name = self.bound.get(id(value))
        if name is None:
            name = self.bound[id(value)] = f"{kind}{len(self.bound)}"
            self.scope[name] = value
        return name


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def callable_of(target: Any) -> Any:
    """Return what to call for an operator: without Python in between where torch offers that."""
    if not isinstance(target, OpOverload):
        return target
    name = name_of(target)
    if name in BOUND:
        return getattr(torch, name)
    return getattr(Tensor, name) if name in METHODS else target._op


def operators_of(run: Run) -> int | None:
    """Return how many operators a program runs, each on a line of its own; None for what a compiler made."""
    code = getattr(run, "__code__", None)
    if code is None or code.co_filename != FILENAME:
        return None
    return len({line for _, _, line in code.co_lines() if line is not None})


def work_of(run: Run) -> tuple[Any, ...] | None:
    """Return what tells programs apart by the work they do: operators, arguments, and the kinds of constant tensors.

    None for what a compiler made, which shows nothing of the kind.
    """
    code = getattr(run, "__code__", None)
    if code is None or code.co_filename != FILENAME:
        return None
    scope = [
        (name, (tuple(value.shape), value.dtype, value.stride()) if isinstance(value, Tensor) else repr(value))
        for name, value in run.__globals__.items()
        if not name.startswith("__") and name != "program"
    ]
    return code.co_code, code.co_consts, code.co_names, tuple(scope)
