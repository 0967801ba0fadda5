"""Exact batched Jacobians in PyTorch, at the lowest cost measured on the device at hand.

Wrap a function of the whole batch once, and call the wrapper as you would call the function:

    >>> import torch
    >>> from autojac import AutoJacobian
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    >>> jac = AutoJacobian(model)
    >>> J = jac(torch.randn(256, 3))  # (256, 2, 3): each sample's Jacobian
    >>> print(jac.explain(torch.randn(256, 3)))  # doctest: +SKIP

`AutoJacobian` is where to start; `jacobian_from` works on outputs that have been computed already, `probe` tells what
couples with what across the batch, and `verify` checks a Jacobian, whoever computed it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from autojac.core.garbage import gc_disabled

with gc_disabled():
    from autojac.api.autojacobian import AutoJacobian
    from autojac.api.checks import probe, verify
    from autojac.api.derivatives import Derivatives
    from autojac.api.from_graph import jacobian_from
    from autojac.api.hessian import AutoHessian
    from autojac.api.training_step import TrainingStep
    from autojac.core.pattern import Pattern, Sparsity
    from autojac.core.plan import Plan, Trial
    from autojac.core.structure import Structure
    from autojac.core.vector_math import choose_kernels
    from autojac.errors import (
        AutojacError,
        AutojacWarning,
        InputError,
        ModesDisagreeWarning,
        MutationError,
        NoGraphWarning,
        OptionError,
        OutputError,
        PerformanceWarning,
        PlanMissError,
        RandomnessError,
        SearchError,
        SingularJacobianError,
        StoreError,
        StoreWarning,
        StructureChangedWarning,
        TargetError,
        UnsupportedError,
        VerificationError,
    )
    from autojac.planning.pinned_plans import pin
    from autojac.sparse.csr import to_scipy

choose_kernels()

if TYPE_CHECKING:
    from autojac import report
    from autojac.store import PlanStore

__version__ = "0.1.0"
__all__ = [
    "AutoHessian",
    "AutoJacobian",
    "AutojacError",
    "AutojacWarning",
    "Derivatives",
    "InputError",
    "ModesDisagreeWarning",
    "MutationError",
    "NoGraphWarning",
    "OptionError",
    "OutputError",
    "Pattern",
    "PerformanceWarning",
    "Plan",
    "PlanMissError",
    "PlanStore",
    "RandomnessError",
    "SearchError",
    "SingularJacobianError",
    "Sparsity",
    "StoreError",
    "StoreWarning",
    "Structure",
    "StructureChangedWarning",
    "TargetError",
    "TrainingStep",
    "Trial",
    "UnsupportedError",
    "VerificationError",
    "jacobian_from",
    "pin",
    "probe",
    "report",
    "to_scipy",
    "verify",
]


def __getattr__(name: str) -> Any:
    # the store brings SQLAlchemy, which costs more than the rest of autojac together
    if name == "PlanStore":
        return importlib.import_module("autojac.store").PlanStore
    if name == "report":
        return importlib.import_module("autojac.report")
    raise AttributeError(f"module 'autojac' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names; the rooms of the package are none of the user's business."""
    return sorted([*__all__, "__doc__", "__name__", "__version__"])
