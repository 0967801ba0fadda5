"""What each aten operator does to the batch axis. An operator that is not listed proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from autojac.flow import Along, Lost, State, Step, regrouped
from autojac.graph import Operation, Value

Rule = Callable[[Step], "State | Sequence[State]"]
MEET = "samples meet in it"


def rule_of(operation: Operation) -> Rule:
    """The rule of an operator; one that raises `Lost` where there is none."""
    if operation.name in RULES:
        return RULES[operation.name]
    if torch.Tag.pointwise in operation.target.tags:
        return pointwise
    return unknown


def unknown(step: Step) -> State:
    raise Lost("no rule for this operator")


def pointwise(step: Step) -> State:
    """Broadcast, entry by entry."""
    found, dims = set(), len(step.out)
    for value, state in step.carried():
        shape = step.shape(value)
        axis = state.axis + dims - len(shape)
        if shape[state.axis] != step.out[axis]:
            raise Lost("the batch is broadcast")
        found.add(state._replace(axis=axis))
    if len(found) > 1:
        raise Lost(MEET)
    return found.pop()


def same(step: Step) -> State:
    """Shape and order are kept."""
    return step.only()[1]


def reduction(step: Step) -> State:
    """A reduction over axes other than the batch's."""
    shape, state = step.only()
    name = "dim" if "dim" in step.arguments else "dims"
    gone = step.axes(name, len(shape)) if name in step.arguments else set(range(len(shape)))
    if state.axis in gone:
        raise Lost("it reduces over the batch")
    if step.arguments.get("keepdim"):
        return state
    return state._replace(axis=state.axis - sum(axis < state.axis for axis in gone))


def inside(step: Step) -> State:
    """Something along one or more other axes, which keep their place (and maybe not their length)."""
    shape, state = step.only()
    if state.axis in step.axes("dim" if "dim" in step.arguments else "dims", len(shape)):
        raise Lost(MEET)
    return state


def view(step: Step) -> State:
    if step.operation.target._overloadname not in ("", "default"):
        raise Lost("a view as another dtype")
    shape, state = step.only()
    return regrouped(state, shape, step.out, step.batch)


def permute(step: Step) -> State:
    shape, state = step.only()
    order = [axis % len(shape) for axis in step["dims"]]
    return state._replace(axis=order.index(state.axis))


def transpose(step: Step) -> State:
    shape, state = step.only()
    one, other = step["dim0"] % len(shape), step["dim1"] % len(shape)
    return state._replace(axis={one: other, other: one}.get(state.axis, state.axis))


def turned(step: Step) -> State:
    shape, state = step.only()
    return state._replace(axis=len(shape) - 1 - state.axis)


def unsqueeze(step: Step) -> State:
    shape, state = step.only()
    return state._replace(axis=state.axis + (step["dim"] % (len(shape) + 1) <= state.axis))


def squeeze(step: Step) -> State:
    shape, state = step.only()
    gone = step.axes("dim", len(shape)) if "dim" in step.arguments else set(range(len(shape)))
    return state._replace(axis=state.axis - sum(shape[axis] == 1 and axis < state.axis for axis in gone))


def expand(step: Step) -> State:
    shape, state = step.only()
    return state._replace(axis=state.axis + len(step.out) - len(shape))


def repeat(step: Step) -> State:
    shape, state = step.only()
    axis = state.axis + len(step.out) - len(shape)
    if step["repeats"][axis] != 1:
        raise Lost("the batch is repeated")
    return state._replace(axis=axis)


def select(step: Step) -> State:
    shape, state = step.only()
    axis = step["dim"] % len(shape)
    if axis == state.axis:
        raise Lost("it takes one sample out of the batch")
    return state._replace(axis=state.axis - (axis < state.axis))


def slicing(step: Step) -> State:
    shape, state = step.only()
    axis = (step["dim"] or 0) % len(shape)
    if axis == state.axis and (step["step"] != 1 or shape[axis] != step.out[axis]):
        raise Lost("it takes some samples out of the batch")
    return state


def splitting(step: Step) -> State:
    shape, state = step.only()
    if step["dim"] % len(shape) == state.axis:
        raise Lost("it takes the batch apart")
    return state


def unbind(step: Step) -> State:
    shape, state = step.only()
    axis = step["dim"] % len(shape)
    if axis == state.axis:
        raise Lost("it takes the batch apart")
    return state._replace(axis=state.axis - (axis < state.axis))


def cat(step: Step) -> State:
    found = {state for _, state in step.carried()}
    axis = step["dim"] % len(step.out)
    if len(found) > 1 or axis in {state.axis for state in found}:
        raise Lost(MEET)
    return found.pop()


def stack(step: Step) -> State:
    found = {state for _, state in step.carried()}
    if len(found) > 1:
        raise Lost(MEET)
    state = found.pop()
    return state._replace(axis=state.axis + (step["dim"] % len(step.out) <= state.axis))


def diagonal(step: Step) -> State:
    shape, state = step.only()
    gone = {step["dim1"] % len(shape), step["dim2"] % len(shape)}
    if state.axis in gone:
        raise Lost(MEET)
    return state._replace(axis=state.axis - sum(axis < state.axis for axis in gone))


def diag_embed(step: Step) -> State:
    shape, state = step.only()
    if state.axis == len(shape) - 1:
        raise Lost(MEET)
    fresh = {step["dim1"] % len(step.out), step["dim2"] % len(step.out)}
    return state._replace(axis=[axis for axis in range(len(step.out)) if axis not in fresh][state.axis])


def pad(step: Step) -> State:
    """Pairs of numbers, the last axis first."""
    shape, state = step.only()
    amounts = step["pad"] if "pad" in step.arguments else step["padding"]
    behind = 2 * (len(shape) - 1 - state.axis)
    if any(amounts[behind : behind + 2]):
        raise Lost("the batch is padded")
    return state


def unfold(step: Step) -> State:
    shape, state = step.only()
    if step["dimension"] % len(shape) == state.axis:
        raise Lost(MEET)
    return state


def product(left: str, right: str) -> Rule:
    """A product of (stacks of) matrices: two axes are kept, one is summed over."""

    def rule(step: Step) -> State:
        a, b = step[left], step[right]
        dims = len(step.shape(a))
        one, other = step.state(a), step.state(b)
        carried = [state for state in (one, other) if isinstance(state, Along)]
        if dims == 3 and all(state.axis == 0 for state in carried):
            if len(set(carried)) > 1:
                raise Lost(MEET)
            return _beside(step, carried[0])
        if isinstance(one, Along) and isinstance(other, Along):
            raise Lost(MEET)
        if isinstance(one, Along):
            if one.axis == dims - 1:
                raise Lost("it sums over the batch")
            return _beside(step, one)
        if not isinstance(other, Along):
            raise Lost("only what is added carries the batch")
        if other.axis == dims - 2:
            raise Lost("it sums over the batch")
        return _beside(step, other)

    return rule


def _beside(step: Step, state: Along) -> State:
    """The same, unless what is added to a product carries the batch elsewhere."""
    added = step.arguments.get("self") if step.operation.name in ("addmm", "baddbmm", "addmv") else None
    added_state = step.state(added) if isinstance(added, Value) else None
    if isinstance(added_state, Along):
        assert isinstance(added, Value)
        if added_state._replace(axis=added_state.axis + len(step.out) - len(step.shape(added))) != state:
            raise Lost(MEET)
    return state


def matrix_vector(step: Step) -> State:
    matrix, vector = (step["self"], step["vec"]) if step.operation.name == "mv" else (step["mat"], step["vec"])
    state = step.state(matrix)
    if isinstance(step.state(vector), Along) or not isinstance(state, Along) or state.axis == 1:
        raise Lost("it sums over the batch")
    return _beside(step, state)


def leading(*positions: int) -> Rule:
    """The batch on axis 0 of the tensors at some positions, free or shared tensors elsewhere; all outputs keep it."""

    def rule(step: Step) -> State:
        args = step.operation.args
        allowed = {args[place].number for place in positions if place < len(args) and isinstance(args[place], Value)}
        found = {state for _, state in step.carried()}
        if found != {Along(0, *next(iter(found))[1:])} or not {value.number for value, _ in step.carried()} <= allowed:
            raise Lost("the batch is not in front of what it takes samples from")
        missing = [number for number in allowed if not isinstance(step.states.get(number), Along)]
        if missing:
            raise Lost("only some of its arguments carry the batch")
        return found.pop()

    return rule


def layer_norm(step: Step) -> list[State]:
    shape, state = step.only()
    if state.axis >= len(shape) - len(step["normalized_shape"]):
        raise Lost("it normalizes over the batch")
    return [state, state, state]


def group_norm(step: Step) -> list[State]:
    _, state = step.only()
    if state != Along(0):
        raise Lost("the batch is not in front")
    return [state, state, state]


def convolution(step: Step) -> State:
    _, state = step.only()
    if state.axis != 0:
        raise Lost("it mixes along the batch")
    return state


def embedding(step: Step) -> State:
    state = step.state(step["indices"])
    if not isinstance(state, Along) or isinstance(step.state(step["weight"]), Along):
        raise Lost("it reads rows of the batch")
    return state


def gathering(step: Step) -> State:
    """gather, scatter and their kin: every tensor that carries the batch does so on one axis, which is not `dim`."""
    found = {state for _, state in step.carried()}
    dims = len(step.out)
    values = [value for value in step.operation.args if isinstance(value, Value)]
    if len(found) != 1 or any(len(step.shape(value)) != dims for value in values):
        raise Lost(MEET)
    state = found.pop()
    if step["dim"] % dims == state.axis or any(step.shape(v)[state.axis] != step.out[state.axis] for v in values):
        raise Lost("it takes samples by index")
    return state


def index_select(step: Step) -> State:
    shape, state = step.only()
    if step["dim"] % len(shape) == state.axis:
        raise Lost("it takes samples by index")
    return state


def indexing(step: Step) -> State:
    """x[..., index, ...] with one index tensor of integers."""
    indices = step["indices"]
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or step.graph.dtypes[used[0][1].number] in (torch.bool, torch.uint8):
        raise Lost("it takes entries by several indices or by a mask")
    (axis, index) = used[0]
    own, by = step.state(step["self"]), step.state(index)
    if isinstance(own, Along) and isinstance(by, Along):
        raise Lost(MEET)
    if isinstance(by, Along):
        return by._replace(axis=by.axis + axis)
    assert isinstance(own, Along)
    if own.axis == axis:
        raise Lost("it takes samples by index")
    return own._replace(axis=own.axis + (len(step.shape(index)) - 1 if axis < own.axis else 0))


def matrices(step: Step) -> State:
    """Linear algebra on the last two axes of one tensor or of several with the same leading axes."""
    found = set()
    for value in (value for value in step.operation.args if isinstance(value, Value)):
        state, dims = step.state(value), len(step.shape(value))
        if isinstance(state, Along):
            found.add(state)
            if state.axis >= dims - 2:
                raise Lost("the batch is part of the matrix")
    if len(found) != 1:
        raise Lost(MEET)
    state = found.pop()
    shapes = [step.graph.shapes[number] for number in step.operation.outputs if number is not None]
    length = state.outer * step.batch * state.inner
    if any(len(shape) <= state.axis or shape[state.axis] != length for shape in shapes):
        raise Lost("the batch is part of the matrix")
    return state


def solving(step: Step) -> State:
    """A X = B with the batch in front of A, and of B if B carries it."""
    matrix, right = step["A"], step["B"]
    own, other = step.state(matrix), step.state(right)
    if not isinstance(own, Along) or own.axis >= len(step.shape(matrix)) - 2:
        raise Lost("the batch is part of the matrix")
    if isinstance(other, Along) and (other != own or own.axis >= len(step.shape(right)) - 1):
        raise Lost(MEET)
    return own


def distances(step: Step) -> State:
    found, dims = set(), len(step.out)
    for value, state in step.carried():
        behind = len(step.shape(value)) - state.axis
        if behind <= 2:
            raise Lost("it compares samples")
        found.add(state._replace(axis=dims - behind))
    if len(found) > 1:
        raise Lost(MEET)
    return found.pop()


_GROUPS: tuple[tuple[Rule, str], ...] = (
    (
        pointwise,
        "masked_fill hardswish fill polar complex real imag "
        "_conj fmod remainder softplus_backward log_sigmoid_forward log_sigmoid_backward _prelu_kernel prelu "
        "hardtanh_backward elu_backward leaky_relu_backward hardswish_backward mish_backward hardsigmoid_backward "
        "pow sub rsub lerp where clamp addcmul addcdiv",
    ),
    (same, "clone detach alias _to_copy lift_fresh lift_fresh_copy contiguous _neg_view _conj_physical resolve_conj"),
    (same, "view_as_real view_as_complex native_dropout"),
    (
        reduction,
        "sum mean amax amin prod var std var_mean std_mean logsumexp norm linalg_vector_norm argmax argmin any all max "
        "min median nanmedian mode kthvalue count_nonzero nansum aminmax",
    ),
    (
        inside,
        "cumsum cumprod logcumsumexp cummax cummin _softmax _log_softmax softmax log_softmax sort topk flip roll "
        "_fft_r2c _fft_c2c argsort",
    ),
    (view, "view _unsafe_view reshape _reshape_alias"),
    (permute, "permute"),
    (transpose, "transpose"),
    (turned, "t"),
    (unsqueeze, "unsqueeze"),
    (squeeze, "squeeze"),
    (expand, "expand"),
    (repeat, "repeat"),
    (select, "select"),
    (slicing, "slice"),
    (splitting, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk"),
    (unbind, "unbind"),
    (cat, "cat"),
    (stack, "stack"),
    (diagonal, "diagonal"),
    (diag_embed, "diag_embed"),
    (pad, "constant_pad_nd"),
    (unfold, "unfold"),
    (product("self", "mat2"), "mm bmm"),
    (product("mat1", "mat2"), "addmm"),
    (product("batch1", "batch2"), "baddbmm"),
    (matrix_vector, "mv addmv"),
    (layer_norm, "native_layer_norm"),
    (group_norm, "native_group_norm"),
    (convolution, "convolution"),
    (embedding, "embedding"),
    (gathering, "gather scatter scatter_add scatter_reduce"),
    (index_select, "index_select"),
    (indexing, "index"),
    (
        matrices,
        "linalg_inv_ex linalg_cholesky_ex linalg_qr _linalg_eigh linalg_lu_factor_ex linalg_lu _linalg_det "
        "_linalg_slogdet _linalg_svd tril triu linalg_matrix_exp cholesky_solve cholesky_inverse",
    ),
    (solving, "_linalg_solve_ex"),
    (distances, "_cdist_forward _euclidean_dist"),
    (
        leading(0),
        "avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
        "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d max_pool2d upsample_nearest1d upsample_nearest2d "
        "upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_nearest3d im2col col2im pixel_shuffle "
        "pixel_unshuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d _adaptive_avg_pool1d "
        "native_channel_shuffle",
    ),
    (
        leading(0, 1, 2),
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention",
    ),
    (leading(0, 1), "grid_sampler_2d grid_sampler_3d"),
    (inside, "glu _fft_c2r"),
)
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}
