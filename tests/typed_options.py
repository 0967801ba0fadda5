"""What a type checker sees of the options: `make check` fails where an ignored error is none.

Not run: mypy reads it, as its configuration names it.
"""

import torch

import autojac

autojac.AutoJacobian(torch.sin, layout="full", effort="quick", store="plans.db", coupling=autojac.Structure("dense"))
autojac.AutoJacobian(torch.sin, layout="blok")  # type: ignore[arg-type]
autojac.AutoJacobian(torch.sin, layuot="full")  # type: ignore[arg-type]
autojac.AutoJacobian.of_parameters(torch.nn.Linear(2, 2), in_dims=(0,), layout="blocks", batch_dims=2)
autojac.AutoJacobian.of_parameters(torch.nn.Linear(2, 2), layout="blok")  # type: ignore[arg-type]
print(autojac.PlanStore(":memory:").find, autojac.report.spy)
