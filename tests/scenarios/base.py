"""What a scenario is, and where its numbers come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Made = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

TRAITS = {
    "no_vmap": "per-sample vmap(jacrev) and vmap(jacfwd) raise",
    "no_vmap_jacrev": "per-sample vmap(jacrev) raises, while vmap(jacfwd) gives the right numbers",
    "no_functorch_vjp": "torch.func.vjp raises, though autograd manages",
    "no_forward_ad": "forward mode raises",
    "no_batched_grad": "is_grads_batched raises",
    "wrong_vmap_jacrev": "vmap(jacrev) gives wrong numbers without a word",
    "wrong_vmap_jacfwd": "vmap(jacfwd) gives wrong numbers without a word",
    "modes_differ": "forward and reverse mode disagree; what autograd's reverse mode says is right",
    "in_place": "writes in place, into tensors of its own",
    "mutates_input": "writes into its argument",
    "data_dependent": "branches in Python on values of the data",
    "custom_function": "holds a torch.autograd.Function without the rules of torch.func",
    "random": "draws random numbers",
    "stateful": "a call changes buffers",
    "not_sliceable": "independent, yet some of the samples alone give other outputs or an error",
    "hidden": "coupled, but not in the derivatives at this point",
    "dense_accepted": "no sample's derivative reaches another, but values do: calling it dense is no error",
    "conserved": "the sum of an output is constant, so a cotangent of ones sees nothing",
    "kink": "finite differences may straddle a point where the derivative jumps",
    "nan": "J holds NaN or infinities; which entries do depends on the mode",
    "masked": "some arguments are masks or indices, not differentiated",
    "noncontiguous": "an argument is not contiguous",
}


class Draw:
    """Random numbers that are the same in every dtype: drawn in float32, then converted.

    So the float64 version of a scenario is the exact problem of which the float32 version is the rounded one.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.empty(*shape).uniform_(low, high, generator=self.generator).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) > 0.3

    def module(self, build: Callable[[], nn.Module]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(int(self.integers(2**31, 1)))
            return build().to(self.dtype)

    def mlp(self, *widths: int) -> nn.Module:
        def build() -> nn.Module:
            pairs = [(nn.Linear(n, m), nn.Tanh()) for n, m in itertools.pairwise(widths)]
            return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])

        return self.module(build)


@dataclass(frozen=True)
class Scenario:
    """One function with its inputs and what is true of it.

    Attributes:
        name: for people, and unique.
        build: makes (func, args) or (func, args, kwargs) from a source of random numbers.
        coupling: whether output b depends on input b alone, anywhere in the domain.
        jacobian: the blocks by hand, called with func and its arguments, nested as torch.func.jacrev nests.
        traits: keys of TRAITS.
        argnums: what to differentiate in.
        shared: those positions of the arguments that carry no batch.
    """

    name: str
    build: Callable[[Draw], Any]
    coupling: Literal["independent", "dense"] = "independent"
    jacobian: Callable[..., Any] | None = None
    traits: frozenset[str] = field(default_factory=frozenset)
    argnums: int | tuple[int, ...] = 0
    shared: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        unknown = self.traits - TRAITS.keys()
        if unknown:
            raise ValueError(f"{self.name}: unknown traits {sorted(unknown)}")

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Made:
        """The function, its positional and its keyword arguments; state and captured tensors are fresh."""
        func, args, *rest = self.build(Draw(seed, dtype))
        return func, args, rest[0] if rest else {}


def traits(*names: str) -> frozenset[str]:
    return frozenset(names)
