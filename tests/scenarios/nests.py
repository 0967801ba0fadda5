"""Nested arguments and results, and arguments that are no tensors."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scenarios.base import Draw, Scenario, traits
from scenarios.maths import eye_like

ROWS = 5


class Pose(NamedTuple):
    place: Tensor
    angle: Tensor


@dataclass
class State:
    x: Tensor
    v: Tensor


@dataclass(frozen=True)
class Settings:
    """Not registered with pytree: torch takes it for a leaf."""

    power: int = 2
    name: str = "cube"


pytree.register_dataclass(State)


def zeros(*tensors: Tensor) -> Tensor:
    """The Jacobian of the first in the second where there is none."""
    y, x = tensors
    return torch.zeros(*y.shape, *x.shape[1:], dtype=x.dtype)


def diagonal(x: Tensor) -> Tensor:
    return x.diag_embed()


def move(pose: Pose) -> Pose:
    return Pose(pose.place + pose.angle[:, None] ** 2, pose.angle.sin())


def move_jacobian(_: Any, pose: Pose) -> Pose:
    by_angle = (2 * pose.angle)[:, None].expand_as(pose.place)
    return Pose(Pose(eye_like(pose.place), by_angle), Pose(zeros(pose.angle, pose.place), pose.angle.cos()))


def leapfrog(state: State, step: float) -> State:
    """A half kick, a drift and a half kick of a pendulum."""
    v = state.v - step / 2 * state.x.sin()
    x = state.x + step * v
    return State(x, v - step / 2 * x.sin())


def deep(nest: Any) -> Any:
    a, (b, c) = nest["a"], nest["more"][0]
    return [{"product": a * b}, (c.sum(-1), a.sin() * c)]


def deep_jacobian(_: Any, nest: Any) -> Any:
    a, (b, c) = nest["a"], nest["more"][0]
    product = {"a": diagonal(b), "more": [(diagonal(a), zeros(a, c))]}
    total = {"a": zeros(a[:, 0], a), "more": [(zeros(a[:, 0], b), torch.ones_like(c))]}
    last = {"a": diagonal(a.cos() * c), "more": [(zeros(a, b), diagonal(a.sin()))]}
    return [{"product": product}, (total, last)]


def by_name(power: int, x: Tensor, name: str, negate: bool, nothing: None, step: float) -> Tensor:
    assert nothing is None
    y = getattr(x, name)() ** power * step
    return -y if negate else y


def configured(x: Tensor, config: dict[str, Any]) -> Tensor:
    gain, (flag, name) = config["gain"], config["choice"]
    return gain * getattr(x, name)() ** config["power"] if flag and config["nothing"] is None else gain


def three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True) * c


def three_jacobian(_: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return eye_like(c) * (a * b).sum(-1)[:, None, None], c[:, :, None] * b[:, None, :]


def chosen(x: Tensor, *, options: dict[str, Any], skip: None = None) -> Tensor:
    return options["gain"] * x.sin() if options["mode"] == "sin" and skip is None else x


def five(draw: Draw) -> Any:
    return [draw.normal(ROWS, 1 + k % 2) for k in range(5)]


SCENARIOS = [
    Scenario(
        "tuple in, list out",
        lambda d: (lambda p: [p[0] * p[1], p[1].sum(-1)], ((d.normal(ROWS, 3), d.normal(ROWS, 3)),)),
        jacobian=lambda _, p: [(diagonal(p[1]), diagonal(p[0])), (zeros(p[0][:, 0], p[0]), torch.ones_like(p[1]))],
    ),
    Scenario(
        "namedtuple in, namedtuple out",
        lambda d: (move, (Pose(d.normal(ROWS, 2), d.normal(ROWS)),)),
        jacobian=move_jacobian,
    ),
    Scenario(
        "registered dataclass in, dataclass out",
        lambda d: (leapfrog, (State(d.normal(ROWS, 2), d.normal(ROWS, 2)), 0.1)),
    ),
    Scenario(
        "deep nests",
        lambda d: (deep, ({"a": d.normal(ROWS, 2), "more": [(d.normal(ROWS, 2), d.normal(ROWS, 2))]},)),
        jacobian=deep_jacobian,
    ),
    Scenario(
        "OrderedDict in, its own input out",
        lambda d: (
            lambda x: {"same": x["z"], "sine": x["y"].sin()},
            (OrderedDict(z=d.normal(ROWS, 2), y=d.normal(ROWS, 3)),),
        ),
        jacobian=lambda _, x: {
            "same": OrderedDict(z=eye_like(x["z"]), y=zeros(x["z"], x["y"])),
            "sine": OrderedDict(z=zeros(x["y"], x["z"]), y=diagonal(x["y"].cos())),
        },
    ),
    Scenario(
        "list of five inputs",
        lambda d: (lambda xs: torch.cat([x.sin() for x in xs], -1), (five(d),)),
        jacobian=lambda _, xs: list(torch.cat([x.cos() for x in xs], -1).diag_embed().split([1, 2, 1, 2, 1], -1)),
    ),
    Scenario(
        "the same tensor twice in the result",
        lambda d: (lambda x: (y := x.sin(), y), (d.normal(ROWS, 3),)),
        jacobian=lambda _, x: (diagonal(x.cos()), diagonal(x.cos())),
    ),
    Scenario(
        "argnums out of order",
        lambda d: (three, (d.normal(ROWS, 3), d.normal(ROWS, 3), d.normal(ROWS, 2))),
        jacobian=three_jacobian,
        argnums=(2, 0),
    ),
    Scenario(
        "argnums out of order, nested",
        lambda d: (lambda p, x: {"y": p["a"] * x}, ({"a": d.normal(ROWS, 3)}, d.normal(ROWS, 3))),
        jacobian=lambda _, p, x: {"y": (diagonal(p["a"]), {"a": diagonal(x)})},
        argnums=(1, 0),
    ),
    Scenario(
        "an output that depends on nothing differentiated",
        lambda d: (lambda x, s: (x.sin(), s.exp()), (d.normal(ROWS, 3), d.normal(ROWS, 2))),
        jacobian=lambda _, x, s: (diagonal(x.cos()), zeros(s, x)),
    ),
    Scenario(
        "each output of its own input",
        lambda d: (lambda x, z: (x.sin(), z.exp()), (d.normal(ROWS, 3), d.normal(ROWS, 2))),
        jacobian=lambda _, x, z: ((diagonal(x.cos()), zeros(x, z)), (zeros(z, x), diagonal(z.exp()))),
        argnums=(0, 1),
    ),
    Scenario(
        "arguments that are no tensors",
        lambda d: (by_name, (2, d.normal(ROWS, 3), "sin", True, None, 0.5)),
        jacobian=lambda _, power, x, name, negate, nothing, step: diagonal(-2 * step * x.sin() * x.cos()),
        argnums=1,
    ),
    Scenario(
        "nest of tensors and others on the side",
        lambda d: (
            configured,
            (
                d.normal(ROWS, 3),
                {"gain": d.normal(ROWS, 1), "power": 2, "nothing": None, "choice": (True, "sin"), "step": 0.5},
            ),
        ),
        jacobian=lambda _, x, config: diagonal(config["gain"] * 2 * x.sin() * x.cos()),
        traits=traits("masked"),
    ),
    Scenario(
        "settings that torch takes for a leaf",
        lambda d: (lambda x, s: x**s.power if s.name else x, (d.normal(ROWS, 3), Settings(power=3))),
        jacobian=lambda _, x, s: diagonal(3 * x**2),
    ),
    Scenario(
        "empty containers beside",
        lambda d: (lambda e, x, t, li: x.sin() * (1 + len(e) + len(t)), ({}, d.normal(ROWS, 3), (), [])),
        jacobian=lambda _, e, x, t, li: diagonal(x.cos()),
        argnums=1,
    ),
    Scenario(
        "as many arguments as one likes",
        lambda d: (lambda *xs: sum(x.prod(-1) for x in xs), (d.normal(ROWS, 2), d.normal(ROWS, 2), d.normal(ROWS, 2))),
        jacobian=lambda _, *xs: tuple(x.flip(-1) for x in (xs[2], xs[1])),
        argnums=(2, 1),
    ),
    Scenario(
        "nest among the keyword arguments",
        lambda d: (chosen, (d.normal(ROWS, 3),), {"options": {"gain": d.normal(3), "mode": "sin"}, "skip": None}),
        jacobian=lambda _, x, *, options, skip: diagonal(options["gain"] * x.cos()),
    ),
    Scenario(
        "keyword argument with the batch",
        lambda d: (lambda x, *, mask: x.sin() * mask, (d.normal(ROWS, 3),), {"mask": d.uniform(ROWS, 3)}),
        jacobian=lambda _, x, *, mask: diagonal(x.cos() * mask),
        traits=traits("not_sliceable", "wrong_vmap_jacrev", "wrong_vmap_jacfwd"),
    ),
    Scenario(
        "nest of scalar and matrix samples",
        lambda d: (
            lambda x: (x["t"][:, None, None] * x["a"]).flatten(1),
            ({"t": d.normal(ROWS), "a": d.normal(ROWS, 2, 2)},),
        ),
        jacobian=lambda _, x: {
            "t": x["a"].flatten(1),
            "a": eye_like(x["a"]).flatten(1, 2) * x["t"][:, None, None, None],
        },
    ),
]
