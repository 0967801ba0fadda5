"""What a method is: seeds pushed or pulled through a function, as a frozen candidate of the search.

The instance is the candidate: its fields are the tunables and its JSON spec is the row in the store. Methods are
found by walking this package, so a file with a `Method` subclass is searched, tested and documented.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

from torch import Tensor

import autojac.methods
from autojac.autodiff.open_modes import transforming
from autojac.core.structure import DRAWS, DRAWS_ALIKE, EXCHANGES, KEEPS, SETS_ARGUMENTS, UPDATES_BUFFERS
from autojac.errors import StoreError
from autojac.graph.special_kernels import ATTENTION
from autojac.guards.assignments import leaving
from autojac.guards.escapes import DataAssignedError
from autojac.methods.support.func_runs import FuncRuns
from autojac.methods.support.leave_once import leave_once
from autojac.methods.support.reverse_mode import ReverseMode, seeds_for
from autojac.problem.compression import DeviceIndices
from autojac.problem.problem import Compute, Problem, Result
from autojac.problem.randomness import from_one_state
from autojac.replay.replayer import Replayer
from autojac.replay.trace import Lower


@dataclass(frozen=True)
class Method(ABC):
    """One way to compute a Jacobian.

    Subclasses are frozen dataclasses whose fields are plain JSON values or inner methods.
    """

    runs: ClassVar[FuncRuns] = FuncRuns.ANYHOW
    is_wrapper: ClassVar[bool] = False
    """Whether it goes around any other method: such ones don't go around each other of their own accord."""
    goes_into_chunks: ClassVar[bool] = True
    """Whether a search tries it for chunks of the batch."""
    makes_derivatives: ClassVar[bool] = False
    """Whether it makes derivatives by columns (`Problem.of`); a wrapper does where its inner method does."""

    def unsupported(self, problem: Problem) -> str | None:
        """Return why this method can't serve the problem, as a sentence to act on; None if it can."""
        # these are put right after the call, however func is run in it
        effects = tuple(effect for effect in problem.structure.effects if effect not in (KEEPS, SETS_ARGUMENTS))
        if EXCHANGES in effects and self.uses_transforms:
            # torch lets a plain tensor be given a transform's own, and crashes when that is read
            return f"func {EXCHANGES}, which torch.func's transforms can't do"
        if problem.of and not self.makes_derivatives:
            return "it makes Jacobians, not single derivatives"
        harmless = {DRAWS_ALIKE, EXCHANGES, DRAWS} if self.runs is FuncRuns.WHOLE_BATCH else {DRAWS_ALIKE, EXCHANGES}
        if self.repeats_func and set(effects) - harmless:
            return f"func {' and '.join(effects)}, so it must run exactly once and on the whole batch"
        if self.runs is FuncRuns.ANYHOW and problem.structure.branches == "by values":
            return "func looks at values of tensors, as `if x.sum() > 0` does, so it must run on the whole batch"
        if problem.has_aux and effects and not self.runs_func_plainly:
            does = " and ".join(effects)
            return f"func {does} and returns aux, so it must run exactly once and outside of transforms"
        once = problem.forward_once(self.runs is FuncRuns.RECORDED) if problem.differentiable and self.pushes else ()
        if once:
            return (
                f"func may run {' and '.join(once)}, whose forward mode in torch has a wrong derivative, and this "
                "Jacobian is differentiable. Under torch.no_grad() it is not"
            )
        if ATTENTION in problem.structure.kernels and (self.pushes or problem.differentiable):
            lacks = "forward mode" if self.pushes else "second derivative"
            return f"func uses a fused {ATTENTION}, whose kernel has no {lacks} in torch; its formula has"
        if {KEEPS, UPDATES_BUFFERS} <= set(problem.structure.effects) and not self.runs_func_plainly:
            return f"func {KEEPS} and {UPDATES_BUFFERS}, so it must run exactly once and outside of transforms"
        if problem.layout == "sparse" and not self.makes_sparse and not problem.structure.independent:
            return "it makes blocks, which are not all of the Jacobian where samples are coupled"
        return None

    @property
    def repeats_func(self) -> bool:
        """Whether func runs more than once, or on anything but the whole batch as it is."""
        return self.runs in (FuncRuns.ANYHOW, FuncRuns.WHOLE_BATCH)

    @property
    def pushes(self) -> bool:
        """Whether the method may go through torch's forward mode."""
        return False

    @property
    def trusts_zeros(self) -> bool:
        """Whether the method is wrong where a pattern misses an entry."""
        return False

    @property
    def makes_sparse(self) -> bool:
        """Whether `prepare` knows the layout `sparse`; what else is asked for it makes blocks."""
        return False

    @property
    def is_chunked(self) -> bool:
        """Whether the method cuts its work into pieces itself: chunks of chunks are not worth timing."""
        return getattr(self, "chunk", None) is not None

    @property
    def makes_flat_programs(self) -> bool:
        """Whether it makes programs of plain operators, which a compiler takes as they are."""
        return False

    @property
    def uses_transforms(self) -> bool:
        """Whether func runs inside of transforms of torch.func."""
        return getattr(self, "engine", None) == "vmap"

    @property
    def may_load_compiler(self) -> bool:
        """Whether its first run in a process may wait for torch's compiler to be loaded (1 s), or to compile."""
        return self.compiles

    @property
    def runs_func_plainly(self) -> bool:
        """Whether func runs exactly once, on the whole batch and outside of every transform."""
        return self.runs is FuncRuns.RECORDED or (self.runs is FuncRuns.ONCE and not self.uses_transforms)

    @property
    def compiles(self) -> bool:
        """Whether preparing the method takes seconds: such candidates are tried last."""
        return False

    def prepare_lowered(self, problem: Problem, lower: Lower) -> Compute | None:
        """Prepare with something else made of each program; return None for a method that makes none."""
        return None

    @classmethod
    @abstractmethod
    def candidates(cls, problem: Problem, depth: int) -> Iterator[Self]:
        """Return the settings worth timing; `depth` 0 is a quick search, 1 adds compilers, 2 is exhaustive."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Compute:
        """Make once what depends on shapes alone, and return the function that computes."""

    def prepare_call(self, problem: Problem) -> Compute:
        """Prepare, and let all evaluations of func within one call draw the same numbers."""
        compute = self.prepare_layout(problem)
        if isinstance(compute, Replayer):
            # its program draws as one run of func does, and runs no transform
            return compute
        if self.uses_transforms and not problem.trial:
            compute = _with_plain_fallback(problem, compute)
        if problem.structure.branches == "by values" and self.repeats_func:
            compute = leave_once(problem, compute)
        elif problem.places and self.repeats_func:
            # what func set while it ran once, a cache, is not left with what a transform would put there
            compute = leaving(compute, problem.places, None)
        return from_one_state(compute, problem.generators) if problem.structure.draws else compute

    def prepare_layout(self, problem: Problem) -> Compute:
        """Prepare for the layout asked for."""
        return _prepare_layout(problem, self.prepare, self.makes_sparse)

    @abstractmethod
    def cost(self, problem: Problem) -> float:
        """Predict the seconds of one call, from passes, the graph's work and the machine's constants."""

    @abstractmethod
    def workspace(self, problem: Problem) -> int:
        """Return bytes needed at least beyond the Jacobian: known before anything runs."""

    def spec(self) -> dict[str, Any]:
        """Return the method as JSON: its name, its fields, inner methods nested."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {name: value.spec() if isinstance(value, Method) else value for name, value in fields.items()}
        return {"method": type(self).__name__, **nested}


class Wrapper(Method):
    """A method around another one, its field `inner`, and as that is in all that a wrapper does not say itself."""

    inner: Method

    is_wrapper: ClassVar[bool] = True
    makes_derivatives: ClassVar[bool] = True

    @property
    def makes_sparse(self) -> bool:
        return self.inner.makes_sparse

    @property
    def pushes(self) -> bool:
        return self.inner.pushes

    @property
    def trusts_zeros(self) -> bool:
        return self.inner.trusts_zeros

    @property
    def is_chunked(self) -> bool:
        return self.inner.is_chunked

    @property
    def compiles(self) -> bool:
        return self.inner.compiles

    @property
    def uses_transforms(self) -> bool:
        return self.compiles or self.inner.uses_transforms

    @property
    def may_load_compiler(self) -> bool:
        return self.compiles or self.inner.may_load_compiler

    def workspace(self, problem: Problem) -> int:
        return self.inner.workspace(problem)


@cache
def registry() -> dict[str, type[Method]]:
    """Return every method by name, in the order of the files of this package."""
    found: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(autojac.methods.__path__):
        module = importlib.import_module(f"autojac.methods.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
                found[value.__name__] = value
    return {name: kind for name, kind in found.items() if kind.__module__ != Method.__module__}


def build(spec: Mapping[str, Any]) -> Method:
    """Return the method that a JSON spec describes.

    Raises:
        StoreError: if the spec names no known method, or fields that it does not have.
    """
    fields = dict(spec)
    kind = registry().get(str(fields.pop("method", None)))
    if kind is None:
        raise StoreError(f"a plan names the method {spec.get('method')!r}; known are {', '.join(registry())}")
    nested = {name: build(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
    try:
        return kind(**nested)
    except TypeError as error:
        raise StoreError(f"a plan has fields that {kind.__name__} does not: {error}") from error


def build_if_known(spec: Mapping[str, Any]) -> Method | None:
    """Return the method that a JSON spec describes; None for one of another version of autojac."""
    try:
        return build(spec)
    except StoreError:
        return None


def _with_plain_fallback(problem: Problem, compute: Compute) -> Compute:
    """Return a computation by transforms, or by a loop of plain VJPs where func starts to assign to `.data`."""
    loop: list[Compute] = []

    def compute_either(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        try:
            return compute(leaves, kwargs)
        except DataAssignedError:
            if transforming():
                raise
        if not loop:
            kind = seeds_for(problem)
            loop.append(_prepare_layout(problem, ReverseMode(kind).prepare, makes_sparse=kind == "identity"))
        return loop[0](leaves, kwargs)

    return compute_either


def _prepare_layout(problem: Problem, prepare: Callable[[Problem], Compute], makes_sparse: bool) -> Compute:
    """Prepare for the layout asked for; a sparse Jacobian is taken out of blocks where nothing makes it directly."""
    if problem.layout != "sparse" or makes_sparse:
        return prepare(problem)
    compute = prepare(dataclasses.replace(problem, layout="blocks"))
    places = [
        [DeviceIndices(problem.patterns(output, position)[1].places) for position in problem.inputs]
        for output in range(len(problem.outputs))
    ]

    def take(blocks: Tensor, stored: DeviceIndices) -> Tensor:
        rows = blocks.reshape(problem.batch, -1)
        return rows.reshape(-1) if len(stored.tensor) == rows.shape[1] else rows[:, stored.on(rows.device)].reshape(-1)

    def compute_sparse(leaves: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Result:
        result = compute(leaves, kwargs)
        pairs = zip(result.jacobians, places, strict=True)
        return result._replace(jacobians=tuple(tuple(map(take, row, stored)) for row, stored in pairs))

    return compute_sparse
