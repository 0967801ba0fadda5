"""Wrappers of functions whose batch runs over several axes: each call goes to one that sees a single batch axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor

from autojac.api.flat_calls import CallsOverBatchAxes, FlattenedCall
from autojac.api.kernels import tangent_kernel
from autojac.api.products import LAST, apart_from_own, without_last
from autojac.core.batch_grid import split_axis
from autojac.core.options import Options
from autojac.core.plan import Effort, Plan
from autojac.planning.plan_repository import function_name


class PlansOverBatchAxes:
    """What wrappers of every kind do for several batch axes as the one does that sees a single axis."""

    func: Callable[..., Any]
    _calls: CallsOverBatchAxes

    def __repr__(self) -> str:
        kind = next(base for base in type(self).__mro__ if vars(base).get("over_batch_axes") is type(self))
        return f"{kind.__name__}({function_name(self.func)}, batch_dims={self._calls.batch_dims})"

    def _flat_call(
        self, of: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[FlattenedCall, tuple[Any, ...], bool]:
        """Return a call with one batch axis, what a method of its wrapper takes, and whether of several vectors."""
        if of is None or of not in LAST:
            call = self._calls.flat(args)
            return call, call.args, False
        inputs, vectors = without_last(args, of)
        call = self._calls.flat(inputs)
        if LAST[of] == "v":
            flat, several = call.tangents(vectors)
        else:
            flat, several = call.cotangents(vectors, kwargs, LAST[of], several=of == "vjp")
        return call, (*call.args, flat), several

    def plan(self, *args: Any, of: Any = None, **kwargs: Any) -> Plan:
        call, own, chosen = self._call_behind(of, args, kwargs)
        plan: Plan = call.wrapper.plan(*own, **chosen)
        return plan

    def tune(
        self, *args: Any, of: Any = None, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any
    ) -> Plan:
        call, own, chosen = self._call_behind(of, args, kwargs)
        plan: Plan = call.wrapper.tune(*own, effort=effort, budget_s=budget_s, **chosen)
        return plan

    def explain(self, *args: Any, of: Any = None, **kwargs: Any) -> str:
        call, own, chosen = self._call_behind(of, args, kwargs)
        text: str = call.wrapper.explain(*own, **chosen)
        return text

    def _call_behind(
        self, of: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[FlattenedCall, tuple[Any, ...], dict[str, Any]]:
        """Return a call with one batch axis, and arguments and keywords of what tells of its plan."""
        chosen, others = apart_from_own(of, kwargs)
        call, own, _ = self._flat_call(of, args, others)
        if chosen.get("loss") is not None:
            chosen["loss"] = call.loss(chosen["loss"])
        return call, own, {**others, **chosen, **({} if of is None else {"of": of})}


class PlannedOverBatchAxes(PlansOverBatchAxes):
    """A wrapper for several batch axes whose one `AutoJacobian`, or what stands for it, is `planned`."""

    planned: Any
    _of_one_axis: Callable[[Callable[..., Any], Any], Any]

    def __init__(self, *args: Any, batch_dims: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._calls = self._calls_over(batch_dims)

    def _calls_over(self, batch_dims: int) -> CallsOverBatchAxes:
        return CallsOverBatchAxes(self._of_one_axis, self.func, batch_dims, self.planned.options)

    def _without_search(self) -> Self:
        made: Self = super()._without_search()  # type: ignore[misc]
        made._calls = made._calls_over(self._calls.batch_dims)
        return made

    def __autojac_reach__(self) -> dict[str, Any]:
        return {**super().__autojac_reach__(), "batch_dims": self._calls.batch_dims}  # type: ignore[misc]


class OverBatchAxes(PlansOverBatchAxes):
    """The methods of a wrapper for several batch axes: those of one for a single axis, around which all are restored.

    What is a matrix of the whole batch stays one of the flattened batch: sparse Jacobians, `factors`, operators, and
    the Gram matrices of `layout="full"`. `chunks` counts samples as the flattened batch does.
    """

    options: Options

    def __autojac_rests__(self) -> bool:
        """Check whether no plan in use is ever checked again."""
        return bool(self._calls.wrappers) and all(wrapper.__autojac_rests__() for wrapper in self._calls.wrappers)

    @property
    def _is_one_matrix(self) -> bool:
        return self.options.layout in ("full", "sparse")

    def _split(self, found: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return a result apart from aux, in a tuple that is empty without one."""
        return (found[0], (found[1],)) if self.options.has_aux else (found, ())

    def _call_flat(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool, **given: Any) -> Any:
        """Return what a method of the flattened batch gives, per sample unless it is of the `whole` batch."""
        call = self._calls.flat(args)
        found, aux = self._split(getattr(call.wrapper, name)(*call.args, **given, **kwargs))
        led = found if whole else call.lead(found)
        return (led, *aux) if aux else led

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        found, aux = self._split(call.wrapper(*call.args, **kwargs))
        jacobian = call.jacobian(found, self.options.layout)
        return (jacobian, *aux) if aux else jacobian

    def value_and_jacobian(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        call = self._calls.flat(args)
        value, jacobian, *aux = call.wrapper.value_and_jacobian(*call.args, **kwargs)
        return (call.value(value), call.jacobian(jacobian, self.options.layout), *aux)

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        if self.options.layout != "full":
            return self._call_flat("inverse", args, kwargs, False)
        call = self._calls.flat(args)
        found, aux = self._split(call.wrapper.inverse(*call.args, **kwargs))
        outputs = len(call.shapes(kwargs).outputs[0])
        # (B, *in, B, *out), or (*in, B, *out) for an input that all samples share
        found = split_axis(found, found.dim() - outputs - 1, call.sizes)
        inverse = found if call.inputs[:1] in ((), (None,)) else call.lead(found)
        return (inverse, *aux) if aux else inverse

    def slogdet(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("slogdet", args, kwargs, self.options.layout == "full")

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("trace", args, kwargs, False)

    def factors(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.factors(*call.args, **kwargs)

    def linear_operator(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.linear_operator(*call.args, **kwargs)

    def chunks(self, *args: Any, bytes: int | str = "1GiB", out: Any = None, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.chunks(*call.args, bytes=bytes, out=out, **kwargs)

    def gram(self, *args: Any, outer: bool = False, **kwargs: Any) -> Any:
        return self._call_flat("gram", args, kwargs, self._is_one_matrix, outer=outer)

    def norm(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("norm", args, kwargs, self._is_one_matrix)

    def singular_values(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_flat("singular_values", args, kwargs, self._is_one_matrix)

    def jvp(self, *args: Any, **kwargs: Any) -> Any:
        call, own, several = self._flat_call("jvp", args, kwargs)
        found, aux = self._split(call.wrapper.jvp(*own, **kwargs))
        pushed = call.lead(found, int(several))
        return (pushed, *aux) if aux else pushed

    def vjp(self, *args: Any, **kwargs: Any) -> Any:
        call, own, several = self._flat_call("vjp", args, kwargs)
        found, aux = self._split(call.wrapper.vjp(*own, **kwargs))
        pulled = call.like_inputs(found, several, not self._is_one_matrix)
        return (pulled, *aux) if aux else pulled

    def solve(self, *args: Any, damping: float | Tensor = 0.0, **kwargs: Any) -> Any:
        call, own, _ = self._flat_call("solve", args, kwargs)
        if isinstance(damping, Tensor) and damping.shape == call.sizes and not self._is_one_matrix:
            damping = damping.flatten()
        found, aux = self._split(call.wrapper.solve(*own, damping=damping, **kwargs))
        step = call.like_inputs(found, shared=not self._is_one_matrix)
        return (step, *aux) if aux else step

    def ntk(self, x: Any, y: Any = None, **kwargs: Any) -> Tensor:
        calls = [self._calls.flat(each if isinstance(each, tuple) else (each,)) for each in (x, y) if each is not None]
        pairs = tangent_kernel([(call.wrapper, call.args) for call in calls], kwargs)
        led: Tensor = calls[0].lead(calls[-1].lead(pairs, 1))
        return led

    def ggn_product(self, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Any:
        call, own, several = self._flat_call("ggn_product", args, kwargs)
        product = call.wrapper.ggn_product(*own, loss=None if loss is None else call.loss(loss), **kwargs)
        return call.like_inputs(product, several, shared=False)

    def gradient_norms(self, *args: Any, **kwargs: Any) -> Tensor:
        call, own, _ = self._flat_call("gradient_norms", args, kwargs)
        norms: Tensor = call.lead(call.wrapper.gradient_norms(*own, **kwargs))
        return norms
