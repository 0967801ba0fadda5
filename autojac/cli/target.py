"""TARGET: the function or module that a command works on."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from autojac.cli.shell import blame_on
from autojac.errors import TargetError, kind_of, nearest

FORMS = "`package.module:attribute` or `path/file.py:attribute`"
NAMED = "Name the function, module or factory of one after the colon"


def load(text: str) -> Callable[..., Any]:
    """Return the function or module that `package.module:attribute` or `path/file.py:attribute` names.

    What can be called without arguments, and is no module instance, is a factory: it is called once.

    Raises:
        TargetError: there is no such thing.
        TargetRaised: the user's code raised while it was imported or called.
    """
    place, colon, attribute = text.rpartition(":")
    if not colon or not place or not attribute:
        raise TargetError(f"{FORMS} was expected as TARGET, got {text!r}. {NAMED}")
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    found = _attribute(_import_file(text, place) if is_file else _import_module(text, place), attribute, text)
    if _is_factory(found):
        with blame_on(text):
            found = found()
        made = f", which {attribute}() returned"
    else:
        made = ""
    if not callable(found):
        raise TargetError(
            f"{text} is {kind_of(found)}{made}; a function or module was expected. Name one, or a factory that "
            "returns one"
        )
    if inspect.isclass(found):
        raise TargetError(
            f"a function or module was expected, but {text} is a class whose constructor needs arguments. Name an "
            "instance, or a factory that returns one"
        )
    assert callable(found)
    return found  # type: ignore[no-any-return]


def _import_module(text: str, name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with blame_on(text):
            return importlib.import_module(name)
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise TargetError(
                f"there is no module {cause.name!r} in this folder or among the installed packages. Check the "
                "spelling, change to the folder that has it, or name a file: path/file.py:attribute"
            ) from error
        if isinstance(cause, (TypeError, ValueError)) and not name.replace(".", "").isidentifier():
            raise TargetError(f"{FORMS} was expected as TARGET, got {text!r}. {NAMED}") from error
        raise


def _import_file(text: str, place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise TargetError(f"there is no file {place}. Name it relative to this folder, or by its whole path")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python path/file.py` does
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    # a name that is taken, such as `types`, must not hide the module that has it
    name = path.stem if known is None else f"autojac_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"a Python file was expected, got {place}. Name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with blame_on(text):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, dotted: str, text: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        known = [known for known in dir(found) if not known.startswith("_")]
        if not hasattr(found, name):
            owner = found.__name__ if isinstance(found, ModuleType) else type(found).__name__
            raise TargetError(f"{text}: {owner} has no attribute {name!r}{nearest(name, known)}")
        found = getattr(found, name)
    return found


def _is_factory(found: Any) -> bool:
    if isinstance(found, torch.nn.Module) or not callable(found):
        return False
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # builtins don't say what they take
        return False
    return all(one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in parameters)
