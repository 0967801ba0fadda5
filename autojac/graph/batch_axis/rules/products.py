"""Products of matrices and vectors, and distances."""

from __future__ import annotations

from autojac.graph.batch_axis.rules.base import MEET, Rule, register
from autojac.graph.batch_axis.states import Along, Lost, Meets, State, Step
from autojac.graph.ir import Value


def product(left: str, right: str) -> Rule:
    """A product of (stacks of) matrices: two axes are kept, one is summed over."""

    def rule(step: Step) -> State:
        a, b = step[left], step[right]
        dims = len(step.shape(a))
        one, other = step.state(a), step.state(b)
        carried = [state for state in (one, other) if isinstance(state, Along)]
        if dims == 3 and all(state.axis == 0 for state in carried):
            if len(set(carried)) > 1:
                raise Meets(MEET)
            return _beside(step, carried[0])
        if isinstance(one, Along) and isinstance(other, Along):
            raise Meets(MEET)
        if isinstance(one, Along):
            if one.axis == dims - 1:
                raise Meets("it sums over the batch")
            return _beside(step, one)
        if not isinstance(other, Along):
            raise Lost("only what is added carries the batch")
        if other.axis == dims - 2:
            raise Meets("it sums over the batch")
        return _beside(step, other)

    return rule


def _beside(step: Step, state: Along) -> State:
    """The same, unless what is added to a product carries the batch elsewhere."""
    added = step.arguments.get("self") if step.operation.name in ("addmm", "baddbmm", "addmv") else None
    added_state = step.state(added) if isinstance(added, Value) else None
    if isinstance(added_state, Along):
        assert isinstance(added, Value)
        if added_state._replace(axis=added_state.axis + len(step.out) - len(step.shape(added))) != state:
            raise Meets(MEET)
    return state


@register("mv addmv")
def matrix_vector(step: Step) -> State:
    matrix, vector = (step["self"], step["vec"]) if step.operation.name == "mv" else (step["mat"], step["vec"])
    state = step.state(matrix)
    if isinstance(step.state(vector), Along) or not isinstance(state, Along) or state.axis == 1:
        raise Meets("it sums over the batch")
    return _beside(step, state)


@register("_cdist_forward _euclidean_dist")
def distances(step: Step) -> State:
    found, dims = set(), len(step.out)
    # points lie along the second axis from behind: those of x1 along the result's second, those of x2 along its last
    for value, points in ((step["x1"], 2), (step["x2"], 1)):
        state = step.state(value)
        if not isinstance(state, Along):
            continue
        behind = len(step.shape(value)) - state.axis
        if behind == 1:
            raise Meets("it sums over the batch")
        found.add(state._replace(axis=dims - (points if behind == 2 else behind)))
    if len(found) > 1:
        raise Meets(MEET)
    return found.pop()


register("mm bmm")(product("self", "mat2"))
register("addmm")(product("mat1", "mat2"))
register("baddbmm")(product("batch1", "batch2"))
