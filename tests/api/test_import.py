"""`import autojac` loads torch and nothing heavier."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"alembic", "click", "optuna", "plotly", "rich", "rustworkx", "scipy", "sqlalchemy"}

LOADED_BEYOND_TORCH = """
import json, sys, torch
before = set(sys.modules)
import autojac
autojac.AutoJacobian
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_loads_nothing_heavy_beyond_torch() -> None:
    output = subprocess.run([sys.executable, "-c", LOADED_BEYOND_TORCH], capture_output=True, text=True, check=True)
    loaded = json.loads(output.stdout)
    heavy = [name for name in loaded if name.split(".")[0] in HEAVY or name.startswith("torch._dynamo")]
    assert not heavy
