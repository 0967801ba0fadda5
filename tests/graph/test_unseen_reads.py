"""No operator of the torch installed reads values of a tensor unseen, as far as torch has samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def report(names: Sequence[str] = ()) -> dict[str, Any]:
    script = Path(__file__).parents[1] / "unseen_reads.py"
    done = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.nightly
def test_what_fake_tensors_show_to_be_read_is_seen() -> None:
    found = report()
    assert "tensor_split" in found["hidden"]
    assert not found["unseen"]
