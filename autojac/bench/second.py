"""What is made of Jacobians: Hessians, Laplacians, Levenberg-Marquardt steps and products, against torch by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import autojac
from autojac.autodiff.primitives import load_forward_rules
from autojac.bench.jacobians import OVER_BEST, OWN, PLAN, wrap
from autojac.bench.results import BenchResult, Facts, Figure, fastest
from autojac.bench.run import Run, Settings, admit, at_rest, race_with_best
from autojac.bench.training import gradients_after, moves_jacobian
from autojac.bench.workloads import WORKLOADS, layers, move_to
from autojac.problem.compression import colors_of

LAPLACIAN, CHAIN, STEP, EQUAL, GRAPH = 0.6, 6, 0.7, 1.03, 1.2
"""What autojac is to take at most: of a Laplacian's and of a Levenberg-Marquardt step's time, as a multiple of torch's
fastest way; passes of a chain's Hessian; products, and training steps by `jacobian_from`, against the same by hand."""
CAMERA = (100, 7, 4096)
"""Residuals, unknowns and samples of a Levenberg-Marquardt step."""
SIZES, BATCH = (50, 256, 256, 1), 512
"""Layers of the network whose Laplacian is taken, and samples."""
TRAINED_GRAPHS = ("pinn-2-50-50-50-1", "train-flow-8")
DAMPING = 1e-2
Runs = Mapping[str, Run]


def contest(
    name: str, own: Run, ways: Runs, truth: Tensor, settings: Settings, bound: float, facts: Facts
) -> BenchResult:
    """Check and race what autojac does and the same by hand.

    Args:
        name: of the result.
        own: autojac's; it gives a tensor, as all ways do.
        ways: torch's, by name.
        truth: what all must give.
        settings: how to measure.
        bound: what autojac is to take at most over torch's fastest right way.
        facts: the plan and whatever else is known.
    """
    return steps_contest(name, {OWN: own, **ways}, truth, settings, bound, facts, lambda run: run)


def steps_contest(
    name: str, runs: Runs, truth: Tensor, settings: Settings, bound: float, facts: Facts, check: Callable[[Run], Run]
) -> BenchResult:
    """Return the same of several runs, autojac's first, each checked by what `check` makes of it."""
    entrants = [admit(way, run, truth, check(run)) for way, run in runs.items()]
    own, *ways = race_with_best(entrants[:1], entrants[1:], truth.device, settings, "")
    return BenchResult(name, (own, *ways), (Figure.over(own, fastest(ways), bound, OVER_BEST),), facts)


def scalar_network(
    sizes: Sequence[int] = SIZES, batch: int = BATCH, trained: bool = False
) -> tuple[nn.Module, Scalar, Tensor]:
    """Return a network, the function that gives its scalar for each sample, and a point."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, x = layers(sizes, nn.Tanh), torch.randn(batch, sizes[0])
    network.requires_grad_(trained)
    return network, Scalar(network), x


class Scalar(nn.Module):
    """A network of one output without its last axis."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x).squeeze(-1)
        return out


def laplacian_ways(func: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Run]:
    """Return how torch's users take a Laplacian: Hessians and their trace, or a product for each coordinate."""
    load_forward_rules()
    of_sample = lambda sample: func(sample[None])[0]  # noqa: E731
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def traced(hessian: Any) -> Run:
        compute = torch.func.vmap(hessian(of_sample))
        return lambda: compute(x).diagonal(dim1=-2, dim2=-1).sum(-1)

    def along(sample: Tensor) -> Tensor:
        gradient = torch.func.grad(of_sample)
        second = torch.func.vmap(lambda v: torch.func.jvp(gradient, (sample,), (v,))[1])(basis)
        trace: Tensor = second.diagonal().sum()
        return trace

    products = torch.func.vmap(along)
    return {
        "vmap(hessian)": traced(torch.func.hessian),
        "vmap(jacrev(jacrev))": traced(lambda f: torch.func.jacrev(torch.func.jacrev(f))),
        "vmap of products": lambda: products(x),
    }


def laplacian(settings: Settings, sizes: Sequence[int] = SIZES, batch: int = BATCH) -> BenchResult:
    """The Laplacian of a network of one output."""
    with at_rest():
        _, func, x = scalar_network(sizes, batch)
        exact = laplacian_ways(scalar_network(sizes, batch)[1].double(), x.double())
        truth = exact["vmap(jacrev(jacrev))"]().to(x.dtype)
        hessian = autojac.AutoHessian(func, **settings.planning())
        hessian.laplacian(x)
        plan: Facts = {PLAN: str(hessian._laplacian.plan(x))}
        own = lambda: hessian.laplacian(x)  # noqa: E731
        # a sum of fifty terms that may cancel is compared on the scale of all samples
        return steps_contest(
            f"Laplacian {'-'.join(map(str, sizes))}", {OWN: own, **laplacian_ways(func, x)}, truth[None], settings,
            LAPLACIAN, plan, lambda run: lambda: run()[None],
        )  # fmt: skip


def trained_laplacian(settings: Settings, sizes: Sequence[int] = SIZES, batch: int = BATCH) -> BenchResult:
    """A training step on the mean square of that Laplacian."""
    with at_rest(training=True):
        network, func, x = scalar_network(sizes, batch, trained=True)
        parameters = list(network.parameters())[:-1]
        hessian = autojac.AutoHessian(func, **settings.planning())
        values = {OWN: lambda: hessian.laplacian(x), **laplacian_ways(func, x)}
        runs = {name: _backward(value) for name, value in values.items()}
        doubled, exact, _ = scalar_network(sizes, batch, trained=True)
        doubled.double()
        reference = _backward(laplacian_ways(exact, x.double())["vmap(jacrev(jacrev))"])
        truth = gradients_after(reference, list(doubled.parameters())[:-1])().to(x.dtype)
        return steps_contest(
            "Laplacian, trained", runs, truth, settings, LAPLACIAN, {}, lambda run: gradients_after(run, parameters)
        )


def _backward(value: Run) -> Run:
    def step() -> None:
        loss: Tensor = value().square().mean()
        loss.backward()

    return step


def rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock's function, each variable chained to the next."""
    return (1 - x[:-1]).square().sum() + 100 * (x[1:] - x[:-1].square()).square().sum()


def chain_hessian(settings: Settings, size: int = 2000) -> BenchResult:
    """The sparse Hessian of a function of 2000 variables, tridiagonal."""
    with at_rest():
        x = torch.rand(size, generator=torch.Generator().manual_seed(0))
        truth = torch.func.hessian(rosenbrock)(x.double()).to(x.dtype)
        hessian = autojac.AutoHessian(rosenbrock, in_dims=None, layout="sparse", **settings.planning())
        hessian(x)
        entry, _ = hessian.planned._run((x,), {})
        passes = min(colors_of(entry.problem, side).count for side in ("rows", "columns"))
        ways = {"hessian": lambda: torch.func.hessian(rosenbrock)(x)}
        checked = steps_contest(
            f"Hessian of a chain of {size}", {OWN: lambda: hessian(x), **ways}, truth, settings, EQUAL,
            {PLAN: str(hessian.plan(x))}, lambda run: lambda: _dense(run()),
        )  # fmt: skip
    figures = (Figure("passes", passes, CHAIN), *checked.figures)
    return BenchResult(checked.name, checked.outcomes, figures, checked.facts)


def _dense(H: Tensor) -> Tensor:
    return H.to_dense() if H.layout == torch.sparse_csr else H


class Residuals(nn.Module):
    """Residuals of a model with few unknowns per sample, at fixed places, (B, unknowns) → (B, residuals)."""

    def __init__(self, residuals: int, unknowns: int) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(unknowns, residuals))
        self.register_buffer("seen", torch.randn(residuals))
        self.places: Tensor
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.places) + 0.1 * x.square() @ self.places - self.seen


def marquardt_step(settings: Settings, camera: Sequence[int] = CAMERA) -> BenchResult:
    """Levenberg-Marquardt steps of many small problems, against vmap(jacrev) and `torch.linalg.lstsq`."""
    residuals, unknowns, batch = camera
    with at_rest():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            func, x = Residuals(residuals, unknowns), torch.randn(batch, unknowns)
        jac = wrap(func, settings)
        r = func(x)

        def by_hand(func: Any, x: Tensor, r: Tensor, transform: Any) -> Tensor:
            J = torch.func.vmap(transform(lambda sample: func(sample[None])[0]))(x)
            damped = torch.cat([J, (DAMPING**0.5 * torch.eye(unknowns, dtype=x.dtype)).expand(batch, -1, -1)], 1)
            right = torch.cat([-r, r.new_zeros(batch, unknowns)], 1)
            step: Tensor = torch.linalg.lstsq(damped, right[..., None]).solution.squeeze(-1)
            return step

        ways = {
            "vmap(jacrev), lstsq": lambda: by_hand(func, x, r, torch.func.jacrev),
            "vmap(jacfwd), lstsq": lambda: by_hand(func, x, r, torch.func.jacfwd),
        }
        exact = by_hand(copy.deepcopy(func).double(), x.double(), r.double(), torch.func.jacrev)
        jac.solve(x, r, damping=DAMPING)
        own = lambda: jac.solve(x, r, damping=DAMPING)  # noqa: E731
        return contest("Levenberg-Marquardt step", own, ways, exact.to(x.dtype), settings, STEP, {})


def graph_step(settings: Settings, workload: str) -> BenchResult:
    """A training step on the mean square of the Jacobian of a graph that exists, against the loop that users write."""
    with at_rest(training=True):
        func, given = WORKLOADS[workload].make(settings.device)
        assert isinstance(func, nn.Module)
        parameters = [p for name, p in func.named_parameters() if moves_jacobian(func, name, given)]

        def step(func: Any, given: Tensor, rows: Callable[[Tensor, Tensor], Tensor]) -> Run:
            def run() -> None:
                x = given.clone().requires_grad_()
                rows(func(x), x).square().mean().backward()

            return run

        def by_hand(y: Tensor, x: Tensor) -> Tensor:
            return torch.stack([torch.autograd.grad(row.sum(), x, create_graph=True)[0] for row in y.unbind(1)], 1)

        exact: Any = move_to(func, given.device, torch.float64)
        doubled = [p for name, p in exact.named_parameters() if moves_jacobian(exact, name, given.double())]
        truth = gradients_after(step(exact, given.double(), by_hand), doubled)().to(given.dtype)
        runs = {
            OWN: step(func, given, lambda y, x: autojac.jacobian_from(y, x, create_graph=True)),
            "loop of VJPs": step(func, given, by_hand),
        }
        return steps_contest(
            f"jacobian_from, trained: {workload}", runs, truth, settings, GRAPH, {},
            lambda run: gradients_after(run, parameters),
        )  # fmt: skip


def product(settings: Settings, kind: str, workload: str = "mlp-64-256-256-64") -> BenchResult:
    """A product with J, against the same by hand."""
    with at_rest():
        func, x = WORKLOADS[workload].make(settings.device)
        jac = wrap(func, settings)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        load_forward_rules()

        def pulled() -> Tensor:
            found: Tensor = torch.func.vjp(func, x)[1](v)[0]
            return found

        blocks = torch.func.vmap(torch.func.jacrev(lambda sample: func(sample[None])[0]))
        runs: dict[str, tuple[Run, dict[str, Run]]] = {
            "jvp": (lambda: jac.jvp(x, v), {"torch.func.jvp": lambda: torch.func.jvp(func, (x,), (v,))[1]}),
            "vjp": (lambda: jac.vjp(x, v), {"torch.func.vjp": pulled}),
            "gram": (lambda: jac.gram(x), {"vmap(jacrev)": lambda: (J := blocks(x)).mT @ J}),
            "norm": (lambda: jac.norm(x), {"vmap(jacrev)": lambda: torch.linalg.matrix_norm(blocks(x))}),
        }
        own, ways = runs[kind]
        truth = next(iter(ways.values()))()
        return contest(f"{kind} of {workload}", own, ways, truth, settings, EQUAL, {})


CASES: dict[str, Callable[[Settings], BenchResult]] = {
    "laplacian": laplacian,
    "laplacian-trained": trained_laplacian,
    "chain-hessian": chain_hessian,
    "marquardt-step": marquardt_step,
    **{f"jacobian-from: {name}": partial(graph_step, workload=name) for name in TRAINED_GRAPHS},
    **{kind: partial(product, kind=kind) for kind in ("jvp", "vjp", "gram", "norm")},
}
