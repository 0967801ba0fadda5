"""Other libraries' functions and models: right Jacobians, derivatives of them, and no effect but that of a plain call.

Cases whose library isn't installed are skipped, by name; `make test-interop` installs them all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac.autodiff.tolerance import disagreement
from autojac.bench.interop.case import Case, cases, elsewhere
from autojac.bench.interop.ways import exact, loss_gradient

# what a library warns of is its own matter
pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Types whose values are compared."""


def parameters(chosen: Sequence[Case]) -> list[Any]:
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.skipif(missing, reason=f"{case.missing} is not installed"))
        for case in chosen
        for missing in [case.missing is not None]
    ]


@pytest.mark.parametrize("case", parameters(cases()))
def test_jacobian_is_right_and_a_call_leaves_what_a_plain_one_leaves(case: Case) -> None:
    plain, built = case.build(), case.build()
    jac = autojac.AutoJacobian(built.func, on_miss="tune", budget_s=0.5, **built.options)
    with torch.no_grad():
        for point in (built.x, elsewhere(built.x), built.x):
            before, stream = point.clone(), torch.get_rng_state()
            plain.func(point.clone())
            expected = state(plain)
            torch.set_rng_state(stream)
            J = jac(point)
            assert state(built) == expected
            assert torch.equal(point, before)
            assert disagreement(J, exact(case.build().func)(point)) is None


@pytest.mark.parametrize("case", parameters([case for case in cases() if case.trains]))
def test_jacobian_can_be_differentiated_in_the_parameters(case: Case) -> None:
    built, plain = case.build(), case.build()
    assert built.module is not None
    assert plain.module is not None
    jac = autojac.AutoJacobian(built.func, effort="estimate", **built.options)
    found = loss_gradient(jac(built.x), list(built.module.parameters()))
    expected = loss_gradient(exact(plain.func)(plain.x), list(plain.module.parameters()))
    assert disagreement(found[None], expected[None]) is None


def state(built: Any) -> dict[str, Any]:
    """Return everything of a model that can be compared with another one like it, and of the process."""
    modules = [] if built.module is None else list(built.module.named_modules())
    found = {f"{name}.{key}": value for name, module in modules for key, value in attributes(module)}
    found["random state"] = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    found["process"] = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    return found


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        # hooks are numbered through all modules of a process
        yield key, len(value) if key.endswith("hooks") else comparable(value)


def comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return type(value).__name__, value.requires_grad, value.detach().tolist(), str(value.dtype)
    if isinstance(value, dict):
        return [(comparable(key), comparable(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [comparable(each) for each in value]
    return value if isinstance(value, PLAIN) else type(value).__name__
