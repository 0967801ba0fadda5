"""Derivatives of one piece of a computation: many cotangents pulled, or many tangents pushed, by one of the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from autojac.autodiff import seeds
from autojac.autodiff.primitives import Bound, functional_jvp, functional_vjp, load_forward_rules, push_dual, vmap
from autojac.autodiff.pullback import Pullback
from autojac.graph.batch_axis.states import BatchAxis

Engine = Literal["loop", "vmap", "batched"]
PushMany = Callable[[int, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Pulls:
    """Pull many cotangents at a time through one evaluation.

    Attributes:
        values: what the evaluation gave.
        vjp: of `torch.func`, to be mapped over cotangents.
        pullback: the evaluation as recorded by autograd, where there is no `vjp`.
        batched: whether autograd pulls all cotangents in one pass (`is_grads_batched`).
    """

    values: tuple[Tensor, ...]
    vjp: Callable[..., Any] | None = None
    pullback: Pullback | None = None
    batched: bool = False

    @classmethod
    def through(cls, bound: Bound, inputs: Sequence[Tensor]) -> Self:
        """Evaluate under `torch.func.vjp`, for engine `vmap`."""
        return cls(*functional_vjp(bound, inputs))

    @classmethod
    def by(cls, pullback: Pullback, engine: Engine) -> Self:
        """Take what autograd has recorded, for engines `loop` and `batched`."""
        return cls(pullback.outputs, pullback=pullback, batched=engine == "batched")

    def one(self, output: int, cotangents: Tensor, last: bool = False) -> Sequence[Tensor]:
        """Pull (c, *output) of one output to one (c, *input) per input; with `last` the graph may be freed."""
        if self.pullback is not None:
            return self._pull_recorded(self.pullback, (self.pullback.recorded[output],), (cotangents,), last)
        assert self.vjp is not None
        vjp, zeros = self.vjp, [torch.zeros_like(value) for value in self.values]
        pulled: Sequence[Tensor] = vmap(lambda seed: vjp((*zeros[:output], seed, *zeros[output + 1 :])))(cotangents)
        return pulled

    def row(self, output: int, cotangent: Tensor, last: bool = False) -> Sequence[Tensor]:
        """Pull a single (*output) of one output to one (*input) per input, through what autograd has recorded."""
        assert self.pullback is not None
        return self.pullback(output, cotangent, last=last)

    def all(self, cotangents: Sequence[Tensor], last: bool = False) -> Sequence[Tensor]:
        """Pull one (c, *output) per output, all outputs together."""
        if self.pullback is not None:
            return self._pull_recorded(self.pullback, self.pullback.recorded, cotangents, last)
        assert self.vjp is not None
        vjp = self.vjp
        pulled: Sequence[Tensor] = vmap(lambda *seeds: vjp(seeds))(*cotangents)
        return pulled

    def _pull_recorded(
        self, pullback: Pullback, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], last: bool
    ) -> Sequence[Tensor]:
        if self.batched:
            return pullback.pull(outputs, cotangents, batched=True, last=last)
        final = len(cotangents[0]) - 1
        rows = [
            pullback.pull(outputs, seeds, last=last and number == final)
            for number, seeds in enumerate(zip(*[part.unbind() for part in cotangents], strict=True))
        ]
        return _stack(rows)


def puller(
    bound: Bound, inputs: Sequence[Tensor], engine: Engine, differentiable: bool, repeatable: bool = True
) -> Pulls:
    """Evaluate once, and return what pulls cotangents back by the engine."""
    if engine == "vmap":
        return Pulls.through(bound, inputs)
    return Pulls.by(Pullback(bound, inputs, differentiable, repeatable), engine)


def push(
    bound: Bound, inputs: Sequence[Tensor], tangents: Sequence[Tensor], engine: Engine, draws: bool = False
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Push one (c, *input) per input, all together: the values, and one (c, *output) per output."""
    if engine == "vmap":
        # a draw belongs to the batch, not to a tangent
        outputs, pushed = vmap(lambda *seeds: functional_jvp(bound, inputs, seeds), draws=draws)(*tangents)
        return tuple(output[0] for output in outputs), list(pushed)
    pairs = [push_dual(bound, inputs, seeds) for seeds in zip(*tangents, strict=True)]
    return tuple(pairs[-1][0]), _stack([pushed for _, pushed in pairs])


def of_one_input(bound: Bound, inputs: Sequence[Tensor], position: int) -> Bound:
    """Return the function of one input alone, the others fixed."""
    return lambda tensor: bound(*inputs[:position], tensor, *inputs[position + 1 :])


def pusher(bound: Bound, inputs: Sequence[Tensor], engine: Engine) -> PushMany:
    """Return a function from (input, tangents (c, *input)) to one (c, *output) per output."""
    if engine == "vmap":
        load_forward_rules()

    def push_one(position: int, tangents: Tensor) -> Sequence[Tensor]:
        alone, source = of_one_input(bound, inputs, position), inputs[position]
        if engine == "vmap":
            pushed: Sequence[Tensor] = vmap(lambda seed: functional_jvp(alone, (source,), (seed,))[1])(tangents)
            return pushed
        return push(alone, (source.contiguous(),), (tangents,), engine)[1]

    return push_one


def _stack(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    # a single row is not worth a copy
    return [torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0) for parts in zip(*rows, strict=True)]


def each(run: Callable[[Tensor], Sequence[Tensor]], rows: Tensor, step: int | None) -> list[Tensor]:
    """Run on all seeds (k, *shape), `step` of them at a time, and join the results."""
    parts = [run(rows[start:stop]) for start, stop in seeds.spans(len(rows), step)]
    return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]


def coordinates(tensor: Tensor, state: BatchAxis, batch: int) -> Tensor:
    """Return one-hot seeds (k, *shape) of a tensor that carries the batch along an axis, each for every sample."""
    axis, outer, inner = state
    event = (*tensor.shape[:axis], outer, inner, *tensor.shape[axis + 1 :])
    return seeds.shared_seeds(event, batch, tensor).movedim(1, axis + 2).reshape(-1, *tensor.shape)


def by_sample(rows: Tensor, state: BatchAxis, batch: int) -> Tensor:
    """Arrange rows (c, *shape) of such a tensor as (c, B, k), elements in the order of `coordinates`."""
    axis, outer, inner = state
    apart = rows.reshape(*rows.shape[: axis + 1], outer, batch, inner, *rows.shape[axis + 2 :])
    return apart.movedim(axis + 2, 1).reshape(len(rows), batch, -1)
