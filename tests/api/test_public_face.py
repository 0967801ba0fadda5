"""What editors, `inspect`, `help` and type checkers see of autojac."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import autojac
from autojac import AutoJacobian, InputError, OptionError
from autojac.core.options import Options, OptionValues

TOP = Path(__file__).parents[2]


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert [name for name in dir(autojac) if not name.startswith("__")] == sorted(autojac.__all__)
    assert all(getattr(autojac, name) is not None for name in autojac.__all__)


def test_help_starts_with_an_example() -> None:
    assert autojac.__doc__ is not None
    assert ">>> jac = AutoJacobian(model)" in autojac.__doc__[:500]
    lines = [line.strip()[4:] for line in autojac.__doc__.splitlines() if line.strip().startswith((">>>", "..."))]
    scope: dict[str, typing.Any] = {}
    for line in lines:
        exec(line, scope)
    assert scope["J"].shape == (256, 2, 3)


def test_the_version_is_that_of_the_distribution() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "from setuptools.config.pyprojecttoml import read_configuration as r; "
         "print(r('pyproject.toml')['project']['version'])"], cwd=TOP, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == autojac.__version__


def test_every_option_is_a_typed_keyword() -> None:
    parameters = inspect.signature(AutoJacobian).parameters
    options = {field.name: field for field in dataclasses.fields(Options) if field.name in Options.names()}
    keywords = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in ("select", "batch_dims"):  # these make another function, and are no options of how it is differentiated
        del keywords[name]
    assert list(keywords) == list(options) == ["argnums", "in_dims", *OptionValues.__annotations__]
    for name, parameter in keywords.items():
        assert parameter.default == options[name].default
        if name not in ("store", "in_dims"):
            assert parameter.annotation == options[name].type


def test_type_checkers_look_at_the_options() -> None:
    assert '"tests/typed_options.py"' in (TOP / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("func", "words"),
    [
        (torch.nn.Linear, "an instance of a module was expected, got the class Linear. Create it first: Linear(...)"),
        (None, "a function or module was expected, got None. Pass one that maps tensors (B, ...) to tensors (B, ...)"),
        (
            torch.ones(3),
            "a function or module was expected, got a Tensor. Pass one that maps tensors (B, ...) to tensors (B, ...)",
        ),
    ],
)
def test_what_cannot_be_wrapped(func: typing.Any, words: str) -> None:
    with pytest.raises(InputError) as told:
        AutoJacobian(func)
    assert str(told.value) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_dims": "batch"}, "in_dims must be 'auto', an int, None, or a tuple"),
        ({"in_dims": (0, True)}, "in_dims must be 'auto', an int, None, or a tuple"),
        ({"in_dims": (0, {"a": 1.5})}, "in_dims must be 'auto', an int, None, or a tuple"),
        ({"store": 3}, "store must be a PlanStore, a path, ':memory:' or a database URL, got an int"),
    ],
)
def test_options_are_checked_when_wrapping(options: dict[str, typing.Any], words: str) -> None:
    with pytest.raises(OptionError) as told:
        AutoJacobian(torch.sin, **options)
    assert str(told.value).startswith(words)
