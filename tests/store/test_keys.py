"""Keys of plans: whatever could change the answer, alone, is a miss; batch sizes of one bucket hit."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from autojac.core.signature import Leaf, Signature, bucket
from autojac.errors import OptionError
from autojac.store import Key, environment_key, operation_key

LEAF = Leaf((5, 3), "float32", "cpu", batched=True, differentiated=True)
MASK = Leaf((7,), "bool", "cpu", batched=False, differentiated=False)
FLAGS = (("autocast", None), ("tf32", False), ("deterministic", False), ("threads", 2), ("training", True))
SIGNATURE = Signature((LEAF, MASK), ((3,),), 5, "(*, *)", "blocks", False, FLAGS)
OPTIONS = {"memory_limit": None, "methods": 1}
BASE = operation_key("module.f", "00ff", SIGNATURE, OPTIONS)

CHANGED_LEAF = {"shape": (5, 4), "dtype": "float64", "device": "cuda:0", "batched": False, "differentiated": False}
CHANGED_SIGNATURE = {
    "leaves": (LEAF,),
    "outputs": ((3, 1),),
    "batch": 9,
    "context": "(*, *, scale=3.0)",
    "layout": "full",
    "differentiable": True,
    "flags": FLAGS[1:],
}


def key(**changes: Any) -> Key:
    return operation_key("module.f", "00ff", replace(SIGNATURE, **changes), OPTIONS)


def test_every_field_has_a_case() -> None:
    assert {field.name for field in fields(Leaf)} == set(CHANGED_LEAF)
    assert {field.name for field in fields(Signature)} == set(CHANGED_SIGNATURE)


def test_equal_calls_have_equal_keys() -> None:
    again = operation_key("module.f", "00ff", replace(SIGNATURE), dict(reversed(OPTIONS.items())))
    assert again == BASE
    assert hash(again) == hash(BASE)
    assert len(BASE.digest) == 64


@pytest.mark.parametrize("name", CHANGED_SIGNATURE)
def test_each_field_of_the_signature_alone_is_a_miss(name: str) -> None:
    assert key(**{name: CHANGED_SIGNATURE[name]}) != BASE


@pytest.mark.parametrize("name", CHANGED_LEAF)
@pytest.mark.parametrize("position", [0, 1])
def test_each_field_of_each_tensor_alone_is_a_miss(name: str, position: int) -> None:
    leaves = list(SIGNATURE.leaves)
    value = CHANGED_LEAF[name]
    leaves[position] = replace(
        leaves[position], **{name: not getattr(MASK, name) if position and value is False else value}
    )
    assert key(leaves=tuple(leaves)) != BASE


@pytest.mark.parametrize("position", range(len(FLAGS)))
def test_each_flag_alone_is_a_miss(position: int) -> None:
    name, _ = FLAGS[position]
    assert key(flags=(*FLAGS[:position], (name, "other"), *FLAGS[position + 1 :])) != BASE


def test_function_fingerprint_and_options_alone_are_misses() -> None:
    assert operation_key("module.g", "00ff", SIGNATURE, OPTIONS) != BASE
    assert operation_key("module.f", "00fe", SIGNATURE, OPTIONS) != BASE
    assert operation_key("module.f", "00ff", SIGNATURE, {**OPTIONS, "memory_limit": 1}) != BASE
    assert operation_key("module.f", "00ff", SIGNATURE, {**OPTIONS, "further": 0}) != BASE


def test_batch_sizes_of_one_bucket_hit() -> None:
    def at(batch: int) -> Key:
        return key(batch=batch, leaves=(replace(LEAF, shape=(batch, 3)), MASK))

    assert {at(batch).digest for batch in (5, 6, 7, 8)} == {BASE.digest}
    assert len({at(batch).digest for batch in (0, 1, 2, 3, 5, 9, 17)}) == 7
    assert [bucket(batch) for batch in (0, 1, 2, 3, 5, 9)] == [0, 1, 2, 4, 8, 16]


def test_cards_of_one_machine_share_a_plan() -> None:
    first, second, kind = (key(leaves=(replace(LEAF, device=device), MASK)) for device in ("cuda:0", "cuda:1", "cuda"))
    assert first == second == kind != BASE


def test_true_and_one_are_different_flags() -> None:
    assert key(flags=(("a", True),)) != key(flags=(("a", 1),)) != key(flags=(("a", 1.0),))


def test_what_is_not_json_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="dtype"):
        key(flags=(("dtype", torch.float32),))


def test_fields_are_what_was_hashed() -> None:
    assert Key.of(BASE.fields) == BASE
    assert BASE.fields["signature"]["batch"] == 8


ENVIRONMENT = {
    "autojac.store.keys._cpu_model": lambda: "Another CPU",
    "autojac.store.keys._core_count": lambda: 1000,
    "torch.backends.cpu.get_cpu_capability": lambda: "VSX",
    "torch.__version__": "99.0",
    "torch.version.cuda": "99.0",
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_each_field_of_the_environment_alone_is_a_miss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment_key("cpu")
    assert environment_key("cpu") == before
    monkeypatch.setattr(name, ENVIRONMENT[name])
    assert environment_key("cpu") != before


class Card:
    name, major, minor, total_memory = "H200", 9, 0, 150_000_000_000


@pytest.mark.parametrize("change", [{"name": "A100"}, {"major": 8}, {"minor": 1}, {"total_memory": 1}])
def test_two_gpu_models_are_two_environments(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Card)
    before = environment_key("cuda:0")
    assert environment_key("cuda:1") == before != environment_key("cpu")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: type("Other", (Card,), change))
    assert environment_key("cuda:0") != before
