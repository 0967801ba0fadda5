"""Cases of zuko, nflows and gpytorch: flows, distributions and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autojac.bench.interop.case import Built, case


def zuko_flow(flow: Any, features: int = 4) -> Built:
    """Return the map of a flow from data to its base."""
    return Built(lambda x: flow().transform(x), torch.randn(32, features), flow)


@case("zuko/maf", trains=True)
def maf() -> Built:
    import zuko

    return zuko_flow(zuko.flows.MAF(4, transforms=2, hidden_features=(16, 16)))


@case("zuko/nsf", trains=True)
def nsf() -> Built:
    import zuko

    return zuko_flow(zuko.flows.NSF(4, transforms=1, hidden_features=(16, 16), bins=4))


@case("zuko/realnvp", trains=True)
def realnvp() -> Built:
    import zuko

    return zuko_flow(zuko.flows.RealNVP(4, transforms=2, hidden_features=(16, 16)))


@case("zuko/log-prob", trains=True)
def log_prob() -> Built:
    import zuko

    flow = zuko.flows.MAF(4, transforms=2, hidden_features=(16, 16))
    return Built(lambda x: flow().log_prob(x), torch.randn(32, 4), flow)


@case("zuko/masked-mlp", trains=True)
def masked_mlp() -> Built:
    import zuko

    model = zuko.nn.MaskedMLP(torch.ones(4, 4, dtype=torch.bool).tril(), hidden_features=(16, 16))
    return Built(model, torch.randn(32, 4), model)


def nflows_transform(transform: Any) -> Built:
    """Return a transform without the logarithm of its determinant."""
    transform = transform.eval()
    return Built(lambda x: transform(x)[0], torch.randn(32, 4), transform)


@case("nflows/masked-affine", trains=True)
def masked_affine() -> Built:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    return nflows_transform(MaskedAffineAutoregressiveTransform(4, 16))


@case("nflows/affine-coupling", trains=True)
def affine_coupling() -> Built:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform

    def net(inputs: int, outputs: int) -> nn.Module:
        made: nn.Module = ResidualNet(inputs, outputs, hidden_features=16, num_blocks=1)
        return made

    return nflows_transform(AffineCouplingTransform([0, 1, 0, 1], net))


@case("nflows/rational-quadratic", trains=True)
def rational_quadratic() -> Built:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Quadratic

    return nflows_transform(Quadratic(4, 16, num_bins=4, tails="linear", tail_bound=3.0, num_blocks=1))


@case("nflows/lu-composite", trains=True)
def composite() -> Built:
    from nflows.transforms import CompositeTransform, LULinear, MaskedAffineAutoregressiveTransform, ReversePermutation

    return nflows_transform(
        CompositeTransform([LULinear(4), ReversePermutation(4), MaskedAffineAutoregressiveTransform(4, 16)])
    )


@case("nflows/log-prob", trains=True)
def nflows_log_prob() -> Built:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    flow = Flow(MaskedAffineAutoregressiveTransform(4, 16), StandardNormal([4])).eval()
    return Built(flow.log_prob, torch.randn(32, 4), flow)


@case("gpytorch/rbf-kernel", trains=True)
def rbf() -> Built:
    import gpytorch

    kernel, centers = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()), torch.randn(5, 3)
    return Built(lambda x: kernel(x, centers).to_dense(), torch.randn(16, 3), kernel)


@case("gpytorch/matern-kernel", trains=True)
def matern() -> Built:
    import gpytorch

    kernel, centers = gpytorch.kernels.MaternKernel(nu=2.5), torch.randn(5, 3)
    return Built(lambda x: kernel(x, centers).to_dense(), torch.randn(16, 3), kernel)


@case("gpytorch/exact-gp")
def exact_gp() -> Built:
    import gpytorch

    class Process(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    x = torch.randn(8, 2)
    model = Process(x, torch.sin(x[:, 0]), gpytorch.likelihoods.GaussianLikelihood()).eval()

    def func(at: Tensor) -> Tensor:
        mean: Tensor = model(at).mean
        return mean

    return Built(func, torch.randn(6, 2), model)
