"""Whole functions, drawn: parts in chains, with residuals and branches, and every way to call them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracle import jacobian_blocks, jacobian_full
from parts import KINDS, Fn, Shop
from scenarios.base import Draw

WIDEST = 5
"""Columns beyond these are dropped after every part, so that Jacobians stay tiny."""


def widened(x: Tensor, least: int) -> Tensor:
    """At least so many columns, no two alike."""
    more = [(k * x + k).sin() for k in range(1, -(-least // x.shape[1]))]
    return torch.cat([x, *more], 1)[:, : max(least, x.shape[1])]


def width_after(fn: Fn, width: int) -> int:
    with torch.enable_grad():
        return fn(torch.linspace(-0.9, 1.1, 2 * width, dtype=torch.float64).view(2, width)).shape[1]


@dataclass(frozen=True)
class Part:
    """One of `parts.KINDS`, by name."""

    name: str

    def __repr__(self) -> str:
        return repr(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, shop: Shop, width: int) -> Fn:
        kind = KINDS[self.name]
        fn, least = kind.make(shop, max(width, kind.least)), kind.least
        whole = fn if width >= least else lambda x: fn(widened(x, least))
        return whole if kind.lone else lambda x: whole(x) if len(x) > 1 else x.sin()


@dataclass(frozen=True)
class Chain:
    """Parts one after the other."""

    parts: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.parts))})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def build(self, shop: Shop, width: int) -> Fn:
        fns = []
        for part in self.parts:
            fns.append(part.build(shop, width))
            width = min(width_after(fns[-1], width), WIDEST)

        def run(x: Tensor) -> Tensor:
            for fn in fns:
                x = fn(x)
                x = x[:, :WIDEST] if x.shape[1] > WIDEST else x
            return x

        return run


def chain(*parts: Any) -> Chain:
    """Parts, or their names, one after the other: what a chain prints."""
    return Chain(tuple(Part(part) if isinstance(part, str) else part for part in parts))


def no_gradient(inner: Fn, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = inner(x)
    return x * gate.mean(1, keepdim=True).tanh()


def slope(inner: Fn, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = inner(x).sin()
    if not y.requires_grad:
        return x
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)
    return gradient + x


def slope_anywhere(inner: Fn, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return slope(inner, x)


AROUND: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "residual": lambda inner, x: x[:, :1] + inner(x),
    "gate": lambda inner, x: x[:, :1].tanh() * inner(x).tanh(),
    "beside": lambda inner, x: torch.cat([inner(x), x], 1),
    "detached": lambda inner, x: inner(x).detach().tanh() + x[:, :1],
    "no_grad": no_gradient,
    "checkpoint": lambda inner, x: checkpoint(inner, x, use_reentrant=False),
    "slope": slope,
    "slope_anywhere": slope_anywhere,
    "twice": lambda inner, x: inner(x) + inner(x.sin()).tanh(),
    "each": lambda inner, x: torch.cat([inner(row) for row in x.split(1)]),
}
ROUGH = {"detached", "no_grad", "each"}
"""Of these the derivative that autograd takes is not that of the values, or batches are cut up."""


@dataclass(frozen=True)
class Around:
    """A chain inside something."""

    how: str
    inner: Chain

    def __repr__(self) -> str:
        return f"Around({self.how!r}, {self.inner!r})"

    @property
    def names(self) -> tuple[str, ...]:
        return self.inner.names

    def build(self, shop: Shop, width: int) -> Fn:
        inner, wrap = self.inner.build(shop, width), AROUND[self.how]
        return lambda x: wrap(inner, x)


MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda a, b: torch.cat([a[:, :2], b], 1),
    "sum": lambda a, b: a[:, :1] + b,
    "product": lambda a, b: a[:, :1].tanh() * b.sin(),
    "maximum": lambda a, b: torch.maximum(a[:, :1] + 0.17, b),
    "outer": lambda a, b: torch.einsum("bi,bj->bij", a[:, :2], b[:, :2].sin()).flatten(1),
}


@dataclass(frozen=True)
class Both:
    """Two chains from one point, merged."""

    left: Chain
    right: Chain
    merge: str

    def __repr__(self) -> str:
        return f"Both({self.left!r}, {self.right!r}, {self.merge!r})"

    @property
    def names(self) -> tuple[str, ...]:
        return self.left.names + self.right.names

    def build(self, shop: Shop, width: int) -> Fn:
        left, right, merge = self.left.build(shop, width), self.right.build(shop, width), MERGES[self.merge]
        return lambda x: merge(left(x), right(x))


HEADS: dict[str, Fn] = {
    "flat": lambda y: y,
    "scalar": lambda y: y.sum(1),
    "first": lambda y: y[:, 0],
    "one": lambda y: y[:, :1],
    "row": lambda y: y.unsqueeze(1),
    "column": lambda y: y.unsqueeze(2),
    "two": lambda y: torch.stack([y, y.sin()], 2).mT,
    "expanded": lambda y: y.sum(1, keepdim=True).expand(-1, 2),
    "detached": lambda y: y.detach(),
    "constant": lambda y: torch.ones(len(y), 2, dtype=y.dtype),
}
NESTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "plain": lambda ys: ys[0] if len(ys) == 1 else tuple(ys),
    "tuple": tuple,
    "list": list,
    "dict": lambda ys: {f"y{k}": y for k, y in enumerate(ys)},
    "deep": lambda ys: {"first": (ys[0],), "rest": [list(ys[1:]), ys[0]]},
}
MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda x: torch.stack([x, x + 1]).movedim(0, -1).contiguous()[..., 0],
    "every_other": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}
FLOATS = ("batched", "matrix", "vector")
SECONDS = (*FLOATS, "index", "neighbours", "mask", "row_mask", "shared_mask", "number")
SHARED = ("matrix", "vector", "shared_mask", "number")


def second_input(kind: str, draw: Draw, batch: int, width: int) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "batched": lambda: draw.normal(batch, 2),
        "matrix": lambda: 0.7 * draw.normal(width, 2),
        "vector": lambda: draw.normal(width),
        "index": lambda: draw.integers(width, batch, width),
        "neighbours": lambda: draw.integers(batch, batch),
        "mask": lambda: draw.mask(batch, width),
        "row_mask": lambda: draw.mask(batch),
        "shared_mask": lambda: draw.mask(width),
        "number": lambda: 0.7,
    }
    return made[kind]()


def joined(kind: str, x: Tensor, z: Any) -> Tensor:
    """The first input, flat, with the second worked in."""
    if kind in ("row_mask", "index"):
        return x * z.unsqueeze(1) + 0.1 * x if kind == "row_mask" else x.gather(1, z)
    if kind in ("mask", "shared_mask"):
        return torch.where(z, x, x.sin())
    if kind == "matrix":
        return x @ z
    if kind == "batched":
        return torch.cat([x * z[:, :1].tanh(), z[:, 1:].sin()], 1)
    return x + x[z].tanh() if kind == "neighbours" else x * z


@dataclass(frozen=True)
class Architecture:
    """A function and how it is called; `make` gives both.

    Attributes:
        trunk: from the input.
        heads: (chain from the trunk, shape of its end) for every output.
        event: shape of one sample.
        second: kind of a second argument, if any; `packed` in one dictionary with the first, or `by_keyword`.
        axis: where the first argument carries the batch; declared unless it is 0 and `roles` is `auto`.
        roles: `auto`, `declared`, or `none` for a function without a batch.
        grad: grad mode of the call: `on`, `off` or `inference`.
        inputs_require, trains: whether inputs and weights require gradients.
        wrapping: what kind of callable it is.
    """

    trunk: Chain
    heads: tuple[tuple[Chain, str], ...] = ((Chain(), "flat"),)
    nest: str = "plain"
    batch: int = 2
    event: tuple[int, ...] = (2,)
    second: str | None = None
    packed: bool = False
    by_keyword: bool = False
    argnums: int | tuple[int, ...] = 0
    axis: int = 0
    roles: str = "auto"
    layout: str = "blocks"
    memory: str = "contiguous"
    grad: str = "on"
    inputs_require: bool = False
    trains: bool = False
    wrapping: str = "closure"
    seed: int = 0

    def __repr__(self) -> str:
        changed = []
        for name, known in Architecture.__dataclass_fields__.items():
            value = getattr(self, name)
            if name == "trunk" or value != known.default:
                changed.append(f"{name}={value!r}")
        return f"Architecture({', '.join(changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def names(self) -> tuple[str, ...]:
        return self.trunk.names + tuple(name for chain, _ in self.heads for name in chain.names)

    @property
    def coupled(self) -> bool:
        return self.batch > 1 and (self.second == "neighbours" or any(KINDS[name].coupled for name in self.names))

    def make(self) -> Made:
        return Made(self)


class Made:
    """An architecture with its weights and inputs.

    Attributes:
        func, args, kwargs: what a user has.
        options: of its AutoJacobian.
        plain, plain_args: the same function with the batch on axis 0, for the oracle.
        weights: the tensors that may require gradients.
    """

    def __init__(self, drawn: Architecture) -> None:
        self.drawn = drawn
        shop, draw = Shop(drawn.seed, drawn.trains), Draw(drawn.seed + 17, torch.float64)
        batch, width, second = drawn.batch, math.prod(drawn.event), drawn.second
        x = MEMORY[drawn.memory](draw.normal(batch, *drawn.event))
        z = None if second is None else second_input(second, draw, batch, width)
        start = width if second is None else joined(second, draw.normal(batch, width), z).shape[1]
        trunk = drawn.trunk.build(shop, start)
        middle = min(width_after(trunk, start), WIDEST)
        heads = [(chain.build(shop, middle), HEADS[end]) for chain, end in drawn.heads]

        def values(x: Tensor, *rest: Any) -> Any:
            flat = x.reshape(len(x), -1)
            y = trunk(flat if second is None else joined(str(second), flat, rest[0]))
            return NESTS[drawn.nest]([end(head(y)) for head, end in heads])

        both = (x,) if z is None else (x, z)
        self.weights = [*shop.tensors, *(p for module in shop.modules for p in module.parameters())]
        self.by_batch: tuple[bool, ...] = (True,) if second is None else (True, second not in SHARED)
        self.plain, self.plain_args, self.kwargs = self._called(values, both)
        axis = drawn.axis
        self.func: Any = self.plain
        self.args = self.plain_args
        if axis:
            self.func = lambda first, *rest, **named: self.plain(first.movedim(axis, 0), *rest, **named)
            self.args = (x.movedim(0, axis), *self.plain_args[1:])
        self.args = tuple(map(self._trained, self.args))
        if drawn.wrapping == "module":
            self.func = Net(self.func, shop.modules, shop.tensors)
        elif drawn.wrapping == "method":
            self.func = Holder(self.func, shop.modules).value

    def _called(self, values: Any, both: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The function as it takes its arguments, and these."""
        if self.drawn.packed and len(both) == 2:
            return lambda nest: values(nest["x"], nest["z"]), ({"x": both[0], "z": both[1]},), {}
        if self.drawn.by_keyword and len(both) == 2:
            return lambda x, *, z: values(x, z), both[:1], {"z": both[1]}
        return values, both, {}

    def _trained(self, arg: Any) -> Any:
        if isinstance(arg, dict):
            return {name: self._trained(value) for name, value in arg.items()}
        required = self.drawn.inputs_require and isinstance(arg, Tensor) and arg.is_floating_point()
        return arg.detach().requires_grad_() if required else arg

    @property
    def options(self) -> dict[str, Any]:
        drawn = self.drawn
        made: dict[str, Any] = {"argnums": drawn.argnums, "layout": drawn.layout, "randomness": "different"}
        if drawn.roles == "none":
            made["in_dims"] = None
        elif drawn.roles == "declared":
            axes = tuple((drawn.axis if k == 0 else 0) if has else None for k, has in enumerate(self.by_batch))
            made["in_dims"] = axes[: len(self.args)]
        return made

    @property
    def grad_mode(self) -> Any:
        return {"on": torch.enable_grad, "off": torch.no_grad, "inference": torch.inference_mode}[self.drawn.grad]()

    def plain_args_of(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with the batch on axis 0."""
        return (args[0].movedim(self.drawn.axis, 0), *args[1:]) if self.drawn.axis else args

    def shared(self) -> tuple[int, ...]:
        return () if self.by_batch[-1] or self.drawn.packed else (1,)

    def expected(self, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None) -> Any:
        """The oracle's Jacobian in the drawn layout."""
        drawn = self.drawn
        numbers = drawn.argnums
        here = self.plain_args if args is None else self.plain_args_of(args)
        named = self.kwargs if kwargs is None else kwargs
        count = len(here)
        numbers = tuple(k % count for k in numbers) if isinstance(numbers, tuple) else numbers % count
        if drawn.layout == "full" or drawn.roles == "none":
            return jacobian_full(self.plain, here, numbers, kwargs=named)
        return jacobian_blocks(self.plain, here, numbers, shared=self.shared(), kwargs=named)


class Net(nn.Module):
    """The function as a module that owns its weights."""

    def __init__(self, run: Any, modules: list[nn.Module], tensors: list[Tensor]) -> None:
        super().__init__()
        self.run = run
        self.parts = nn.ModuleList(modules)
        for k, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{k}", tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class Holder:
    """The function as a bound method."""

    def __init__(self, run: Any, modules: list[nn.Module]) -> None:
        self.run = run
        self.parts = modules

    def value(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def chains(names: list[str], rough: bool, longest: int = 4) -> st.SearchStrategy[Chain]:
    """Chains of such parts, of parts around chains, and of chains side by side."""
    part = st.sampled_from(names).map(Part)
    short = st.lists(part, max_size=2).map(lambda parts: Chain(tuple(parts)))
    around = st.builds(Around, st.sampled_from([how for how in AROUND if rough or how not in ROUGH]), short)
    both = st.builds(Both, short, short, st.sampled_from([how for how in MERGES if rough or how != "maximum"]))
    link = st.one_of(part, part, part, part, around, both)
    return st.lists(link, min_size=1, max_size=longest).map(lambda parts: Chain(tuple(parts)))


@st.composite
def architectures(draw: Any, smooth: bool = False, grad: str | None = None) -> Architecture:
    """A whole function with its call.

    Args:
        draw: hypothesis's own.
        smooth: only functions with a second derivative everywhere that autograd takes of the values themselves.
        grad: the grad mode; drawn by default.
    """
    usable = [name for name, kind in KINDS.items() if kind.smooth or not smooth]
    alone = [name for name in usable if not KINDS[name].coupled]
    # a function with one coupled part in it is coupled: leave most without
    names = draw(st.sampled_from([alone, alone, usable]))
    trunk = draw(chains(names, not smooth))
    if names is usable and draw(st.booleans()):
        coupler = draw(st.sampled_from([name for name in usable if KINDS[name].coupled]))
        trunk = Chain((*trunk.parts, Part(coupler)))
    ends = [end for end in HEADS if not smooth or end not in ("detached", "constant")]
    head = st.tuples(
        st.lists(st.sampled_from(alone).map(Part), max_size=1).map(lambda parts: Chain(tuple(parts))),
        st.sampled_from(ends),
    )
    heads = tuple(draw(st.one_of(st.lists(head, min_size=1, max_size=1), st.lists(head, min_size=1, max_size=3))))
    if {end for _, end in heads} in ({"detached"}, {"detached", "constant"}):
        # without any graph a function is refused
        heads = (*heads[:-1], (heads[-1][0], "flat"))
    batch = draw(st.integers(1, 6))
    event = draw(st.sampled_from([(2,), (3,), (1,), (), (2, 2), (2, 3), (batch,), (1, 2, 1)]))
    roles = draw(st.sampled_from(["auto", "auto", "auto", "declared", "none"]))
    second = draw(st.one_of(st.none(), st.none(), st.sampled_from(SECONDS)))
    packed = second == "batched" and draw(st.booleans())
    by_keyword = second not in (None, "number") and not packed and draw(st.sampled_from([False, False, True]))
    positional = second in FLOATS and not packed and not by_keyword
    argnums = draw(st.sampled_from([0, (0,), (0, 1), 1, (1, 0), -1] if positional else [0, 0, 0, (0,)]))
    axis = 0
    if roles == "declared" and not packed:
        axis = draw(st.integers(0, len(event)))
    width = math.prod(event)
    differentiated = positional and argnums not in (0, (0,))
    if roles == "auto" and differentiated and second in ("matrix", "vector") and (width == batch or argnums in (1, -1)):
        # by its shape it may be either; and with nothing else batched there is no batch to guess
        roles = "declared"
    if roles != "auto" and second is not None and argnums in (1, -1) and second in ("matrix", "vector"):
        argnums = (0, 1)
    return Architecture(
        trunk,
        heads,
        draw(st.sampled_from(sorted(NESTS) if len(heads) > 1 else ["plain", "plain", "tuple", "dict"])),
        batch,
        event,
        second,
        packed,
        by_keyword,
        argnums,
        axis,
        roles,
        draw(st.sampled_from(["blocks", "blocks", "full"])),
        draw(st.sampled_from(["contiguous", "contiguous", *MEMORY])),
        grad or draw(st.sampled_from(["on", "off", "on", "inference"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(["closure", "module", "method"])),
        draw(st.integers(0, 3)),
    )
