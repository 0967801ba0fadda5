"""Wrappers of functions whose batch runs over several axes: each call goes to one that sees a single batch axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor

from autojac.api.flat_calls import CallsOverBatchAxes
from autojac.api.kernels import tangent_kernel
from autojac.api.products import without_last
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

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        call = self._calls.flat(args)
        plan: Plan = call.wrapper.plan(*call.args, **kwargs)
        return plan

    def tune(self, *args: Any, effort: Effort | None = None, budget_s: float | None = None, **kwargs: Any) -> Plan:
        call = self._calls.flat(args)
        plan: Plan = call.wrapper.tune(*call.args, effort=effort, budget_s=budget_s, **kwargs)
        return plan

    def explain(self, *args: Any, **kwargs: Any) -> str:
        call = self._calls.flat(args)
        text: str = call.wrapper.explain(*call.args, **kwargs)
        return text


class PlannedOverBatchAxes(PlansOverBatchAxes):
    """A wrapper for several batch axes whose one `AutoJacobian`, or what stands for it, is `planned`."""

    planned: Any
    _of_one_axis: Callable[[Callable[..., Any], Any], Any]

    def __init__(self, *args: Any, batch_dims: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._calls = self._calls_over(batch_dims)

    def _calls_over(self, batch_dims: int) -> CallsOverBatchAxes:
        return CallsOverBatchAxes(self._of_one_axis, self.func, batch_dims, self.planned.options)

    def _settled(self) -> Self:
        made: Self = super()._settled()  # type: ignore[misc]
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

    def _led(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool, **given: Any) -> Any:
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
            return self._led("inverse", args, kwargs, False)
        call = self._calls.flat(args)
        found, aux = self._split(call.wrapper.inverse(*call.args, **kwargs))
        outputs = len(call.shapes(kwargs).outputs[0])
        # (B, *in, B, *out), or (*in, B, *out) for an input that all samples share
        found = split_axis(found, found.dim() - outputs - 1, call.sizes)
        inverse = found if call.inputs[:1] in ((), (None,)) else call.lead(found)
        return (inverse, *aux) if aux else inverse

    def slogdet(self, *args: Any, **kwargs: Any) -> Any:
        return self._led("slogdet", args, kwargs, self.options.layout == "full")

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._led("trace", args, kwargs, False)

    def factors(self, *args: Any, **kwargs: Any) -> Any:
        return self._led("factors", args, kwargs, True)

    def linear_operator(self, *args: Any, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.linear_operator(*call.args, **kwargs)

    def chunks(self, *args: Any, bytes: int | str = "1GiB", out: Any = None, **kwargs: Any) -> Any:
        call = self._calls.flat(args)
        return call.wrapper.chunks(*call.args, bytes=bytes, out=out, **kwargs)

    def gram(self, *args: Any, outer: bool = False, **kwargs: Any) -> Any:
        return self._led("gram", args, kwargs, self._is_one_matrix, outer=outer)

    def norm(self, *args: Any, **kwargs: Any) -> Any:
        return self._led("norm", args, kwargs, self._is_one_matrix)

    def singular_values(self, *args: Any, **kwargs: Any) -> Any:
        return self._led("singular_values", args, kwargs, self._is_one_matrix)

    def jvp(self, *args: Any, **kwargs: Any) -> Any:
        inputs, vectors = without_last(args, "jvp")
        call = self._calls.flat(inputs)
        tangents, several = call.tangents(vectors)
        found, aux = self._split(call.wrapper.jvp(*call.args, tangents, **kwargs))
        pushed = call.lead(found, int(several))
        return (pushed, *aux) if aux else pushed

    def vjp(self, *args: Any, **kwargs: Any) -> Any:
        inputs, vectors = without_last(args, "vjp")
        call = self._calls.flat(inputs)
        cotangents, several = call.cotangents(vectors, kwargs, "u")
        found, aux = self._split(call.wrapper.vjp(*call.args, cotangents, **kwargs))
        pulled = call.like_inputs(found, several, not self._is_one_matrix)
        return (pulled, *aux) if aux else pulled

    def solve(self, *args: Any, damping: float | Tensor = 0.0, **kwargs: Any) -> Any:
        inputs, residual = without_last(args, "solve")
        call = self._calls.flat(inputs)
        r, _ = call.cotangents(residual, kwargs, "r", several=False)
        if isinstance(damping, Tensor) and damping.shape == call.sizes and not self._is_one_matrix:
            damping = damping.flatten()
        found, aux = self._split(call.wrapper.solve(*call.args, r, damping=damping, **kwargs))
        step = call.like_inputs(found, shared=not self._is_one_matrix)
        return (step, *aux) if aux else step

    def ntk(self, x: Any, y: Any = None, **kwargs: Any) -> Tensor:
        calls = [self._calls.flat(each if isinstance(each, tuple) else (each,)) for each in (x, y) if each is not None]
        pairs = tangent_kernel([(call.wrapper, call.args) for call in calls], kwargs)
        led: Tensor = calls[0].lead(calls[-1].lead(pairs, 1))
        return led

    def ggn_product(self, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Any:
        inputs, vectors = without_last(args, "ggn_product")
        call = self._calls.flat(inputs)
        tangents, _ = call.tangents(vectors)
        own = None if loss is None else lambda outputs: loss(call.value(outputs))
        return call.like_inputs(call.wrapper.ggn_product(*call.args, tangents, loss=own, **kwargs), shared=False)

    def gradient_norms(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs, vectors = without_last(args, "gradient_norms")
        call = self._calls.flat(inputs)
        cotangents, _ = call.cotangents(vectors, kwargs, "u", several=False)
        norms: Tensor = call.lead(call.wrapper.gradient_norms(*call.args, cotangents, **kwargs))
        return norms
