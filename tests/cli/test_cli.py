"""The command line: every command does what its help says, and says in one line what it can't do."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from autojac import AutoJacobian, PlanStore
from autojac.cli import main

MODEL = """
from typing import NamedTuple

import torch
from torch import nn


class Sizes(NamedTuple):
    width: int = 8


class Net(nn.Module):
    def __init__(self, sizes=Sizes()):
        super().__init__()
        self.sizes = sizes
        self.layers = nn.Sequential(nn.Linear(3, sizes.width), nn.Tanh(), nn.Linear(sizes.width, 2))

    def forward(self, x):
        return self.layers(x)


def make_model(sizes=Sizes()):
    return Net(sizes)


def residual(x, t):
    return torch.sin(x) * t


def mixed(x):
    return x - x.mean(0)


def within_rows(x):
    return x.cumsum(1)


def raises(x):
    raise ValueError("a message\\nof two lines")


def make_nothing():
    return 3


model = make_model()
number = 3

if __name__ == "__main__":
    from autojac import AutoJacobian

    torch.set_num_threads(2)
    for func, args in ((make_model(), (torch.randn(50, 3),)), (residual, (torch.randn(50, 2), torch.randn(50, 1)))):
        print(AutoJacobian(func, on_miss="error", memory_limit=2**30).plan(*args).source)
"""
NET = ["tune", "model.py:make_model", "--effort", "estimate"]
TUNE = [*NET, "--shape", "64x3"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a model in it, none of which outlives the test."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "physics.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")) or name == "package":
            del sys.modules[name]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*arguments: str) -> Any:
    return json.loads(output(*arguments, "--json"))


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(main))


def examples(path: tuple[str, ...]) -> list[list[str]]:
    """The example lines in a command's help, without the `autojac` in front."""
    text = COMMANDS[path].help or ""
    return [shlex.split(line)[1:] for line in re.findall(r"^ +autojac .*", text.partition("Example")[2], re.MULTILINE)]


def test_commands_are_all_there() -> None:
    assert {path[0] for path in COMMANDS} >= {"demo", "tune", "probe", "explain", "audit", "plans"}
    assert {path[1] for path in COMMANDS if len(path) == 2} == {"list", "show", "rm"}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_and_explains_each_option(path: tuple[str, ...]) -> None:
    assert examples(path)
    assert all(example[: len(path)] == list(path) for example in examples(path))
    assert "--help" in output(*path, "--help")
    options = [option for option in COMMANDS[path].params if isinstance(option, click.Option)]
    assert all(option.help for option in options)


@pytest.mark.parametrize("path", [("tune",), ("probe",), ("explain",), ("audit",)], ids=" ".join)
def test_examples_run(path: tuple[str, ...]) -> None:
    fast = [] if path == ("probe",) else ["--effort", "estimate"]
    for example in examples(path):
        if path == ("audit",):
            output("tune", *example[1 : example.index("--shape") + 2], *[o for o in example if o == "--no-grad"], *fast)
        assert output(*example, *fast)


def test_examples_of_plans_run() -> None:
    output(*TUNE, "--shape", "16x3")
    for action in ("list", "show", "rm"):
        for example in examples(("plans", action)):
            assert output(*example)
    assert "there are no plans" in output("plans", "list")


def test_version_and_entry_points() -> None:
    assert output("--version").split()[-1] == version("autojac")
    (script,) = entry_points(group="console_scripts", name="autojac")
    assert script.load() is main
    command = [sys.executable, "-m", "autojac", "--version"]
    assert version("autojac") in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_answers_a_group_without_a_command() -> None:
    assert "Commands:" in output()
    assert "Commands:" in output("plans")


def test_an_installation_without_a_part_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main.sources, "bench", "autojac.absent.command:bench")  # type: ignore[attr-defined]
    assert "bench" not in output("--help")
    assert run("bench").exit_code == 2


def test_what_the_command_tunes_a_script_finds(folder: Path) -> None:
    limit = ["--memory-limit", "1GiB", "--threads", "2", "--effort", "estimate"]
    output("tune", "model.py:make_model", "--shape", "64x3", *limit)
    output("tune", "model:residual", "--shape", "33x2,33x1", *limit)
    command = [sys.executable, "model.py"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert found.stdout.split() == ["store", "store"]


def test_tune_measures_and_keeps_a_plan(own_store: Path) -> None:
    found = data("tune", "model.py:model", "--shape", "8x3", "--shape", "32x3", "--budget", "500ms")
    assert found["store"] == str(own_store)
    for plan, batch in zip(found["plans"], (8, 32), strict=True):
        assert plan["shapes"] == [[batch, 3]]
        assert (plan["source"], plan["effort"], plan["kept"]) == ("search", "quick", True)
        assert plan["seconds"] > 0
        assert plan["trials"]
        assert plan["structure"]["coupling"] == "independent"
    assert len(PlanStore(own_store).listing()) == 2


def test_tune_says_where_a_plan_of_higher_effort_stays() -> None:
    output("tune", "torch:sin", "--shape", "8x3", "--budget", "300ms")
    assert "not kept" in output("tune", "torch:sin", "--shape", "8x3", "--effort", "estimate")


def test_tune_names_the_store(folder: Path) -> None:
    output(*TUNE, "--store", "here.db")
    assert len(PlanStore(folder / "here.db").listing()) == 1
    assert not PlanStore().listing()


@pytest.mark.parametrize(
    ("target", "flags", "differentiable"),
    [
        ("model.py:make_model", (), True),
        ("model.py:make_model", ("--no-grad",), False),
        ("torch:sin", (), False),
        ("torch:sin", ("--grad",), True),
    ],
)
def test_grad_says_whether_j_is_differentiated(target: str, flags: tuple[str, ...], differentiable: bool) -> None:
    output("tune", target, "--shape", "8x3", "--effort", "estimate", *flags)
    assert PlanStore().listing()[0].op.fields["signature"]["differentiable"] is differentiable


def test_dtypes_and_threads_are_those_named() -> None:
    threads = torch.get_num_threads()
    output(*TUNE, "--dtype", "float64", "--threads", "1")
    output(
        "tune", "torch:mul", "--shape", "8x3,8x3", "--dtype", "float32,bool", "--shape", "8,8", "--effort", "estimate"
    )
    signatures = [plan.op.fields["signature"] for plan in reversed(PlanStore().listing())]
    dtypes = [[leaf["dtype"] for leaf in signature["leaves"]] for signature in signatures]
    assert dtypes == [["float64"], ["float32", "bool"], ["float32", "bool"]]
    assert dict(signatures[0]["flags"])["threads"] == 1
    assert torch.get_num_threads() == threads


def test_a_file_named_as_a_module_hides_nothing(folder: Path) -> None:
    (folder / "json.py").write_text("def f(x):\n    return x.sin()\n")
    output("tune", "json.py:f", "--shape", "8x3", "--effort", "estimate")
    assert sys.modules["json"] is json


def test_probe_says_what_couples() -> None:
    text = output("probe", "model.py:mixed", "--shape", "16x3")
    assert "statistics, observed" in text and "shared numbers" in text
    assert "random cotangents" in text
    (found,) = data("probe", "model:residual", "--shape", "16x3,16x1", "--argnums", "0,1")
    assert (found["coupling"], found["shapes"]) == ("independent", [[16, 3], [16, 1]])
    assert found["evidence"]
    assert not PlanStore().listing()


def test_methods_are_planned_with_vectors_of_their_shapes(folder: Path) -> None:
    call = ["model.py:residual", "--shape", "4x4x2,4x4x1", "--batch-dims", "2", "--argnums", "0,1"]
    for method in ("jvp", "vjp", "gram", "solve"):
        (found,) = data("tune", *call, "--of", method, "--effort", "estimate")["plans"]
        assert found["kept"]
        assert "from store" in output("explain", *call, "--of", method, "--effort", "estimate")
    text = output("explain", *call, "--of", "ggn_product", "--effort", "estimate")
    assert text.count("plan: ") == 2
    assert "grouped" in output("probe", "model.py:within_rows", "--shape", "4x4x2", "--batch-dims", "2")


def test_explain_finds_the_plan_and_its_candidates() -> None:
    output("tune", "torch:sin", "--shape", "8x3", "--budget", "300ms")
    text = output("explain", "torch:sin", "--shape", "8x3")
    assert "from store, effort quick" in text
    assert re.search(r"candidates: \d+", text)


def test_plans_are_listed_shown_and_removed(own_store: Path) -> None:
    output("tune", "model.py:model", "--shape", "8x3", "--budget", "300ms")
    output("tune", "torch:sin", "--shape", "8x3", "--effort", "estimate")
    listed = data("plans", "list")
    assert [plan["function"].rpartition(".")[2] for plan in listed] == ["sin", "Net"]
    assert "8x3 float32 on cpu" in output("plans", "list")
    number = str(listed[1]["id"])
    shown = data("plans", "show", number)
    assert shown["trials"]
    assert {key: shown[key] for key in listed[1]} == listed[1]
    text = output("plans", "show", number)
    assert "differentiable" in text
    assert "random cotangents" in text
    assert run("plans", "rm", number, "99").exit_code == 2
    assert len(PlanStore(own_store).listing()) == 2
    output("plans", "rm", number)
    assert [plan["id"] for plan in data("plans", "list")] == [listed[0]["id"]]
    assert "removed 1 plan " in output("plans", "rm", "--all")
    assert data("plans", "list") == []


def test_a_refuted_plan_says_so(own_store: Path) -> None:
    output("tune", "torch:sin", "--shape", "8x3", "--effort", "estimate")
    store = PlanStore(own_store)
    (plan,) = store.listing()
    store.refute(plan.op, plan.env, "it was wrong")
    assert "refuted" in output("plans", "list")
    assert "it was wrong" in output("plans", "show", str(plan.id))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "model.py", "--shape", "8x3"], "was expected as TARGET"),
        (["tune", "absent.py:f", "--shape", "8x3"], "no file absent.py"),
        (["tune", "absent.module:f", "--shape", "8x3"], "no module 'absent'"),
        (["tune", "model..x:f", "--shape", "8x3"], "no module 'model."),
        (["tune", "model.py:make_modle", "--shape", "8x3"], "did you mean 'make_model'?"),
        (["tune", "model.py:number", "--shape", "8x3"], "is an int; a function or module was expected"),
        (["tune", "model.py:make_nothing", "--shape", "8x3"], "which make_nothing() returned"),
        (["tune", "torch.nn:Linear", "--shape", "8x3"], "constructor needs arguments"),
        (["tune", "model.py:model"], "Missing option '--shape'"),
        ([*NET, "--shape", "8y3"], "'8y3' is no shape"),
        ([*NET, "--shape", "0x3"], "'0x3' is no shape"),
        ([*NET, "--shape", "8x4"], "can't be called with (8, 4) float32"),
        ([*NET, "--shape", "8x3,8x3"], "2 positional arguments but 3 were given"),
        ([*TUNE, "--dtype", "float33"], "did you mean 'float32'?"),
        ([*TUNE, "--dtype", "int64"], "int64, which has no derivative"),
        ([*TUNE, "--dtype", "float32,bool"], "names 2 dtypes for 1 argument"),
        ([*TUNE, "--device", "abacus"], "device 'abacus' can't be used"),
        ([*TUNE, "--device", "meta"], "a device that computes was expected"),
        ([*TUNE, "--budget", "soon"], "'soon' is no time"),
        ([*TUNE, "--memory-limit", "much"], "memory_limit must be bytes"),
        ([*TUNE, "--memory-limit", "1"], "the Jacobian alone takes"),
        ([*TUNE, "--effort", "hard"], "'hard' is not one of"),
        ([*TUNE, "--argnums", "x"], "positions of arguments"),
        ([*TUNE, "--argnums", "1"], "argnums names argument 1"),
        ([*TUNE, "--argnums", "1", "--of", "jvp"], "argnums names argument 1"),
        ([*TUNE, "--of", "product"], "'product' is not one of"),
        ([*TUNE, "--batch-dims", "0"], "--batch-dims"),
        ([*TUNE, "--batch-dims", "3"], "3 batch axes in front"),
        ([*TUNE, "--threads", "0"], "--threads"),
        ([*TUNE, "--efort", "quick"], "No such option"),
        ([*TUNE, "--store", "foo://bar"], "can't be used as a plan store"),
        ([*TUNE, "--store", "."], "can't be used as a plan store"),
        (["explain", "model.py:model", "--shape", "8x3", "--store", "."], "can't be used as a plan store"),
        (["audit", "model.py:model", "--shape", "8x3"], "no plan is stored for this call"),
        (["plans", "list", "--store", "foo://bar"], "can't be used as a plan store"),
        (["plans", "show", "7"], "has no plan 7"),
        (["plans", "rm"], "or --all"),
        (["plans", "rm", "1", "--all"], "or --all"),
        (["plan"], "No such command 'plan'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.startswith("autojac: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(x):\n    raise ValueError('a message\\n in two lines')", "raised ValueError: a message in two lines"),
        ("def f(x):\n    return x / (1 - 1 // 1) * {}['key']", "raised KeyError: 'key'"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def f(x:", "raised SyntaxError"),
        ("import absent_module", "raised ModuleNotFoundError: No module named 'absent_module'"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
    ],
    ids=lambda text: str(text).splitlines()[0][:20],
)
def test_what_the_users_code_raises_is_named(folder: Path, source: str, said: str) -> None:
    (folder / "theirs.py").write_text(source + "\n")
    for target in ("theirs.py:f", "theirs:f"):
        result = run("tune", target, "--shape", "8x3")
        assert result.exit_code == 1
        assert said in result.stderr
        assert "theirs.py:" in result.stderr
        assert result.stderr.count("\n") == 1


def test_warnings_of_autojac_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOJAC_STORE", str(folder))
    shown = warnings.showwarning
    result = run("demo", "--steps", "1", "--poses", "8", "--effort", "estimate")
    assert result.exit_code == 0
    assert result.stderr.startswith("autojac: warning: ")
    assert result.stderr.count("\n") == 1
    assert "The plan was not kept" in result.stdout
    assert warnings.showwarning is shown


def test_demo_tunes_trains_verifies_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autojac.planning.search.looks.COMPILED_PROGRAMS", 0)
    first = output("demo", "--steps", "20", "--poses", "32")
    assert re.search(r"Tuned: \d+ candidates", first)
    assert re.search(r"source: search, \d+ trials", first)
    assert "verified: J agrees" in first
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", first)]
    assert losses[-1] < losses[0]
    second = output("demo", "--steps", "1", "--poses", "32")
    assert "source: store" in second
    assert "0 trials" in second
    assert "Tuned" not in second


def test_demo_knows_the_arm_exactly() -> None:
    from autojac.cli.demo import Arm, draw_poses  # noqa: PLC0415

    arm, angles = Arm(), draw_poses(5).double()
    arm.weights, arm.below = arm.weights.double(), arm.below.double()
    exact = arm.jacobian(angles)
    assert torch.allclose(AutoJacobian(arm.places, effort="estimate")(angles), exact)
    assert exact.abs().max() <= 1 + 1e-12
