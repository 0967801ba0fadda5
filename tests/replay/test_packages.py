"""Code of installed packages is followed like the user's: whatever Python changes of it is noticed in the next call.

Each package is written to a folder that looks like one of installed packages, and imported from there.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import autojac
from autojac.guards.provenance import is_installed
from harness import compare, forced, in_use
from oracle import jacobian_blocks

PULL = {"method": "Pull", "seeds": "shared", "engine": "vmap"}
REPLAY = {"method": "Replay", "inner": PULL}
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Package:
    """A package and what may change in it.

    Attributes:
        files: sources by name; `PKG` stands for the package's name.
        make: of the package's modules, by name, the function.
        changes: statements on the modules, and `func`, each to be noticed.
    """

    files: dict[str, str]
    make: Callable[[Any], Any]
    changes: tuple[Callable[[Any, Any], Any], ...]


def one(source: str, *changes: Callable[[Any, Any], Any], make: Callable[[Any], Any] = lambda p: p.a.func) -> Package:
    return Package({"a": "import torch\nfrom torch import nn\n" + source}, make, changes)


def assign(**values: Any) -> Callable[[Any, Any], None]:
    def change(package: Any, func: Any) -> None:
        for name, value in values.items():
            setattr(package.a, name, value)

    return change


def in_class(name: str, **values: Any) -> Callable[[Any, Any], None]:
    def change(package: Any, func: Any) -> None:
        for attribute, value in values.items():
            setattr(getattr(package.a, name), attribute, value)

    return change


def on_func(**values: Any) -> Callable[[Any, Any], None]:
    def change(package: Any, func: Any) -> None:
        for attribute, value in values.items():
            setattr(func, attribute, value)

    return change


def times(factor: float) -> Callable[..., Any]:
    return lambda *args: args[-1] * factor


PACKAGES = {
    "global": one("SCALE = 2.0\ndef func(x): return x.sin() * SCALE", assign(SCALE=3.0)),
    "function": one("def help(x): return x * 2\ndef func(x): return help(x).sin()", assign(help=times(5.0))),
    "code of a function": one(
        "def other(x): return x * 4\ndef help(x): return x * 2\ndef func(x): return help(x).sin()",
        lambda p, f: setattr(p.a.help, "__code__", p.a.other.__code__),
    ),
    "defaults": one(
        "def func(x, by=2.0, *, plus=1.0): return x.sin() * by + x * plus",
        lambda p, f: setattr(f, "__defaults__", (3.0,)),
        lambda p, f: f.__kwdefaults__.update(plus=7.0),
    ),
    "closure": one(
        "def make(by):\n def func(x): return x.sin() * by\n def set(value):\n  nonlocal by\n  by = value\n"
        " return func, set\nfunc, set = make(2.0)",
        lambda p, f: p.a.set(3.0),
    ),
    "attribute of a module": one(
        "class Net(nn.Module):\n def __init__(self):\n  super().__init__()\n  self.by = 2.0\n  self.dims = [1]\n"
        " def forward(self, x): return x.sin() * self.by * len(self.dims)",
        on_func(by=3.0),
        lambda p, f: f.dims.append(2),
        in_class("Net", forward=lambda self, x: x.cos() * self.by),
        make=lambda p: p.a.Net(),
    ),
    "attribute of a class": one(
        "class Net:\n by = 2.0\n def __call__(self, x): return x.sin() * self.by",
        in_class("Net", by=3.0),
        make=lambda p: p.a.Net(),
    ),
    "property and descriptor": one(
        "class By:\n value = 2.0\n def __get__(self, obj, kind): return self.value\n"
        "class Net:\n by = By()\n k = 1.0\n @property\n def plus(self): return self.k\n"
        " def __call__(self, x): return x.sin() * self.by + x * self.plus",
        in_class("By", value=3.0),
        in_class("Net", k=4.0),
        make=lambda p: p.a.Net(),
    ),
    "__getattr__": one(
        "class Net:\n def __init__(self): self.kept = {'by': 2.0}\n def __getattr__(self, name):\n"
        "  if name != 'by': raise AttributeError(name)\n  return self.kept[name]\n"
        " def __call__(self, x): return x.sin() * self.by",
        lambda p, f: f.kept.update(by=3.0),
        make=lambda p: p.a.Net(),
    ),
    "registry": one(
        "ACTS = {}\ndef register(f):\n ACTS[f.__name__] = f\n return f\n@register\ndef double(x): return x.sin() * 2\n"
        "def func(x): return ACTS['double'](x)",
        lambda p, f: p.a.ACTS.update(double=times(3.0)),
    ),
    "dataclass": one(
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n by: float = 2.0\n"
        "class Net:\n def __init__(self): self.config = Config()\n"
        " def __call__(self, x): return x.sin() * self.config.by * Config().by",
        lambda p, f: setattr(f.config, "by", 3.0),
        lambda p, f: setattr(p.a, "Config", type("Config", (), {"by": 5.0})),
        make=lambda p: p.a.Net(),
    ),
    "wraps and partial": one(
        "import functools\ndef twice(f):\n @functools.wraps(f)\n def wrapper(*a, **k): return f(*a, **k) * BY\n"
        " return wrapper\nBY = 2.0\n@twice\ndef inner(x, k): return x.sin() * k\n"
        "func = functools.partial(inner, k=2.0)",
        assign(BY=3.0),
        lambda p, f: f.keywords.update(k=5.0),
    ),
    "lru_cache": one(
        "import functools\nBY = 2.0\n@functools.lru_cache(maxsize=8)\ndef table(n): return torch.arange(n) * BY\n"
        "def func(x): return x.sin() * table(x.shape[1])",
        lambda p, f: (setattr(p.a, "BY", 3.0), p.a.table.cache_clear()),
    ),
    "singledispatch": one(
        "import functools\n@functools.singledispatch\ndef act(x): raise TypeError\n"
        "@act.register\ndef _(x: torch.Tensor): return x.sin() * BY\nBY = 2.0\ndef func(x): return act(x)",
        assign(BY=3.0),
    ),
    "context manager": one(
        "from contextlib import contextmanager\nBY = 2.0\n@contextmanager\ndef scaled():\n yield BY\n"
        "class Plus:\n k = 1.0\n def __enter__(self): return self.k\n def __exit__(self, *e): pass\n"
        "def func(x):\n with scaled() as by, Plus() as k: return x.sin() * by + x * k",
        assign(BY=3.0),
        in_class("Plus", k=4.0),
    ),
    "generator": one(
        "BY = [1.0, 2.0]\ndef terms(x):\n for by in BY: yield x.sin() * by\ndef func(x): return sum(terms(x))",
        lambda p, f: p.a.BY.append(3.0),
    ),
    "annotations that run": one(
        "KINDS = {'number': int | float, 'list': list[int]}\nNEWEST = torch.__version__\nSCALE = 2\n"
        "def func(x):\n"
        "    known = isinstance(SCALE, KINDS['number']) and KINDS['list'].__origin__ is list and NEWEST >= '2'\n"
        "    return x.sin() * (SCALE if known else 5)\n",
        assign(SCALE=3),
        assign(SCALE="x"),
        assign(KINDS={"number": str, "list": list[int]}, SCALE=2),
    ),
    "random numbers that are not drawn": one(
        "from random import random as draw\n"
        "DRAW = False\n"
        "def func(x):\n"
        "    import random\n"
        "    return x.sin() * (random.randint(0, 9) + draw() if DRAW else SCALE)\n"
        "SCALE = 2.0\n",
        assign(SCALE=3.0),
    ),
    "import inside a function": Package(
        {
            "a": "def func(x):\n from . import b\n from .b import BY\n import PKG.b as c\n return x.sin() * BY * c.TWO",
            "b": "BY = 2.0\nTWO = 1.0",
        },
        lambda p: p.a.func,
        (lambda p, f: setattr(p.b, "BY", 3.0), lambda p, f: setattr(p.b, "TWO", 4.0)),
    ),
    "class hierarchy over modules": Package(
        {
            "base": "from torch import nn\nclass Base(nn.Module):\n k = 2.0\n"
            " def act(self, x): return x.sin() * self.k\n def forward(self, x): return self.act(x)",
            "mixin": "class Mixin:\n def act(self, x): return super().act(x) + x * self.plus",
            "a": "from .base import Base\nfrom .mixin import Mixin\nclass Net(Mixin, Base):\n plus = 1.0",
        },
        lambda p: p.a.Net(),
        (
            lambda p, f: setattr(p.base.Base, "k", 3.0),
            lambda p, f: setattr(p.a.Net, "plus", 5.0),
            lambda p, f: setattr(p.a.Net, "act", times(7.0)),
            lambda p, f: setattr(p.mixin.Mixin, "forward", times(9.0)),
        ),
    ),
    "parametrization": one(
        "from torch.nn.utils import parametrize\nclass Scaled(nn.Module):\n by = 2.0\n"
        " def forward(self, w): return w * self.by\n"
        "def make():\n net = nn.Linear(3, 3).double()\n parametrize.register_parametrization(net, 'weight', Scaled())\n"
        " return net.requires_grad_(False)",
        in_class("Scaled", by=3.0),
        make=lambda p: p.a.make(),
    ),
    "logging and warnings": one(
        "import logging, warnings\nlogger = logging.getLogger('PKG')\nBY = 2.0\ndef func(x):\n"
        " logger.debug('called with %s', x.shape)\n warnings.warn('careful', UserWarning, stacklevel=2)\n"
        " if logger.isEnabledFor(10): x = x * 2\n return x.sin() * BY",
        assign(BY=3.0),
        lambda p, f: p.a.logger.setLevel(logging.DEBUG),
    ),
    "environment": one(
        "import os\ndef func(x): return x.sin() * float(os.environ.get('AUTOJAC_TEST_SCALE', '2'))",
        lambda p, f: os.environ.update(AUTOJAC_TEST_SCALE="3"),
    ),
    "context variable": one(
        "import contextvars\nby = contextvars.ContextVar('by', default=2.0)\ndef func(x): return x.sin() * by.get()",
        lambda p, f: p.a.by.set(3.0) and None,
    ),
    "cache filled at the first call": one(
        "class Net(nn.Module):\n def __init__(self):\n  super().__init__()\n  self.table = None\n"
        " def forward(self, x):\n  if self.table is None or len(self.table) != x.shape[1]:\n"
        "   self.table = torch.arange(x.shape[1]).to(x)\n  return x.sin() * self.table",
        lambda p, f: setattr(f, "table", f.table * 3),
        make=lambda p: p.a.Net(),
    ),
    "cache in a global": one(
        "CACHE = {}\ndef func(x):\n n = x.shape[1]\n if n not in CACHE: CACHE[n] = torch.arange(n).to(x)\n"
        " return x.sin() * CACHE[n]",
        lambda p, f: p.a.CACHE.update({3: torch.ones(3).double()}),
    ),
    "last result": one(
        "class Net(nn.Module):\n def __init__(self):\n  super().__init__()\n  self.calls = 0\n  self.by = 2.0\n"
        " def forward(self, x):\n  y = x.sin() * self.by\n  self.last = y.sum(-1)\n  self.calls += 1\n  return y",
        on_func(by=3.0),
        make=lambda p: p.a.Net(),
    ),
    "slots": one(
        "class Net:\n __slots__ = ('by', 'calls', 'last')\n def __init__(self):\n  self.by, self.calls = 2.0, 0\n"
        "  self.last = None\n def __call__(self, x):\n  y = x.sin() * self.by\n  self.last = y.sum(-1)\n"
        "  self.calls += 1\n  return y",
        on_func(by=3.0),
        make=lambda p: p.a.Net(),
    ),
    "names that torch may have": one(
        "def func(x): return x.sin() * (2.0 if hasattr(torch, 'autojac_later') else 1.0)",
        lambda p, f: setattr(torch, "autojac_later", 1),
        lambda p, f: delattr(torch, "autojac_later"),
    ),
    "who called it": one(
        "import sys\nfrom sys import _getframe\nBY = 2.0\ndef func(x):\n"
        " assert _getframe(0).f_code is func.__code__ and sys._getframe(0)\n return x.sin() * BY",
        assign(BY=3.0),
    ),
    "pattern matching and walrus": one(
        "BY = {'kind': 'sin', 'by': 2.0}\ndef func(x):\n match BY:\n"
        "  case {'kind': 'sin', 'by': by}: return x.sin() * by\n"
        "  case _: return x.cos()",
        lambda p, f: p.a.BY.update(by=3.0),
        lambda p, f: p.a.BY.update(kind="cos"),
    ),
}


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], Any]]:
    """Write a package to a folder of installed ones, or of the user's, and import all its modules."""
    names: list[str] = []

    def load(files: dict[str, str], where: str = "site-packages") -> Any:
        folder = tmp_path / where
        name = f"package_{next(_NUMBERS)}"
        names.append(name)
        (folder / name).mkdir(parents=True)
        monkeypatch.syspath_prepend(str(folder))
        for module, source in {"__init__": "", **files}.items():
            (folder / name / f"{module}.py").write_text(source.replace("PKG", name))
        importlib.invalidate_caches()
        package = importlib.import_module(name)
        for module in files:
            importlib.import_module(f"{name}.{module}")
        return package

    monkeypatch.delenv("AUTOJAC_TEST_SCALE", raising=False)
    yield load
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]


@pytest.mark.parametrize("name", PACKAGES)
def test_what_packages_read_is_noticed_and_replayed(name: str, imported: Callable[[dict[str, str]], Any]) -> None:
    case = PACKAGES[name]
    package = imported(case.files)
    assert is_installed(package.a.__name__)
    func = case.make(package)
    x = torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jac = forced(func, (x,), REPLAY)
        for change in (lambda p, f: None, lambda p, f: None, *case.changes):
            change(package, func)
            for _ in range(2):
                x = torch.rand(4, 3, dtype=torch.float64)
                compare(jac(x), jacobian_blocks(func, (x,)))
        traces = list(jac._plans.planner.function_state.traces)
        assert traces
        assert all("operators left" in line for line in traces), traces
        assert isinstance(package, ModuleType)
        assert jac.plan(x).method["method"] == "Replay"


@pytest.mark.parametrize("on_miss", ["estimate", "tune"])
def test_a_first_call_counts_once(on_miss: str, imported: Callable[[dict[str, str]], Any]) -> None:
    source = (
        "CALLS = 0\n"
        "SEEN = {'n': 0, 'last': []}\n"
        "class Net:\n"
        "    total = 0\n"
        "    __slots__ = ('mine',)\n"
        "    def __init__(self):\n"
        "        self.mine = 0\n"
        "    def __call__(self, x):\n"
        "        global CALLS\n"
        "        CALLS += 1\n"
        "        type(self).total += 1\n"
        "        self.mine += 1\n"
        "        count(len(x))\n"
        "        return x.sin()\n"
        "def count(size):\n"
        "    SEEN['n'] += 1\n"
        "    SEEN['last'].append((CALLS, size))\n"
    )
    module = imported({"a": source}).a
    net, x = module.Net(), torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad():
        jac = autojac.AutoJacobian(net, store=":memory:", on_miss=on_miss, budget_s=0.1)
        for calls in range(1, 4):
            compare(jac(x), jacobian_blocks(torch.sin, (x,)))
            assert (module.CALLS, module.SEEN["n"], module.Net.total, net.mine) == (calls,) * 4
            assert module.SEEN["last"] == [(turn, 4) for turn in range(1, calls + 1)]


def test_of_a_package_of_the_users_what_does_not_run_keeps_nothing_from_being_replayed(
    imported: Callable[..., Any],
) -> None:
    helpers = (
        "SCALE = 2.0\n"
        "class Kept:\n"
        "    factor = 1.0\n"
        "    def stamp(self, x):\n"
        "        return x * len(list(map(id, [x])))\n"
        "    def scale(self, x):\n"
        "        return x * SCALE * self.factor\n"
        "def stamp(x):\n"
        "    return x * len(list(map(id, [x])))\n"
        "def cosine(x):\n"
        "    return x.cos()\n"
    )
    source = (
        "from PKG import helpers\n"
        "KEPT = helpers.Kept()\n"
        "HANDLERS = {'sine': lambda x: KEPT.scale(x.sin()), 'cosine': helpers.cosine, 'stamp': helpers.stamp}\n"
        "NAME = 'sine'\n"
        "def func(x):\n"
        "    return HANDLERS[NAME](x)\n"
    )
    package = imported({"helpers": helpers, "a": source}, "project")
    assert not is_installed(package.a.__name__)
    func, helpers, served = package.a.func, package.helpers, 0
    changes: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: setattr(helpers, "SCALE", 3.0),
        lambda: setattr(helpers.Kept, "factor", 2.0),
        lambda: setattr(package.a.KEPT, "factor", 5.0),
        lambda: setattr(package.a, "NAME", "cosine"),
        lambda: package.a.HANDLERS.update(cosine=torch.exp),
        lambda: setattr(package.a, "NAME", "sine"),
        lambda: setattr(helpers.Kept, "scale", lambda self, x: x * 11),
        lambda: setattr(package.a, "KEPT", helpers.Kept()),
        # from here on it does run
        lambda: setattr(package.a, "NAME", "stamp"),
        lambda: setattr(helpers, "len", lambda items: 7),
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jac = forced(func, (torch.rand(4, 3, dtype=torch.float64),), REPLAY)
        for change in changes:
            change()
            for _ in range(3):
                x = torch.rand(4, 3, dtype=torch.float64)
                compare(jac(x), jacobian_blocks(func, (x,)))
            served += in_use(jac).compute.bound is not None
    assert served >= len(changes) - 3, list(jac._plans.planner.function_state.traces)


@pytest.mark.parametrize("name", ["last result", "slots"])
def test_replays_leave_what_a_plain_call_leaves(name: str, imported: Callable[[dict[str, str]], Any]) -> None:
    func = PACKAGES[name].make(imported(PACKAGES[name].files))
    with torch.no_grad():
        jac = forced(func, (torch.rand(4, 3),), REPLAY)
        before = func.calls
        for count in range(1, 12):
            x = torch.rand(4, 3)
            jac(x)
            assert torch.equal(func.last, (x.sin() * 2).sum(-1))
            assert func.calls == before + count


def test_what_was_compiled_is_replayed_as_it_was_written() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double().requires_grad_(False)
    compiled, double = torch.compile(net), torch.compile(lambda x: x.sin() * 2)

    def func(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([compiled(x), double(x)], 1)

    with torch.no_grad():
        jac = forced(func, (torch.rand(4, 3, dtype=torch.float64),), REPLAY)
        for _ in range(2):
            x = torch.rand(4, 3, dtype=torch.float64)
            compare(jac(x), jacobian_blocks(lambda x: torch.cat([net(x), x.sin() * 2], 1), (x,)))
        (line,) = jac._plans.planner.function_state.traces
    assert "operators left" in line


def test_a_package_that_replaces_a_part_of_torchs_transforms(
    imported: Callable[[dict[str, str]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tensordict does."""
    source = (
        "from torch._functorch import vmap\nfrom torch.utils._pytree import tree_map\nplain = vmap._unwrap_batched\n"
        "def seen(leaf): return leaf\ndef helper(): return True\ndef _unwrap_batched(*args, **kwargs):\n"
        " assert helper()\n return tree_map(seen, plain(*args, **kwargs))"
    )
    patch, x = imported({"a": source}).a, torch.rand(4, 3, dtype=torch.float64)
    monkeypatch.setattr(patch.vmap, "_unwrap_batched", patch._unwrap_batched)
    with torch.no_grad():
        jac = forced(torch.sin, (x,), REPLAY)
        for _ in range(2):
            compare(jac(x), torch.diag_embed(x.cos()))
        (line,) = jac._plans.planner.function_state.traces
    assert "operators left" in line


REFUSED = {
    "what it read before it set it": (
        "class Net(nn.Module):\n last = None\n def forward(self, x):\n"
        "  y = x.sin() * (2.0 if self.last is None else 1.5)\n"
        "  self.last = y.sum(-1)\n  return y",
        "attribute last of Net",
    ),
    "a counter that decides": (
        "class Net(nn.Module):\n calls = 0\n def forward(self, x):\n  self.calls += 1\n"
        "  return x.sin() * (2.0 if self.calls > 1000 else 1.5)",
        r"attribute calls of Net and may read it \(a.py, line 7\)",
    ),
    "a list that grows": (
        "class Net(nn.Module):\n def __init__(self):\n  super().__init__()\n  self.losses = []\n"
        " def forward(self, x):\n  self.losses.append(0)\n  return x.sin()",
        "changes a list",
    ),
    "a clock": ("import time\nclass Net(nn.Module):\n def forward(self, x): return x * (time.time() > 0)", "time"),
    "a file": (
        "import os\nclass Net(nn.Module):\n def forward(self, x): return x * len(open(os.devnull).read() + 'a')",
        "open",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_replayed_is_named(name: str, imported: Callable[[dict[str, str]], Any]) -> None:
    source, expected = REFUSED[name]
    func = imported({"a": f"import torch\nfrom torch import nn\n{source}"}).a.Net()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        func(torch.rand(4, 3, dtype=torch.float64))
        try:
            jac = forced(func, (torch.rand(4, 3, dtype=torch.float64),), REPLAY)
            for _ in range(3):
                x = torch.rand(4, 3, dtype=torch.float64)
                y = jac(x)
                assert y.isfinite().all()
        except autojac.RandomnessError:
            assert name == "what it read before it set it"
            return
        found = list(jac._plans.planner.function_state.lines())
    assert any("not possible" in line for line in found), found
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(found)


def test_values_of_captured_tensors_that_python_reads_are_compared(imported: Callable[[dict[str, str]], Any]) -> None:
    source = (
        "import torch\nmask = torch.ones(3, dtype=torch.bool)\nsteps = torch.tensor(2)\ndef func(x):\n"
        " y = x.sin() if mask.all() else x.cos()\n for _ in range(int(steps)): y = y * 2\n return y"
    )
    package = imported({"a": source}).a
    with torch.no_grad():
        jac = forced(package.func, (torch.rand(4, 3, dtype=torch.float64),), REPLAY)
        changes = (lambda: None, package.mask.zero_, lambda: package.steps.data.add_(1), package.mask.fill_)
        for number, change in enumerate(changes):
            change(True) if number == 3 else change()
            for _ in range(3):
                x = torch.rand(4, 3, dtype=torch.float64)
                compare(jac(x), jacobian_blocks(package.func, (x,)))
        traces = list(jac._plans.planner.function_state.traces)
    assert len(traces) == 4
    assert all("operators left" in line for line in traces), traces


def written_in_place(x: torch.Tensor) -> torch.Tensor:
    sign = torch.zeros(4, 3, dtype=x.dtype)
    sign.copy_(x.detach())
    return x.sin() if sign.sum() > 0 else x.cos()


def test_numbers_of_what_was_written_in_place_are_no_constants() -> None:
    x = torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad():
        jac = forced(written_in_place, (x,), REPLAY, verify="never")
        for point in (x, x, -x, x):
            compare(jac(point), jacobian_blocks(written_in_place, (point,)))


def test_what_one_kind_of_call_counts_and_another_reads_is_watched() -> None:
    class Net:
        n = 0

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] == 3:
                self.n += 1
                return x.sin() * 2
            return self.scaled(x)

        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            return x.cos() * self.n

    net = Net()
    three, two = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    net(three)
    with torch.no_grad():
        jac = forced(net, (three,), REPLAY)
        for turn in range(8):
            assert torch.allclose(jac(three), torch.diag_embed(2 * three.cos()))
            assert net.n == turn + 2
            if turn % 3 == 2:
                assert torch.allclose(jac(two), torch.diag_embed(-two.sin() * net.n))


def test_a_bare_except_hides_nothing() -> None:
    class Net:
        last: torch.Tensor | None = None

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            try:
                factor = float(self.last.shape[0])  # type: ignore[union-attr]
            except BaseException:
                factor = 4.0
            y = x.sin() * factor
            self.last = y
            return y

    net = Net()
    x = torch.rand(4, 3, dtype=torch.float64)
    net(x)
    with torch.no_grad():
        jac = forced(net, (x,), REPLAY)
        for _ in range(3):
            compare(jac(x), jacobian_blocks(net, (x,)))
        net.last = torch.ones(7)
        expected = torch.diag_embed(7 * x.cos())
        assert torch.allclose(jac(x), expected)
        lines = jac._plans.planner.function_state.lines()
    assert any("may read it (test_packages.py, line" in line for line in lines), lines


def test_what_torch_reads_of_its_own_modules_is_no_counter() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(3, dtype=torch.float64).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.norm.eps *= 2
            return self.norm(x)

    net = Net()
    x = torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            jac = forced(net, (x,), REPLAY)
            jac(x)
        except autojac.RandomnessError:
            return
        lines = jac._plans.planner.function_state.lines()
    assert any("not possible" in line for line in lines), lines
