"""Cases of solvers and operators: torchdiffeq, torchsde, torchcde, deepxde, neuraloperator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autojac.bench.interop.case import Built, case


class Field(nn.Module):
    """A vector field of time and state, as ODE solvers call it."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, width))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(y)
        return out


def integrate(solver: Any, **options: Any) -> Built:
    field, times = Field(), torch.linspace(0, 1, 5)
    return Built(lambda y: solver(field, y, times, **options)[-1], torch.randn(16, 3), field)


@case("torchdiffeq/odeint-rk4", trains=True)
def rk4() -> Built:
    from torchdiffeq import odeint

    return integrate(odeint, method="rk4")


@case("torchdiffeq/odeint-euler", trains=True)
def euler_steps() -> Built:
    from torchdiffeq import odeint

    return integrate(odeint, method="euler")


@case("torchdiffeq/odeint-dopri5", trains=True)
def dopri5() -> Built:
    from torchdiffeq import odeint

    return integrate(odeint, rtol=1e-4, atol=1e-5)


@case("torchdiffeq/odeint-adjoint")
def adjoint() -> Built:
    from torchdiffeq import odeint_adjoint

    return integrate(odeint_adjoint, method="rk4")


class Diffusion(Field):
    """A stochastic vector field with diagonal noise."""

    noise_type = "diagonal"
    sde_type = "ito"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 + 0.1 * torch.sigmoid(y)


@case("torchsde/sdeint-euler", trains=True)
def sdeint() -> Built:
    import torchsde

    sde, times = Diffusion(), torch.linspace(0, 1, 3)

    def func(y: Tensor) -> Tensor:
        noise = torchsde.BrownianInterval(t0=0.0, t1=1.0, size=y.shape, dtype=y.dtype, entropy=7)
        return torchsde.sdeint(sde, y, times, bm=noise, dt=0.25, method="euler")[-1]

    return Built(func, torch.randn(8, 3), sde)


@case("torchcde/cubic-spline")
def spline() -> Built:
    import torchcde

    def func(x: Tensor) -> Tensor:
        coefficients = torchcde.natural_cubic_coeffs(x)
        return torchcde.CubicSpline(coefficients).evaluate(torch.tensor(1.5))

    return Built(func, torch.randn(16, 5, 2))


@case("torchcde/cdeint", trains=True)
def cdeint() -> Built:
    import torchcde

    class Controlled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 8)

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(self.linear(z)).view(*z.shape[:-1], 4, 2)

    model = Controlled()

    def func(x: Tensor) -> Tensor:
        path = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
        z = torchcde.cdeint(X=path, func=model, z0=x.new_zeros(len(x), 4), t=path.interval, adjoint=False, method="rk4")
        out: Tensor = z[:, -1]
        return out

    return Built(func, torch.randn(8, 4, 2), model)


def deepxde() -> Any:
    import os

    os.environ.setdefault("DDE_BACKEND", "pytorch")
    import deepxde as dde

    return dde


@case("deepxde/fnn", trains=True)
def fnn() -> Built:
    model = deepxde().nn.FNN([2, 32, 32, 3], "tanh", "Glorot uniform")
    return Built(model, torch.randn(64, 2), model)


@case("deepxde/pfnn", trains=True)
def pfnn() -> Built:
    model = deepxde().nn.PFNN([2, [16, 16], [16, 16], 2], "sin", "Glorot normal")
    return Built(model, torch.randn(64, 2), model)


@case("deepxde/deeponet", trains=True)
def deeponet() -> Built:
    net = deepxde().nn.DeepONetCartesianProd([8, 16, 16], [1, 16, 16], "tanh", "Glorot normal")
    places = torch.linspace(0, 1, 6)[:, None]
    return Built(lambda u: net((u, places)), torch.randn(32, 8), net)


@case("neuralop/fno", trains=True)
def fno() -> Built:
    from neuralop.models import FNO

    model = FNO(n_modes=(4,), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2).eval()
    return Built(lambda x: model(x[:, None])[:, 0], torch.randn(4, 16), model)


@case("neuralop/spectral-conv", trains=True)
def spectral() -> Built:
    from neuralop.layers.spectral_convolution import SpectralConv

    model = SpectralConv(1, 2, n_modes=(4,))
    return Built(lambda x: model(x[:, None]).mean(1), torch.randn(8, 16), model)


@case("neuralop/mlp", trains=True)
def channel_mlp() -> Built:
    from neuralop.layers.channel_mlp import ChannelMLP

    model = ChannelMLP(4, 3, hidden_channels=16, n_layers=2)
    return Built(lambda x: model(x).mean(2), torch.randn(16, 4, 6), model)
