"""The plans behind the methods of `AutoJacobian`: returned, searched for and explained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from autojac.api.kernels import Kernels
from autojac.api.planned_call import PlannedCall
from autojac.api.products import LAST, apart_from_own, without_last
from autojac.core.nests import is_differentiable, tensor_leaves
from autojac.core.options import check_budget
from autojac.core.plan import Effort, Plan, effort_rank
from autojac.core.product_functions import AlongTangents, WeightedOutput
from autojac.errors import require_choice

PlannedMethod = Literal[
    "jacobian", "jvp", "vjp", "gram", "norm", "singular_values", "solve", "inverse", "slogdet", "trace", "factors",
    "chunks", "ggn_product", "gradient_norms",
]  # fmt: skip
"""What an `AutoJacobian` has plans for: the Jacobian, and the computations behind its methods of these names."""
HINT = (
    "\nhint: AutoHessian(func) plans second derivatives, and Derivatives(func, of=((), (0,), (1, 1))) computes only "
    "those by columns that are asked for"
)
"""Added to the explanation of a Jacobian of a Jacobian."""


class MethodPlans(Kernels):
    """The methods of `AutoJacobian` for the plans behind the other methods."""

    def plan(self, *args: Any, of: PlannedMethod = "jacobian", **kwargs: Any) -> Plan:
        """Return the plan for such a call; made now if there is none.

        Args:
            args, kwargs: the call; that of the method which `of` names, such as (x, v) for `"jvp"`.
            of: what the plan is for: the Jacobian, or what a method of this name computes by, which may be the
                Jacobian, that in another layout, a part of it, or a product. `ggn_product` has two plans, of a product
                along v and of one back, and so has `solve` where the Jacobian does not fit; this returns the first.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(torch.sin, store=":memory:", on_miss="estimate")
            >>> x = torch.rand(8, 3)
            >>> jac.plan(x, torch.ones(8, 3), of="jvp").structure.coupling
            'independent'
        """
        return next(self._calls_behind(of, args, kwargs)).prepare().plan

    def tune(
        self,
        *args: Any,
        of: PlannedMethod = "jacobian",
        effort: Effort | None = None,
        budget_s: float | None = None,
        **kwargs: Any,
    ) -> Plan:
        """Search for the best plan for such a call, and remember it.

        Args:
            args, kwargs, of: as of `plan`. Where there are two plans, both are searched for.
            effort: `"quick"`, `"measure"` or `"exhaustive"`; the wrapper's own by default.
            budget_s: seconds the search may take, overshot by one candidate's run at most.

        Among several ranks of a process group nothing is timed and the effort is `"estimate"`: ranks that decide by
        their clocks evaluate func unequally often, and wait for each other for ever if it communicates.
        """
        check_budget(budget_s)
        effort = self.options.effort if effort is None else effort
        effort_rank(effort)
        plans = [call.tune(effort, budget_s) for call in self._calls_behind(of, args, kwargs)]
        return plans[0]

    def explain(self, *args: Any, of: PlannedMethod = "jacobian", **kwargs: Any) -> str:
        """Explain the plan: what was probed, and every candidate with its time and memory or why it was rejected.

        Args:
            args, kwargs, of: as of `plan`. Where there are two plans, both are explained.
        """
        text = "\n\n".join(call.explain() for call in self._calls_behind(of, args, kwargs))
        return text + HINT * isinstance(self.func, MethodPlans)

    def _calls_behind(
        self, of: PlannedMethod, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[PlannedCall]:
        """Yield the calls that a method computes by; a later one may depend on the result of an earlier one."""
        require_choice("of", of, get_args(PlannedMethod))
        keywords, kwargs = apart_from_own(of, kwargs)
        if of in LAST:
            inputs, vectors = without_last(args, of)
            yield from self._calls_with(of, self._func_args(inputs, kwargs), kwargs, vectors, keywords.get("loss"))
            return
        func_args, pieces = self._func_args(args, kwargs), None
        if of == "jacobian" or (of == "norm" and self.options.layout == "sparse"):
            yield PlannedCall(self, func_args, kwargs)
        elif of in ("trace", "factors"):
            yield PlannedCall(self._other("diagonal" if of == "trace" else "blocks"), func_args, kwargs)
        elif of == "chunks":
            yield from self._calls_of_parts(func_args, kwargs, keywords.get("bytes", "1GiB"))
        else:
            if of in ("gram", "norm", "singular_values"):
                self._require_dense(of)
            if of in ("gram", "norm"):
                pieces = self._pieces(of, func_args, self._shapes(func_args, kwargs), keywords.get("outer", False))
            if pieces is None:
                yield self._matrices_call(func_args, kwargs)
            else:
                vectors = pieces.vectors(*pieces.spans[0])
                yield self._product_call(pieces.kind, func_args, kwargs, vectors, pieces.whole)[1]

    def _calls_with(
        self,
        of: PlannedMethod,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        vectors: Any,
        loss: Callable[[Any], Tensor] | None,
    ) -> Iterator[PlannedCall]:
        """Yield the calls that a method of vectors computes by."""
        along, back = (
            functools.partial(self._product_call, kind, args, kwargs) for kind in (AlongTangents, WeightedOutput)
        )
        if of in ("jvp", "vjp"):
            yield (along if of == "jvp" else back)(vectors, self._is_whole)[1]
        elif of == "gradient_norms":
            call, room = self._gradients_call(args, kwargs, vectors)
            yield from [call] if room is None else call.wrapper._calls_of_parts(call.args, call.kwargs, room)
        elif of == "ggn_product":
            yield along(vectors, True)[1]
            yield back(self._push(args, kwargs, vectors, loss), True)[1]
        elif (formed := self._solve_call(args, kwargs, self._shapes(args, kwargs))) is not None:
            yield formed
        else:
            inputs = [t for t in tensor_leaves(self._pick_differentiated(args)) if is_differentiable(t)]
            yield back(vectors, self._is_whole)[1]
            yield along(self._nested_inputs(args, [torch.zeros_like(t) for t in inputs]), self._is_whole)[1]

    def _calls_of_parts(self, args: Sequence[Any], kwargs: Mapping[str, Any], room: int | str) -> Iterator[PlannedCall]:
        """Yield the call for the first part of a Jacobian; of the whole batch's, one for each output."""
        shapes, step = self._division(args, kwargs, room)
        stop = min(step, int(shapes.batch or 0))
        if not self._is_whole:
            yield self._part_call(args, kwargs, shapes, 0, stop)
            return
        for seeds in self._row_seeds(args, shapes, 0, stop):
            yield self._product_call(WeightedOutput, args, kwargs, seeds, True)[1]
