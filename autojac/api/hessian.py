"""Second derivatives: each sample's Hessian, its diagonal and Laplacian, and products with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, Unpack, get_args

from autojac.api.autojacobian import AutoJacobian, jacobian_of, require_function
from autojac.api.flat_calls import BatchAxesChoice
from autojac.api.method_plans import HINT, PlannedMethod
from autojac.api.over_batch_axes import PlannedOverBatchAxes
from autojac.api.product_arguments import of_samples
from autojac.core import pytree
from autojac.core.call import outside_inference_mode
from autojac.core.options import OnMiss, Options, OptionValues
from autojac.core.plan import Effort, Plan
from autojac.errors import OptionError, OutputError, UnsupportedError, require_choice
from autojac.guards.compiled_functions import opaque_methods
from autojac.problem.problem import Problem

PlannedDerivative = Literal["hessian", "diagonal", "laplacian", "hvp"]
"""What an `AutoHessian` has plans for."""


@opaque_methods
class AutoHessian(BatchAxesChoice):
    """Exact second derivatives of a function, each sample's own, by the cheapest method measured.

    `func` gives one scalar for each sample: x of shape (B, *in) gives y of shape (B,). A Hessian is the Jacobian of
    each sample's gradient, so everything that `AutoJacobian` knows applies: forward over reverse, reverse over reverse
    and forward over forward mode compete, recorded as flat programs or compiled; zeros are found and colored; every
    candidate is checked against plain VJPs, and training goes through the result. Samples may be coupled: the Hessian
    is of sample b's scalar in sample b's input. For a function without a batch, `in_dims=None`, it is a drop-in for
    `torch.func.hessian`.

        >>> import torch
        >>> from autojac import AutoHessian
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> hessian = AutoHessian(lambda x: net(x).squeeze(1))
        >>> x = torch.rand(64, 3)
        >>> hessian(x).shape
        torch.Size([64, 3, 3])
        >>> hessian.laplacian(x).shape
        torch.Size([64])

    Args:
        func: a function or module of the whole batch. Outputs (B, *out) give Hessians (B, *out, *in, *in).
        argnums: as of `torch.func.hessian`; int or tuple.
        in_dims: as of `AutoJacobian`; None for a function without a batch.
        layout: `"blocks"`, or `"sparse"`: one CSR matrix that is never dense on the way. Of a batch it is (B·n, B·n),
            for independent samples; of a function without a batch (n, n). Of its two equal halves one is read where
            that takes fewer passes, by a star coloring: each entry is its own or its mirror image's, nothing is
            subtracted. So are blocks with zeros; without zeros, n passes over n rows give every entry twice, and
            nothing is known that saves one of them.
        batch_dims: as of `AutoJacobian`: with 2 an input (B1, B2, *in) gives (B1, B2, *out, *in, *in).
        options: the others of `AutoJacobian` but `has_aux`.

    Raises:
        OptionError: for an unknown option or a value that is not accepted.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        argnums: int | tuple[int, ...] = 0,
        in_dims: Any = "auto",
        batch_dims: int = 1,
        **options: Unpack[OptionValues],
    ) -> None:
        require_function(func)
        if "has_aux" in options:
            raise OptionError("a Hessian has no has_aux. Leave it out, and return the one output from func")
        self.layout = options.get("layout", "blocks")
        require_choice("layout", self.layout, ("blocks", "sparse"))
        self._wrap(func, Options.from_keywords({"argnums": argnums, "in_dims": in_dims, **options}))

    def _wrap(self, func: Callable[..., Any], chosen: Options) -> None:
        """Create the wrappers for options that are checked already."""
        inner = chosen.replace(layout="blocks", effort="estimate", on_miss="estimate", budget_s=None)
        self._gradient = jacobian_of(func, inner)
        self.func = self._gradient.func
        # zeros that were declared are those of func's own Jacobian
        outer = chosen.replace(coupling=of_samples(chosen.coupling), symmetric=True)
        self.planned = jacobian_of(self._gradient, outer)
        self._diagonals = jacobian_of(self._gradient, outer.replace(layout="diagonal"))
        self._laplacian = jacobian_of(func, outer.replace(layout="blocks", symmetric=False), "laplacian")

    def _of_one_axis(self, func: Callable[..., Any], in_dims: Any) -> AutoHessian:
        """Return the Hessians of another function, by the same options, with one batch axis."""
        hessian = AutoHessian.__new__(AutoHessian)
        hessian.layout = self.layout
        hessian._wrap(func, self.planned.options.replace(in_dims=in_dims, symmetric=False))
        return hessian

    def _replace_on_miss(self, on_miss: OnMiss) -> Self:
        """Return the same Hessians where another value of `on_miss` says what to do without a plan."""
        hessian = copy.copy(self)
        hessian.planned = self.planned._replace_on_miss(on_miss)
        return hessian

    def __repr__(self) -> str:
        return f"AutoHessian({repr(self.planned).removeprefix('AutoJacobian(AutoJacobian of ')}"

    def __autojac_reach__(self) -> dict[str, Any]:
        """Return what another wrapper's fingerprint sees of this one."""
        return {"hessian": self.planned}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Hessians at these arguments.

        Returns:
            (B, *in, *in), or (B, *out, *in, *in) for outputs (B, *out); nested as `torch.func.hessian` nests them. For
            `layout="sparse"` a CSR matrix. Differentiable where inputs or parameters require grad.

        Raises:
            InputError, OutputError, MutationError, RandomnessError: where there is no such Hessian.
            UnsupportedError: for `layout="sparse"` where samples are coupled.
            SearchError: if no method is right within the limits.
        """
        if self.layout == "sparse":
            problem = self._gradient_problem(args, kwargs)
            self._require_scalar(problem, "a sparse Hessian")
            if not problem.structure.independent:
                raise UnsupportedError(
                    "samples are coupled, so each sample's scalar has a Hessian of its own, and no one matrix holds "
                    "them all. Ask for layout='blocks', or pass in_dims=None with a function that returns one scalar "
                    "for the whole batch"
                )
        return self.planned(*args, **kwargs)

    def diagonal(self, *args: Any, **kwargs: Any) -> Any:
        """Return the diagonal of each sample's Hessian, (B, n) for n numbers in a sample; one scalar per sample.

        Raises:
            OutputError: if func returns more than a scalar for each sample.
        """
        try:
            return self._diagonals(*args, **kwargs)
        except OutputError:
            self._require_scalar(self._gradient_problem(args, kwargs), "the diagonal of a Hessian")
            raise

    def laplacian(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Laplacian in each sample's input, the trace of its Hessian: shaped as func's output.

        Taylor mode with one row for the sum, the forward Laplacian of Li et al. (2023) and Dangel et al. (2025), and
        nested reverse mode compete. Differentiable.

        Raises:
            InputError: if more than one tensor is differentiated in.
        """
        return pytree.tree_map(lambda stack: stack.squeeze(-1), self._laplacian(*args, **kwargs))

    def hvp(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Hessian times a vector, H_b v_b for each sample, without forming H.

        Args:
            args: those of func, and at last v, nested and shaped as what is differentiated, or (k, B, *in) for several
                vectors at a time.
            kwargs: those of func.

        Returns:
            (B, *in), or (B, *out, *in) for outputs (B, *out). Differentiable, in v too.
        """
        return self.planned.jvp(*args, **kwargs)

    def _gradient_problem(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Problem:
        with outside_inference_mode(args, kwargs) as call:
            return self._gradient._plans.look_up(*call)[0].problem

    @staticmethod
    def _require_scalar(problem: Problem, what: str) -> None:
        if problem.out_size != 1:
            shapes = ", ".join(str((problem.batch, *event)) for event in problem.outputs)
            raise OutputError(
                f"{what} is of one scalar per sample, of shape (B,) or (B, 1), but func returns {shapes}. Return one "
                "scalar, or take the Hessians of all outputs by layout='blocks'"
            )

    def _planned_method(self, of: PlannedDerivative) -> tuple[AutoJacobian, PlannedMethod]:
        """Return the wrapper that has the plans, and which of its methods they are of."""
        require_choice("of", of, get_args(PlannedDerivative))
        wrappers = {"diagonal": self._diagonals, "laplacian": self._laplacian}
        return wrappers.get(of, self.planned), "jvp" if of == "hvp" else "jacobian"

    def plan(self, *args: Any, of: PlannedDerivative = "hessian", **kwargs: Any) -> Plan:
        """Return the plan for such a call; made now if there is none.

        Args:
            args, kwargs: the call; that of `hvp`, (x, v), for this.
            of: what the plan is for: `"hessian"`, `"diagonal"`, `"laplacian"` or `"hvp"`, each of which has plans of
                its own.
        """
        wrapper, method = self._planned_method(of)
        return wrapper.plan(*args, of=method, **kwargs)

    def tune(
        self,
        *args: Any,
        of: PlannedDerivative = "hessian",
        effort: Effort | None = None,
        budget_s: float | None = None,
        **kwargs: Any,
    ) -> Plan:
        """Search for the best plan for such a call, as `AutoJacobian.tune` does; `of` is that of `plan`."""
        wrapper, method = self._planned_method(of)
        return wrapper.tune(*args, of=method, effort=effort, budget_s=budget_s, **kwargs)

    def explain(self, *args: Any, of: PlannedDerivative = "hessian", **kwargs: Any) -> str:
        """Explain the plan, as `AutoJacobian.explain` does; `of` is that of `plan`."""
        wrapper, method = self._planned_method(of)
        return wrapper.explain(*args, of=method, **kwargs).removesuffix(HINT)


@opaque_methods
class _HessianOverBatchAxes(PlannedOverBatchAxes, AutoHessian):
    """An `AutoHessian` for several batch axes; what is sparse stays a matrix of the flattened batch."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.jacobian(call.wrapper(*call.args, **kwargs), self.layout)

    def diagonal(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.lead(call.wrapper.diagonal(*call.args, **kwargs))

    def laplacian(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.lead(call.wrapper.laplacian(*call.args, **kwargs))

    def hvp(self, *args: Any, **kwargs: Any) -> Any:
        call, flat_args, several = self._flat_call("hvp", args, kwargs)
        return call.lead(call.wrapper.hvp(*flat_args, **kwargs), int(several))


AutoHessian.over_batch_axes = _HessianOverBatchAxes
