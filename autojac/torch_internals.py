"""Every private name of torch that autojac uses, and nothing else: the only file that reaches for them.

Each says what it is for, which public name would do instead, and what happens on a torch without it. Required ones are
looked up when autojac is imported, so that a torch without one is refused by name; without one of the others, autojac
takes a slower path, which the suite tests as well. `ATTRIBUTES` lists the private attributes of torch's objects, which
other files read where they need them, since a wrapper would cost each read a call. `tests/test_torch_internals.py`
names everything that the installed torch lacks, and keeps what is not listed out of all other files. Operators of aten
that are private are not listed here, but with the rules for operators.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import CodeType
from typing import Any, Final, NamedTuple

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ATTRIBUTES", "PRIVATE", "OpOverload", "PrivateName", "TorchDispatchMode", "pytree"]

TESTED = "2.11 to 2.14"


class PrivateName(NamedTuple):
    """Why a private name is used.

    Attributes:
        use: what autojac does by it.
        public: what a public name could do instead.
        without: what happens on a torch that lacks it; empty where autojac can't be imported then.
    """

    use: str
    public: str = "none"
    without: str = ""


PRIVATE: dict[str, PrivateName] = {
    "torch.utils._pytree": PrivateName("flatten nests as torch.func does", "optree, whose registry is another"),
    "torch._ops.OpOverload": PrivateName("recognize an aten operator"),
    "torch.utils._python_dispatch.TorchDispatchMode": PrivateName("see every aten operator that runs"),
}
"""Every private name by its path; filled below, where each is looked up."""

_FOLLOWED: Final = PrivateName("follow the user's code in a custom operator")
ATTRIBUTES: Final[dict[str, PrivateName]] = {
    "torch.Tensor._version": PrivateName("see writes into a tensor"),
    "torch.Tensor._cdata": PrivateName("identify a tensor whatever Python object stands for it", "id"),
    "torch.Tensor._is_zerotensor": PrivateName("recognize the zeros of forward mode, which have no memory"),
    "torch.Tensor._backward_hooks": PrivateName("see a tensor's hooks, and set them aside for a run of autojac's own"),
    "torch.Tensor._post_accumulate_grad_hooks": PrivateName("set hooks aside for a backward of autojac's own"),
    "torch.UntypedStorage._cdata": PrivateName("identify a tensor's memory", "data_ptr, 0 for all without elements"),
    "torch._ops.OpOverload._schema": PrivateName("read an operator's name, arguments and aliases"),
    "torch._ops.OpOverload._overloadname": PrivateName("tell overloads of an operator apart", "the text of its str"),
    "torch._ops.OpOverload._op": PrivateName("call an operator with less Python in between", "the operator itself"),
    "torch.nn.Module._parameters": PrivateName("watch and exchange parameters", "named_parameters, which copies"),
    "torch.nn.Module._buffers": PrivateName("watch buffers", "named_buffers, which copies"),
    "torch.nn.Module._modules": PrivateName("watch children", "named_children, which drops repetitions"),
    "torch.nn.Module._forward_hooks": PrivateName("watch hooks"),
    "torch.nn.Module._forward_pre_hooks": PrivateName("watch hooks"),
    "torch.nn.Module._backward_hooks": PrivateName("watch hooks"),
    "torch.nn.Module._backward_pre_hooks": PrivateName("watch hooks"),
    "torch.nn.Module._compiled_call_impl": PrivateName("see that a module was compiled in place"),
    "torch.autograd.profiler._is_profiler_enabled": PrivateName("start no profiler while another thread has one"),
    "torch.jit.ScriptModule._concrete_type": PrivateName("read the constants of a scripted module"),
    "torch._dynamo.eval_frame.OptimizedModule._orig_mod": PrivateName("differentiate what torch.compile was given"),
    "torch.compile()._torchdynamo_orig_callable": PrivateName("differentiate what torch.compile was given"),
    "torch.compiler.disable()._torchdynamo_disable": PrivateName("keep torch.compile out of autojac"),
    "torch.compiler.disable()._torchdynamo_disable_msg": PrivateName("say why in the compiler's logs"),
    "NativeBatchNormBackward0._saved_training": PrivateName(
        "tell whether a batch norm uses the statistics of its batch", without="every batch norm is taken to"
    ),
    "NativeBatchNormBackward0._input_metadata": PrivateName("recognize graphs of one shape, by that of their tensors"),
    "NativeBatchNormBackward0._raw_saved_input": PrivateName("recognize graphs of one shape, and what hooks pack"),
    "torch._library.custom_ops.CustomOpDef._init_fn": _FOLLOWED,
    "torch._library.custom_ops.CustomOpDef._backward_fn": _FOLLOWED,
    "torch._library.custom_ops.CustomOpDef._setup_context_fn": _FOLLOWED,
}
"""Private attributes of torch's objects that other files read."""

COMPILED_HOME: Final = "torch._dynamo.eval_frame"
COMPILER: Final = "torch._dynamo"
"""Module that defines what torch.compile makes of a module."""
TENSOR_HOME: Final = "torch._tensor"
"""Module that defines the methods of tensors that are written in Python."""
PYTREE_HOME, TRANSFORMS_HOME, FAKES_HOME = "torch.utils._pytree", "torch._functorch", "torch._subclasses"
"""Where nests are, vmap and its like, and tensors without values."""
OPERATORS_HOME: Final = OpOverload.__module__
"""Module that defines operators, overloads and namespaces."""
CUSTOM_OPERATOR: Final = "torch._library.custom_ops.CustomOpDef"
"""Class of what `torch.library.custom_op` makes."""
CUSTOM_OPERATOR_FUNCTIONS: Final = ("_init_fn", "_backward_fn", "_setup_context_fn")
"""Its attributes that hold the user's functions."""


def _require(path: str, use: str, public: str = "none") -> Any:
    PRIVATE[path] = PrivateName(use, public)
    found = resolve(path)
    if found is None:
        raise ImportError(f"torch {torch.__version__} has no {path}, which autojac needs to {use}; it runs on {TESTED}")
    return found


def _optional(path: str, use: str, without: str, public: str = "none") -> Any:
    PRIVATE[path] = PrivateName(use, public, without)
    return resolve(path)


def resolve(path: str) -> Any:
    """Return what a dotted path leads to, or None. Modules of torch are imported only if they are loaded already."""
    parts = path.split(".")
    found: Any = torch
    for depth, part in enumerate(parts[1:], start=2):
        attribute = getattr(found, part, None)
        found = sys.modules.get(".".join(parts[:depth])) if attribute is None else attribute
        if found is None:
            return None
    return found


# modes and transforms that are open
innermost_transform: Callable[[], Any] = _require(
    "torch._C._functorch.peek_interpreter_stack", "tell in 50 ns whether a torch.func transform is open"
)
open_transforms: Callable[[], Sequence[Any] | None] = _require(
    "torch._C._functorch.get_interpreter_stack", "see how many transforms are open"
)
close_transforms_to_depth: Callable[[int], None] = _require(
    "torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth", "close transforms that a failure left open"
)
is_wrapped_by_transform: Callable[[Any], bool] = _require(
    "torch._C._functorch.is_functorch_wrapped_tensor", "tell a transform's tensors from plain ones"
)
set_vmap_fallback_warning: Callable[[bool], None] = _require(
    "torch._C._functorch._set_vmap_fallback_warning_enabled", "keep vmap from warning about operators without a rule"
)
is_profiling: Callable[[], bool] = _require("torch.autograd._profiler_enabled", "try nothing while a caller profiles")
function_modes: Callable[[], int] = _require(
    "torch._C._len_torch_function_stack", "see whether a caller's torch function mode is open"
)
dispatch_modes: Callable[[], int] = _require(
    "torch._C._len_torch_dispatch_stack", "see whether a caller's dispatch mode is open"
)
saved_tensors_hooks: Callable[[bool], Any] = _require(
    "torch._C._autograd._top_saved_tensors_default_hooks", "see whether hooks such as checkpointing's are set"
)
is_any_autocast_enabled: Callable[[], bool] = _require(
    "torch._C._is_any_autocast_enabled",
    "tell in one call whether autocast is on",
    "torch.is_autocast_enabled per device",
)
deterministic_algorithms: Callable[[], bool] = _require(
    "torch._C._get_deterministic_algorithms",
    "read the flag without Python in between",
    "torch.are_deterministic_algorithms_enabled",
)
matmul_precision: Callable[[], str] = _require(
    "torch._C._get_float32_matmul_precision",
    "read the setting without Python in between",
    "torch.get_float32_matmul_precision",
)

# dual numbers
is_forward_grad_enabled: Callable[[], bool] = _require("torch._C._is_fwd_grad_enabled", "restore forward mode")
set_forward_grad_enabled: Callable[[bool], None] = _require("torch._C._set_fwd_grad_enabled", "restore forward mode")
set_grad_enabled: Callable[[bool], None] = _require(
    "torch._C._set_grad_enabled", "restore grad mode", "torch.set_grad_enabled, which a function mode sees"
)
enter_dual_level: Callable[[], int] = _require("torch._C._enter_dual_level", "find out whether a dual level is open")
exit_dual_level: Callable[..., None] = _require("torch._C._exit_dual_level", "close a dual level left open")
make_dual: Callable[..., torch.Tensor] = _require(
    "torch._VF._make_dual",
    "make dual numbers without loading decompositions (0.2 s)",
    "torch.autograd.forward_ad.make_dual",
)
forward_grad_enabled: Callable[[bool], Any] = _require(
    "torch.autograd.forward_ad._set_fwd_grad_enabled", "switch forward mode on in the forward of a custom Function"
)
_require("torch.autograd.forward_ad._current_level", "see whether a dual level is open")
_dual_numbers = torch.autograd.forward_ad


def dual_level() -> int:
    """Return the number of the open dual level, for all threads; below zero if there is none."""
    level: int = _dual_numbers._current_level
    return level


def may_transform() -> bool:
    """Check whether a transform is open, or a dual level, in whatever thread."""
    return innermost_transform() is not None or _dual_numbers._current_level >= 0


def set_dual_level(level: int) -> None:
    """Set what torch takes for the open dual level."""
    _dual_numbers._current_level = level


# autograd
batched_vmap: Callable[..., Callable[..., Any]] = _require(
    "torch._vmap_internals._vmap", "run VJPs batched, as torch.autograd.grad(is_grads_batched=True) does"
)
preserve_version: Callable[[Any], Any] = _require(
    "torch.autograd.grad_mode._unsafe_preserve_version_counter",
    "write into a tensor that a graph has saved",
    "torch.autograd._unsafe_preserve_version_counter",
)
run_backward: Callable[..., tuple[torch.Tensor | None, ...]] = _require(
    "torch.autograd.graph._engine_run_backward", "pull without the checks of torch.autograd (10 µs per VJP)"
)
FunctionBase: type = _require("torch._C._FunctionBase", "recognize the node of a custom autograd Function")
TensorBase: type = _require("torch._C.TensorBase", "recognize tensor classes", "torch.Tensor")

# dispatch
DispatchKey: Any = _require("torch._C.DispatchKey", "name dispatch keys")
included_keys: Callable[[], Any] = _require("torch._C._dispatch_tls_local_include_set", "read a thread's dispatch keys")
excluded_keys: Callable[[], Any] = _require("torch._C._dispatch_tls_local_exclude_set", "read a thread's dispatch keys")
ForceDispatchKeys: Callable[..., Any] = _require(
    "torch._C._ForceDispatchKeyGuard", "run with dispatch keys, and restore those of the thread"
)
BelowAutograd: Callable[[], Any] = _require(
    "torch._C._AutoDispatchBelowAutograd", "run a flat program without autograd", "torch.no_grad, 1 µs per operator"
)
DisableAutocast: Callable[[], Any] = _require("torch._C._DisableAutocast", "compile outside autocast")
DisableTorchFunction: Callable[[], Any] = _require(
    "torch._C.DisableTorchFunction", "read a tensor's metadata unseen by a caller's mode"
)
DisableTorchFunctionSubclass: Callable[[], Any] = _require(
    "torch._C.DisableTorchFunctionSubclass", "take a tensor subclass for a plain tensor"
)

# comparisons in C, of what is compared in every call
global_state_guard: Callable[[], Any] | None = _optional(
    "torch._C._dynamo.guards.GlobalStateGuard",
    "compare grad mode, autocast, dtype, threads and precision in 0.1 µs",
    "every call takes the way through its key",
)
tensor_guards: Callable[..., Any] | None = _optional(
    "torch._C._dynamo.guards.TensorGuards",
    "compare the metadata of tensors in C",
    "metadata is compared in Python (0.5 µs per tensor), and every call takes the way through its key",
)
dict_version: Callable[[dict[Any, Any]], int] | None = _optional(
    "torch._C._dynamo.guards.dict_version",
    "count the changes of a dict in C",
    "attributes are compared one by one (54 instead of 5 µs for ten layers)",
)

# torch.compile around autojac
_COMPILED_INTO: Final = "what is compiled around autojac is compiled into it, which is slow and right"
_set_code_strategy, _FrameStrategy, _FrameAction = (
    _optional(
        f"torch._C._dynamo.eval_frame.{name}",
        "keep torch.compile out of autojac without importing it (1 s)",
        _COMPILED_INTO,
        "torch.compiler.disable, which imports it and costs each call 2 µs",
    )
    for name in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
)


def skip_when_compiling(code: CodeType) -> None:
    """Let compiled code that calls this code leave it and all that it calls as they are."""
    with suppress(AttributeError, TypeError):  # a torch without one of the names
        skip = _FrameAction.SKIP
        _set_code_strategy(code, _FrameStrategy(skip, skip))


def load_compiler() -> None:
    """Load torch's compiler (1 s), before some transform of torch's does so, which then takes longer."""
    importlib.import_module(COMPILER)


_LOADED_AT_FIRST_CALL: Final = "forward mode loads the compiler (1 s) in the first call of a process"
compiler_shield: Any = _optional(
    "torch._disable_dynamo", "recognize functions that load the compiler when first called", _LOADED_AT_FIRST_CALL
)
reference_operators: Any = _optional("torch._refs", "find those that forward mode calls", _LOADED_AT_FIRST_CALL)


@functools.cache
def load_forward_decompositions() -> None:
    """Load torch's decompositions for forward mode (0.2 s), which few operators need."""
    importlib.import_module("torch._decomp.decompositions_for_jvp")


def compile_graph(graph: Any, inputs: Sequence[Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Let Inductor compile an fx graph of aten operators, without Dynamo around it."""
    compiled: Callable[..., tuple[torch.Tensor, ...]] = importlib.import_module("torch._inductor").compile(
        graph, inputs
    )
    return compiled
