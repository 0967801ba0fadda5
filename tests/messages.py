"""Every message that a user may see as an error or a warning of autojac's: how to provoke it, and what it has to say.

`python tests/test_messages.py` prints all of them, to be read as a whole.
"""

from __future__ import annotations

import itertools
import sqlite3
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import autojac
from autojac import (
    AutoHessian,
    AutoJacobian,
    Derivatives,
    InputError,
    ModesDisagreeWarning,
    MutationError,
    NoGraphWarning,
    OptionError,
    OutputError,
    Pattern,
    PerformanceWarning,
    PlanMissError,
    PlanStore,
    RandomnessError,
    SearchError,
    SingularJacobianError,
    Sparsity,
    StoreError,
    StoreWarning,
    Structure,
    StructureChangedWarning,
    TargetError,
    TrainingStep,
    UnsupportedError,
    VerificationError,
    jacobian_from,
    to_scipy,
    verify,
)
from autojac.api.least_squares import matrix_free_least_squares
from autojac.cli import main
from autojac.core.options import Options
from autojac.methods.pull import Pull
from autojac.planning.audit import audit_call
from autojac.planning.plans_in_use import PlansInUse
from autojac.store import Key


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: its class.
        expected, got, advice: patterns of its three parts: what was expected, what came, and what to do about it; empty
            where another part says it too, as "must be one of ..." does.
        provoke: raises the error, or warns, in an empty folder.
    """

    kind: type[Exception]
    expected: str
    got: str
    advice: str
    provoke: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.kind.__name__}: {self.got or self.expected}"


x = torch.arange(6.0).reshape(3, 2) / 6 + 0.1
must_be = r"must be "


def jac(func: Any, *args: Any, **options: Any) -> Any:
    """Wrap a function and call it, without timing anything."""
    return wrap(func, **options)(*args)


def ragged() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([x, x[:1]])


def wrap(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"store": ":memory:", "on_miss": "estimate", "effort": "estimate", **options})


def command(*words: str) -> None:
    """Run a command of the command line, with a module to work on."""

    Path("model.py").write_text(MODEL)
    with mock.patch.object(sys, "path", list(sys.path)), mock.patch.object(sys, "dont_write_bytecode", True):
        before = set(sys.modules)
        try:
            main.main([*words], standalone_mode=False)
        finally:
            for name in set(sys.modules) - before:
                if name == "model":
                    del sys.modules[name]


@dataclass
class Computing:
    """A dataclass that computes one of its fields."""

    x: Tensor
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.norm = self.x.norm(dim=1)


class Listing(nn.Module):
    """A module that reads its parameter past its attributes."""

    weight = nn.Parameter(torch.ones(2))

    def __init__(self) -> None:
        super().__init__()
        self.own = Listing.weight

    def forward(self, x: Tensor) -> Tensor:
        return x * Listing.weight


def of_listing() -> AutoJacobian:
    return AutoJacobian.of_parameters(Listing(), store=":memory:", on_miss="estimate")


def tune(target: str, *words: str) -> None:
    command("tune", target, "--effort", "estimate", *(words or ("--shape", "3x2")))


MODEL = """
import torch
class Needs(torch.nn.Module):
    def __init__(self, size): super().__init__()
def nothing(): return 3
def of_three(x): return x @ torch.ones(7, 3)
"""


def here(name: str = "plans.db") -> Path:
    return Path.cwd() / name


def store_at(content: bytes) -> PlanStore:
    Path(here()).write_bytes(content)
    return PlanStore(here())


def refusing(name: str) -> Any:
    """Files of the plan store can't be written."""
    return mock.patch.object(Path, name, side_effect=PermissionError(13, "Permission denied", "plans.db"))


def unwritable() -> None:
    with refusing("touch"):
        jac(torch.sin, x, store=here())


def unusable_shared() -> None:
    Path("shared.db").write_bytes(b"no database at all " * 500)
    with mock.patch.dict("os.environ", {"AUTOJAC_PLAN_PATH": str(here("shared.db"))}):
        jac(torch.sin, x, store=here())


def bad_row() -> None:
    jac(torch.sin, x, store=here())
    with closing(sqlite3.connect(here())) as connection, connection:
        connection.execute("UPDATE plans SET plan = '[]'")
    PlanStore(here()).listing()


def later_autojac() -> None:
    jac(torch.sin, x, store=here())
    with closing(sqlite3.connect(here())) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    PlanStore(here()).save(Key.of({}), Key.of({}), wrap(torch.sin).plan(x), "sin")


class Sine(torch.autograd.Function):
    """A sine whose backward is `pull`, made of the cotangent and the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pull: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.x, ctx.pull = x.detach(), pull
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return ctx.pull(ctx, cotangent), None


def pulled(ctx: Any, cotangent: Tensor) -> Tensor:
    return cotangent * ctx.x.cos()


def pulled_once(ctx: Any, cotangent: Tensor) -> Tensor:
    x, ctx.x = ctx.x, None
    return cotangent * x.cos()


class Weighted(torch.autograd.Function):
    """A product with weights whose backward has no graph to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        slope = (x * weight).cos()
        return cotangent * slope * weight, (cotangent * slope * x).sum(0)


class Untrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return Weighted.apply(x, self.weight)


class Rounded(torch.autograd.Function):
    """Rounding with a straight-through backward, and forward mode that says otherwise."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * ctx.saved_tensors[0].cos()


def changed() -> None:
    couples: list[bool] = []
    func = wrap(lambda x: x.sin() + (x.roll(1, 0) if couples else 0), verify="always")
    func(x)
    couples.append(True)
    func(x)


def crowded() -> None:
    """A call whose plan runs out of memory."""
    own = wrap(lambda x: x.sin() * x.sum(1, keepdim=True))
    own(x)
    ((_, plan),) = own._plans.items()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plan.compute = full
    own(x)


def pinned_miss() -> None:
    """A call that no pinned plan is for."""
    autojac.pin(PlanStore(":memory:"))
    try:
        wrap(torch.sin)(x)
    finally:
        autojac.pin(None)


def nothing_to_audit() -> None:
    """An audit of a call that was never tuned."""
    plans = PlansInUse(torch.sin, Options.from_keywords({"store": ":memory:"}))
    audit_call(plans.planner, plans.describe((x,), {}), "quick")


def wrapped_in_a_loop() -> None:
    """Wrappers of one lambda with other constants."""

    def scaled(value: float) -> Any:
        return lambda x: value * x.sin()

    for value in range(8):
        wrap(scaled(value + 1.5))(x)


def spoiled() -> None:
    """Differentiate a replayed Jacobian again, after func has changed."""
    net = nn.Linear(2, 2)
    J = wrap(net, differentiable=True)(x.clone().requires_grad_())
    net.weight.data.mul_(2)
    torch.autograd.grad(J.sum(), [net.weight])


def freed_graph() -> None:
    leaf = x.clone().requires_grad_()
    y = leaf.sin()
    y.sum().backward()
    jacobian_from(y, leaf)


def hooked_later() -> None:
    for call in range(4):
        leaf = torch.ones(5, 7, requires_grad=True)
        inner = leaf.sin()
        if call == 3:
            inner.register_hook(lambda gradient: gradient + gradient.flip(0))
        jacobian_from(inner.cos(), leaf)


def refused_graph() -> None:
    with mock.patch.object(Pull, "of_graph", side_effect=RuntimeError("no vmap rule")):
        graph_of(torch.sin)


def of_two_tensors() -> Derivatives:
    return Derivatives(lambda t, x: t * x, of=(("t",), ("x",)), store=":memory:")


def of_columns(of: Any, **options: Any) -> Derivatives:
    return Derivatives(lambda x: x[0] if isinstance(x, list) else x, of, **{"store": ":memory:"} | options)


def graph_of(func: Callable[[Tensor], Any], **options: Any) -> Any:
    leaf = x.clone().requires_grad_()
    return jacobian_from(func(leaf), leaf, **options)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True).sin() + self.shift


def counted() -> Callable[[Tensor], Tensor]:
    numbers = itertools.count(1)
    return lambda x: x * next(numbers)


def remembered() -> Callable[[Tensor], Tensor]:
    """A function that keeps a tensor that its next call reads, and gives something else in its first call."""

    class Warm:
        first, level = True, torch.zeros(())

        def __call__(self, x: Tensor) -> Tensor:
            if self.first:
                self.first, self.level = False, torch.ones(())
                return x.sin()
            return x.cos()

    return Warm()


def flagged() -> Any:
    """A module that leaves train mode in its first call."""

    class Settles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.calls = nn.Linear(2, 4), nn.BatchNorm1d(4), 0
            self.inner = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

        def forward(self, x: Tensor) -> Any:
            found = self.inner(self.norm(self.first(x).tanh()))
            if self.calls == 0:
                self.calls = 1
                self.norm.eval()
            return found

    return Settles().train()


def scripted() -> Any:
    with mock.patch("warnings.warn"):
        return torch.jit.script(nn.Linear(2, 2))


def of_all_samples(x: Tensor, weights: Tensor) -> Tensor:
    """Refuse every other number of samples, and mix columns by weights of as many rows."""
    if len(x) != 3:
        raise ValueError("three samples, please")
    return x @ weights


def batch_norm_pulled_once() -> Any:
    norm = nn.BatchNorm1d(2)
    return jac(lambda x: Sine.apply(norm(x), pulled_once), x)


def inside_transform(**options: Any) -> Any:
    return torch.func.vmap(wrap(torch.sin, **options), in_dims=1)(x[None].expand(3, 3, 2))


def singular() -> Any:
    return wrap(lambda x: x @ torch.tensor([[1.0, 2.0], [2.0, 4.0]])).inverse(x)


def patterned(**patterns: Any) -> Any:
    return Structure("sparse", "declared", sparsity=Sparsity(**patterns))


def without_plotly() -> Any:
    with mock.patch.dict(sys.modules, {"plotly": None}):
        autojac.report.spy(Pattern.of(np.eye(3)), "spy.html")


class Locked(dict[str, Any]):
    """Forbidden to everyone."""


MESSAGES = (
    # options
    Message(
        OptionError, must_be + "one of 'blocks'", "got 'blok'", "did you mean", lambda: wrap(torch.sin, layout="blok")
    ),
    Message(OptionError, must_be + "one of 'estimate'", "got 'deep'", "", lambda: wrap(torch.sin, effort="deep")),
    Message(
        OptionError,
        "known are",
        "unknown option 'layuot'",
        "did you mean 'layout'",
        lambda: wrap(torch.sin, layuot="full"),
    ),
    Message(OptionError, must_be + "True or False", "got 1", "", lambda: wrap(torch.sin, has_aux=1)),
    Message(
        OptionError,
        "exclude each other",
        "has_aux and randomness='same'",
        "Leave one of them out",
        lambda: wrap(torch.sin, has_aux=True, randomness="same"),
    ),
    Message(OptionError, must_be + "a string", "got 3", "", lambda: wrap(torch.sin, version=3)),
    Message(OptionError, must_be + "an int or a tuple", "got 'x'", "", lambda: wrap(torch.sin, argnums="x")),
    Message(
        OptionError, must_be + "one of 'blocks', 'sparse'", "'full'", "", lambda: AutoHessian(torch.sin, layout="full")
    ),
    Message(OptionError, "the one output", "has_aux", "Leave it out", lambda: AutoHessian(torch.sin, has_aux=True)),
    Message(
        OutputError,
        "one scalar per sample",
        r"returns \(3, 2\)",
        "layout='blocks'",
        lambda: AutoHessian(torch.sin, store=":memory:").diagonal(x),
    ),
    Message(
        UnsupportedError,
        "a Hessian of its own",
        "samples are coupled",
        "in_dims=None",
        lambda: AutoHessian(lambda x: (x - x.mean(0)).prod(1), layout="sparse", store=":memory:")(x),
    ),
    Message(
        InputError, "loss was expected", "a int|an int", "returns a number", lambda: TrainingStep(nn.Linear(2, 2), 3)
    ),
    Message(
        OutputError,
        "one number",
        r"shape \(3,\)",
        "mean",
        lambda: TrainingStep(nn.Linear(2, 2), lambda y, J: y[:, 0], store=":memory:")(x),
    ),
    Message(OptionError, "sequence of tuples", r"got \(1, 1\)", "such as", lambda: of_columns((1, 1))),
    Message(OptionError, "counted from 0", "got -1", "such as", lambda: of_columns(((-1,),))),
    Message(OptionError, "sequence of tuples", "no derivative", "Call func itself", lambda: of_columns(((),))),
    Message(OptionError, "by columns", "layout", "Leave it out", lambda: of_columns(((0,),), layout="full")),
    Message(
        OptionError, "must be one int", r"got \(0, 1\)", "Name columns", lambda: of_columns(((0,),), argnums=(0, 1))
    ),
    Message(
        OptionError, "for several tensors", r"got both, \(\('x', 0\),\)", "Name all", lambda: of_columns((("x", 0),))
    ),
    Message(OptionError, "func takes x", "'y'", "Name columns of arguments", lambda: of_columns((("y",),))),
    Message(OptionError, "names of func's arguments", "'x'", "Wrap it", lambda: Derivatives(torch.sin, (("x",),))),
    Message(InputError, "by position", "0 arguments", "func's order", of_columns((("x", "x"),))),
    Message(InputError, "floating-point numbers", "got an int", "one row", lambda: of_columns((("x", "x"),))(3)),
    Message(InputError, "3 columns|2 columns", "by 'x'", r"\('x', 0\)", lambda: of_columns((("x", "x"),))(x)),
    Message(OptionError, "0 or 'auto'", "got 1", "Move", lambda: of_columns((("x",),), in_dims=1)(x[:, 0])),
    Message(InputError, "share batch", "float64", "Convert", lambda: of_two_tensors()(x[:, 0], x[:, 0].double())),
    Message(InputError, "2 columns", "u_0,2 was asked", "Name columns", lambda: of_columns(((0, 2),))(x)),
    Message(InputError, "one tensor", "2 tensors", "torch.stack", lambda: of_columns(((0,),))([x, x])),
    Message(OptionError, must_be + "a number of seconds", "got -1", "", lambda: wrap(torch.sin, budget_s=-1)),
    Message(OptionError, must_be + "a PlanStore, a path", "got an int", "", lambda: wrap(torch.sin, store=3)),
    Message(
        OptionError, must_be + "bytes or a size", "got 'much'", "such as", lambda: wrap(torch.sin, memory_limit="much")
    ),
    Message(OptionError, must_be + "positive", "got 0", "", lambda: wrap(torch.sin, memory_limit=0)),
    Message(OptionError, must_be + "'auto', an int", "got 'batch'", "", lambda: wrap(torch.sin, in_dims="batch")),
    Message(OptionError, must_be + "one of", "got 'thorough'", "", lambda: wrap(torch.sin).tune(x, effort="thorough")),
    Message(OptionError, must_be + "one of", "got 'loose'", "", lambda: Structure("loose")),
    Message(OptionError, must_be + "one of", "got 'sworn'", "", lambda: Structure("dense", "sworn")),
    Message(
        OptionError,
        "all parameters that require grad",
        "takes no argnums",
        "Leave it out, or wrap the module",
        lambda: AutoJacobian.of_parameters(nn.Linear(2, 2), argnums=0),
    ),
    # what is wrapped
    Message(InputError, "an instance of a module", "the class Linear", "Create it first", lambda: wrap(nn.Linear)),
    Message(InputError, "a function or module", "got an int", "Pass one that maps", lambda: wrap(3)),
    Message(
        InputError,
        r"torch\.nn\.Module was expected",
        "got a function",
        "AutoJacobian",
        lambda: AutoJacobian.of_parameters(jac),
    ),
    Message(
        InputError,
        "none can be put in their place",
        "scripted or traced",
        "Pass the module that it was made from",
        lambda: AutoJacobian.of_parameters(scripted()),
    ),
    Message(
        InputError,
        "parameters that require grad were expected",
        "Tanh has none",
        "requires_grad_",
        lambda: AutoJacobian.of_parameters(nn.Tanh(), store=":memory:")(x),
    ),
    # arguments of a call
    Message(OptionError, "positional arguments .* expected", "got none", "pass by position", lambda: jac(torch.sin)),
    Message(
        OptionError,
        "argnums names argument 2",
        "has 1 positional",
        "pass by position",
        lambda: jac(torch.sin, x, argnums=2),
    ),
    Message(OptionError, "once", "twice: \\(0, 0\\)", "Name each once", lambda: jac(torch.sin, x, argnums=(0, 0))),
    Message(
        OptionError, "the call has 1", "entries for 2 arguments", "Give one", lambda: jac(torch.sin, x, in_dims=(0, 0))
    ),
    Message(OptionError, must_be + "'auto'", "whose nest differs", "", lambda: jac(torch.sin, x, in_dims=([0, 0],))),
    Message(OptionError, "one of its axes", r"shape is \(3, 2\)", "Name one", lambda: jac(torch.sin, x, in_dims=2)),
    Message(
        InputError, "tensors were expected", "holds a str", "argnums", lambda: jac(lambda s, x: x, "s", x, argnums=0)
    ),
    Message(InputError, "real inputs", "complex64", "view_as_real", lambda: jac(torch.sin, x.to(torch.complex64))),
    Message(
        InputError, "floating-point tensor was expected", "int64", "argnums", lambda: jac(torch.sin, torch.arange(3))
    ),
    Message(InputError, "a dense tensor", "meta device", "argnums", lambda: jac(torch.sin, x.to("meta"))),
    Message(InputError, "tensors of one shape", "nested", "to_padded_tensor", lambda: jac(torch.add, x, ragged())),
    Message(InputError, "batch was expected on axis 0", "is a scalar", "in_dims=None", lambda: jac(torch.sin, x.sum())),
    Message(
        InputError,
        "share a batch",
        r"\[2, 3\] samples",
        "Pass equal numbers",
        lambda: jac(torch.add, x, x[:2], in_dims=0, argnums=(0, 1)),
    ),
    Message(
        InputError,
        "One batch size was expected",
        r"\[2, 3\] samples .* RuntimeError",
        "say with in_dims",
        lambda: jac(torch.add, x, x[:2], argnums=(0, 1)),
    ),
    Message(
        InputError,
        "carries the batch or is shared",
        "can't be called on some of the samples",
        "in_dims=",
        lambda: jac(of_all_samples, torch.ones(3, 3), torch.ones(3, 3), argnums=(0, 1)),
    ),
    Message(
        MutationError,
        "needs the input as it was",
        "writes into its tensor argument",
        "clone",
        lambda: jac(lambda x: x.mul_(2), x),
    ),
    Message(
        MutationError,
        "",
        "writes into a tensor that is passed by keyword or in an object",
        "clone it first",
        lambda: wrap(lambda x, total: x * total.add_(1))(x, total=torch.zeros(2)),
    ),
    Message(
        MutationError,
        "Let func reach it in one way",
        "sets something in a list that is passed to it twice",
        "return what it sets as aux",
        lambda: jac(lambda x, a, b: (a.append(1), b.append(2), x)[2], x, *[[]] * 2),
    ),
    Message(
        MutationError,
        "",
        "sets something in its arguments, which batch_dims=2 makes copies of",
        "Pass what it sets by keyword",
        lambda: jac(lambda x, log: (log.append(1), x)[1], x[None], [], batch_dims=2),
    ),
    Message(
        PerformanceWarning,
        "In use from now on: BatchChunk",
        "memory ran out in the plan",
        "Pass memory_limit",
        crowded,
    ),
    Message(PlanMissError, "for this call", "no plan is stored", "Make one with `autojac tune`", nothing_to_audit),
    Message(
        PlanMissError, "are pinned", "none is for arguments", r"unpin them by autojac\.pin\(None\), tune", pinned_miss
    ),
    Message(
        StoreError, "were to be pinned", "there is no plan store at", "Tune ahead", lambda: autojac.pin(here("no.db"))
    ),
    Message(
        PerformanceWarning,
        "Wrap the function once",
        "each with another value of `value`",
        "as an argument",
        wrapped_in_a_loop,
    ),
    # what func returns and does
    Message(
        OutputError, "a pair", "it returned a Tensor", "Return such a pair", lambda: jac(torch.sin, x, has_aux=True)
    ),
    Message(OutputError, "was expected", "returned no tensor", "Return what", lambda: jac(lambda x: (), x)),
    Message(
        OutputError, "a tensor .* was expected", "output 0 of func is a str", "has_aux", lambda: jac(lambda x: "y", x)
    ),
    Message(OutputError, "a dense tensor", "sparse_coo", "to_dense", lambda: jac(lambda x: x.to_sparse(), x)),
    Message(OutputError, "no real derivative", "int64", "Return floating-point", lambda: jac(lambda x: x.long(), x)),
    Message(OutputError, "batch on axis 0", "a scalar", r"return one value per sample", lambda: jac(torch.sum, x)),
    Message(OutputError, "share the batch", r"\(3, 2\), \(2,\)", "Expand", lambda: jac(lambda x: (x, x.sum(0)), x)),
    Message(OutputError, "batch was expected on axis 0", r"shape \(2, 3\)", "Return one row", lambda: jac(torch.t, x)),
    Message(
        OutputError,
        "axis 0 is not the batch",
        "half",
        r"Return \(B",
        lambda: jac(lambda x: x.T @ x, torch.ones(4, 4) * x[0, 0]),
    ),
    Message(
        OutputError,
        "needs as many outputs as inputs",
        "maps",
        "blocks",
        lambda: jac(lambda x: x[:, :1], x, layout="diagonal"),
    ),
    Message(
        OutputError,
        "every derivative would be zero",
        "none has a graph",
        "Compute in torch operators",
        lambda: jac(lambda x: x.detach() * 2, x),
    ),
    Message(
        RandomnessError,
        "one plain call",
        "draws random numbers",
        "Pass randomness",
        lambda: jac(lambda x: x * torch.rand(()), x),
    ),
    Message(
        RandomnessError,
        "equal ones were expected",
        "two different outputs",
        "Pass such a value",
        lambda: jac(counted(), x),
    ),
    Message(
        RandomnessError,
        "equal ones were expected",
        "two different outputs",
        "Pass such a value",
        lambda: torch.no_grad()(jac)(flagged(), x),
    ),
    Message(
        RandomnessError,
        "equal ones were expected",
        "two different outputs",
        "Pass such a value",
        lambda: jac(remembered(), x),
    ),
    Message(
        UnsupportedError,
        "needs torch.autograd.grad",
        r"backward\(\) alone",
        "use_reentrant=False",
        lambda: AutoJacobian.of_parameters(Reentrant(), store=":memory:", on_miss="estimate")(x),
    ),
    Message(
        UnsupportedError,
        "dense derivatives were expected",
        "returns a sparse one",
        "Make it return a dense one",
        lambda: AutoJacobian.of_parameters(nn.Embedding(3, 2, sparse=True), store=":memory:")(torch.arange(3)),
    ),
    Message(UnsupportedError, "evaluation of its own", "a second backward", "eval mode", batch_norm_pulled_once),
    Message(UnsupportedError, "nothing can be probed", "transform .* is active", "once outside", inside_transform),
    Message(
        UnsupportedError,
        "makes no sparse matrices",
        "transform .* is active",
        "layout='blocks'",
        lambda: inside_transform(layout="sparse"),
    ),
    # plans
    Message(
        PlanMissError,
        "on_miss='error' forbids",
        "no plan is stored",
        "Tune ahead",
        lambda: jac(torch.sin, x, on_miss="error"),
    ),
    Message(
        SearchError,
        "are allowed",
        "the Jacobian alone takes",
        "Choose another layout",
        lambda: jac(torch.sin, torch.ones(500, 8), layout="full", memory_limit="1MB"),
    ),
    Message(
        SearchError,
        "was declared",
        "no method that relies on it",
        "coupling='auto'",
        lambda: jac(lambda x: x.softmax(0), x, coupling="independent"),
    ),
    Message(
        SearchError,
        "the right Jacobian within the limits",
        "no method gives",
        "gradcheck",
        lambda: jac(torch.sin, x, memory_limit=60),
    ),
    Message(
        SearchError,
        "the right Jacobian within the limits",
        "no method gives",
        "gradcheck",
        lambda: jac(torch.sin, x, memory_limit=60, effort="quick", on_miss="tune", budget_s=0),
    ),
    Message(
        OptionError,
        r"this call needs \(3, 3\)",
        r"pattern of samples of shape \(2, 2\)",
        "Give it one row",
        lambda: jac(torch.sin, x, coupling=patterned(samples=Pattern.of(np.eye(2)))),
    ),
    Message(StructureChangedWarning, "the plan .* does not hold", "off by", "computed again and is right", changed),
    Message(
        StructureChangedWarning,
        "the declared pattern",
        "misses entries",
        "Correct the pattern",
        lambda: jac(lambda x: x + x.roll(1, 1), x, layout="sparse", coupling=patterned(features=Pattern.of(np.eye(2)))),
    ),
    Message(
        NoGraphWarning,
        "move with the inputs|moves with the inputs",
        "no derivative there",
        "Compute that in torch",
        lambda: jac(lambda x: (x.sin(), x.detach() * 2), x),
    ),
    Message(
        NoGraphWarning,
        "trains no parameter",
        "the backward of Weighted can't",
        "Write that backward",
        lambda: jac(Untrained(), x),
    ),
    Message(ModesDisagreeWarning, "disagree", "finite difference", "", lambda: jac(Rounded.apply, x)),
    # outputs that have been computed already
    Message(
        OptionError,
        "needs the function",
        "does not show",
        "Use AutoJacobian",
        lambda: graph_of(torch.sin, layout="sparse"),
    ),
    Message(
        UnsupportedError,
        "expects plain tensors",
        "transform is active",
        "AutoJacobian",
        lambda: torch.func.vmap(lambda x: jacobian_from(x, x))(x),
    ),
    Message(InputError, "a tensor or a nest", "got an empty one", "Pass those", lambda: jacobian_from(x, ())),
    Message(InputError, "a tensor was expected", "an int", "Leave it out", lambda: jacobian_from(x, [1])),
    Message(InputError, "a floating-point tensor", "int64", "In place", lambda: jacobian_from(x, torch.arange(3))),
    Message(InputError, "no graph leads to it", "does not require grad", "requires_grad_", lambda: jacobian_from(x, x)),
    Message(
        InputError, "outputs with a graph", "none requires grad", "grad mode on", lambda: graph_of(torch.Tensor.detach)
    ),
    Message(
        InputError,
        "expected to lead there",
        "no output depends on input 0",
        "allow_unused",
        lambda: jacobian_from(x.clone().requires_grad_().sin(), x.clone().requires_grad_()),
    ),
    Message(
        OptionError,
        "must be on axis 0",
        "axis 1 of an input",
        "in_dims",
        lambda: graph_of(lambda leaf: leaf.T.sin(), in_dims=1),
    ),
    Message(InputError, "graph", "has been freed", "retain_graph=True", freed_graph),
    Message(SearchError, "no method agrees", "plain VJPs", "Let backwards", refused_graph),
    Message(
        StructureChangedWarning,
        "declared independent",
        "are not",
        "Pass coupling=",
        lambda: graph_of(lambda leaf: leaf.softmax(0), coupling="independent"),
    ),
    Message(StructureChangedWarning, "met before", "couples samples otherwise", "declare coupling=", hooked_later),
    # verification, and what is made of Jacobians
    Message(
        VerificationError,
        "batch_dims that it was",
        "Jacobian is wrong",
        "pass the function",
        lambda: verify(jac(torch.sin, x) * 2, torch.sin, x),
    ),
    Message(
        VerificationError,
        "one Jacobian per output and input was expected",
        "got 2",
        "Pass them",
        lambda: verify([x, x], torch.sin, x),
    ),
    Message(
        VerificationError, "a sparse CSR", "torch.strided", "layout", lambda: verify(x, torch.sin, x, layout="sparse")
    ),
    Message(InputError, "a sparse CSR", "torch.strided", "layout='sparse'", lambda: to_scipy(x)),
    Message(
        InputError, "one output and one input", "has 2 and 1", "concatenates", lambda: wrap(lambda x: (x, x)).inverse(x)
    ),
    Message(
        InputError,
        "square",
        "3 x 2",
        "let the function return",
        lambda: wrap(lambda x: x.repeat(1, 2)[:, :3]).slogdet(x),
    ),
    Message(SingularJacobianError, "singular", "3 of 3 Jacobians", "damp", singular),
    Message(
        InputError,
        "one output and one input",
        "has 2 and 1",
        "Wrap a function",
        lambda: wrap(lambda x: (x, x)).factors(x),
    ),
    Message(
        InputError,
        r"shape \(3, 2\) was expected",
        r"got \(2, 2\)",
        "one vector per sample",
        lambda: wrap(lambda x: x - x.mean(0)).factors(x) @ x[:2],
    ),
    Message(
        UnsupportedError,
        "has no factors",
        "custom autograd Function Sine",
        "layout='full'",
        lambda: wrap(lambda x: Sine.apply(x - x.mean(0), pulled)).factors(x),
    ),
    # patterns and pictures
    Message(OptionError, must_be + "a matrix", "ndarray of 1 axes", "2-D", lambda: Pattern.of(np.ones(3))),
    Message(
        InputError,
        "one color for each of the 3 columns",
        "got 2",
        "Pass those",
        lambda: autojac.report.spy(Pattern.of(np.eye(3)), "spy.html", np.zeros(2)),
    ),
    Message(UnsupportedError, "need plotly", "not installed", "pip install", without_plotly),
    # stores
    Message(
        OptionError,
        "patterns",
        "no patterns were passed",
        "pass patterns=",
        lambda: Structure.from_json({"coupling": "sparse", "sparsity": {"samples": "key"}}),
    ),
    Message(
        OptionError,
        must_be + "|must name",
        r"got \['x'\]",
        "to_json",
        lambda: Structure.from_json({"coupling": "sparse", "sparsity": ["x"]}, {}.__getitem__),
    ),
    Message(OptionError, must_be + "made of plain JSON", "not JSON serializable", "", lambda: Key.of({"a": x})),
    Message(
        StoreWarning,
        "",
        "can't be used",
        "plans live in memory",
        lambda: jac(torch.sin, x, store="postgresql://host:port/plans"),
    ),
    Message(
        StoreWarning,
        "",
        "can't be used",
        "plans live in memory",
        lambda: PlanStore("postgresql://host:port/plans").save(Key.of({}), Key.of({}), wrap(torch.sin).plan(x), "sin"),
    ),
    Message(
        StoreWarning, "", "can't be read", "plans live in memory", lambda: jac(torch.sin, x, store="no://host/plans")
    ),
    Message(StoreWarning, "", "can't be written", "new plans live in memory", unwritable),
    Message(StoreWarning, "", "can't be written|made by a later autojac", "live in memory", later_autojac),
    Message(
        StoreWarning,
        "",
        "was corrupt",
        "a new store was started",
        lambda: jac(torch.sin, x, store=store_at(b"no database " * 999)),
    ),
    Message(StoreWarning, "", "the shared plans .* can't be read", "", unusable_shared),
    Message(StoreWarning, "", "a row that can't be used", "ignored", bad_row),
    Message(
        StoreError, "", "can't be used as a plan store", "", lambda: PlanStore("postgresql://host:port/plans").listing()
    ),
    Message(StoreError, "", "has no plan 7", "autojac plans list", lambda: PlanStore(here()).get(7)),
    Message(StoreError, "", "can't be used as a plan store", "", lambda: store_at(b"no database " * 999).clear()),
    # the command line
    Message(TargetError, "was expected as TARGET", "got 'model'", "Name the function", lambda: tune("model")),
    Message(TargetError, "was expected as TARGET", "got '..:f'", "Name the function", lambda: tune("..:f")),
    Message(TargetError, "here|in this folder", "no module 'absent'", "Check the spelling", lambda: tune("absent:f")),
    Message(TargetError, "relative to", "no file absent.py", "Name it", lambda: tune("absent.py:f")),
    Message(
        TargetError,
        "a Python file",
        "got ./model.txt",
        "ends in .py",
        lambda: (Path("model.txt").touch(), tune("./model.txt:f")),
    ),
    Message(
        TargetError, "a function or module", "is an int, which nothing", "Name one", lambda: tune("model.py:nothing")
    ),
    Message(TargetError, "a function or module", "is a class", "Name an instance", lambda: tune("model.py:Needs")),
    Message(TargetError, "model", "no attribute 'nothin'", "did you mean 'nothing'", lambda: tune("model.py:nothin")),
    Message(
        TargetError, "can't be called with", "RuntimeError", "", lambda: tune("model.py:of_three", "--shape", "3x2")
    ),
    Message(
        TargetError,
        "a device that computes",
        "'meta'",
        "such as cpu",
        lambda: tune("model.py:of_three", "--shape", "3x7", "--device", "meta"),
    ),
    Message(
        TargetError,
        "this machine has",
        "'xla'|can't be used",
        "Name one",
        lambda: tune("model.py:of_three", "--shape", "3x7", "--device", "nowhere"),
    ),
    Message(
        TargetError,
        "1 argument",
        "names 2 dtypes",
        "Name one",
        lambda: tune("model.py:of_three", "--shape", "3x7", "--dtype", "float32,float64"),
    ),
    Message(
        TargetError,
        "no tensor of shape",
        "can be made on cpu",
        "Try a smaller",
        lambda: tune("model.py:of_three", "--shape", "3x99999999999x999999"),
    ),
    # products
    Message(
        OptionError,
        "func's positional arguments and at last a vector",
        "got 1 argument",
        "Pass both",
        lambda: wrap(torch.sin).jvp(x),
    ),
    Message(
        InputError,
        "shape .3, 2. of what",
        "got .2, 2.",
        "one vector per",
        lambda: wrap(torch.sin).jvp(x, x[:2]),
    ),
    Message(InputError, "of func's outputs", "got .3,.", "or expand it", lambda: wrap(torch.sin).vjp(x, x[:, 0])),
    Message(InputError, "floating-point tensors", "got an int", "Convert", lambda: wrap(torch.sin).vjp(x, 1)),
    Message(
        InputError,
        "in the nest of what is differentiated, 1 tensor",
        "got a Tensor",
        "nested alike",
        lambda: wrap(lambda d: d["a"].sin()).jvp({"a": x}, x),
    ),
    Message(
        UnsupportedError,
        "nothing can be probed",
        "transform or forward mode is active",
        "use torch.func.jvp",
        lambda: torch.vmap(wrap(torch.sin).jvp)(x[None], x[None]),
    ),
    Message(
        UnsupportedError,
        "layout='blocks' or 'full'",
        "got 'sparse'",
        "go on with the matrix",
        lambda: wrap(torch.sin, layout="sparse").gram(x),
    ),
    Message(
        SearchError,
        "are allowed",
        "Gram matrices alone take",
        "fewer samples",
        lambda: wrap(torch.sin, memory_limit=9).gram(x),
    ),
    Message(
        UnsupportedError,
        "expected to have no effects",
        "updates buffers",
        "eval mode",
        lambda: wrap(nn.BatchNorm1d(2), memory_limit=9).norm(x),
    ),
    Message(
        InputError,
        "damping was expected to be a number",
        "got -1",
        "added to the",
        lambda: wrap(torch.sin).solve(x, x, damping=-1),
    ),
    Message(
        InputError,
        "or a tensor of shape .. or .3,.",
        "got a str",
        "Pass 0.0",
        lambda: wrap(torch.sin).solve(x, x, damping="low"),
    ),
    Message(
        SingularJacobianError,
        "of 3 Jacobians",
        "rank-deficient .sample 0.",
        "damp",
        lambda: wrap(lambda z: z * (z > 0.2)).solve(x, x),
    ),
    Message(
        SingularJacobianError,
        "of 3 Jacobians",
        "not finite .samples 0, 1, 2.",
        "division by zero",
        lambda: wrap(torch.sin, layout="sparse").solve(x, x / 0),
    ),
    Message(
        SingularJacobianError,
        "of 3 Jacobians",
        "rank-deficient .sample 0.",
        "damp",
        lambda: wrap(lambda z: z * (z > 0.2), layout="sparse").solve(x, x),
    ),
    Message(
        SingularJacobianError,
        "of 3 Jacobians",
        "rank-deficient .sample 0.",
        "damp",
        lambda: wrap(lambda z: torch.where(z < 0.3, z.sum(1, True), z), layout="sparse").solve(x, x),
    ),
    Message(
        SearchError,
        "were expected to converge",
        "did not in 1 system",
        "Pass damping",
        lambda: matrix_free_least_squares(torch.exp, torch.cos, x[:1], x[0, 0], 2),
    ),
    Message(
        InputError,
        "tensor of shape .3, 2. was expected",
        "of shape .2, 2.",
        "one vector for the whole",
        lambda: wrap(torch.sin).linear_operator(x) @ x[:2],
    ),
    # a Jacobian in parts
    Message(
        OptionError,
        "chunks expects a size and layout='blocks'",
        "got layout='sparse'",
        "for the sparse Jacobian",
        lambda: wrap(torch.sin, layout="sparse").chunks(x),
    ),
    Message(OptionError, "bytes " + must_be, "got 'many'", "", lambda: wrap(torch.sin).chunks(x, bytes="many")),
    Message(
        InputError,
        "a function with a batch",
        "in_dims=None says",
        "Pass in_dims",
        lambda: wrap(torch.sin, in_dims=None).chunks(x),
    ),
    Message(
        InputError,
        "hold 2 tensors or arrays",
        "got 1",
        "Nest them",
        lambda: wrap(lambda z: (z, z)).chunks(x, out=torch.zeros(3, 2, 2)),
    ),
    Message(
        InputError,
        "array of shape .3, 2, 2. and dtype float32",
        "got float64 of shape .3, 2.",
        "Make one",
        lambda: wrap(torch.sin).chunks(x, out=np.zeros((3, 2))),
    ),
    # parameters
    Message(
        InputError,
        "names was expected to match parameters",
        "'weigth' matches nothing .did you mean 'weight'",
        "Pass names",
        lambda: AutoJacobian.of_parameters(nn.Linear(2, 2), names="weigth"),
    ),
    Message(
        OptionError,
        "names must be a name or a pattern",
        "got .3",
        "Leave it out",
        lambda: AutoJacobian.of_parameters(nn.Linear(2, 2), names=[3]),
    ),
    Message(
        InputError,
        "needs real parameters",
        "parameter weight is torch.complex64",
        "view_as_complex",
        lambda: AutoJacobian.of_parameters(nn.Linear(2, 2, dtype=torch.complex64))(x),
    ),
    Message(
        UnsupportedError,
        "ntk expects layout='blocks'",
        "got 'full'",
        "Wrap",
        lambda: wrap(torch.sin, layout="full").ntk(x),
    ),
    Message(
        InputError,
        "ntk expects a function with a batch",
        "in_dims=None",
        "Call gram",
        lambda: wrap(torch.sin, in_dims=None).ntk(x),
    ),
    Message(
        InputError,
        "gradient_norms expects a function with a batch",
        "in_dims=None",
        "Call vjp",
        lambda: wrap(torch.sin, in_dims=None).gradient_norms(x, x),
    ),
    Message(
        InputError,
        "expected to return a scalar",
        "of shape .3, 2.",
        "return the sum",
        lambda: wrap(torch.sin).ggn_product(x, x, loss=torch.sin),
    ),
    # a part of the output
    Message(OptionError, "select must be a path", "got 3", "or a function", lambda: wrap(torch.sin, select=3)),
    Message(
        OptionError,
        "exclude each other",
        "select and has_aux=True",
        "Leave has_aux out",
        lambda: wrap(torch.sin, select="y", has_aux=True),
    ),
    Message(
        OutputError,
        "expected to pick a part of func's output",
        "has no 'logit' .did you mean 'logits'",
        "Name keys",
        lambda: jac(lambda z: {"logits": z}, x, select="logit"),
    ),
    Message(
        UnsupportedError,
        "a vector without a graph was expected",
        "reads its parameters past",
        "Pass vector.detach",
        lambda: AutoJacobian.of_parameters(Listing(), store=":memory:", on_miss="estimate").vjp(
            x, Listing.weight.exp() * x
        ),
    ),
    Message(
        InputError,
        "do not depend on the parameters of Listing",
        "one was computed from them",
        "Pass x.detach",
        lambda: of_listing()(Listing.weight.exp() * x),
    ),
    Message(
        OptionError, "a number of axes, 1 or more", "got 0", "pass in_dims=None", lambda: wrap(torch.sin, batch_dims=0)
    ),
    Message(
        OptionError,
        "expected for a wrapper of autojac's own class",
        "got Derived",
        "Let it hold a wrapper",
        lambda: type("Derived", (AutoJacobian,), {})(torch.sin, batch_dims=2),
    ),
    Message(
        UnsupportedError,
        "a derivative of every operator was expected",
        "reverse mode raises NotImplementedError: the derivative for 'zeta' is not implemented",
        "Compute without that operator",
        lambda: jac(lambda x: torch.special.zeta(x + 1, x + 1), x),
    ),
    Message(
        InputError,
        "parameters and buffers with shapes were expected",
        "an UninitializedParameter of a lazy module",
        "Call func once",
        lambda: jac(nn.LazyLinear(2), x),
    ),
    Message(
        InputError,
        "argument 0 is to be differentiated",
        r"computes the field Computing.norm \(init=False\) itself",
        "Compute it inside func",
        lambda: jac(lambda points: points.x, Computing(x)),
    ),
    Message(
        OptionError,
        "batch_dims=2 expects in_dims of 0, None and 'auto'",
        "got 1",
        "Move the axes",
        lambda: wrap(torch.sin, batch_dims=2, in_dims=1),
    ),
    Message(
        InputError,
        "batch_dims=3 expects tensors with 3 batch axes in front",
        r"got \(3, 2\)",
        "Add the axes, lower batch_dims",
        lambda: jac(torch.sin, x, batch_dims=3),
    ),
    Message(
        InputError,
        "a dense tensor with batch axes was expected",
        "stored as torch.sparse_coo",
        r"Pass x.to_dense\(\)",
        lambda: jac(torch.sin, x.to_sparse(), batch_dims=2),
    ),
    Message(
        InputError,
        "tensors of one shape for all samples were expected",
        "an argument is a nested tensor",
        "Pass a padded tensor",
        lambda: jac(torch.sin, ragged(), batch_dims=2),
    ),
    Message(
        InputError,
        "arguments share batch axes",
        r"theirs are \[\(3, 1\), \(3, 2\)\]",
        "Pass equal sizes, or None in in_dims",
        lambda: jac(torch.mul, x[..., None], x[:, :1, None], batch_dims=2, in_dims=0),
    ),
    Message(
        OutputError,
        r"batch_dims=2 expects func's outputs to have the batch axes \(3, 2\) in front",
        r"got shape \(3,\)",
        "Return .* say by in_dims .* or lower batch_dims",
        lambda: jac(lambda x: x.sum(1), x, batch_dims=2),
    ),
    Message(
        UnsupportedError,
        "fits into the memory limit was expected",
        "samples share what is differentiated",
        "Raise memory_limit",
        lambda: wrap(torch.mul, argnums=(0, 1), in_dims=(0, None), memory_limit="150B").solve(x, x[0], x),
    ),
    Message(
        InputError,
        "ntk expects two calls whose Jacobians have equally many columns",
        "got 2 and 1 for a sample",
        "Pass inputs of equal shapes",
        lambda: wrap(torch.sin).ntk(x, x[:, :1]),
    ),
    Message(
        VerificationError,
        r"the batch axes \(3, 2\) in front was expected",
        r"got \(6,\)",
        "Pass the layout and batch_dims",
        lambda: verify(x.flatten(), torch.sin, x, batch_dims=2),
    ),
)
INTERNAL = {
    "graph": "why a call can't be recorded: a reason that explain() lists; see test_recorder.py",
    "replay": "why a plan runs without replay: a reason that explain() lists",
    "guards": "why torch.func's transforms can't be used: a reason that explain() lists",
    "api/from_graph.py:_no_func": "stands in for a function that no method of jacobian_from calls",
    "api/low_rank_factors.py:_check": "a fault of autojac's own",
    "api/linalg.py:as_matrices": "the layouts that get there have these shapes",
    "api/linalg.py:_check": "Jacobians are real floating-point matrices",
    "methods/base.py:build": "a stored plan of another version of autojac, which is ignored",
    "sparse/colorings.py:apart": "declared patterns are checked before",
}
"""What no user sees as an error: rooms, or functions, and why."""
