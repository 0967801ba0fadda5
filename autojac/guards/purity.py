"""Recognize library code that reads what no list of places shows: clocks, files, random numbers, tensor values."""

from __future__ import annotations

import datetime
import re
import types
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from autojac.guards.escapes import AS_OPERATORS, ESCAPES
from autojac.guards.places import is_made_in_c
from autojac.guards.provenance import CORE_PACKAGES, is_core
from autojac.torch_internals import TENSOR_HOME, TensorBase


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Packages whose functions depend on their arguments alone, but for what is named below.
TRUSTED: Final = CORE_PACKAGES | _words(
    """functools collections _collections_abc contextlib abc typing typing_extensions dataclasses operator enum copy
    copyreg types numbers fractions statistics itertools heapq bisect math cmath re string textwrap keyword weakref
    _weakrefset inspect json warnings logging builtins"""
)
_C_MODULES: Final = TRUSTED | _words(
    """_operator _functools _collections _abc _heapq _bisect _statistics _struct _typing _warnings _sre _weakref
    _contextvars"""
)
# Packages that torch itself calls.
_OF_TORCH: Final = _words("sympy mpmath networkx triton jinja2 markupsafe filelock fsspec typing_extensions setuptools")
# Of the latter, `RunMonitor` judges the caller.
_ALLOWED: Final = (("_pickle", "dumps"), ("sys", "_getframe"))
_HARMLESS: Final = _words(
    """abs all any ascii bin callable chr delattr dir divmod format getattr hasattr hex isinstance issubclass iter len
    max min next oct ord pow repr round setattr sorted sum __build_class__"""
)
# Parts of torch and numpy that read or set the state of the process.
_STATE: Final = _words(
    """torch.backends torch.cuda.memory torch.cuda.random torch.hub torch.serialization torch.distributed
    torch.multiprocessing torch.utils.data torch.utils.benchmark torch.random numpy.random torch._dynamo
    torch._inductor torch.mps torch.xpu torch.profiler torch.utils.cpp_extension numpy.lib.npyio numpy.lib._npyio_impl
    torch.utils.dlpack numpy.testing torch.utils._config_module numpy._core.arrayprint numpy.core.arrayprint"""
)
_STATE_FUNCTIONS: Final = _words(
    """get_rng_state set_rng_state initial_seed seed manual_seed get_num_threads get_num_interop_threads
    set_num_threads set_default_dtype set_default_device get_default_device set_default_tensor_type
    are_deterministic_algorithms_enabled use_deterministic_algorithms get_float32_matmul_precision
    set_float32_matmul_precision memory_allocated memory_reserved max_memory_allocated mem_get_info current_device
    current_stream synchronize elapsed_time utilization from_file fromfile load loadtxt genfromtxt memmap
    get_printoptions set_printoptions frombuffer geterr seterr geterrcall seterrcall getbufsize setbufsize errstate"""
)
# Functions of torch that return flags of the process; the flags in `_KEYED` are part of a plan's key.
_FLAG: Final = re.compile(r"_?get_.*|_?(is|are)_.*_enabled(_only)?|_?is_warn_.*|.*_sdp_enabled")
_KEYED: Final = _words("is_grad_enabled is_inference_mode_enabled is_autocast_enabled get_default_dtype")
_OF_FLAGS: Final = _words("torch torch._C torch.amp.autocast_mode torch.autograd.anomaly_mode")
# How the environment is read, which guards list.
_ENVIRONMENT: Final = _words("getenv __getitem__ __iter__ __len__ encode decode encodekey check_str")
# Functions that tell a compiler something, or ask about one.
_OF_COMPILERS: Final = _words("is_current_stream_capturing mark_static_address mark_dynamic maybe_mark_dynamic")
_RANDOM: Final = ("torch.random", "torch.cuda.random", "torch.mps", "torch.xpu.random")
_VALUES: Final = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, range, slice, type(None))
_OBJECTS: Final = frozenset({"collections", "re", "fractions", "types", "functools", "numpy"})
_UNSAFE_OBJECTS: Final = ("Generator", "Event", "Stream", "StorageBase", "UntypedStorage", "RandomState")


def package(name: str) -> str:
    """Return the outermost package of a module."""
    return name.partition(".")[0]


def frame_reason(home: str, name: str) -> str:
    """Return why a Python function of a library may give something else next time; empty if it can't.

    Args:
        home: the module whose globals the function uses.
        name: the function's.
    """
    if home == "importlib._bootstrap":
        return ""  # an import of what is imported already: guards list its name
    if package(home) not in TRUSTED and not (home == "os" and name in _ENVIRONMENT):
        return f"it calls {name} of {home}"
    if home == TENSOR_HOME and name in ESCAPES:
        return f"it reads values of a tensor ({name})"
    if (home == "torch.backends" and name == "__get__") or tells_compilers(name):
        return ""  # a flag, which guards list, or nothing that a result depends on
    if _of_state(home, name) and package(home) in ("torch", "numpy"):
        return f"it calls {name} of {home}, which reads the state of the process"
    return ""


def _of_state(home: str, name: str) -> bool:
    flag = home in _OF_FLAGS and name not in _KEYED and _FLAG.fullmatch(name)
    return bool(flag) or is_inside(home, _STATE) or name in _STATE_FUNCTIONS


def tells_compilers(name: str) -> bool:
    """Check whether a function of torch's informs a compiler, or asks whether there is one."""
    return name in _OF_COMPILERS


def serves_torch(home: str) -> bool:
    """Check whether torch itself calls a package."""
    return package(home) in _OF_TORCH


def seeds(home: str, name: str) -> bool:
    """Check whether a function sets or returns a seed of random numbers."""
    return is_inside(home, _RANDOM) and name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed")


def sets_random_state(home: str, name: str) -> bool:
    """Check whether a function makes random numbers repeat, as torch's checkpoints do around what runs again."""
    return is_inside(home, _RANDOM) and name.startswith("set_")


def is_inside(home: str, packages: Iterable[str]) -> bool:
    """Check whether a module is one of some modules or packages, or inside one."""
    return any(home == name or home.startswith(f"{name}.") for name in packages)


def unseen(home: str, value: Any) -> bool:
    """Check whether a part of a library's module may be used unseen by a profile function, or change by itself."""
    if is_inside(home, ("numpy.random",)):
        # one without a fixed seed differs between equal calls, which the probe notices
        return getattr(value, "__name__", "") != "SeedSequence"
    if isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
        return False
    if isinstance(value, (dict, list, set, deque)):
        return package(home) not in ("torch", "functorch", "numpy", "autojac")
    visible = (types.FunctionType, types.BuiltinFunctionType, type, *_VALUES)
    return package(home) not in TRUSTED and not isinstance(value, visible)


def c_reason(function: Any) -> str:
    """Return why a function written in C may give something else next time; empty if it can't."""
    name = function.__name__
    owner = getattr(function, "__self__", None)
    home = getattr(function, "__module__", None)
    if isinstance(owner, types.ModuleType) or (isinstance(home, str) and not isinstance(owner, _VALUES[:-1])):
        return _module_function(str(home or getattr(owner, "__name__", "")), name)
    if owner is None:  # an unbound method, such as list.append
        owner_type = getattr(function, "__objclass__", None)
        return "" if owner_type is None else _method(owner_type, name)
    if isinstance(owner, type):
        module = owner.__module__
        safe = package(module) in _C_MODULES or not (is_core(module) or is_made_in_c(owner))
        return "" if safe and name != "__subclasses__" else f"it calls {name} of {module}.{owner.__name__}"
    return _method(type(owner), name)


def _module_function(home: str, name: str) -> str:
    if home in ("builtins", "_io"):
        return "" if name in _HARMLESS else f"it calls {name}"
    if package(home) not in _C_MODULES and (home, name) not in _ALLOWED:
        return f"it calls {name} of {home}"
    if _of_state(home, name):
        return f"it calls {name} of {home}, which reads the state of the process"
    return ""


def _method(kind: type, name: str) -> str:
    if issubclass(kind, TensorBase):
        return f"it reads values of a tensor ({name})" if name in ESCAPES - AS_OPERATORS else ""
    bases = kind.__mro__
    if any(base.__name__ in _UNSAFE_OBJECTS for base in bases):
        return f"it calls {name} of a {kind.__module__}.{kind.__qualname__}"
    if issubclass(kind, (*_VALUES, types.GeneratorType, datetime.timedelta)):
        return ""
    if kind.__module__ in ("builtins", "itertools"):  # iterators made in this call; guards refuse others
        return ""
    if kind.__module__ == "_io":
        return "" if kind.__name__ in ("StringIO", "BytesIO") else f"it calls {name} of a file"
    if not is_core(kind.__module__) and not is_made_in_c(kind):
        return "" if name not in ("__reduce_ex__", "__reduce__", "__sizeof__", "__hash__") else f"it calls {name}"
    if package(kind.__module__) in _OBJECTS | _C_MODULES or kind.__qualname__ in ("lock", "RLock"):
        tensor_like = name in ("tofile", "dump", "dumps", "locked", "_is_owned")
        return f"it calls {name}" if tensor_like else ""
    return f"it calls {name} of a {kind.__module__}.{kind.__qualname__}"
