"""What can't be computed is refused at once, in words that say what was expected, what came, and what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autojac
from autojac import AutoJacobian, InputError, OptionError, SearchError, StoreWarning
from autojac.core.module_function import module_function
from autojac.planning.plan_repository import function_name


def message(error: type[Exception], run: Callable[[], Any]) -> str:
    with pytest.raises(error) as told:
        run()
    return str(told.value)


def softmax_of_the_batch(x: Tensor) -> Tensor:
    return x.softmax(0)


def test_a_wrong_declaration_is_named() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    jac = AutoJacobian(softmax_of_the_batch, coupling="independent", store=":memory:", effort="estimate")
    text = message(SearchError, lambda: jac(x))
    assert text.startswith("coupling='independent' was declared for func, and no method that relies on it gives")
    assert "coupling='auto'" in text and "row 0 of output 0 is off by" in text
    # a structure probed for another function
    elsewhere = autojac.probe(torch.sin, x)
    jac = AutoJacobian(softmax_of_the_batch, coupling=elsewhere, store=":memory:", effort="estimate")
    assert message(SearchError, lambda: jac(x)).startswith("coupling=Structure(...) was declared for func")


def test_a_jacobian_without_room_says_its_size_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no method is looked for")

    monkeypatch.setattr("autojac.planning.search.optimize.search", never)
    options: dict[str, Any] = {"store": ":memory:", "memory_limit": "1MB"}
    text = message(SearchError, lambda: AutoJacobian(torch.sin, layout="full", **options)(torch.randn(500, 24)))
    assert text == (
        "the Jacobian alone takes 549 MiB in layout='full', of shape (500, 24, 500, 24); 977 KiB are allowed. Choose "
        "another layout ('sparse' takes 141 KiB and holds every entry that can be nonzero; 'diagonal' takes 46.9 KiB "
        "and holds every entry that can be nonzero), take it in parts by jac.chunks(x, bytes=..., out=...), or raise "
        "memory_limit"
    )
    text = message(
        SearchError, lambda: AutoJacobian(softmax_of_the_batch, layout="full", **options)(torch.randn(300, 8))
    )
    assert "'blocks' takes 75 KiB and holds a part of them only" in text
    text = message(SearchError, lambda: AutoJacobian(lambda x: x @ x.T @ x[:, :90], **options)(torch.randn(30, 100)))
    parts = "take it in parts by jac.chunks(x, bytes=..., out=...)"
    assert text.endswith(f"Differentiate fewer samples per call, {parts}, or raise memory_limit")


@pytest.mark.parametrize(("layout", "count"), [("blocks", 20 * 25), ("full", 20 * 25 * 20), ("diagonal", 20 * 5)])
def test_room_is_counted_to_the_byte(layout: Any, count: int) -> None:
    x = torch.randn(20, 5)
    jac = AutoJacobian(torch.sin, layout=layout, store=":memory:", memory_limit=4 * count - 1)
    assert "the Jacobian alone takes" in message(SearchError, lambda: jac(x))
    jac = AutoJacobian(torch.sin, layout=layout, store=":memory:", memory_limit=20 * 4 * count, effort="estimate")
    assert jac(x).numel() == count


@pytest.mark.parametrize("name", ["__call__", "plan", "tune", "explain", "value_and_jacobian", "trace", "inverse"])
def test_a_call_without_arguments_is_told_so(name: str) -> None:
    jac = AutoJacobian(torch.sin, store=":memory:")
    assert "positional arguments of a call of func were expected, got none" in message(OptionError, getattr(jac, name))


def test_meta_tensors_have_no_values() -> None:
    jac = AutoJacobian(torch.sin, store=":memory:")
    assert message(InputError, lambda: jac(torch.randn(4, 3, device="meta"))) == (
        "tensor argument 0 is on the meta device, without values; a dense tensor with values was expected. Pass a "
        "tensor on a device with memory, or leave it out of argnums"
    )


def test_a_folder_that_takes_no_files_is_no_lock_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    jac = AutoJacobian(torch.sin, store=tmp_path / "plans.db", effort="estimate")
    with pytest.warns(StoreWarning, match=r"plans.db can't be written \(Permission denied\); new plans live in memory"):
        jac(torch.randn(4, 3))


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.sin, "torch.sin"),
        (softmax_of_the_batch, f"{__name__}.softmax_of_the_batch"),
        (Net(), f"{__name__}.Net"),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "Sequential(Linear, Tanh)"),
        (nn.Sequential(*[nn.Tanh()] * 5, nn.ReLU()), "Sequential(Tanh, Tanh, ..., ReLU)"),
        (functools.partial(torch.add, 1), "partial(torch.add)"),
        (module_function(Net()), f"{__name__}.Net in its parameters"),
        (lambda x: x, f"lambda at test_refusals.py:{(lambda: 0).__code__.co_firstlineno}"),
    ],
)
def test_functions_have_names_that_tell_them(func: Any, name: str) -> None:
    assert function_name(func) == name


def test_what_is_printed_is_short() -> None:
    x = torch.randn(8, 3)
    jac = AutoJacobian(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), store=":memory:", effort="estimate")
    plan = jac.plan(x)
    assert repr(plan.structure) == "Structure('independent', 'proved')"
    assert repr(plan).startswith("Plan(") and len(repr(plan)) < 200
    assert str(plan.structure).splitlines()[0] == "independent, proved" and "proof:" in str(plan.structure)
    assert repr(jac) == "AutoJacobian(Sequential(Linear, Tanh), 1 plan in use)"
    jac(x.double().float()[:4])
    jac(torch.randn(16, 3))
    assert "plans in use" in repr(jac)
