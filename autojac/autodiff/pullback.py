"""One evaluation, recorded by autograd, and pulled any number of times."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from autojac.autodiff.graph_shape import edge_of, graph_shape
from autojac.autodiff.primitives import Bound, quietly
from autojac.autodiff.zero_tangents import without_loading_compiler
from autojac.errors import UnsupportedError
from autojac.torch_internals import batched_vmap, run_backward

NO_DERIVATIVE = re.compile(r"derivative for \S+ is not implemented")


def fresh_inputs(inputs: Sequence[Tensor], differentiable: bool) -> tuple[Tensor, ...]:
    """Make distinct autograd nodes for `inputs`, so that aliases and captured inputs are told apart.

    With `differentiable` the nodes stay connected to the caller's tensors, without it they are leaves.
    """
    if not differentiable:
        return tuple(x.detach().requires_grad_() for x in inputs)
    return tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs)


class Pullback:
    """One plain evaluation of `fn`, recorded by autograd for any number of VJPs.

    Args:
        fn: bound function.
        inputs: tensors to differentiate.
        differentiable: whether the VJPs carry a graph themselves.
        repeatable: whether `fn` may run once more where a backward through it runs only once, as one does that frees
            or overwrites what it has saved.
        fresh: give `fn` new autograd nodes for `inputs`; without it, these tensors themselves.
        shapes: in which `fn` gets the inputs and gradients are returned; those of the inputs by default.
    """

    def __init__(
        self,
        fn: Bound,
        inputs: Sequence[Tensor],
        differentiable: bool,
        repeatable: bool = True,
        fresh: bool = True,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.differentiable = self.keeps = differentiable
        self.fn: Bound | None = fn
        self.repeatable, self.pulled, self.once = repeatable, False, False
        self.shapes = None if shapes is None else tuple(map(tuple, shapes))
        with torch.enable_grad():
            self.inputs = fresh_inputs(inputs, differentiable) if fresh else tuple(inputs)
            self.recorded = self._evaluate()

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The function's values; with their graph only if `differentiable`."""
        return self.recorded if self.differentiable else tuple(y.detach() for y in self.recorded)

    @classmethod
    def of_graph(cls, outputs: Sequence[Tensor], inputs: Sequence[Tensor], differentiable: bool) -> Self:
        """Return the pullback of a graph that exists already; it is kept, whatever is pulled."""
        pullback = cls.__new__(cls)
        pullback.differentiable, pullback.keeps = differentiable, True
        pullback.fn, pullback.repeatable, pullback.pulled, pullback.once = None, True, False, False
        pullback.shapes = None
        pullback.inputs, pullback.recorded = tuple(inputs), tuple(outputs)
        return pullback

    def __call__(self, output: int, cotangent: Tensor, *, batched: bool = False, last: bool = False) -> list[Tensor]:
        """Return the VJP of one output for every input; zeros where it does not depend on the input.

        Args:
            output: index of the output.
            cotangent: shape of that output, with one more leading axis if `batched`.
            batched: pull all cotangents along the leading axis at once (`is_grads_batched`).
            last: the graph is not needed any more.
        """
        return self.pull((self.recorded[output],), (cotangent,), batched=batched, last=last)

    def pull(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, batched: bool = False, last: bool = False
    ) -> list[Tensor]:
        """Return the VJP of several outputs together."""
        lead = cotangents[0].shape[:1] if batched else torch.Size()
        pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
        if not pairs:
            return self._shape([None] * len(self.inputs), lead)
        recorded, keep = tuple(y for y, _ in pairs), self.keeps or not last
        cotangents = [c for _, c in pairs]
        with torch.enable_grad():
            if self.once:
                gradients = self._back(self._again(recorded), cotangents, batched, keep)
            else:
                try:
                    gradients = self._back(recorded, cotangents, batched, keep)
                except Exception as error:
                    # checkpointing stops a recomputation in this way
                    if not self.pulled or self.fn is None or type(error).__module__ == "torch.utils.checkpoint":
                        raise
                    if not self.repeatable:
                        raise UnsupportedError(
                            f"a second backward through func raises {type(error).__name__}: {error}. Where one "
                            "backward uses up what func has saved, each row takes an evaluation of its own, but func "
                            "does more than return: it draws, or moves its buffers. Put the module into eval mode"
                        ) from error
                    gradients = self._back(self._again(recorded), cotangents, batched, keep)
                    self.once = True
        self.pulled = True
        if any([gradient is not None and gradient.layout != torch.strided for gradient in gradients]):
            raise UnsupportedError(
                "dense derivatives were expected, but a backward in func returns a sparse one, as an embedding with "
                "sparse=True does. Make it return a dense one"
            )
        return self._shape(gradients, lead)

    def _shape(self, gradients: Sequence[Tensor | None], lead: torch.Size) -> list[Tensor]:
        # torch's own materialize_grads would forget the leading axis of batched cotangents
        filled = [
            x.new_zeros((*lead, *x.shape)) if gradient is None else gradient
            for x, gradient in zip(self.inputs, gradients, strict=True)
        ]
        if self.shapes is None:
            return filled
        return [gradient.reshape(*lead, *shape) for gradient, shape in zip(filled, self.shapes, strict=True)]

    def _evaluate(self) -> tuple[Tensor, ...]:
        assert self.fn is not None
        if self.shapes is None:
            return self.fn(*self.inputs)
        return self.fn(*(x.view(shape) for x, shape in zip(self.inputs, self.shapes, strict=True)))

    def _back(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], batched: bool, keep: bool
    ) -> tuple[Tensor | None, ...]:
        def run(*seeds: Tensor) -> tuple[Tensor | None, ...]:
            # torch.autograd.grad without its shape checks, which import sympy (0.3 s) and cost 10 µs per pass
            return run_backward(outputs, seeds, keep, self.differentiable, self.inputs, True, False)

        if batched:
            run = quietly(batched_vmap(run, 0, 0, allow_none_pass_through=True))
        try:
            gradients: tuple[Tensor | None, ...] = run(*cotangents)
        except RuntimeError as error:
            # torch raises either kind, by where an operator is defined
            if not isinstance(error, NotImplementedError) and not NO_DERIVATIVE.search(str(error)):
                raise
            message = f"{type(error).__name__}: {str(error).rstrip('.')}"
            raise UnsupportedError(
                f"a derivative of every operator was expected, but reverse mode raises {message}. Compute without that "
                "operator, detach its inputs, or write a torch.autograd.Function with a backward"
            ) from error
        return gradients

    def _again(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the same outputs by another evaluation."""
        places = {id(y): place for place, y in enumerate(self.recorded)}
        values = self._evaluate()
        return tuple(values[places[id(y)]] for y in outputs)

    def unused_inputs(self) -> list[int]:
        """Return the inputs that no output leads back to, by their numbers; nothing is pulled."""
        return list(graph_shape(self.recorded, self.inputs).unused)

    def hidden_inputs(self) -> list[int]:
        """Return the inputs that only `backward()` reaches, by their numbers: those behind reentrant checkpoints."""
        outputs = [y for y in self.recorded if y.requires_grad]
        unused = self.unused_inputs() if outputs else []
        # a checkpoint is a custom Function; without one there is nothing to look for
        if not unused or not _has_custom_function(outputs):
            return []
        # a backward reaches all of them, adds to what is there, and calls hooks
        before = [leaf.grad for leaf in self.inputs]
        hooks = [(held, dict(held)) for leaf in self.inputs if (held := leaf._post_accumulate_grad_hooks)]
        for leaf in self.inputs:
            leaf.grad = None
        for held, _ in hooks:
            held.clear()
        try:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs], retain_graph=True)
            return [number for number in unused if self.inputs[number].grad is not None]
        finally:
            for leaf, gradient in zip(self.inputs, before, strict=True):
                leaf.grad = gradient
            for held, those in hooks:
                held.update(those)

    @contextmanager
    def without_graph(self) -> Iterator[None]:
        """Pull gradients that carry no graph themselves."""
        differentiable, self.differentiable = self.differentiable, False
        keeps, self.keeps = self.keeps, True
        try:
            yield
        finally:
            self.differentiable, self.keeps = differentiable, keeps

    def free(self) -> None:
        """Free what the graph has saved, by a last VJP with zeros."""
        outputs = [y for y in self.recorded if y.requires_grad]
        self.keeps = False
        self.differentiable = False
        self.pull(outputs, [torch.zeros_like(y) for y in outputs], last=True)


def is_custom(node: Any) -> bool:
    """Check whether a node of a graph is a `torch.autograd.Function` written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _has_custom_function(outputs: Sequence[Tensor]) -> bool:
    """Check whether a graph holds a `torch.autograd.Function` written in Python."""
    seen, stack = set[Any](), [y.grad_fn for y in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if is_custom(node):
            return True
        seen.add(node)
        stack += [target for target, _ in node.next_functions]
    return False


def node_of(tensor: Tensor) -> Any:
    """Return the node of the graph that a tensor stands at, an input's too; None where it has no graph."""
    return edge_of(tensor)[0] if tensor.requires_grad else None


def gradient(scalar: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a scalar with respect to `sources`, zeros where there is no path; the graph is kept."""
    if not scalar.requires_grad:
        return [torch.zeros_like(x) for x in sources]
    with without_loading_compiler():
        return list(
            torch.autograd.grad(scalar, list(sources), retain_graph=True, allow_unused=True, materialize_grads=True)
        )


def pull_back(
    outputs: Sequence[Tensor], sources: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return VJPs of outputs that exist already; None for a source that they don't depend on. The graph is kept."""
    # as in `Pullback`
    with without_loading_compiler():
        return run_backward(tuple(outputs), tuple(cotangents), True, False, tuple(sources), True, False)


def backward(scalar: Tensor) -> None:
    """Add the gradients of a scalar to `.grad` of all leaves that it leads back to."""
    torch.autograd.backward(scalar)


def accumulate_gradients(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to `.grad` of leaves as a backward that arrives there does: through the hooks of each.

    Args:
        pairs: leaves and what arrives, of their shapes, dtypes and devices.
    """
    if pairs:
        leaves, gradients = zip(*pairs, strict=True)
        run_backward(leaves, gradients, False, False, (), True, True)
