"""Products with a Jacobian, against the Jacobian of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autojac import AutoJacobian, InputError, UnsupportedError, probe
from harness import Counted, compare
from oracle import jacobian_blocks, jacobian_full
from scenarios import SCENARIOS, Scenario


def estimated(func: Any, **options: Any) -> AutoJacobian:
    return AutoJacobian(func, **{"on_miss": "estimate", "store": ":memory:", **options})


def plain(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0] * x[:, 1], x.sin().sum(1), x[:, 2].exp(), x[:, 1]], 1)


def paired(x: Tensor) -> Tensor:
    return plain(x) * (1 + x[[1, 0, 3, 2, 5, 4]].sum(1, keepdim=True))


def centred(x: Tensor) -> Tensor:
    return plain(x - x.mean(0)) + x.std(0).sum()


def attended(x: Tensor) -> Tensor:
    return (x @ x.T).softmax(1) @ plain(x)


def shaped(x: Tensor) -> Tensor:
    return (x[:, :, None] * x[:, None, :]).cos()


COUPLINGS = [plain, paired, centred, attended, shaped]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("func", COUPLINGS)
def test_products_are_those_with_each_block(func: Callable[[Tensor], Tensor], several: bool, x: Tensor) -> None:
    jac, J = estimated(func), jacobian_blocks(func, (x,))
    lead = (2,) if several else ()
    v, u = x.new_empty(*lead, *x.shape).normal_(), x.new_empty(*lead, *J.shape[:-1]).normal_()
    along = torch.einsum("bmn,kbn->kbm", J.flatten(1, -2), v.reshape(-1, 6, 3)).reshape(u.shape)
    weighed = torch.einsum(
        "bmn,kbm->kbn", J.flatten(1, -2), u.reshape(*v.shape[:-2], 6, -1).view(-1, 6, J[0, ..., 0].numel())
    )
    for _ in range(2):  # the second call is served by what the first one prepared
        compare(jac.jvp(x, v), along)
        compare(jac.vjp(x, u), weighed.reshape(v.shape))


@pytest.mark.parametrize("func", COUPLINGS)
def test_with_the_full_layout_they_are_those_of_the_whole_batch(func: Callable[[Tensor], Tensor], x: Tensor) -> None:
    J = jacobian_full(func, (x,))
    v, u = torch.randn_like(x), torch.randn_like(J[..., 0, 0])
    for layout in ("full", "sparse"):
        jac = estimated(func, layout=layout)
        compare(jac.jvp(x, v), torch.einsum("...bn,bn->...", J, v))
        compare(jac.vjp(x, u), torch.tensordot(u, J, u.dim()))
        compare(jac.vjp(x, torch.stack([u, 2 * u]))[1], 2 * torch.tensordot(u, J, u.dim()))
        compare(jac.jvp(x, torch.stack([v, 2 * v]))[1], 2 * torch.einsum("...bn,bn->...", J, v))


def differentiated(scenario: Scenario, args: tuple[Any, ...]) -> Any:
    """What is differentiated, nested as the argument is, or as a tuple of arguments."""
    numbers = scenario.argnums
    return args[numbers] if isinstance(numbers, int) else tuple(args[number] for number in numbers)


def random_like(nest: Any) -> Any:
    return pytree.tree_map(lambda t: torch.randn(t.shape, dtype=t.dtype), nest)


@pytest.mark.by_day(24, 1)
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not s.traits & {"nan", "mutates_input"}], ids=str)
def test_products_of_every_scenario(scenario: Scenario) -> None:
    func, args, kwargs = scenario.make()
    options = {"argnums": scenario.argnums, "randomness": "different"}
    torch.manual_seed(1)
    J = jacobian_blocks(func, args, scenario.argnums, shared=scenario.shared, kwargs=kwargs)
    func, args, kwargs = scenario.make()
    v = random_like(differentiated(scenario, args))
    torch.manual_seed(1)
    along = estimated(func, **options).jvp(*args, v, **kwargs)
    func, args, kwargs = scenario.make()
    u = random_like(along)
    torch.manual_seed(1)
    weighed = estimated(func, **options).vjp(*args, u, **kwargs)
    inputs, outputs = pytree.tree_leaves(v), pytree.tree_leaves(along)
    blocks = pytree.tree_leaves(J)
    rows = [blocks[start : start + len(inputs)] for start in range(0, len(blocks), len(inputs))]
    pairs = [[J.reshape(len(y), y[0].numel(), -1) for J in row] for y, row in zip(outputs, rows, strict=True)]
    right = [
        sum((J @ _expanded(x, J)).reshape(y.shape) for J, x in zip(row, inputs, strict=True))
        for y, row in zip(outputs, pairs, strict=True)
    ]
    compare(outputs, right, rtol=1e-9)
    for place, pulled in enumerate(pytree.tree_leaves(weighed)):
        parts = [row[place].mT @ w.reshape(len(w), -1, 1) for row, w in zip(pairs, pytree.tree_leaves(u), strict=True)]
        compare(pulled, sum(parts).reshape(pulled.shape), rtol=1e-9)


def _expanded(vector: Tensor, J: Tensor) -> Tensor:
    """One vector per sample, as columns."""
    own = vector.reshape(len(J), -1) if vector.numel() == len(J) * J.shape[2] else vector.reshape(1, -1)
    return own.expand(len(J), -1)[..., None]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def test_a_product_takes_one_pass_and_never_forms_the_jacobian() -> None:
    wide = nn.Linear(300, 300).double()
    func = Counted(lambda x: wide(x).sin())
    jac = estimated(func, verify="never", memory_limit="2MB")
    x, v = torch.randn(2, 16, 300, dtype=torch.float64)  # the blocks take 11.5 MB
    with torch.no_grad():
        for method in (jac.jvp, jac.vjp):
            method(x, v)
            before = func.calls
            method(x, v)
            assert func.calls == before + 1


def test_products_train_what_the_jacobian_trains_and_the_vectors(x: Tensor) -> None:
    net = network()
    jac = estimated(net)
    x.requires_grad_()
    v, u = torch.randn_like(x).requires_grad_(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    sources = [x, *net.parameters()]
    for _ in range(2):
        J = jac(x)
        ours = torch.autograd.grad(jac.jvp(x, v).square().sum(), [v, *sources], create_graph=True, allow_unused=True)
        right = torch.autograd.grad(
            torch.einsum("bmn,bn->bm", J, v).square().sum(), [v, *sources], create_graph=True, allow_unused=True
        )
        compare(ours[:-1], right[:-1])  # the last bias moves no Jacobian
        compare(torch.autograd.grad(ours[0].square().sum(), x), torch.autograd.grad(right[0].square().sum(), x))
        ours = torch.autograd.grad(jac.vjp(x, u).square().sum(), [u, *sources], allow_unused=True)
        right = torch.autograd.grad(
            torch.einsum("bmn,bm->bn", jac(x), u).square().sum(), [u, *sources], allow_unused=True
        )
        compare(ours[:-1], right[:-1])
    with torch.no_grad():
        assert not jac.jvp(x, v).requires_grad


def test_products_in_parameters_are_per_sample_gradients(x: Tensor) -> None:
    net = network()
    jac = AutoJacobian.of_parameters(net, on_miss="estimate", store=":memory:")
    J = jac(x)
    u = torch.randn(6, 4, dtype=torch.float64)
    v = {name: torch.randn_like(p) for name, p in reversed(list(net.named_parameters()))}
    compare(jac.vjp(x, u), {name: torch.einsum("bm,bm...->b...", u, block) for name, block in J.items()})
    compare(jac.jvp(x, v), sum(torch.einsum("bmp,p->bm", J[n].flatten(2), v[n].flatten()) for n in J))
    full = AutoJacobian.of_parameters(net, layout="full", on_miss="estimate", store=":memory:")
    compare(full.vjp(x, u), {name: torch.tensordot(u, block, 2) for name, block in J.items()})


def test_the_graph_of_a_cotangent_is_no_part_of_the_product(x: Tensor) -> None:
    net = network()
    jac = AutoJacobian.of_parameters(net, on_miss="estimate", store=":memory:")
    J, y = jac(x), net(x)
    for _ in range(2):
        compare(jac.vjp(x, y), {name: torch.einsum("bm,bm...->b...", y, block) for name, block in J.items()})
        x.requires_grad_()
        y = net(x)
    own, right = estimated(net).vjp(x, y), torch.einsum("bm,bmn->bn", y, jacobian_blocks(net, (x,)))
    compare(own, right)


def test_parameters_read_past_the_arguments_count_too(x: Tensor) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
            self.others = [self.scale]

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.others[0]).sin()

    full = AutoJacobian.of_parameters(Listed(), layout="full", on_miss="estimate", store=":memory:")
    J, u = full(x)["scale"], torch.randn(6, 3, dtype=x.dtype)
    compare(full.vjp(x, u)["scale"], torch.tensordot(u, J, 2))
    compare(full.vjp(x, torch.stack([u, 2 * u]))["scale"][1], 2 * torch.tensordot(u, J, 2))
    jac = AutoJacobian.of_parameters(Listed(), on_miss="estimate", store=":memory:")
    v = {"scale": torch.randn(3, dtype=torch.float64)}
    for _ in range(2):
        right = torch.einsum("bmn,n->bm", jac(x)["scale"], v["scale"])
        compare(jac.jvp(x, v), right)
        compare(jac.jvp(x, {"scale": torch.stack([v["scale"], 2 * v["scale"]])})[1], 2 * right)
    with pytest.raises(UnsupportedError, match="reads its parameters past"):
        jac.vjp(x, jac.jvp(x, v))


def test_side_inputs_axes_nests_and_aux_are_as_in_a_jacobian(x: Tensor) -> None:
    w = torch.randn(3, 3, dtype=torch.float64)

    def func(nest: dict[str, Tensor], w: Tensor, scale: float = 1.0) -> tuple[dict[str, Tensor], str]:
        y = scale * (nest["a"].T @ w).sin() * nest["b"]
        return {"y": y, "z": y.sum(1)}, "aux"

    jac = estimated(func, argnums=(0, 1), in_dims=({"a": 1, "b": 0}, None), has_aux=True)
    args = ({"a": x.T, "b": x.exp()}, w)
    v = random_like(args)
    J = jac(*args, scale=2.0)[0]
    product, aux = jac.jvp(*args, v, scale=2.0)
    assert aux == "aux"
    own = [(J["y"][0]["a"], v[0]["a"].T), (J["y"][0]["b"], v[0]["b"])]
    right = sum(torch.einsum("bmn,bn->bm", J, v) for J, v in own) + torch.einsum("bmij,ij->bm", J["y"][1], v[1])
    compare(product["y"], right)
    compare(product["z"], right.sum(1))
    u = random_like(product)
    (nest, shared), aux = jac.vjp(*args, u, scale=2.0)
    assert aux == "aux" and nest.keys() == {"a", "b"}
    total = u["y"] + u["z"][:, None]
    compare(nest["a"], torch.einsum("bm,bmn->bn", total, J["y"][0]["a"]))
    compare(shared, torch.einsum("bm,bmij->bij", total, J["y"][1]))


def test_a_function_without_a_batch_has_products_too() -> None:
    x = torch.randn(3, dtype=torch.float64)
    jac = estimated(lambda x: plain(x[None])[0], in_dims=None)
    J = jac(x)
    compare(jac.jvp(x, x), J @ x)
    compare(jac.vjp(x, J[:, 0]), J[:, 0] @ J)
    compare(jac.vjp(x, torch.eye(4, dtype=x.dtype)), J)
    compare(jac.jvp(x, torch.eye(3, dtype=x.dtype)), J.T)


def test_a_product_moves_state_once(x: Tensor) -> None:
    norm = nn.BatchNorm1d(3).double()
    jac = estimated(norm)
    jac.jvp(x, x)
    jac.vjp(x, x)
    assert int(norm.num_batches_tracked) == 2


def test_what_is_declared_of_samples_holds_for_products(x: Tensor) -> None:
    jac = estimated(paired, coupling=probe(paired, x))
    compare(jac.vjp(x, torch.ones(6, 4, dtype=x.dtype)), jacobian_blocks(paired, (x,)).sum(1))


def test_bad_vectors_leave_nothing(x: Tensor) -> None:
    jac = estimated(plain)
    for vector in (x[:3], x.int(), None, (x,)):
        with pytest.raises(InputError):
            jac.jvp(x, vector)
    assert not jac._products
