"""Products with a Jacobian that need not be formed: along tangents, and with cotangents."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autojac.api.matrix_quantities import MatrixQuantities
from autojac.api.planned_call import PlannedCall
from autojac.api.product_arguments import (
    CallShapes,
    VectorNest,
    call_shapes,
    cotangents,
    nested_axes,
    of_samples,
    tangents,
)
from autojac.autodiff.open_modes import transforming
from autojac.core import pytree
from autojac.core.call import describe
from autojac.core.nests import is_differentiable, tensor_leaves
from autojac.core.product_functions import AlongTangents, ProductFunction, WeightedOutput
from autojac.errors import OptionError, UnsupportedError, plural
from autojac.planning.call import describe_keywords

LAST = {"jvp": "v", "hvp": "v", "vjp": "u", "solve": "r", "ggn_product": "v", "gradient_norms": "u"}
"""The vector that follows func's arguments, as messages name it."""
OWN = {"gram": ("outer",), "solve": ("damping",), "ggn_product": ("loss",), "chunks": ("bytes", "out")}
"""Keywords of methods that func does not get."""


@dataclasses.dataclass
class Product:
    """A product in use, for one kind of call.

    Attributes:
        jacobian: the wrapper whose Jacobian is the product.
        steps: of a product along tangents, its first arguments: zeros.
        nest: where the vectors are in what is passed.
        shapes: of the call.
        several_at: the axis of the result that runs over several vectors; None for a single one.
        is_formed: the Jacobian itself is computed, and multiplied.
        reads_past: it is a gradient in a module's own parameters, which nothing can replace.
        is_summed: the product with the Jacobian of the whole batch is the sum of those with each sample's.
    """

    jacobian: Any
    steps: tuple[Tensor, ...]
    nest: VectorNest
    shapes: CallShapes
    several_at: int | None
    is_formed: bool = False
    is_summed: bool = False
    reads_past: bool = False

    def of_jacobian(self, jacobian: Any) -> Any:
        """Return the product from the Jacobian of the function that `jacobian` wraps."""
        if len(self.steps) == 2:
            flat = tensor_leaves(jacobian)
            sums = [own + shared for own, shared in zip(flat[::2], flat[1::2], strict=True)]
            jacobian = self.shapes.nested_outputs(sums)
        if self.several_at is None and not self.is_summed:
            return jacobian
        return pytree.tree_map_only(Tensor, self._change, jacobian)

    def _change(self, part: Tensor) -> Tensor:
        vectors_first = part if self.several_at is None else part.movedim(self.several_at, 0)
        return vectors_first.sum(int(self.several_at is not None)) if self.is_summed else vectors_first


class Products(MatrixQuantities):
    """The methods of `AutoJacobian` that multiply with the Jacobian."""

    _products: dict[Any, Product]
    _call_shapes: dict[Any, CallShapes]

    def __autojac_needs_no_check__(self) -> bool:
        """Check whether no plan in use is ever checked again, so that recordings of calls need no checks."""
        others = all(other.__autojac_needs_no_check__() for other in self._others.values())
        rest = [plan.needs_no_check for _, plan in self._plans.items()]
        return others and not self._products and bool(rest) and all(rest)

    def jvp(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Jacobian times a vector, J_b v_b for each sample: the derivative of func along v.

        One forward pass where samples are independent, whatever the size of the Jacobian, which is not formed; coupled
        samples need a pass per color of their graph, or as many as their structure asks for, since J_b is the
        derivative in a sample's own input. `layout="full"` and `"sparse"` multiply with the Jacobian of the whole
        batch, in one pass whatever couples.

        Args:
            args: those of func, and at last v, nested as what is differentiated: tensors of the same shapes, or several
                vectors at a time with one more axis in front, (k, B, *in). For an argument that all samples share v has
                its shape, and serves all samples.
            kwargs: those of func.

        Returns:
            (B, *out), nested as the outputs are; (k, B, *out) for several vectors. Differentiable in whatever J is, and
            in v. With `has_aux=True` the pair (product, aux).

        Raises:
            InputError: if v is not nested or shaped as what is differentiated.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: x.sin(), store=":memory:", on_miss="estimate")
            >>> jac.jvp(torch.zeros(3, 2), torch.ones(3, 2)).shape
            torch.Size([3, 2])
        """
        inputs, tangents = without_last(args, "jvp")
        return self._product(AlongTangents, self._func_args(inputs, kwargs), kwargs, tangents, self._is_whole)

    def vjp(self, *args: Any, **kwargs: Any) -> Any:
        """Return a vector times the Jacobian, u_bᵀ J_b for each sample: the gradient of each sample's u_b · y_b.

        One backward pass where samples are independent; coupled samples need what `jvp` says of them. In parameters, or
        another argument that all samples share, these are per-sample gradients, (B, *arg). `layout="full"` and
        `"sparse"` multiply with the Jacobian of the whole batch, which gives (B, *in), and (*arg) for what is shared.

        Args:
            args: those of func, and at last u, nested as its outputs: (B, *out), or (k, B, *out) for several vectors.
            kwargs: those of func.

        Returns:
            (B, *in), nested as what is differentiated; (k, B, *in) for several vectors. Differentiable in whatever J
            is, and in u. With `has_aux=True` the pair (product, aux).

        Raises:
            InputError: if u is not nested or shaped as the outputs.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: x.sum(1), store=":memory:", on_miss="estimate")
            >>> jac.vjp(torch.zeros(3, 2), torch.tensor([1.0, 2.0, 3.0]))
            tensor([[1., 1.],
                    [2., 2.],
                    [3., 3.]])
        """
        inputs, cotangents = without_last(args, "vjp")
        return self._product(WeightedOutput, self._func_args(inputs, kwargs), kwargs, cotangents, self._is_whole)

    @property
    def _is_whole(self) -> bool:
        """Whether the Jacobian is that of the whole batch."""
        return self.options.layout in ("full", "sparse")

    def _product(
        self, kind: type[ProductFunction], args: Sequence[Any], kwargs: Mapping[str, Any], vectors: Any,
        whole: bool = False,
    ) -> Any:  # fmt: skip
        """Return a product with each sample's own Jacobian, or with that of the whole batch."""
        product, call = self._product_call(kind, args, kwargs, vectors, whole)
        if product.is_formed:
            plan, outcome = call.run()
            along = times_parameters(outcome.jacobians, product.nest.flat(vectors), product.several_at is not None)
            return self._beside_aux(plan.layout.value(along, itertools.repeat(None)), outcome)
        result = product.jacobian(*call.args, **kwargs)
        if self.options.has_aux:
            return product.of_jacobian(result[0]), result[1]
        return product.of_jacobian(result)

    def _product_call(
        self, kind: type[ProductFunction], args: Sequence[Any], kwargs: Mapping[str, Any], vectors: Any,
        whole: bool = False,
    ) -> tuple[Product, PlannedCall]:  # fmt: skip
        """Return a product, and the call that gives it."""
        product = self._prepare(kind, args, kwargs, vectors, whole)
        if product.is_formed:
            return product, PlannedCall(self, args, kwargs)
        return product, PlannedCall(product.jacobian, (*product.steps, *product.nest.flat(vectors), *args), kwargs)

    def _prepare(
        self, kind: type[ProductFunction], args: Sequence[Any], kwargs: Mapping[str, Any], vectors: Any, whole: bool
    ) -> Product:
        """Return the product for such a call, prepared now if there is none."""
        key = (kind, whole, *map(describe, (*args, vectors)), *describe_keywords(kwargs))
        product = self._products.get(key)
        if product is None:
            product = self._products[key] = self._make(kind, args, kwargs, vectors, whole)
        if product.reads_past and any(vector.grad_fn is not None for vector in tensor_leaves(vectors)):
            raise UnsupportedError(
                "this module reads its parameters past its arguments, so a vector without a graph was expected, got "
                "one whose graph may lead to them. Pass vector.detach()"
            )
        return product

    def _make(
        self, kind: type[ProductFunction], args: Sequence[Any], kwargs: Mapping[str, Any], vectors: Any, whole: bool
    ) -> Product:
        options, shapes = self.options, self._shapes(args, kwargs)
        # a module that reads its parameters directly is differentiated in its own parameters alone
        is_summed = whole and shapes.is_blind and kind is WeightedOutput
        whole = (whole and not is_summed) or shapes.batch is None
        single = isinstance(options.argnums, int)
        argnums = self._argnums(args)
        numbers: tuple[int, ...]
        common = (self.func, argnums, options.has_aux, whole)
        if kind is AlongTangents:
            facts = tangents(shapes, self._pick_differentiated(args), vectors, whole)
            function: ProductFunction = AlongTangents(*common, facts.several, axes=facts.axes)
            numbers, several_at = tuple(range(len(facts.steps))), -1
            single = len(facts.steps) == 1
        else:
            facts = cotangents(shapes, vectors, whole)
            function = WeightedOutput(*common, facts.several, count=len(facts.in_dims), reads_past=shapes.is_blind)
            numbers, several_at = tuple(number + len(facts.in_dims) for number in argnums), 0 if whole else 1
        chosen_options = dataclasses.replace(
            options,
            argnums=numbers[0] if single else numbers,
            in_dims=None if whole else (*facts.in_dims, *nested_axes(args, shapes.axes)),
            layout="blocks",
            coupling="auto" if whole else of_samples(options.coupling),
        )
        return Product(
            self._rewrap(function, chosen_options),
            facts.steps,
            facts.nest,
            shapes,
            several_at if facts.several else None,
            is_formed=kind is AlongTangents and shapes.is_blind,
            is_summed=is_summed,
            reads_past=kind is WeightedOutput and shapes.is_blind,
        )

    def _argnums(self, args: Sequence[Any]) -> tuple[int, ...]:
        numbers = self.options.argnums
        return tuple(number % len(args) for number in (numbers if isinstance(numbers, tuple) else (numbers,)))

    def _pick_differentiated(self, args: Sequence[Any]) -> Any:
        """Return the argument that is differentiated, or a tuple of those that are."""
        chosen = tuple(args[number] for number in self._argnums(args))
        return chosen if isinstance(self.options.argnums, tuple) else chosen[0]

    def _nested_inputs(self, args: Sequence[Any], flat: Sequence[Any]) -> Any:
        """Return values for what is differentiated in its nest."""
        leaves, spec = pytree.tree_flatten(self._pick_differentiated(args))
        values = iter(flat)
        return pytree.tree_unflatten([next(values) if is_differentiable(value) else None for value in leaves], spec)

    def _shapes(self, args: Sequence[Any], kwargs: Mapping[str, Any], probing: bool = False) -> CallShapes:
        """Return the shapes of a call; the first time func is called for them, without side effects that stay."""
        if transforming():
            raise UnsupportedError(
                "a torch.func transform or forward mode is active, in which nothing can be probed. Call products "
                "outside of it, or use torch.func.jvp or vjp there"
            )
        key = (probing, *map(describe, args), *describe_keywords(kwargs))
        if key not in self._call_shapes:
            self._call_shapes[key] = call_shapes(self._other("blocks")._plans, args, kwargs, probing)
        return self._call_shapes[key]


def apart_from_own(method: str | None, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of a method, and those that are passed on to func."""
    keywords = {name: value for name, value in kwargs.items() if name in OWN.get(method or "", ())}
    return keywords, {name: value for name, value in kwargs.items() if name not in keywords}


def without_last(args: tuple[Any, ...], what: str) -> tuple[tuple[Any, ...], Any]:
    if len(args) < 2:
        raise OptionError(
            f"{what} expects func's positional arguments and at last a vector, got {plural(len(args), 'argument')}. "
            f"Pass both, as in jac.{what}(x, {LAST[what]})"
        )
    return args[:-1], args[-1]


def times_parameters(rows: Sequence[Sequence[Tensor]], vectors: Sequence[Tensor], several: bool) -> tuple[Tensor, ...]:
    """Return the products of Jacobians in parameters, (B, *out, *param), with vectors (*param) or (k, *param)."""

    def times(J: Tensor, v: Tensor) -> Tensor:
        product: Tensor = torch.tensordot(J, v.movedim(0, -1) if several else v, v.dim() - several)
        return product.movedim(-1, 0) if several else product

    products = ([times(J, v) for J, v in zip(row, vectors, strict=True)] for row in rows)
    return tuple(sum(parts[1:], parts[0]) for parts in products)
