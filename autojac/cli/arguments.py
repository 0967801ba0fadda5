"""The arguments of a call, from what the command line says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch
from torch import Tensor

from autojac.errors import TargetError, nearest, plural
from autojac.guards.captures import captures

Shapes = tuple[tuple[int, ...], ...]
UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def shapes(text: str) -> Shapes:
    """Read `1024x3,1024x1`: one shape per positional argument."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(,[1-9]\d*(x[1-9]\d*)*)*", text):
        raise click.BadParameter(
            f"{text!r} is no shape; sizes joined by x were expected, batch first, such as 1024x3, and a comma between "
            "the arguments of one call, such as 1024x3,1024x1"
        )
    return tuple(tuple(int(size) for size in shape.split("x")) for shape in text.split(","))


def seconds(text: str) -> float:
    """Read `30s`, `500ms`, `2min` or a number of seconds."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", text.strip())
    if match is None or match[2] not in UNITS:
        raise click.BadParameter(f"{text!r} is no time; a number with a unit was expected, such as 30s, 500ms or 2min")
    return float(match[1]) * UNITS[match[2]]


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    """Read `float32`, or `float32,bool`: one dtype for all arguments or one each."""
    known = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
    names = [name.removeprefix("torch.") for name in text.split(",")]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is no dtype of torch's{nearest(name, known)}")
    return tuple(known[name] for name in names)


def argnums(text: str | int) -> int | tuple[int, ...]:
    """Read `0`, or `0,2`."""
    if not re.fullmatch(r"-?\d+(,-?\d+)*", str(text)):
        raise click.BadParameter(f"{text!r}: the positions of arguments were expected, such as 0 or 0,2")
    numbers = tuple(int(number) for number in str(text).split(","))
    return numbers if len(numbers) > 1 else numbers[0]


def device_named(text: str) -> torch.device:
    """Return the device, if it is there.

    Raises:
        TargetError: it is not.
    """
    try:
        device = torch.device(text)
        if device.type != "meta":
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TargetError(
            f"device {text!r} can't be used: {str(error).splitlines()[0]}. Name one that this machine has, such as cpu"
        ) from error
    raise TargetError(f"device {text!r} can't be used: a device that computes was expected, such as cpu or cuda:0")


def place_modules(func: Callable[..., Any], device: torch.device, kinds: Sequence[torch.dtype]) -> torch.dtype:
    """Move the modules that func reaches to the device and to the first floating dtype named.

    Returns:
        The dtype for inputs that no dtype was named for: that of func's parameters, else torch's default.
    """
    floating = next((dtype for dtype in kinds if dtype.is_floating_point), None)
    modules = captures(func).modules
    for module in modules:
        module.to(device=device, dtype=floating)
    own = (tensor.dtype for module in modules for tensor in module.parameters() if tensor.is_floating_point())
    return floating or next(own, torch.get_default_dtype())


def make_arguments(sizes: Shapes, kinds: Sequence[torch.dtype], device: torch.device) -> tuple[Tensor, ...]:
    """Return tensors to call func with: floats from a normal distribution, integers zero, booleans true.

    Raises:
        TargetError: they can't be made.
    """
    if len(kinds) == 1:
        kinds = tuple(kinds) * len(sizes)
    if len(kinds) != len(sizes):
        raise TargetError(
            f"--dtype names {plural(len(kinds), 'dtype')} for {plural(len(sizes), 'argument')}. "
            "Name one for all of them, or one for each"
        )
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, dtype in zip(sizes, kinds, strict=True):
        try:
            if dtype.is_floating_point or dtype.is_complex:
                drawn = torch.complex64 if dtype.is_complex else torch.float32
                made.append(torch.randn(shape, generator=generator, dtype=drawn).to(device, dtype))
            else:
                made.append(torch.full(shape, dtype is torch.bool, dtype=dtype, device=device))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            size = "x".join(map(str, shape))
            reason = str(error).splitlines()[0]
            raise TargetError(
                f"no tensor of shape {size} and {dtype} can be made on {device}: {reason}. Try a smaller --shape or "
                "another --dtype"
            ) from error
    return tuple(made)
