"""Distinguish the user's code, installed packages, and Python's and torch's own code.

A function's fingerprint takes the user's code line by line and a library's by name and version. A guard follows the
Python of installed packages like the user's, as far as it runs.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import types
from itertools import chain
from typing import Any, Final

import torch

from autojac.torch_internals import CUSTOM_OPERATOR, CUSTOM_OPERATOR_FUNCTIONS

_LIBRARY_FOLDERS: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

CORE_PACKAGES: Final = frozenset({"torch", "torchgen", "functorch", "numpy", "einops", "opt_einsum", "autojac"})
"""Packages that no guard follows, nor Python's own: what they compute depends on their arguments alone."""

# `_backward_cls` of an autograd.Function carries a number counted up per process.
UNSTABLE: Final = frozenset({"_backward_cls", "_abc_impl"})
# torch.jit numbers equally named types as the process meets them.
_MANGLED: Final = re.compile(r"___torch_mangle_\d+\.")
# Library objects that keep the user's code next to caches of their own: only the code counts.
_FOLLOWED: Final = {
    CUSTOM_OPERATOR: CUSTOM_OPERATOR_FUNCTIONS,
    "triton.runtime.jit.JITFunction": ("fn",),
    "triton.runtime.autotuner.Autotuner": ("fn",),
}


def is_library(module_name: str | None) -> bool:
    """Check whether a module belongs to Python, to an installed package or to autojac, rather than to the user."""
    if not module_name or module_name == "__main__":
        return False
    top = module_name.partition(".")[0]
    if top in ("torch", "numpy", "builtins") or (top == "autojac" and not module_name.startswith("autojac.bench")):
        return True
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None:
        return top in sys.stdlib_module_names
    return file.startswith(_LIBRARY_FOLDERS) or "site-packages" in file or "dist-packages" in file


def is_core(module_name: str | None) -> bool:
    """Check whether a module belongs to Python, torch, NumPy or autojac, rather than to the user or another package."""
    if not is_library(module_name):
        return False
    top = str(module_name).partition(".")[0]
    return top in CORE_PACKAGES or top in sys.stdlib_module_names


def is_installed(module_name: str | None) -> bool:
    """Check whether a module belongs to an installed package whose Python is followed where it runs."""
    return is_library(module_name) and not is_core(module_name)


def is_package(module_name: str | None) -> bool:
    """Check whether a module is followed where it runs, or could be: installed, or part of a package of the user's."""
    if not module_name or is_library(module_name):
        return is_installed(module_name)
    return "." in module_name or hasattr(sys.modules.get(module_name), "__path__")


def home_of(kind: type) -> str:
    """Return the module of a library's class; empty for a user's, whose `__module__` varies with who runs the file."""
    return kind.__module__ if is_library(kind.__module__) else ""


def library_version(module_name: str | None) -> str:
    """Return `__version__` of the package that a module belongs to; empty where it states none."""
    package = sys.modules.get((module_name or "").partition(".")[0])
    version = getattr(package, "__version__", "")
    return str(version) if isinstance(version, str) else ""


def followed_fields(kind: type) -> tuple[str, ...]:
    """Return the attributes that hold the user's code in a library's wrapper, which holds caches as well."""
    return _FOLLOWED.get(f"{kind.__module__}.{kind.__qualname__}", ())


def source_of(module: torch.nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Return code and constants of a ScriptModule or GraphModule, whose class has no code; None for other modules."""
    if any(base.__module__ == "torch.fx.graph_module" for base in type(module).__mro__):
        return str(module.code), {}
    if not isinstance(module, torch.jit.ScriptModule):
        return None
    graph = getattr(module, "inlined_graph", None)  # absent where there is no forward
    source = "" if graph is None else _MANGLED.sub("", graph.str(False))
    concrete_type = getattr(module, "_concrete_type", None)
    names = sorted(set(concrete_type.get_attributes()) - {"training"}) if concrete_type is not None else []
    return source, {name: getattr(module, name) for name in names}


def code_names(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes that a code object and the functions nested in it use."""
    nested = (code_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(chain(code.co_names, *nested))


def slots(kind: type) -> tuple[str, ...]:
    """Return the names of the slots of a class."""
    names = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    flat = chain.from_iterable((entry,) if isinstance(entry, str) else tuple(entry) for entry in names)
    return tuple(name for name in flat if name not in ("__dict__", "__weakref__"))


def own_names(kind: type) -> list[str]:
    """Return the names of the attributes of a class that code may set."""
    return [name for name in vars(kind) if not (name.startswith("__") or name in UNSTABLE)]
