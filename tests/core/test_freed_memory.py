"""What was freed is there for what comes next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from autojac.core import freed_memory

PROGRAM = """
import resource, runpy, sys

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    for _ in range(50):
        blocks = [b"x" * 2**20 for _ in range(6)]
        del blocks

keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
work()
before = faults(work)
own = faults(keep_freed_memory)
work()
print(before, own, faults(work))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_a_program_touches_no_fresh_pages_in_every_call_nor_to_get_there() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, freed_memory.__file__], capture_output=True, text=True, check=True
    )
    before, own, after = map(int, ran.stdout.split())
    assert after < before / 20, (before, after)
    assert own < freed_memory.LARGE / 2**12 / 20, own
