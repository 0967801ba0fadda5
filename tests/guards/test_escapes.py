"""What no operator shows: values read by other code or into literals, and memory exchanged under a tensor."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
from collections import UserList, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian
from autojac.core.structure import EXCHANGES as ASSIGNS
from autojac.guards.escapes import AS_OPERATORS, ESCAPES
from autojac.replay.replayer import Replayer
from harness import compare, forced, in_use
from oracle import jacobian_blocks

REPLAYS = {
    engine: {"method": "Replay", "inner": {"method": "Pull", "seeds": "shared", "engine": engine}}
    for engine in ("loop", "vmap")
}


class Holder(nn.Module):
    """A function of the module that holds what it reads, and of x."""

    def __init__(self, func: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.func = func
        self.number: Tensor
        self.index: Tensor
        self.numbers: Tensor
        self.register_buffer("number", torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("index", torch.tensor(2))
        self.register_buffer("numbers", torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.func(self, x)


def added(module: Holder) -> None:
    module.number.add_(1.5)
    module.index.copy_((module.index + 1) % 4)
    module.numbers.mul_(1.3)


def loaded(module: Holder) -> None:
    state = {name: value + 1 if name != "index" else (value + 1) % 4 for name, value in module.state_dict().items()}
    module.load_state_dict(state)


def exchanged(module: Holder) -> None:
    module.number.data = module.number + 1.5
    module.index.data = (module.index + 1) % 4
    module.numbers.data = 1.3 * module.numbers


def swapped(module: Holder) -> None:
    gc.collect()  # torch refuses while a view of it is alive
    torch.utils.swap_tensors(module.number, module.number + 1.5)
    torch.utils.swap_tensors(module.index, (module.index + 1) % 4)
    torch.utils.swap_tensors(module.numbers, 1.3 * module.numbers)


CHANGES = {change.__name__: change for change in (added, loaded, exchanged, swapped)}


def replayed(func: Holder, engine: str, differentiable: bool, change: Callable[[Holder], None]) -> str:
    """Call a forced replay while the module changes; the last line about the trace."""
    x = torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(5, 4).requires_grad_(differentiable)
    jac = forced(func, (x,), REPLAYS[engine])
    for turn in range(3):
        at = x + 0.1 * turn
        compare(jac(at), jacobian_blocks(func, (at,)))
        change(func)
    entry = in_use(jac)
    if ASSIGNS in entry.problem.structure.effects and differentiable:
        return "replay: not possible, it exchanges the memory of a tensor"  # no plan at all
    assert isinstance(entry.compute, Replayer)
    return list(entry.compute.function_state.lines())[-1]


def read_at(address: int) -> Tensor:
    return torch.tensor(list((ctypes.c_double * 4).from_address(address)), dtype=torch.float64)


# what each of them reads of the module, or what it writes into a tensor of the call
READS: dict[str, Callable[[Holder, Tensor], Any]] = {
    "item": lambda m, x: m.numbers[1].item(),
    "tolist": lambda m, x: x.new_tensor(m.numbers.tolist()),
    "numpy": lambda m, x: torch.from_numpy(m.numbers.numpy().copy()),
    "__array__": lambda m, x: torch.from_numpy(np.array(m.numbers)),
    "__dlpack__": lambda m, x: torch.from_dlpack(m.numbers) + 0,
    "__dlpack_device__": lambda m, x: m.number * (1 + int(m.numbers.__dlpack_device__()[0])),
    "to_dlpack": lambda m, x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(m.numbers)) + 0,
    "data_ptr": lambda m, x: read_at(m.numbers.data_ptr()),
    "storage": lambda m, x: x.new_tensor(list(m.numbers.storage())),
    "untyped_storage": lambda m, x: read_at(m.numbers.untyped_storage().data_ptr()),
    "_typed_storage": lambda m, x: read_at(m.numbers._typed_storage()._data_ptr()),
    "share_memory_": lambda m, x: m.numbers.clone().share_memory_() + 0,
    "is_shared": lambda m, x: m.numbers * (3 if m.numbers.is_shared() else 2),
    "__reduce_ex__": lambda m, x: pickle.loads(pickle.dumps(m.numbers)),
    "__reduce__": lambda m, x: copy.copy(m.numbers),
    "__deepcopy__": lambda m, x: copy.deepcopy(m.numbers),
    "__setstate__": lambda m, x: copy.deepcopy(m.numbers),
    "__repr__": lambda m, x: float(repr(m.number).split("(")[1].split(",")[0]),
    "__str__": lambda m, x: float(str(m.number).split("(")[1].split(",")[0]),
    "__format__": lambda m, x: float(f"{m.number}"),
    "apply_": lambda m, x: torch.ones_like(m.numbers).apply_(lambda value: value * float(m.number)),
    "map_": lambda m, x: torch.zeros_like(m.numbers).map_(m.numbers, lambda a, b: b),
    "map2_": lambda m, x: torch.zeros_like(m.numbers).map2_(m.numbers, m.numbers, lambda a, b, c: b * c),
}
NOT_ON_A_CPU = {"__array_interface__", "__cuda_array_interface__"}


def test_every_escape_is_tried() -> None:
    assert READS.keys() == ESCAPES - NOT_ON_A_CPU


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:__array_", "ignore:.*not writable")
@pytest.mark.parametrize("name", sorted(READS.keys() - AS_OPERATORS))
def test_a_replay_refuses_what_escapes(name: str) -> None:
    line = replayed(Holder(lambda m, x: x.sin() * READS[name](m, x)), "loop", name < "f", added)
    assert line.startswith("replay: not possible, ")


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:__array_", "ignore:.*not writable")
@pytest.mark.parametrize("name", sorted(READS.keys() - {"__dlpack_device__", "is_shared", "share_memory_"}))
def test_nothing_is_proved_of_what_escapes(name: str) -> None:
    func = Holder(lambda m, x: x.sin() * READS[name](m, x))
    structure = autojac.probe(func, torch.randn(5, 4, dtype=torch.float64))
    assert structure.independent
    assert structure.assurance == "observed"


class Wrapped:
    """What `READS` reads, taken from the argument: inside a transform, from the transform's own tensor."""

    def __init__(self, x: Tensor) -> None:
        self.numbers = x.detach()[0].clone()
        self.number = self.numbers[0].clone()


LEVELS = {
    "vmap in jvp": {"method": "Push", "seeds": "shared", "engine": "vmap"},
    "jvp": {"method": "Push", "seeds": "shared", "engine": "loop"},
    "vmap of vjp": {"method": "Pull", "seeds": "identity", "engine": "vmap"},
}


INSIDE = (
    *((name, "jvp") for name in READS),
    *((name, level) for name in ("item", "tolist", "__dlpack_device__", "__format__") for level in LEVELS),
)
"""What torch answers inside a transform: vmap's tensors have no memory that most of `READS` could show."""


@pytest.mark.by_day(3)
@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:__array_", "ignore:.*not writable")
@pytest.mark.parametrize(("name", "level"), sorted(set(INSIDE)))
def test_no_replay_is_served_of_what_escapes_inside_a_transform(name: str, level: str) -> None:
    def func(x: Tensor) -> Tensor:
        y = x.sin() * torch.as_tensor(READS[name](Wrapped(x), x), dtype=x.dtype)
        return y.cumsum(1)

    x = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(3, 4)
    jac = forced(func, (x,), {"method": "Replay", "inner": LEVELS[level]}, verify="never", coupling="independent")
    for turn in range(3):
        compare(jac(x + turn), jacobian_blocks(func, (x + turn,)))
    entry = in_use(jac)
    assert isinstance(entry.compute, Replayer)
    assert list(entry.compute.function_state.lines())[-1].startswith("replay: not possible, ")


@pytest.mark.parametrize("level", LEVELS)
def test_a_branch_on_a_listed_tensor_inside_a_transform(level: str) -> None:
    def func(x: Tensor) -> Tensor:
        return (x.sin() if min(x[:, 0].tolist()) > 0 else x.exp()).cumsum(1)

    x = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(3, 4)
    jac = forced(func, (x,), {"method": "Replay", "inner": LEVELS[level]}, verify="never", coupling="independent")
    for at in (x, x + 1, -x, x):
        compare(jac(at), jacobian_blocks(func, (at,)))


@torch.jit.script
def scripted_split(x: Tensor) -> Tensor:
    first, second = torch.tensor_split(x, (x[:, 0] > 0).sum().view(1), 0)
    return torch.cat([first.sin(), second.cos()]).cumsum(1)


@torch.jit.script
def scripted_list(x: Tensor) -> Tensor:
    numbers: list[float] = x[:, 0].tolist()
    return x.sin().cumsum(1) if numbers[0] > 0 else x.exp().cumsum(1)


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        numbers: list[float] = x[:, 0].tolist()
        return x.sin().cumsum(1) if numbers[0] > 0 else x.exp().cumsum(1)


SCRIPTED = {
    "function": scripted_split,
    "list": scripted_list,
    "called": lambda x: scripted_list(x) + scripted_split(x),
    "module": torch.jit.script(Scripted()),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_code_that_reads_a_tensor_unseen(name: str) -> None:
    func = SCRIPTED[name]
    x = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(3, 4)
    jac = forced(func, (x,), REPLAYS["loop"], verify="never", coupling="independent")
    for at in (x, -x, x):
        compare(jac(at), jacobian_blocks(func, (at,)))
    assert "replay: not possible, it calls" in jac.explain(x)
    assert autojac.probe(func, x).assurance == "observed"


LITERALS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tensor": lambda m, x: x.sin() * torch.tensor([1.0, 2.0, 3.0, m.number]),
    "as_tensor": lambda m, x: x.sin() * torch.as_tensor([1.0, 2.0, 3.0, m.number]),
    "asarray": lambda m, x: x.sin() * torch.asarray([1.0, 2.0, 3.0, m.number]),
    "new_tensor": lambda m, x: x.sin() * x.new_tensor([1.0, 2.0, 3.0, m.number]),
    "new": lambda m, x: x.sin() * x.new([1.0, 2.0, 3.0, m.number]),
    "Tensor": lambda m, x: x.sin() * torch.Tensor([1.0, 2.0, 3.0, m.number]),
    "LongTensor": lambda m, x: x.sin() * torch.LongTensor([1, 2, 3, m.index]),
    "unbind": lambda m, x: x.sin() * torch.tensor(m.numbers.unbind()),
    "list of": lambda m, x: x.sin() * torch.tensor(list(m.numbers)),
    "nested": lambda m, x: x.sin() * torch.tensor([[1.0, 2.0, 3.0, m.number]] * 5),
    "deque": lambda m, x: x.sin() * torch.tensor(deque([1.0, 2.0, 3.0, m.number])),
    "a sequence of the user's": lambda m, x: x.sin() * torch.tensor(UserList([1.0, 2.0, 3.0, m.number])),
    "computed": lambda m, x: x.sin() * torch.tensor([m.index == k for k in range(4)]),
    "index list": lambda m, x: x.sin()[:, [m.index, 0, 1]],
    "index tuple": lambda m, x: x.sin()[:, (m.index, 0)],
    "nested index": lambda m, x: x.sin()[:, [[m.index, 0], [0, 1]]].sum(1),
    "index": lambda m, x: x.sin()[:, m.index :].sum(1),
    "assigned": lambda m, x: put(x, [m.index, 0]),
    "sparse": lambda m, x: x.sin() * torch.sparse_coo_tensor([[0, m.index]], [1.0, 2.0], (4,)).to_dense(),
    "full": lambda m, x: x.sin() * torch.full((4,), m.number),
    "item": lambda m, x: x.sin() * m.numbers[1].item(),
    "tolist": lambda m, x: x.sin() * x.new_tensor(m.numbers.tolist()),
    "python": lambda m, x: x.sin() * torch.tensor([1.0, 2.0, 3.0, float(m.number)]),
}

NUMBERS = ("index", "full", "item", "tolist", "python")
"""What asks a tensor for its number by an operator, which a recording sees."""


def put(x: Tensor, index: Any) -> Tensor:
    y = x.sin()
    y[:, index] = 0.0
    return y


@pytest.mark.by_day(4)
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, "added") for name in LITERALS if name not in NUMBERS),
        *(("tensor", change) for change in CHANGES if change != "added"),
    ],
)
def test_a_replay_knows_literals_that_read_tensors(name: str, change: str) -> None:
    line = replayed(Holder(LITERALS[name]), "loop", False, CHANGES[change])
    assert line.startswith("replay: not possible, ")
    assert "values of a tensor" in line


@pytest.mark.by_day(3)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_read_of_held_tensors_are_compared(name: str, change: str) -> None:
    line = replayed(Holder(LITERALS[name]), "loop", False, CHANGES[change])
    assert "operators left of" in line


@pytest.mark.by_day(2)
@pytest.mark.parametrize("engine", REPLAYS)
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize(
    "func",
    [
        lambda m, x: x.sin() * torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda m, x: x.sin()[:, [0, 2]] * m.number,
        lambda m, x: x.sin()[..., (0, 2)] * m.numbers[:2],
        lambda m, x: x.sin() * torch.stack([m.number, *m.numbers[:3]]),
        lambda m, x: x[:, torch.stack([m.index * 0, m.index]).clamp(0, 3)].sin(),
    ],
)
def test_literals_of_numbers_are_replayed(func: Any, engine: str, differentiable: bool) -> None:
    line = replayed(Holder(func), engine, differentiable, added)
    assert "operators left of" in line


def test_data_that_is_only_read_is_replayed() -> None:
    line = replayed(Holder(lambda m, x: (x * m.numbers.data).sin()), "loop", True, added)
    assert "operators left of" in line


def given_memory(m: Holder, x: Tensor) -> Tensor:
    gain = torch.zeros_like(x)
    gain.data = m.number * x.detach()
    return torch.tanh(x) * gain


def set_to(m: Holder, x: Tensor) -> Tensor:
    gain = torch.zeros_like(m.numbers)
    gain.set_(m.number * m.numbers)
    return torch.tanh(x) * gain


def swapped_inside(m: Holder, x: Tensor) -> Tensor:
    gain = torch.zeros_like(m.numbers)
    torch.utils.swap_tensors(gain, m.number * m.numbers)
    return torch.tanh(x) * gain


def cut_short(m: Holder, x: Tensor) -> Tensor:
    gain = m.number * m.numbers
    gain.data = gain.data[:1]
    return torch.tanh(x) * gain


def with_other_memory_later(m: Holder, x: Tensor) -> Tensor:
    y = torch.tanh(x) * m.numbers
    m.numbers.data = m.numbers.clone()
    return y


EXCHANGES = (given_memory, set_to, swapped_inside, cut_short, with_other_memory_later)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("func", EXCHANGES, ids=lambda func: func.__name__)
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_replay_notices_memory_that_is_exchanged(func: Any, differentiable: bool) -> None:
    line = replayed(Holder(func), "loop", differentiable, added)
    assert line.startswith("replay: not possible, ")
    assert "the memory of" in line


@pytest.mark.parametrize("func", [func for func in EXCHANGES if func is not set_to], ids=lambda func: func.__name__)
def test_nothing_is_proved_where_memory_is_exchanged(func: Any) -> None:
    structure = autojac.probe(Holder(func), torch.randn(5, 4, dtype=torch.float64))
    assert structure.independent
    assert structure.assurance == "observed"


def test_memory_exchanged_in_a_dense_function() -> None:
    def func(x: Tensor) -> Tensor:
        gain = torch.zeros_like(x)
        gain.data = 3 * x.detach()
        return torch.tanh(x @ (x.T @ x)) * gain

    method = {"method": "Replay", "inner": {"method": "Pull", "seeds": "identity", "engine": "loop"}}
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)
    jac = forced(func, (x,), method)
    for turn in range(3):
        compare(jac(x + turn), jacobian_blocks(func, (x + turn,)))


ARGUMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "list": lambda x, i: x.sin()[:, [i, 0, 1, 2]],
    "tuple": lambda x, i: x.sin()[:, (i, 0, 1, 2)],
    "tensor": lambda x, i: x.sin()[:, torch.tensor([i, 0, 1, 2])],
    "number": lambda x, i: x.sin()[:, [int(i), 0, 1, 2]],
    "mask": lambda x, i: x[:, :4].sin() * torch.tensor([i == 0, i == 1, i == 2, i > 2]),
    "samples": lambda x, i: x.sin() + x.cos()[torch.tensor([(j + i) % 6 for j in range(6)])],
    "samples by number": lambda x, i: x.sin() + x.cos()[[(j + int(i)) % 6 for j in range(6)]],
}


@pytest.mark.by_day(6)
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("differentiable", [False, True])
def test_patterns_follow_arguments_that_literals_read(name: str, differentiable: bool) -> None:
    func = ARGUMENTS[name]
    jac = AutoJacobian(func, effort="estimate", store=":memory:")
    for turn, k in enumerate((3, 3, 1, 0, 2, 3, 1, 1)):
        x = torch.linspace(-1, 2, 48, dtype=torch.float64).reshape(6, 8).roll(turn).requires_grad_(differentiable)
        index = torch.tensor(k)
        compare(jac(x, index), jacobian_blocks(func, (x, index)))
    assert autojac.probe(func, x, index).assurance == "observed"
