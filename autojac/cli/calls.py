"""A target and the calls to look at, as the options of a command name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import click
import torch
from torch import Tensor

from autojac.api.method_plans import PlannedMethod
from autojac.api.products import LAST
from autojac.cli import arguments
from autojac.cli.shell import blame_on
from autojac.cli.target import load
from autojac.core import pytree
from autojac.core.nests import chosen_arguments, is_differentiable
from autojac.core.plan import EFFORTS
from autojac.core.signature import Layout
from autojac.errors import StoreError
from autojac.methods.threads import threads

if TYPE_CHECKING:
    from autojac.store import PlanStore

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _decorate(*decorators: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


store_option = click.option("--store", "location", help="Path or URL of the plan store; by default AUTOJAC_STORE.")

call_options = _decorate(
    click.argument("target"),
    click.option(
        "--shape",
        "shapes",
        type=arguments.shapes,
        metavar="SHAPES",
        multiple=True,
        required=True,
        help="Shapes of one call's arguments, batch first, joined by commas: 1024x3 or 1024x3,1024x1. "
        "Several --shape are several calls.",
    ),
    click.option(
        "--dtype",
        "dtypes",
        type=arguments.dtypes,
        metavar="DTYPES",
        default=None,
        help="dtype of the arguments, or one each: float32,bool. Modules follow the first floating one. By default "
        "that of the target's parameters.",
    ),
    click.option("--device", default="cpu", show_default=True, help="Where to run; modules are moved there."),
    click.option(
        "--argnums",
        type=arguments.argnums,
        metavar="NUMBERS",
        default=0,
        show_default=True,
        help="Arguments to differentiate: 0 or 0,2.",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads; by default as many as torch takes."),
)

search_options = _decorate(
    click.option(
        "--effort", type=click.Choice(EFFORTS), default="quick", show_default=True, help="How hard to search."
    ),
    click.option(
        "--budget", "budget_s", type=arguments.seconds, metavar="TIME", help="Time for each search: 30s, 500ms, 2min."
    ),
    click.option("--memory-limit", help="What a method may take: 8GiB. Give AutoJacobian the same."),
    click.option(
        "--layout",
        type=click.Choice(get_args(Layout)),
        default="blocks",
        show_default=True,
        help="Layout of the Jacobian: (B, *out, *in), (B, *out, B, *in), sparse CSR or (B, n).",
    ),
    click.option(
        "--grad/--no-grad",
        default=None,
        help="Whether J itself is differentiated, as in training. By default it is if the target has parameters that "
        "require grad.",
    ),
    store_option,
)
method_option = click.option(
    "--of",
    type=click.Choice(get_args(PlannedMethod)),
    default="jacobian",
    show_default=True,
    help="What is planned: the Jacobian, or what AutoJacobian's method of this name computes by.",
)
batch_option = click.option(
    "--batch-dims", type=click.IntRange(1), default=1, show_default=True, help="How many leading axes are the batch."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True)
class Calls:
    """A target and the calls to look at."""

    target: str
    func: Callable[..., Any]
    all: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def of(cls, target: str, shapes: Any, dtypes: Any, device: str) -> Calls:
        where = arguments.device_named(device)
        func = load(target)
        usual = arguments.place_modules(func, where, dtypes or ())
        return cls(target, func, tuple(arguments.make_arguments(shape, dtypes or (usual,), where) for shape in shapes))

    def describe(self, args: Sequence[Tensor]) -> str:
        """Return the shapes, dtypes and device of a call, human-readable."""
        shapes = ", ".join(f"{tuple(arg.shape)} {str(arg.dtype).removeprefix('torch.')}" for arg in args)
        return f"{shapes} on {args[0].device}"

    def blame(self, args: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Attribute what is raised inside to the target, at this call."""
        return blame_on(self.target, self.describe(args))

    def of_method(self, of: str, args: tuple[Tensor, ...], argnums: int | tuple[int, ...]) -> tuple[Any, ...]:
        """Return the arguments of a method: those of the call, and vectors where it takes some."""
        if of not in LAST:
            return args
        if LAST[of] == "v":
            chosen = tuple(args[number] for number in chosen_arguments(args, argnums))
            like: Any = chosen[0] if isinstance(argnums, int) else chosen
        else:
            with torch.no_grad():
                like = self.func(*args)
        return (*args, pytree.tree_map(lambda y: torch.randn_like(y) if is_differentiable(y) else y, like))

    def to_json(self, args: Sequence[Tensor]) -> dict[str, Any]:
        return {
            "target": self.target,
            "shapes": [list(arg.shape) for arg in args],
            "dtypes": [str(arg.dtype).removeprefix("torch.") for arg in args],
            "device": str(args[0].device),
        }


def using_threads(count: int | None) -> AbstractContextManager[None]:
    """Return what sets torch's threads, and puts them back for whoever calls the command from a program."""
    return nullcontext() if count is None else threads(count)


def grad_mode(grad: bool | None, args: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Return the grad mode that makes J differentiable or not; by default the target's parameters decide."""
    if grad is None:
        return nullcontext()
    for arg in args:
        if grad and arg.is_floating_point():
            arg.requires_grad_()
    return torch.enable_grad() if grad else torch.no_grad()


def require_store(location: str | None) -> PlanStore:
    """Return the store at a location, found to be writable.

    Raises:
        StoreError: plans can't be kept there.
    """
    from autojac.store import PlanStore

    store = PlanStore(location)
    try:
        store.remove(0)  # rows count from 1: nothing is removed, but all that writing needs is tried
    except StoreError as error:
        if "has no plan 0" not in str(error):
            raise
    return store
