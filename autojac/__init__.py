"""autojac: exact batched Jacobians in PyTorch, at the lowest cost measured on the device at hand."""

from typing import TYPE_CHECKING, Any

from autojac.api.autojacobian import AutoJacobian
from autojac.api.checks import probe, verify
from autojac.api.from_graph import jacobian_from
from autojac.core.pattern import Pattern, Sparsity
from autojac.core.plan import Plan, Trial
from autojac.core.structure import Structure
from autojac.errors import (
    AutojacError,
    AutojacWarning,
    InputError,
    ModesDisagreeWarning,
    MutationError,
    NoGraphWarning,
    OptionError,
    OutputError,
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
from autojac.sparse.csr import to_scipy

if TYPE_CHECKING:
    from autojac.store import PlanStore

__all__ = [
    "AutoJacobian",
    "AutojacError",
    "AutojacWarning",
    "InputError",
    "ModesDisagreeWarning",
    "MutationError",
    "NoGraphWarning",
    "OptionError",
    "OutputError",
    "Pattern",
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
    "Trial",
    "UnsupportedError",
    "VerificationError",
    "jacobian_from",
    "probe",
    "to_scipy",
    "verify",
]


def __getattr__(name: str) -> Any:
    # the store brings SQLAlchemy, which costs more than the rest of autojac together
    if name == "PlanStore":
        from autojac.store import PlanStore

        return PlanStore
    raise AttributeError(f"module 'autojac' has no attribute {name!r}")
