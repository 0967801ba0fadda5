"""Random programs of torch operators whose state changes between calls, held against the oracle.

A program is text that a seed decides: a module, what happens to its state, and its calls. `python tests/fuzz.py 17`
runs the program of a seed and prints it where it is wrong; `--without 2,5` leaves out statements by their numbers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import random
import sys
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import autojac
from autojac.core.plan import Plan
from autojac.methods.base import Method, build, registry
from autojac.planning.planner import Planner
from autojac.planning.prepared_plan import PreparedPlan
from autojac.problem.empty_events import without_empty_parts
from autojac.problem.problem import Problem
from autojac.problem.reference import Reference
from autojac.replay.replayer import Replayer

Mode = Literal["replays", "methods", "estimate"]
LAYOUTS = ("blocks", "full", "sparse", "diagonal")
STEPS = 15
SIZES = (2, 4, 5, 6)
"""Batch sizes; none is the number of features, where a shared argument may be taken for a batched one."""

KNOWN: frozenset[str] = frozenset()
"""Kinds of features that are known to be wrong, left out until they are mended."""


@dataclass(frozen=True)
class Feature:
    """A piece of a program: what it holds, what it does with h of shape (B, 3), and how it may change.

    Attributes:
        kind: the name of what made it.
        forward: lines of the module's forward.
        init: lines of its constructor.
        top: lines beside it, at the level of the Python module.
        changes: statements that may be run between two calls.
        couples: those that may make samples depend on each other, or more entries differ from zero, where they did not.
        args: expressions of further arguments, by name, each evaluated for every call.
        replays: it can be replayed: it reads no value of a tensor into Python, gives no tensor the memory of another,
            and keeps nothing. None where a replay may serve it and need not: it reads numbers of a buffer, or keeps a
            result that nothing reads.
        updates: it writes into buffers while the module trains; then a differentiable Jacobian can't be replayed.
    """

    kind: str
    forward: tuple[str, ...]
    init: tuple[str, ...] = ()
    top: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    couples: tuple[str, ...] = ()
    args: tuple[tuple[str, str], ...] = ()
    replays: bool | None = True
    updates: bool = False


NUMBERS = ("float(", "int(", ".item()", "[0] else")
"""In the uses below: a number that Python reads of a tensor."""
READS = ("[0], 1, 2]", "g.data = ")
"""A literal that reads a tensor, or memory that a tensor is given."""


def _flat(*lines: str, held: bool = True) -> bool | None:
    """Whether some lines can be replayed; numbers of tensors that the module holds may be read."""
    if any(mark in line for mark in READS for line in lines):
        return False
    return (None if held else False) if any(mark in line for mark in NUMBERS for line in lines) else True


def _number(r: random.Random) -> str:
    return f"{r.choice([-1, 1]) * r.uniform(0.3, 1.7):.3f}"


PLAIN = (
    "h = h.sin() + h", "h = torch.tanh(h)", "h = (0.3 * h).exp()", "h = h * h.cos()", "h = F.softplus(h)",
    "h = h.softmax(-1)", "h = h.cumsum(1)", "h = h.flip(1) * h", "h = h.roll(1, 1) - h", "h = F.layer_norm(h, (3,))",
    "h = h.sort(1).values * 1.3", "h = torch.where(h > 0.1, h.sin(), h * 0.3)", "h = h.clamp(-0.8, 0.9) + 0.1 * h",
    "h = (h.unsqueeze(2) * h.unsqueeze(1)).sum(2)", "h = torch.einsum('bi,bj->bi', h, h.tanh())",
    "h = h - h.logsumexp(1, keepdim=True)", "h = torch.cat([h[:, 1:], h[:, :1].exp()], 1)", "h = F.gelu(h)",
    "h = torch.stack([h[:, 0], h[:, 1] * h[:, 2], h[:, 2]], 1)", "h = F.pad(h, (1, 0))[:, :3]", "h = h / (1 + h.norm(dim=1, keepdim=True))",
    "h = h.gather(1, h.argsort(1))", "h = h.clone(); h[:, 0] = h[:, 1] * 2", "h = h.clone().mul_(1.1).add_(0.2)", "h = h.unsqueeze(1).expand(-1, 2, -1).sum(1)",
    "h = torch.linalg.solve(torch.eye(3, dtype=h.dtype) + 0.1 * h.unsqueeze(2) * h.unsqueeze(1), h)",
    "h = torch.vmap(lambda row: row * row.sum())(h)", "h = torch.vmap(torch.func.grad(lambda row: row.sin().prod()))(h)",
    "h = h + 0.5 * h.detach()", "h = h.index_select(1, torch.tensor([2, 0, 1]))",
    "h = torch.vmap(torch.func.jacrev(torch.sin))(h).sum(2)", "h = torch.addmm(h, h, torch.eye(3, dtype=h.dtype))",
)  # fmt: skip
COUPLING = (
    "h = h - h.mean(0)", "h = h.cumsum(0)", "h = h.softmax(0)", "h = h + h.roll(1, 0)", "h = h @ (h.T @ h).tanh()",
    "h = (h @ h.T).softmax(1) @ h", "h = h - h.amax(0)", "h = h.flip(0) * h", "h = h * h[:1]", "h = h / (1 + h.var(0))",
)  # fmt: skip


def _operator(r: random.Random, i: int) -> Feature:
    return Feature("operator", (r.choice(PLAIN),))


def _coupled(r: random.Random, i: int) -> Feature:
    return Feature("coupled", (r.choice(COUPLING),))


def _linear(r: random.Random, i: int) -> Feature:
    changes = (
        f"step(net.lin{i}.parameters())", f"net.lin{i} = nn.Linear(3, 3).to(dtype)",
        f"net.lin{i}.weight.data = randn(3, 3)", f"net.lin{i}.weight = nn.Parameter(randn(3, 3))",
        f"net.lin{i}.load_state_dict(nn.Linear(3, 3).state_dict())", f"net.lin{i}.bias.data.mul_(2)",
        f"net.lin{i}.register_forward_hook(lambda module, args, out: out * {_number(r)})",
        f"net.lin{i}.forward = lambda h: h * {_number(r)}", f"net.lin{i}.weight.data[0] = 0.5",
        f"torch.utils.swap_tensors(net.lin{i}.weight, nn.Parameter(randn(3, 3)))",
    )  # fmt: skip
    return Feature("linear", (f"h = self.lin{i}(h)",), (f"self.lin{i} = nn.Linear(3, 3)",), changes=changes)


def _buffer(r: random.Random, i: int) -> Feature:
    changes = (
        f"net.gain{i}.mul_({_number(r)})", f"net.gain{i} = randn(3)", f"net.gain{i}.data = randn(3)",
        f"net.gain{i}.copy_(randn(3))", f"net.gain{i}[1] = {_number(r)}", f"net.load_state_dict(net.state_dict() | {{'gain{i}': randn(3)}})",
        f"net.gain{i} = net.gain{i}.clone()", f"net.gain{i}.set_(randn(3))", f"net.gain{i}.zero_()", f"net.register_buffer('gain{i}', randn(3))",
        f"torch.utils.swap_tensors(net.gain{i}, randn(3))", f"net.gain{i}.numpy()[0] = {_number(r)}",
    )  # fmt: skip
    uses = (f"h = h * self.gain{i}", f"h = (h + self.gain{i}).tanh()", f"h = torch.where(self.gain{i} > 0, h, h.sin())",
            f"h = torch.vmap(lambda row: row * self.gain{i})(h)", f"h = h * self.gain{i}.norm()",
            f"h = torch.vmap(torch.func.grad(lambda row: (row * self.gain{i}).sin().sum()))(h)",
            f"h = h * float(self.gain{i}.sum())", f"h = h * self.gain{i}[0].item() if self.gain{i}[1] > 0 else h.sin()",
            f"h = F.linear(h, torch.diag(self.gain{i}), self.gain{i})", f"g = torch.zeros_like(h); g.data = self.gain{i} * h.detach(); h = h * g")  # fmt: skip
    use = r.choice(uses)
    init = (f"self.register_buffer('gain{i}', torch.randn(3))",)
    return Feature("buffer", (use,), init, changes=changes, replays=_flat(use))


def _tensor(r: random.Random, i: int) -> Feature:
    changes = (
        f"net.t{i} = torch.randn(3)",
        f"net.t{i}.mul_(1.5)",
        f"net.t{i}.data = torch.randn(3)",
        f"net.t{i}[0] = {_number(r)}",
    )
    use = r.choice([f"h = h * self.t{i}.to(h.dtype)", f"h = h + self.t{i}.to(h.dtype).sum() * h.cos()"])
    return Feature("tensor", (use,), (f"self.t{i} = torch.randn(3)",), changes=changes)


def _weight(r: random.Random, i: int) -> Feature:
    changes = (
        f"step([net.w{i}])",
        f"net.w{i}.data = randn(3)",
        f"net.w{i} = nn.Parameter(randn(3))",
        f"net.w{i}.data.mul_({_number(r)})",
    )
    uses = (
        f"h = (h * self.w{i}).sin()",
        f"h = h * self.w{i}.exp() / 3",
        f"h = torch.vmap(lambda row: (row * self.w{i}).tanh())(h)",
    )
    return Feature("weight", (r.choice(uses),), (f"self.w{i} = nn.Parameter(torch.randn(3))",), changes=changes)


def _scalar(r: random.Random, i: int) -> Feature:
    changes = tuple(f"net.k{i} = {_number(r)}" for _ in range(2))
    return Feature("scalar", (f"h = (h * self.k{i}).sin() + h",), (f"self.k{i} = {_number(r)}",), changes=changes)


def _shift(r: random.Random, i: int) -> Feature:
    couples = tuple(f"net.n{i} = {n}" for n in range(3))
    uses = (f"h = h.roll(self.n{i}, 1) * h", f"h = h[:, [self.n{i}, 1, 2]].exp()", f"h = h ** (2 + self.n{i})", f"h = h.clone(); h[:, self.n{i}] = 1.0")  # fmt: skip
    return Feature("shift", (r.choice(uses),), (f"self.n{i} = 0",), couples=couples)


def _flag(r: random.Random, i: int) -> Feature:
    body = r.choice(PLAIN)
    lines = (f"if self.flag{i}:", *(f"    {line.strip()}" for line in body.split(";")))
    return Feature("flag", lines, (f"self.flag{i} = {r.random() < 0.5}",), couples=(f"net.flag{i} = not net.flag{i}",))


def _coupling_flag(r: random.Random, i: int) -> Feature:
    lines = (f"if self.mix{i}:", f"    {r.choice(COUPLING)}")
    return Feature("coupling flag", lines, (f"self.mix{i} = False",), couples=(f"net.mix{i} = not net.mix{i}",))


def _training(r: random.Random, i: int) -> Feature:
    lines = ("if self.training:", f"    {r.choice(COUPLING)}")
    return Feature("training", lines, changes=("net.train()", "net.eval()", "net.train(not net.training)"))


def _batch_norm(r: random.Random, i: int) -> Feature:
    tracked = r.random() < 0.5
    init = f"self.bn{i} = nn.BatchNorm1d(3, track_running_stats={tracked})"
    changes = ["net.train()", "net.eval()", f"net.bn{i}.weight.data.mul_(1.3)", f"step(net.bn{i}.parameters())"]
    changes += (
        [f"net.bn{i}.running_mean.add_(0.3)", f"net.bn{i}.running_var = net.bn{i}.running_var * 2"] if tracked else []
    )
    return Feature("batch norm", (f"h = self.bn{i}(h)",), (init,), changes=tuple(changes), updates=tracked)


def _norm(r: random.Random, i: int) -> Feature:
    init = (f"self.ln{i} = nn.LayerNorm(3)", f"self.norm{i} = nn.Identity()")
    couples = (
        f"net.norm{i} = net.ln{i}",
        f"net.norm{i} = nn.Identity()",
        f"net.norm{i} = nn.Softmax(1)",
        f"net.norm{i} = nn.Tanh()",
    )
    return Feature("norm", (f"h = self.norm{i}(2 * h + 1)",), init, couples=couples)


def _list(r: random.Random, i: int) -> Feature:
    changes = (
        f"net.ws{i}.append({_number(r)})",
        f"net.ws{i}.pop()",
        f"net.ws{i}[:] = [{_number(r)}, {_number(r)}]",
        f"net.ws{i} = [0.7]",
    )
    lines = (f"for w in self.ws{i}:", "    h = (h * w).sin() + h")
    return Feature("list", lines, (f"self.ws{i} = [{_number(r)}, {_number(r)}, 1.0, 0.4, 0.9]",), changes=changes)


def _dict(r: random.Random, i: int) -> Feature:
    changes = (
        f"net.d{i}['a'] = torch.randn(3)",
        f"net.d{i}['a'].mul_(1.2)",
        f"net.d{i}['k'] = {_number(r)}",
        f"net.d{i} = {{'a': torch.ones(3), 'k': 0.4}}",
    )
    line = f"h = h * self.d{i}['a'].to(h.dtype) + self.d{i}['k'] * h.sin()"
    return Feature("dict", (line,), (f"self.d{i} = {{'a': torch.randn(3), 'k': 0.5}}",), changes=changes)


def _layers(r: random.Random, i: int) -> Feature:
    changes = (
        f"net.ls{i}[0] = nn.Linear(3, 3).to(dtype)",
        f"net.ls{i}.append(nn.Linear(3, 3).to(dtype))",
        f"step(net.ls{i}.parameters())",
    )
    init = f"self.ls{i} = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])"
    return Feature("layers", (f"for layer in self.ls{i}:", "    h = torch.tanh(layer(h))"), (init,), changes=changes)


def _global(r: random.Random, i: int) -> Feature:
    changes = (f"G{i} = {_number(r)}", f"T{i} = torch.randn(3)", f"T{i}.mul_(1.3)", f"T{i}.data = torch.randn(3)")
    return Feature(
        "global",
        (f"h = (h * G{i}).sin() * T{i}.to(h.dtype)",),
        top=(f"G{i} = {_number(r)}", f"T{i} = torch.randn(3)"),
        changes=changes,
    )


def _closure(r: random.Random, i: int) -> Feature:
    top = (f"def made{i}():", f"    c, t = {_number(r)}, torch.randn(3)", "    def call(h):", "        return (h * c).sin() * t.to(h.dtype)",
           "    def change(k):", "        nonlocal c", "        c = k", "        t.mul_(k)", "    return call, change", f"call{i}, change{i} = made{i}()")  # fmt: skip
    return Feature(
        "closure",
        (f"h = call{i}(h)",),
        top=top,
        changes=(f"change{i}({_number(r)})", f"call{i}, change{i} = made{i}()"),
    )


def _mask(r: random.Random, i: int) -> Feature:
    couples = (f"net.m{i}.logical_not_()", f"net.m{i} = ~net.m{i}", f"net.m{i} = net.m{i}.roll(1)", f"net.m{i}[0] = not net.m{i}[0]",
               f"net.m{i}.data = ~net.m{i}", f"net.load_state_dict(net.state_dict() | {{'m{i}': ~net.m{i}}})")  # fmt: skip
    changes = (f"net.m{i} = net.m{i}.clone()", f"net.m{i}.copy_(net.m{i}.clone())")
    uses = (
        f"h = h.masked_fill(self.m{i}, 0.5)",
        f"h = torch.where(self.m{i}, h, h.sum(1, keepdim=True))",
        f"h = h * self.m{i}",
        f"h = h.sin() if self.m{i}[0] else h.cumsum(1)",
    )
    use = r.choice(uses)
    return Feature(
        "mask",
        (use,),
        (f"self.register_buffer('m{i}', torch.tensor([True, False, True]))",),
        changes=changes,
        couples=couples,
        replays=_flat(use),
    )


def _index(r: random.Random, i: int) -> Feature:
    couples = (f"net.i{i} = net.i{i}.roll(1)", f"net.i{i}.copy_(torch.randint(3, (3,)))", f"net.i{i}[0] = {r.randrange(3)}",
               f"net.i{i}.data = torch.randint(3, (3,))", f"net.load_state_dict(net.state_dict() | {{'i{i}': torch.randint(3, (3,))}})")  # fmt: skip
    changes = (f"net.i{i} = net.i{i}.clone()",)
    uses = (f"h = h[:, self.i{i}] * h", f"h = h.index_select(1, self.i{i}).sin()", f"h = torch.zeros_like(h).index_add(1, self.i{i}, h)",
            f"h = h[:, [self.i{i}[0], 1, 2]]", f"h = h.roll(int(self.i{i}[0]), 1) + h", f"h = h.gather(1, self.i{i}.expand(len(h), 3))")  # fmt: skip
    use = r.choice(uses)
    return Feature(
        "index",
        (use,),
        (f"self.register_buffer('i{i}', torch.tensor([0, 1, 2]))",),
        changes=changes,
        couples=couples,
        replays=_flat(use),
    )


def _literal(r: random.Random, i: int) -> Feature:
    changes = (
        f"net.s{i}.mul_({_number(r)})",
        f"net.s{i} = randn()",
        f"net.s{i}.data = randn()",
        f"net.load_state_dict(net.state_dict() | {{'s{i}': randn()}})",
    )
    uses = (f"h = h * torch.tensor([1.0, 0.5, self.s{i}], dtype=h.dtype)", f"h = h * torch.as_tensor([self.s{i}, 1, 2], dtype=h.dtype)",
            f"h = h + h.new_tensor([self.s{i}, self.s{i}, 0.1]) * h.sin()", f"h = h * float(self.s{i})", f"h = (h * torch.asarray([self.s{i}, 1.0, 2.0], dtype=h.dtype)).sin()",
            f"h = h.add(h.sin(), alpha=self.s{i}.item())", f"h = torch.full_like(h, self.s{i}.item()) * h")  # fmt: skip
    init = (f"self.register_buffer('s{i}', torch.randn(()))",)
    return Feature("literal", (r.choice(uses),), init, changes=changes, replays=None)


def _data(r: random.Random, i: int) -> Feature:
    uses = ((f"if float(h.detach().abs().max()) > {r.uniform(0.5, 2):.2f}:", "    h = h.sin() + h"),
            (f"h = torch.where(h.detach().abs().amax() > {r.uniform(0.5, 2):.2f}, h.sin(), h * 2)",),
            ("for _ in range(int(h.detach().abs().sum()) % 3):", "    h = h.sin() + h"),
            (f"h = torch.where(h > {r.uniform(0, 1):.2f}, h.sum(1, keepdim=True), h)",))  # fmt: skip
    use = r.choice(uses)
    return Feature("data", use, replays=_flat(*use, held=False))


def _custom(r: random.Random, i: int) -> Feature:
    top = (f"class Cube{i}(torch.autograd.Function):", "    @staticmethod", "    def forward(ctx, h):", "        ctx.save_for_backward(h)",
           "        return h ** 3 / 3", "    @staticmethod", "    def backward(ctx, grad):", "        (h,) = ctx.saved_tensors", "        return grad * h ** 2")  # fmt: skip
    return Feature("custom", (f"h = Cube{i}.apply(h)",), top=top)


def _class(r: random.Random, i: int) -> Feature:
    return Feature(
        "class",
        (f"h = (h * self.c{i}).tanh()",),
        top=(f"Net.c{i} = {_number(r)}",),
        changes=(f"Net.c{i} = {_number(r)}", f"net.c{i} = {_number(r)}"),
    )


def _kept(r: random.Random, i: int) -> Feature:
    return Feature("kept", (f"self.last{i} = h.detach().sum(1)",), (f"self.last{i} = None",), replays=None)


def _batched_argument(r: random.Random, i: int) -> Feature:
    uses = (f"h = (h * a{i}).sin()", f"h = h + a{i} * h.cos()", f"h = torch.where(a{i} > 0, h, h.sin())")
    return Feature("batched argument", (r.choice(uses),), args=((f"a{i}", "randn(B, 3)"),))


def _shared_argument(r: random.Random, i: int) -> Feature:
    return Feature("shared argument", (f"h = (h @ a{i}).tanh()",), args=((f"a{i}", "randn(3, 3)"),))


def _mask_argument(r: random.Random, i: int) -> Feature:
    uses = (f"h = h.masked_fill(a{i}, 0.5)", f"h = torch.where(a{i}, h, h.sum(1, keepdim=True))", f"h = h * a{i}")
    return Feature("mask argument", (r.choice(uses),), args=((f"a{i}", "torch.rand(B, 3) > 0.5"),))


def _segments(r: random.Random, i: int) -> Feature:
    use = f"h = h - torch.zeros_like(h).index_add(0, a{i}, h)[a{i}] * 0.5"
    return Feature("segments", (use,), args=((f"a{i}", "torch.arange(B) // (1 + int(torch.randint(3, ())))"),))


def _integer_argument(r: random.Random, i: int) -> Feature:
    uses = (f"h = h.roll(a{i}, 1) * h", f"h = h ** (a{i} + 1)", f"h = h * a{i} + h.sin()")
    return Feature("integer argument", (r.choice(uses),), args=((f"a{i}", "int(torch.randint(3, ()))"),))


MAKERS: tuple[Callable[[random.Random, int], Feature], ...] = (
    _operator, _operator, _operator, _coupled, _linear, _buffer, _buffer, _tensor, _weight, _scalar, _shift, _flag,
    _coupling_flag, _training, _batch_norm, _norm, _list, _dict, _layers, _global, _closure, _mask, _index, _literal,
    _data, _custom, _class, _kept, _batched_argument, _shared_argument, _mask_argument, _segments, _integer_argument,
)  # fmt: skip
ENDS = (
    "return h", "return h", "return h", "return h.sum(1)", "return h[:, :2]", "return h, h.sum(1)",
    "return {'a': h[:, :1], 'b': h.sin()}", "return torch.stack([h, h * h], 2)",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What happens to the state, by number, and then one call."""

    changes: tuple[tuple[int, str], ...]
    batch: int
    scale: float


@dataclass(frozen=True)
class Program:
    """What a seed decides."""

    seed: int
    features: tuple[Feature, ...]
    end: str
    layout: str
    trained: bool
    grad_input: bool
    double: bool
    steps: tuple[Step, ...]
    left_out: frozenset[int] = field(default=frozenset())

    @property
    def source(self) -> str:
        """The module."""
        init = [line for f in self.features for line in f.init]
        args = "".join(f", {name}" for f in self.features for name, _ in f.args)
        forward = [line for f in self.features for line in f.forward]
        return "\n".join(
            [
                "import torch",
                "from torch import nn",
                "from torch.nn import functional as F",
                f"torch.manual_seed({self.seed})",
                f"dtype = torch.{'float64' if self.double else 'float32'}",
                "randn = lambda *shape: torch.randn(shape, dtype=dtype)",
                "def step(parameters):",
                "    with torch.no_grad():",
                "        for p in parameters:",
                "            p.sub_(0.3 * torch.randn_like(p))",
                "class Net(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in init),
                f"    def forward(self, x{args}):",
                "        h = x",
                *(f"        {line}" for line in forward),
                f"        {self.end}",
                *(line for f in self.features for line in f.top),
                f"net = Net().to(dtype).requires_grad_({self.trained})",
                *([] if self.trained else ["net.eval()"]),
            ]
        )

    def replays(self, training: bool) -> bool | None:
        """Whether the design lets calls be replayed, while the module trains or does not; None where it may."""
        parts = [f.replays and not (f.updates and self.trained and training) for f in self.features]
        return False if False in parts else (None if None in parts else True)

    @property
    def text(self) -> str:
        """The module, the calls and what happens between them, for people."""
        lines = [self.source, "", f"jac = AutoJacobian(net, layout={self.layout!r})"]
        for number, step in enumerate(self.steps):
            lines += [f"{change}  # {n}" for n, change in step.changes if n not in self.left_out]
            args = ", ".join(expression for f in self.features for _, expression in f.args)
            lines.append(f"B = {step.batch}; jac({step.scale} * randn(B, 3){args and ', ' + args})  # call {number}")
        return "\n".join(lines)


def program(seed: int, known: Collection[str] = KNOWN) -> Program:
    """The program of a seed."""
    r = random.Random(seed)
    makers = list(MAKERS)
    features: list[Feature] = []
    for i in range(r.randrange(2, 6)):
        feature = r.choice(makers)(r, i)
        if feature.kind not in known:
            features.append(feature)
    trained = r.random() < 0.4
    changes = [change for f in features for change in (*f.changes, *f.couples)]
    changes.append(r.choice(["dtype = torch.float32; net.to(dtype)", "dtype = torch.float64; net.to(dtype)"]))
    layout = r.choice(LAYOUTS)
    end = r.choice(ENDS) if layout != "diagonal" else "return h"
    batch = r.choice(SIZES)
    steps, numbers = [], itertools.count()
    for _ in range(STEPS):
        chosen = tuple((next(numbers), r.choice(changes)) for _ in range(r.choice([0, 0, 1, 1, 1, 2])))
        steps.append(Step(chosen, batch if r.random() < 0.8 else r.choice(SIZES), r.choice([0.5, 1.0, 1.0, 2.0])))
    return Program(seed, tuple(features), end, layout, trained, r.random() < 0.5, r.random() < 0.6, tuple(steps))


class Forced(Planner):
    """A planner that uses a random one of the methods that the search would have found right."""

    random: random.Random
    mode: Mode
    recovering = False
    recovered: list[PreparedPlan]

    def make(self, request: Any, seen: Any, problem: Problem, plan: Plan, method: Method) -> PreparedPlan:
        if not self.recovering:
            kinds = (
                [k for k in registry().values() if not k.is_wrapper]
                if self.mode == "methods"
                else [registry()["Replay"]]
            )
            found = [m for kind in kinds for m in _candidates(kind, problem)]
            for candidate in self.random.sample(found, min(len(found), 8)):
                if candidate.unsupported(without_empty_parts(problem)) is None and _right(
                    candidate, problem, request, seen.sandbox
                ):
                    plan = dataclasses.replace(plan, method=candidate.spec())
                    return super().make(request, seen, problem, plan, candidate)
        return super().make(request, seen, problem, plan, method)

    def recover(self, *args: Any, **options: Any) -> PreparedPlan:
        # what takes the place of a plan that was seen to be wrong is chosen by the search
        self.recovering = True
        try:
            entry = super().recover(*args, **options)
            self.recovered.append(entry)
            return entry
        finally:
            self.recovering = False


class Same(Planner):
    """A planner that uses one plan, whatever it finds."""

    same: Plan

    def make(self, request: Any, seen: Any, problem: Problem, plan: Plan, method: Method) -> PreparedPlan:
        problem = dataclasses.replace(problem, structure=self.same.structure)
        return super().make(request, seen, problem, self.same, build(self.same.method))


def _candidates(kind: type[Method], problem: Problem) -> list[Method]:
    found: Iterator[Method] = kind.candidates(without_empty_parts(problem), 2)  # type: ignore[assignment]
    return [method for method in found if not method.compiles]


def _right(method: Method, problem: Problem, request: Any, sandbox: Any) -> bool:
    """Whether a search would find a method right at this point."""
    problem = dataclasses.replace(problem, trial=True)
    try:
        with warnings.catch_warnings(), sandbox(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            reference = Reference(problem, request.leaves, request.keywords, sandbox, trained=request.trained)
            result = method.prepare_call(problem)(request.leaves, request.keywords)
            wrong = reference.check(result)
            if wrong is None and problem.differentiable:
                wrong = reference.check_gradient(result)
    except Exception:  # whatever a transform raises: infeasible
        return False
    return wrong is None


@dataclass
class Tally:
    """What became of the calls.

    Attributes:
        due: how many of them the design lets be replayed, by plans that are forced.
    """

    calls: int = 0
    refused: int = 0
    due: int = 0
    replayed: int = 0
    announced: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        ours, theirs = vars(self), vars(other)
        return Tally(**{name: ours[name] + theirs[name] for name in ours})


class WrongError(AssertionError):
    """A wrong number or a raw error, with the program that shows it."""


def run(program: Program, mode: Mode) -> Tally:
    """Make a program's calls.

    Raises:
        WrongError: a number is wrong, or an error is raised that is none of autojac's.
    """
    return _Run(program, mode).all()


class _Run:
    def __init__(self, program: Program, mode: Mode) -> None:
        self.program = program
        self.mode = mode
        self.module = types.ModuleType(f"fuzzed_{program.seed}")
        sys.modules[self.module.__name__] = self.module
        self.space = vars(self.module)
        exec(compile(program.source, f"<program {program.seed}>", "exec"), self.space)
        self.jac = autojac.AutoJacobian(self.space["net"], layout=program.layout, on_miss="estimate", store=":memory:")
        if mode != "estimate":
            planner = self.jac._plans.planner
            planner.__class__ = Forced
            assert isinstance(planner, Forced)
            planner.random, planner.mode, planner.recovered = random.Random(program.seed), mode, []
        self.tally = Tally()

    @property
    def recovered(self) -> list[PreparedPlan]:
        """What took the place of plans that were seen to be wrong: the search's choice, which need be no replay."""
        return getattr(self.jac._plans.planner, "recovered", [])

    def all(self) -> Tally:
        try:
            for number, step in enumerate(self.program.steps):
                for n, change in step.changes:
                    if n not in self.program.left_out:
                        self._change(change)
                self._call(number, step)
        finally:
            sys.modules.pop(self.module.__name__, None)
        return self.tally

    def _change(self, change: str) -> None:
        try:
            with torch.no_grad():
                exec(change, self.space)
        except (IndexError, RuntimeError):
            return  # nothing to pop, or a tensor that was made in another dtype

    def _call(self, number: int, step: Step) -> None:
        space, program = self.space, self.program
        space["B"] = step.batch
        torch.manual_seed(100 * program.seed + number)
        net: nn.Module = space["net"]
        net.requires_grad_(program.trained)
        args = [step.scale * space["randn"](step.batch, 3)]
        args[0].requires_grad_(program.trained and program.grad_input)
        args += [eval(expression, space) for f in program.features for _, expression in f.args]
        try:
            net(*args)
        except (RuntimeError, IndexError, TypeError):
            return  # the changes left nothing that runs
        self.tally.calls += 1
        twin = copy.deepcopy(net)
        before = {id(entry): entry.schedule.calls for _, entry in self.jac._plans.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = self.jac(*args)
            except autojac.AutojacError as error:
                self.tally.refused += 1
                self.tally.reasons[f"{type(error).__name__}: {str(error)[:80]}"] += 1
                return
            except Exception as error:
                raise self._wrong(number, f"raises {type(error).__name__}: {error}") from error
        announced = any(issubclass(w.category, autojac.AutojacWarning) for w in caught)
        self.tally.announced += announced
        (entry,) = (e for _, e in self.jac._plans.items() if e.schedule.calls != before.get(id(e)))
        served = entry.compute if isinstance(entry.compute, Replayer) else None
        replayed, replays = served is not None and served.bound is not None, program.replays(net.training)
        if replayed and replays is False:
            raise self._wrong(number, "is replayed, while a feature of it says that it can't be")
        self.tally.replayed += replayed and replays is True
        self.tally.due += replays is True and not any(entry is other for other in self.recovered)
        full = _full(twin, args, program.trained)
        problem = self._differs(found, full, net, twin, args, entry.plan) or _left_behind(net, twin)
        if problem is not None:
            structure = entry.plan.structure
            raise self._wrong(number, f"{problem}; {entry.plan}, {structure.coupling}, {structure.assurance}")

    def _differs(
        self, found: Any, full: list[Tensor], net: nn.Module, twin: nn.Module, args: list[Any], plan: Plan
    ) -> str | None:
        ours = _outputs(found)
        program, x = self.program, args[0]
        if program.layout == "sparse":
            ours = [one.to_dense() for one in ours]
        right = [laid_out(one, x, program.layout) for one in full]
        accurate = 1e-8 if x.dtype == torch.float64 else 1e-3
        for number, (one, other) in enumerate(zip(ours, right, strict=True)):
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"output {number} is {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"
            if off(one, other) > accurate and not self._rounding(one, other, number, twin, args, plan):
                return f"output {number} is off by {off(one, other):.2g} of the largest"
        if not program.trained:
            return None
        inputs, twins = ([p for p in m.parameters() if p.requires_grad] + [x] * x.requires_grad for m in (net, twin))
        torch.manual_seed(program.seed)
        weights = [torch.randn_like(one) for one in right]
        try:
            right_g = _gradients(right, weights, twins)
        except RuntimeError:
            return None  # what is written into can't be differentiated twice
        try:
            ours_g = _gradients(ours, weights, inputs)
        except RuntimeError as error:
            return f"J is right, its gradient raises {error}"
        # of what is zero but for rounding, nothing else gives a scale
        scale = max(float(g.detach().abs().max()) for g in (*right_g, *right) if g.numel())
        for number, (one, other) in enumerate(zip(ours_g, right_g, strict=True)):
            if off(one, other, scale) > accurate * 10:
                what = f"gradient in number {number} of {len(inputs)} is off by {off(one, other, scale):.2g}"
                return f"J is right, its {what} of the largest"
        return None

    def _rounding(self, one: Tensor, other: Tensor, number: int, twin: nn.Module, args: list[Any], plan: Plan) -> bool:
        """Whether an output's Jacobian, where its terms cancel, is off by rounding alone.

        Rounding is what goes away in float64: there the same plan is right, and what it still misses tells how much is
        rounded off in this dtype. An entry that a plan takes for zero is zero in float64 too.
        """
        x, layout = args[0], self.program.layout
        here, there = torch.finfo(x.dtype).eps, torch.finfo(torch.float64).eps
        if x.dtype == torch.float64:
            return float((one - other).detach().nan_to_num().abs().max()) < 8 * here
        module, wide = _in_double(twin, args)
        exact = laid_out(_full(copy.deepcopy(module), wide, False)[number], x, layout)
        again = autojac.AutoJacobian(module, layout=layout, on_miss="estimate", store=":memory:", verify="never")
        again._plans.planner.__class__ = Same
        assert isinstance(again._plans.planner, Same)
        again._plans.planner.same = plan
        same = _outputs(again(*wide))[number]
        same = same.to_dense() if layout == "sparse" else same
        error, oracles, theirs = (float((t - exact).detach().nan_to_num().abs().max()) for t in (one, other, same))
        return off(same, exact) < 1e-3 and error < 20 * max(oracles, theirs * here / there)

    def _wrong(self, number: int, what: str) -> WrongError:
        seed = self.program.seed
        return WrongError(
            f"call {number} of program {seed} {what}\n\n{self.program.text}\n\n"
            f"python tests/fuzz.py {seed} --mode {self.mode}"
        )


def _left_behind(net: nn.Module, twin: nn.Module) -> str | None:
    """Whether one call left another state than one of a twin."""
    for name, value in {**vars(twin), **twin.state_dict()}.items():
        ours = net.state_dict().get(name, vars(net).get(name))
        if isinstance(value, Tensor) and not (ours.shape == value.shape and off(ours, value) < 1e-4):
            return f"J is right, {name} is {ours} after it, where one call leaves {value}"
    return None


def _gradients(jacobians: list[Tensor], weights: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((j * w).sum() for j, w in zip(jacobians, weights, strict=True) if j.requires_grad)
    if not isinstance(total, Tensor) or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def off(one: Tensor, other: Tensor, least: float = 1e-12) -> float:
    """The largest difference, over the largest number or `least`."""
    both = torch.isfinite(one) & torch.isfinite(other)
    one, other = torch.where(both, one, 0).detach(), torch.where(both, other, 0).detach()
    return float((one - other).abs().max() / other.abs().max().clamp(least)) if other.numel() else 0.0


def _full(net: nn.Module, args: list[Any], create_graph: bool) -> list[Tensor]:
    """(*y.shape, *x.shape) for each output: one plain VJP per row."""
    x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
    with torch.enable_grad():
        y = net(x, *args[1:])
    return [
        torch.stack([_row(s, x, create_graph) for s in out.reshape(-1)]).reshape(*out.shape, *x.shape)
        for out in _outputs(y)
    ]


def _outputs(y: Any) -> list[Tensor]:
    return list(y.values()) if isinstance(y, dict) else list(y) if isinstance(y, tuple) else [y]


def _in_double(net: nn.Module, args: list[Any]) -> tuple[nn.Module, list[Any]]:
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return copy.deepcopy(net).double(), wide


def _row(scalar: Tensor, x: Tensor, create_graph: bool) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros_like(x)
    (row,) = torch.autograd.grad(scalar, x, retain_graph=True, allow_unused=True, create_graph=create_graph)
    return torch.zeros_like(x) if row is None else row


def laid_out(full: Tensor, x: Tensor, layout: str) -> Tensor:
    """A full Jacobian in a layout; a sparse one as a dense matrix."""
    if layout == "full":
        return full
    if layout == "sparse":
        return full.reshape(-1, x.numel())
    blocks = torch.stack([full[b].select(full.dim() - 3, b) for b in range(len(x))])
    return blocks if layout == "blocks" else blocks.diagonal(dim1=1, dim2=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", help="one seed, or a range such as 0:200")
    parser.add_argument("--mode", choices=("replays", "methods", "estimate"), default=None)
    parser.add_argument("--without", default="", help="numbers of statements to leave out")
    parser.add_argument("--calls", type=int, default=None, help="end after so many calls")
    parser.add_argument("--trace", action="store_true", help="print where an error was raised")
    parser.add_argument("--print", action="store_true", help="print the programs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, _, last = options.seeds.partition(":")
    tally = Tally()
    for seed in range(int(first), int(last or int(first) + 1)):
        made = program(seed)
        steps = made.steps[: options.calls]
        made = Program(
            **{**vars(made), "left_out": frozenset(map(int, filter(None, options.without.split(",")))), "steps": steps}
        )
        if options.print:
            print(made.text)
        for mode in [options.mode] if options.mode else ("replays", "methods", "estimate"):
            try:
                tally += run(made, mode)
            except WrongError as error:
                print(error if not last else str(error).splitlines()[0], f"[{mode}]", flush=True)
                if options.trace and error.__cause__:
                    traceback.print_exception(error.__cause__)
    print(tally)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
