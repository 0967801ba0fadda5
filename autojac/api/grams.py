"""Gram matrices, norms and singular values of Jacobians that need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autojac.api.jacobian_matrices import MatrixSizes, as_one_matrix, one_hot_seeds
from autojac.api.linalg import HALVES
from autojac.api.product_arguments import CallShapes
from autojac.api.products import Products
from autojac.autodiff.seeds import spans
from autojac.core.nests import tensor_leaves
from autojac.core.options import format_bytes, parse_bytes
from autojac.core.product_functions import AlongTangents, ProductFunction, WeightedOutput
from autojac.errors import SearchError, UnsupportedError
from autojac.planning.search.memory import available_bytes

PART = 4
"""A piece of a Jacobian takes no more than one in so many parts of the memory limit: its seeds need room as well."""
WORKSPACE = 2
"""Multiple of a Jacobian that computing it takes, as most methods join rows or blocks that they have."""


class _Pieces(NamedTuple):
    """How a Jacobian that does not fit into the memory limit is computed.

    Attributes:
        kind: of product, along columns or with rows.
        vectors: returns unit vectors number `start` to `stop`, nested as the product takes them.
        spans: the first and last numbers of each piece.
        whole: the products are with the Jacobian of the whole batch.
        matrices: one per sample, or a single one.
    """

    kind: type[ProductFunction]
    vectors: Callable[[int, int], Any]
    spans: tuple[tuple[int, int], ...]
    whole: bool
    matrices: int


class Grams(Products):
    """The methods of `AutoJacobian` that add up products of a Jacobian with itself."""

    def gram(self, *args: Any, outer: bool = False, **kwargs: Any) -> Any:
        """Return JᵀJ of each sample's Jacobian, or JJᵀ: Gauss-Newton matrices, or the kernel of a sample with itself.

        From the Jacobian where it fits into the memory limit. Where it does not, row by row (column by column for
        `outer`) in pieces that fit.

        Args:
            args, kwargs: the call.
            outer: JJᵀ instead of JᵀJ.

        Returns:
            (B, n, n), or (B, m, m) for `outer`, where m and n count all outputs and all differentiated inputs of a
            sample, flattened in their order. With `layout="full"` that of the whole batch, (B·n, B·n) or (B·m, B·m);
            without a batch (n, n) or (m, m). Differentiable where J is. With `has_aux=True` the pair (gram, aux).

        Raises:
            SearchError: if the result does not fit into the memory limit itself.
            UnsupportedError: for `layout="sparse"`.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: x.cumsum(1), store=":memory:", on_miss="estimate")
            >>> jac.gram(torch.zeros(1, 2))
            tensor([[[2., 1.],
                     [1., 1.]]])
        """

        def of(matrices: Tensor) -> Tensor:
            return matrices @ matrices.mT if outer else matrices.mT @ matrices

        def add_up(pieces: Iterator[Tensor]) -> Tensor:
            total: Tensor | float = 0.0
            for piece in pieces:  # (B, n, k), or (B, m, k)
                total = total + piece @ piece.mT
            assert isinstance(total, Tensor)
            return total

        return self._of_whole_matrix("gram", of, add_up, args, kwargs, columns=outer)

    def norm(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Frobenius norm of each sample's Jacobian, exactly: no estimate from random vectors.

        From the Jacobian where it fits into the memory limit; where it does not, in pieces that fit.

        Args:
            args, kwargs: the call.

        Returns:
            (B,), of all outputs and inputs together; () for `layout="full"` and `"sparse"`, whose norm is that of the
            whole batch's Jacobian, and without a batch. Differentiable where J is, with the derivative 0 at a Jacobian
            of zeros. With `has_aux=True` the pair (norm, aux).

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: 3 * x, store=":memory:", on_miss="estimate")
            >>> jac.norm(torch.zeros(2, 4))
            tensor([6., 6.])
        """
        if self.options.layout == "sparse":
            _, result = self._run(self._func_args(args, kwargs), kwargs)
            values = torch.cat([part.flatten() for row in result.jacobians for part in row])
            return self._beside_aux(values.norm(), result)

        def of(matrices: Tensor) -> Tensor:
            norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
            return norms

        def add_up(pieces: Iterator[Tensor]) -> Tensor:
            total: Tensor = torch.linalg.vector_norm(torch.stack([of(piece) for piece in pieces]), dim=0)
            return total

        return self._of_whole_matrix("norm", of, add_up, args, kwargs)

    def singular_values(self, *args: Any, **kwargs: Any) -> Any:
        """Return the singular values of each sample's Jacobian, in descending order.

        From the Jacobian, by `torch.linalg.svdvals`. The largest one is the local Lipschitz constant.

        Args:
            args, kwargs: the call.

        Returns:
            (B, min(m, n)), where m and n count all outputs and all differentiated inputs of a sample; those of the
            whole batch for `layout="full"`, and (min(m, n),) without a batch. Differentiable where J is. With
            `has_aux=True` the pair (values, aux).

        Raises:
            UnsupportedError: for `layout="sparse"`.

        Example:
            >>> import torch
            >>> from autojac import AutoJacobian
            >>> jac = AutoJacobian(lambda x: x * torch.tensor([1.0, 2.0]), store=":memory:", on_miss="estimate")
            >>> jac.singular_values(torch.zeros(1, 2))
            tensor([[2., 1.]])
        """

        def of(matrices: Tensor) -> Tensor:
            widened = matrices.float() if matrices.dtype in HALVES else matrices
            values: Tensor = torch.linalg.svdvals(widened)
            return values.to(matrices.dtype)

        return self._of_whole_matrix("singular_values", of, None, args, kwargs)

    def _of_whole_matrix(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        add_up: Callable[[Iterator[Tensor]], Tensor] | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        columns: bool = False,
    ) -> Any:
        """Return a function of the matrices, by `add_up` from pieces of them where the whole does not fit."""
        self._require_dense(name)
        func_args = self._func_args(args, kwargs)
        shapes = self._shapes(func_args, kwargs)
        pieces = None if add_up is None else self._pieces(name, func_args, shapes, columns)
        if add_up is not None and pieces is not None:
            return self._in_pieces(add_up, func_args, kwargs, pieces)
        plan, result = self._matrices_call(func_args, kwargs).run()
        value = function(as_one_matrix(plan.jacobian(result), shapes, self._is_whole))
        return self._beside_aux(value, result)

    def _require_dense(self, name: str) -> None:
        if self.options.layout == "sparse":
            raise UnsupportedError(
                f"{name} expects layout='blocks' or 'full', got 'sparse'. Wrap the function with one of these, or go "
                "on with the matrix itself: to_scipy(jac(x))"
            )

    def _pieces(self, name: str, args: Sequence[Any], shapes: CallShapes, columns: bool) -> _Pieces | None:
        """Return how a Jacobian is computed in pieces; None where it fits into the memory limit."""
        limit = self._memory_limit(shapes)
        sizes_of_result = MatrixSizes.of(shapes, self._is_whole)
        if self._fits(sizes_of_result.bytes, shapes):
            return None
        self._require_room(name, sizes_of_result, limit, columns)
        shapes.require_repeatable("a Jacobian that does not fit into the memory limit")
        whole = self._is_whole or shapes.batch is None
        sizes = MatrixSizes.of(shapes, whole)
        step = max(1, limit // PART // (sizes.matrices * (sizes.rows + sizes.columns) * sizes.item_bytes))
        spread = spans(sizes.columns if columns else sizes.rows, step)

        def vectors(start: int, stop: int) -> Any:
            seeds = one_hot_seeds(shapes, args, start, stop, columns, whole)
            return self._nested_inputs(args, seeds) if columns else shapes.nested_outputs(seeds)

        return _Pieces(AlongTangents if columns else WeightedOutput, vectors, tuple(spread), whole, sizes.matrices)

    def _memory_limit(self, shapes: CallShapes) -> int:
        return parse_bytes(self.options.memory_limit) or available_bytes(shapes.device) // 2

    def _fits(self, size: int, shapes: CallShapes) -> bool:
        """Check whether a Jacobian of that many bytes can be formed within the memory limit."""
        limit = self._memory_limit(shapes)
        # a function that can't be called repeatedly allows no pieces: form the Jacobian if it fits at all
        return WORKSPACE * size <= limit or (size <= limit and not shapes.is_repeatable)

    def _require_room(self, name: str, sizes: MatrixSizes, limit: int, columns: bool) -> None:
        side = sizes.rows if columns else sizes.columns
        needed = sizes.matrices * side * side * sizes.item_bytes
        if name == "gram" and needed > limit:
            raise SearchError(
                f"the Gram matrices alone take {format_bytes(needed)}; {format_bytes(limit)} are allowed. Ask for "
                f"gram(outer={not columns}) or norm(), for fewer samples, or raise memory_limit"
            )

    def _in_pieces(
        self,
        add_up: Callable[[Iterator[Tensor]], Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        pieces: _Pieces,
    ) -> Any:
        """Return what pieces of the Jacobian add up to, (B, n, k) of some rows or (B, m, k) of some columns."""
        aux: list[Any] = []

        def each() -> Iterator[Tensor]:
            for start, stop in pieces.spans:
                product = self._product(pieces.kind, args, kwargs, pieces.vectors(start, stop), pieces.whole)
                if self.options.has_aux:
                    product, aux[:] = product[0], [product[1]]
                parts = [t.reshape(len(t), pieces.matrices, -1).permute(1, 2, 0) for t in tensor_leaves(product)]
                piece = torch.cat(parts, 1)
                yield piece.squeeze(0) if pieces.whole else piece

        value = add_up(each())
        return (value, aux[0]) if self.options.has_aux else value
