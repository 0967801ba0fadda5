"""The two keys of a stored plan: what is computed, and on what."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autojac.core.signature import Signature
from autojac.errors import OptionError


@dataclass(frozen=True, eq=False)
class Key:
    """A digest to look up by, with the fields it was made from to be read by people.

    Attributes:
        digest: sha256 of `fields` as canonical JSON.
        fields: plain JSON types.
    """

    digest: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Key:
        """Make the key of some fields.

        Raises:
            OptionError: a field is not made of JSON types.
        """
        try:
            text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise OptionError(f"a plan's key must be made of plain JSON types: {error}") from error
        return cls(hashlib.sha256(text.encode()).hexdigest(), json.loads(text))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def operation_key(function_name: str, fingerprint: str, signature: Signature, options: dict[str, Any]) -> Key:
    """Return the key of what is computed: function, shapes and roles of its tensors, flags, options.

    Batch sizes count by their power-of-two bucket; devices count by kind, so that `cuda:0` and `cuda:1`
    share a plan (which card it is, is the environment's business).

    Args:
        function_name: qualified name, human-readable; part of the key, so that opaque functions stay apart.
        fingerprint: digest of the function's code and captures.
        signature: the call's signature.
        options: whatever else could change the best plan, e.g. the memory limit.

    Raises:
        OptionError: a flag or option is not made of JSON types.
    """
    described = signature.round_up_batch().to_json()
    for leaf in described["leaves"]:
        leaf["device"] = leaf["device"].partition(":")[0]
    return Key.of(
        {"function": function_name, "fingerprint": fingerprint, "signature": described, "options": dict(options)}
    )


def environment_key(device: str) -> Key:
    """Return the key of where it is computed: processor, accelerator, torch.

    Args:
        device: a torch device, e.g. `cpu` or `cuda:0`.
    """
    kind = torch.device(device)
    fields: dict[str, Any] = {
        "device": kind.type,
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": _core_count(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
    }
    if kind.type == "cuda":
        properties = torch.cuda.get_device_properties(kind)
        fields["accelerator"] = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
        }
    return Key.of(fields)


def _core_count() -> int:
    # A container or a job scheduler may grant fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()
