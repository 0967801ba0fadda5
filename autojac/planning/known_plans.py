"""The plans of one function that are known: in this process for shapes it has met, and in the store."""

from __future__ import annotations

import dataclasses

from autojac.core.options import Options
from autojac.core.plan import Effort, Plan, Trial, effort_rank
from autojac.core.signature import Signature, bucket
from autojac.errors import PlanMissError
from autojac.methods.base import Method, build_if_known
from autojac.planning.first_call import FirstCallReport
from autojac.planning.pinned_plans import pinned_store
from autojac.planning.plan_repository import Keys, PlanRepository
from autojac.planning.same_code import hint_for


class KnownPlans:
    """Plans that may serve a call, and what a search may start from.

    Args:
        repository: the function's stored plans.
        options: of its `AutoJacobian`.
    """

    def __init__(self, repository: PlanRepository, options: Options) -> None:
        self.repository = repository
        self.options = options
        self._neighbours: dict[Signature, tuple[int, Plan]] = {}

    def plan(self, report: FirstCallReport, force: bool) -> Plan | None:
        """Return the best plan known: of a neighbouring shape, unless `force` is set, or stored."""
        neighbour = None if force else self._neighbour(report.signature)
        return neighbour or self.repository.find(report.keys)

    def _neighbour(self, signature: Signature) -> Plan | None:
        """Return the plan of a batch of the same bucket or a larger one: the last partial batch never searches."""
        entry = self._neighbours.get(signature.without_batch())
        if entry is None or bucket(signature.batch) > bucket(entry[0]):
            return None
        if entry[1].structure.samples is not None and signature.batch != entry[0]:
            return None  # a graph of samples belongs to its batch
        return dataclasses.replace(entry[1], source="neighbour")

    def remember(self, signature: Signature, plan: Plan) -> None:
        """Serve calls of the same shapes and no more samples by this plan."""
        key = signature.without_batch()
        if key not in self._neighbours or self._neighbours[key][0] <= signature.batch:
            self._neighbours[key] = (signature.batch, plan)

    def clear(self) -> None:
        """Forget the plans of neighbouring shapes."""
        self._neighbours.clear()

    def is_too_poor(self, plan: Plan, wanted: Effort) -> bool:
        """Check whether a better plan must be searched for before the call is served."""
        if self.options.on_miss in ("error", "online") or pinned_store() is not None:
            return False
        return effort_rank(plan.effort) < effort_rank(wanted) or (wanted != "estimate" and not plan.finished)

    def require_allowed(self, report: FirstCallReport, force: bool) -> None:
        """Raise `PlanMissError` where no plan may be made."""
        shapes = ", ".join(f"{leaf.shape} {leaf.dtype}" for leaf in report.signature.leaves)
        if pinned_store() is not None:
            raise PlanMissError(
                f"the plans of {self.repository.description} are pinned, and none is for arguments {shapes} on this "
                "machine. Nothing is searched while plans are pinned: unpin them by autojac.pin(None), tune, and pin "
                "them again"
            )
        if self.options.on_miss == "error" and not force:
            raise PlanMissError(
                f"no plan is stored for arguments {shapes} in {self.repository.description}, and on_miss='error' "
                "forbids making one. Tune ahead with jac.tune(x), for what another method computes by with "
                "jac.tune(x, v, of='jvp'), or with the command `autojac tune`"
            )

    def so_far(self, keys: Keys, before: Plan | None) -> tuple[Method | None, tuple[Trial, ...]]:
        """Return the method of the plan so far, and the trials of its search if that was not finished."""
        if before is None:
            return None, ()
        method = build_if_known(before.method)
        return method, () if method is None or before.finished else self.trials(keys, before)

    def trials(self, keys: Keys | None, plan: Plan) -> tuple[Trial, ...]:
        """Return what became of the candidates of a plan's search."""
        return plan.trials or (() if keys is None else self.repository.trials(keys))

    def hints(self, keys: Keys | None) -> list[Method]:
        """Return methods that won on other devices, for other shapes, or for other constants in the same code."""
        methods = dict.fromkeys([] if keys is None else self.repository.hints(keys))
        methods |= dict.fromkeys(hint_for(self.repository.func))
        for _, plan in self._neighbours.values():
            if (method := build_if_known(plan.method)) is not None:
                methods.setdefault(method)
        return list(methods)
