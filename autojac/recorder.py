"""The only place that traces: one call of a function, recorded as a graph of aten operators.

A graph is recorded anew in each call, below autograd and beside it: the call is the user's own, with its side effects
once, its branch and its constants those of the moment. So no trace is ever stale, and what is learned from one is kept
by the structure of the graph (`Graph.key`), not by the function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autojac.autodiff import fresh_inputs
from autojac.errors import UnsupportedError
from autojac.graph import Graph, Operation, Value
from autojac.operators import (
    BATCH_NORMS,
    PARTITIONS,
    READS_DATA,
    VIEWS_IN_PLACE,
    autograd_nodes,
    certain,
    functional,
    reaches,
    traits,
)

aten = torch.ops.aten
MOST_OPERATIONS = 4000


@dataclass(frozen=True)
class Recording:
    """A call that ran once.

    Attributes:
        values: what the function returned, with its graph of autograd.
        inputs: the tensors that stood for the differentiated leaves; `values` lead back to them.
        graph: None if there is none, for the `reason`.
    """

    values: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    graph: Graph | None
    reason: str = ""


def record(
    fn: Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    differentiated: Sequence[int],
    differentiable: bool = False,
) -> Recording:
    """Call a function once and write down what it does.

    Args:
        fn: maps (leaves, kwargs) to a tuple of tensors.
        leaves, kwargs: the call.
        differentiated: indices of the leaves that autograd follows.
        differentiable: whether the recorded tensors stay connected to the caller's.
    """
    with torch.enable_grad():
        inputs = fresh_inputs([leaves[position] for position in differentiated], differentiable)
        given = list(leaves)
        for position, tensor in zip(differentiated, inputs, strict=True):
            given[position] = tensor
        recorder = Recorder(given)
        with recorder:
            values = tuple(fn(given, kwargs))
    try:
        return Recording(values, inputs, recorder.graph(values, inputs))
    except UnsupportedError as error:
        return Recording(values, inputs, None, str(error))


def without_autocast(like: Tensor) -> Any:
    """A context in which a graph runs as it was recorded: the casts of autocast are part of it."""
    return torch.autocast(like.device.type, enabled=False)


class Recorder(TorchDispatchMode):
    """Writes down the operators that run under it, in-place ones as what they do to a tensor's value."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.constants: dict[int, Tensor] = {}
        self.operations: list[Operation] = []
        self.marks: dict[int, tuple[str, int]] = {}
        self.made: list[tuple[int, Tensor]] = []
        self.alive: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.storages: dict[int, list[int]] = {}
        self.apart: list[set[int]] = []
        self.stale: set[int] = set()
        self.written: dict[int, str] = {}
        self.refusal = ""
        self.reads_data = False
        self.inputs = tuple(self._number(leaf) for leaf in leaves)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load its compiler (1 s) to keep it away from this mode
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.refusal or len(self.operations) > MOST_OPERATIONS:
            self.refusal = self.refusal or f"func runs more than {MOST_OPERATIONS} operators"
            return func(*args, **kwargs)
        name, written, draws = traits(func)
        self.reads_data |= name in READS_DATA
        if name in BATCH_NORMS:
            return self._batch_norm(name, func, args, kwargs)
        if name in ("_softmax", "_log_softmax") and args[1] % max(args[0].dim(), 1) == 0 and not args[2]:
            return self._softmax(name, func, args)
        seen = self._seen(args), {key: self._seen(value) for key, value in kwargs.items()}
        made = func(*args, **kwargs)
        held = not torch.is_grad_enabled()
        if draws and not certain(func, args, kwargs):
            self._draw(made if isinstance(made, (tuple, list)) else (made,), name)
        elif written:
            self._write(func, name, written, args, seen, held)
        else:
            many = isinstance(made, (tuple, list))
            parts = made if many else (made,)
            outputs = tuple(self._number(part) if isinstance(part, Tensor) else None for part in parts)
            self.operations.append(Operation(func, *seen, outputs, many, held))
            if name in PARTITIONS:
                self.apart.append({id(part) for part in made})
        return made

    def _number(self, tensor: Tensor) -> int:
        """A number for the tensor's value as it is now."""
        index = len(self.shapes)
        self.shapes[index], self.dtypes[index] = tuple(tensor.shape), tensor.dtype
        self.alive.append(tensor)
        self.numbers[id(tensor)] = index
        if tensor.layout == torch.strided:
            self.storages.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))
        self.made.append((index, tensor))
        return index

    def _symbol(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """A number for a tensor that no operator of the call has made."""
        index = len(self.shapes)
        self.shapes[index], self.dtypes[index] = tuple(shape), dtype
        return index

    def _seen(self, value: Any) -> Any:
        """An argument with its tensors as `Value`; a tensor that nobody made was captured."""
        if isinstance(value, Tensor):
            if id(value) not in self.numbers:
                self.constants[self._number(value)] = value
            if id(value) in self.stale:
                self.refusal = "func reads a tensor whose memory was written in place before"
            return Value(self.numbers[id(value)])
        if isinstance(value, (tuple, list)):
            return type(value)(self._seen(part) for part in value) if type(value) in (tuple, list) else value
        return value

    def _draw(self, parts: Sequence[Any], name: str) -> None:
        """Random numbers are constants of the call."""
        for part in parts:
            if isinstance(part, Tensor):
                index = self._number(part)
                # it may be written into afterwards
                self.constants[index] = part.detach().clone()
                self.written[index] = f"draws random numbers in the operator {name}, which has a derivative"

    def _write(
        self, func: Any, name: str, written: Sequence[int | str], args: Any, seen: tuple[Any, Any], held: bool
    ) -> None:
        if list(written) != [0] or not isinstance(args[0], Tensor):
            self.refusal = f"func uses the operator {name} that writes into several tensors"
            return
        target, before = args[0], seen[0][0].number
        if before in self.inputs:
            self.refusal = "func writes into its argument"
        elif before in self.constants and before not in self.written:
            # a counter or a running statistic: right as long as nothing else reads it
            self.stale.add(id(target))
            return
        view = VIEWS_IN_PLACE.get(name)
        if view is not None:
            view = getattr(view, func._overloadname) if name == "squeeze_" else view
            self.operations.append(Operation(view, *seen, (self._number(target),), False, held))
            return
        siblings = set[int]().union(*(group for group in self.apart if id(target) in group))
        sharing = self.storages.get(target.untyped_storage()._cdata, ())
        self.stale.update(other for other in sharing if other != id(target) and other not in siblings)
        after = self._number(target)
        operation = functional(func, name, seen, after, self.shapes[before], self.dtypes[before], held)
        if operation is None:
            self.refusal = f"func writes in place by the operator {name}, which has no other form"
            return
        self.operations.append(operation)

    def _batch_norm(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Batch norm as mean, variance and rescaling; the operator itself moves the running statistics."""
        x, weight, bias = args[:3]
        tracked = name != "_native_batch_norm_legit" or func._overloadname != "no_stats"
        means, variances = args[3:5] if tracked else (None, None)
        eps = args[-1]
        training = args[5] if tracked and name != "_batch_norm_with_update" else True
        if kwargs:
            self.refusal = f"func calls {name} with keyword arguments"
        source, parameters = self._seen(x), [self._seen(part) for part in (weight, bias)]
        running = [] if training else [self._seen(part) for part in (means, variances)]
        made = func(*args, **kwargs)
        held = not torch.is_grad_enabled()
        whole, dtype = tuple(x.shape), x.dtype
        narrow = (1, x.shape[1], *[1] * (x.dim() - 2))

        def emit(target: Any, *given: Any, shape: Sequence[int] = whole, **named: Any) -> Value:
            index = self._symbol(shape, named.get("dtype", dtype))
            self.operations.append(Operation(target, given, named, (index,), False, held))
            return Value(index)

        if dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
            source = emit(aten._to_copy.default, source, dtype=dtype)
            parameters = [
                part and emit(aten._to_copy.default, part, shape=self.shapes[part.number], dtype=dtype)
                for part in parameters
            ]
        if training:
            axes = [0, *range(2, x.dim())]
            mean = emit(aten.mean.dim, source, axes, True, shape=narrow)
            centered = emit(aten.sub.Tensor, source, mean)
            square = emit(aten.mul.Tensor, centered, centered)
            variance = emit(aten.mean.dim, square, axes, True, shape=narrow)
        else:
            mean, variance = (emit(aten.view.default, part, list(narrow), shape=narrow) for part in running)
            centered = emit(aten.sub.Tensor, source, mean)
        scale = emit(aten.rsqrt.default, emit(aten.add.Tensor, variance, eps, shape=narrow), shape=narrow)
        owner = next((id(part) for part in (weight, bias, means) if part is not None), 0)
        self.marks |= {mean.number: ("mean", owner), scale.number: ("1/deviation", owner)}
        result = emit(aten.mul.Tensor, centered, scale)
        for part, combine in zip(parameters, (aten.mul.Tensor, aten.add.Tensor), strict=True):
            if part is not None:
                result = emit(combine, result, emit(aten.view.default, part, list(narrow), shape=narrow))
        if x.dtype != dtype:
            result = emit(aten._to_copy.default, result, dtype=x.dtype)
        first = made[0]
        self.operations.append(Operation(aten.alias.default, (result,), {}, (self._number(first),), False, held))
        return made

    def _softmax(self, name: str, func: Any, args: Any) -> Any:
        """Softmax along the first axis, where the batch may be, with its normaliser as a tensor of its own."""
        x = self._seen(args[0])
        made = func(*args)
        held = not torch.is_grad_enabled()
        whole, dtype = tuple(args[0].shape), args[0].dtype
        normaliser, shifted = self._symbol((1, *whole[1:]), dtype), self._symbol(whole, dtype)
        self.operations += [
            Operation(aten.logsumexp.default, (x, [0], True), {}, (normaliser,), False, held),
            Operation(aten.sub.Tensor, (x, Value(normaliser)), {}, (shifted,), False, held),
            Operation(
                aten.exp.default if name == "_softmax" else aten.alias.default,
                (Value(shifted),),
                {},
                (self._number(made),),
                False,
                held,
            ),
        ]
        return made

    def graph(self, values: Sequence[Tensor], inputs: Sequence[Tensor]) -> Graph:
        """What was recorded, without what no output depends on.

        Raises:
            UnsupportedError: if the graph is not what autograd would follow.
        """
        outputs = []
        for value in values:
            if id(value) not in self.numbers:
                self.refusal = self.refusal or "an output comes from where no operator was seen"
                break
            if id(value) in self.stale:
                self.refusal = self.refusal or "an output is a view of a tensor that was written in place"
            outputs.append(self.numbers[id(value)])
        if self.refusal:
            raise UnsupportedError(self.refusal)
        self._require_plain(values, inputs)
        operations = self._reconnected()
        connected = {index for index, tensor in self._current() if tensor.requires_grad}
        whole = Graph(tuple(operations), self.inputs, tuple(outputs), {}, self.shapes, self.dtypes, self.reads_data)
        kept = [operations[place] for place in whole.needed(outputs, frozenset(self.inputs))]
        read = {index for operation in kept for index in operation.sources} | set(outputs)
        for index in read & self.written.keys():
            if index in connected:
                raise UnsupportedError(f"func {self.written[index]}")
        constants = {index: tensor for index, tensor in self.constants.items() if index in read}
        for index, tensor in constants.items():
            if id(tensor) in self.stale:
                raise UnsupportedError("func writes into a captured tensor that it also reads")
            if tensor.grad_fn is not None and reaches(tensor, inputs):
                raise UnsupportedError(f"a tensor {self.shapes[index]} comes from where no operator was seen")
        drawn = frozenset(self.written)
        return dataclasses.replace(whole, operations=tuple(kept), constants=constants, marks=self.marks, drawn=drawn)

    def _current(self) -> Iterator[tuple[int, Tensor]]:
        """The tensors whose value is still the one that has the number."""
        return ((index, tensor) for index, tensor in self.made if self.numbers[id(tensor)] == index)

    def _reconnected(self) -> list[Operation]:
        """The operators, with what autograd saved and brought back as what it was: recorded are detached copies."""
        functions = {index: tensor.grad_fn for index, tensor in self._current() if tensor.grad_fn is not None}
        sources: dict[int, int] = {}
        operations = []
        for operation in self.operations:
            if operation.target is aten.detach.default:
                own, source = operation.outputs[0], operation.sources[0]
                assert own is not None
                sources[own] = source
                if own in functions:
                    while functions.get(source) is not functions[own]:
                        if source not in sources:
                            raise UnsupportedError("autograd brings back a tensor that was not seen before")
                        source = sources[source]
                    operations.append(Operation(aten.alias.default, (Value(source),), {}, operation.outputs))
                    continue
            operations.append(operation)
        return operations

    def _require_plain(self, values: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Refuse what differentiates otherwise than its operators do."""
        for _, tensor in self.made:
            if tensor.grad_fn is not None and tensor._backward_hooks:
                raise UnsupportedError("func hangs a hook on a tensor, which may change gradients")
        for node in autograd_nodes(values):
            if isinstance(node, torch._C._FunctionBase):
                name = type(node).__name__.removesuffix("Backward")
                raise UnsupportedError(f"func uses the custom autograd Function {name}, whose derivative is its own")
