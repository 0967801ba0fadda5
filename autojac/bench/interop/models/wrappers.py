"""Cases of what wraps tensors and functions: tensordict, and decorators that check types (jaxtyping, torchtyping)."""

# annotations must be values here, for the checkers read them when a function is defined
# ruff: noqa: F722, F821
import torch
from torch import Tensor, nn

from autojac.bench.interop.case import Built, case


@case("tensordict/module", trains=True)
def tensordict_module() -> Built:
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential

    model = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 16), in_keys=["x"], out_keys=["hidden"]),
        TensorDictModule(torch.tanh, in_keys=["hidden"], out_keys=["active"]),
        TensorDictModule(nn.Linear(16, 5), in_keys=["active"], out_keys=["y"]),
    )

    def func(x: Tensor) -> Tensor:
        out: Tensor = model(TensorDict({"x": x}, batch_size=[len(x)]))["y"]
        return out

    return Built(func, torch.randn(32, 4), model)


@case("tensordict/parts")
def tensordict_parts() -> Built:
    from tensordict import TensorDict

    def func(x: Tensor) -> Tensor:
        parts = TensorDict({"a": x[:, :2], "b": x[:, 2:]}, batch_size=[len(x)])
        both = parts.apply(torch.sin) * 2.0
        return torch.cat([both["a"], both["b"]], -1)

    return Built(func, torch.randn(32, 4))


@case("tensordict/params", trains=True)
def tensordict_params() -> Built:
    from tensordict import TensorDictParams, from_module

    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5))
    weights = TensorDictParams(from_module(net))

    def func(x: Tensor) -> Tensor:
        with weights.to_module(net):
            out: Tensor = net(x)
        return out

    return Built(func, torch.randn(32, 4), net)


@case("jaxtyping/beartype", "jaxtyping", "beartype")
def jaxtyping_function() -> Built:
    from beartype import beartype
    from jaxtyping import Float, jaxtyped

    @jaxtyped(typechecker=beartype)
    def rotated(x: Float[Tensor, "batch 3"], angle: float) -> Float[Tensor, "batch 3"]:
        a, b, c = x.unbind(-1)
        cos, sin = torch.cos(angle * c), torch.sin(angle * c)
        return torch.stack([cos * a - sin * b, sin * a + cos * b, c], -1)

    return Built(lambda x: rotated(x, 0.5), torch.randn(64, 3))


@case("jaxtyping/module", "jaxtyping", "beartype", trains=True)
def jaxtyping_module() -> Built:
    from beartype import beartype
    from jaxtyping import Float, jaxtyped

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

        @jaxtyped(typechecker=beartype)
        def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch m"]:
            out: Tensor = self.last(torch.tanh(self.first(x)))
            return out

    model = Net()
    return Built(model, torch.randn(32, 4), model)


@case("beartype/decorated")
def beartype_function() -> Built:
    from beartype import beartype

    @beartype
    def squared(x: Tensor, weight: float = 1.5) -> Tensor:
        return weight * x.square().cumsum(-1)

    return Built(lambda x: squared(x).sin(), torch.randn(64, 4))


@case("torchtyping/typeguard", "torchtyping", "typeguard")
def torchtyping_function() -> Built:
    from torchtyping import TensorType
    from typeguard import typechecked

    @typechecked
    def normalized(x: TensorType["batch", "n"]) -> TensorType["batch", "n"]:
        return x / (1 + x.square().sum(-1, keepdim=True))

    return Built(normalized, torch.randn(64, 4))
