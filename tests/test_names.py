"""One name, one meaning: no class and no function others import is defined twice; files and functions are short.

Docstrings of functions start with a verb in the imperative, those of properties may name a value.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from sources import PACKAGE, nodes

FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
Function = ast.FunctionDef | ast.AsyncFunctionDef

SAME_MEANING = {
    *("__dir__", "__getattr__"),  # a module's own hook
    *("bench", "plans", "probe", "tune"),  # a command is called as what it runs
    *("downgrade", "upgrade"),  # schema revisions
    *("clear", "coloring"),  # of the store's two tables, called by their modules' names
    *("convolution", "distances", "gathering", "pointwise", "product"),  # rules of the same operators, one per analysis
}
"""Names that stand for one thing in several places."""
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
MANY_PARAMETERS: set[str] = set()
"""What still has to be divided, but for what a user or the command line calls: these lists only get shorter."""
NO_VERB = r"(The|An?|All|One|What|Whether|Where|When|Why|How|Which|Everything|\w*(?<!s)s|\w+ing|\w+ed|[^A-Z].*|\w+-\w+)"
"""First words that are no verb in the imperative."""
PARTICIPLE = (
    r"((?!embed|unsupported)[a-z]+(?<!e)ed"
    r"|built|done|drawn|found|given|held|kept|known|left|made|met|seen|shown|taken|written)"
)
BARE = rf"{PARTICIPLE}(_(again|alike|apart|at|back|by|from|in|now|on|once|to|up|with)(_\w+)?)?"
"""Past participles without a noun behind them; `unsupported` is what methods say."""
CALLED_BY_USERS = {"AutoJacobian.__init__", "jacobian_from", "audit", "bench", "tune"}


def defined(path: Path) -> Iterator[str]:
    """Classes, and functions that other files may import."""
    for node in ast.iter_child_nodes(nodes(path)[0]):
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and not node.name.startswith("_")):
            yield node.name


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Functions and methods by their names, those inside of others by their own."""
    owners = {part: node.name for node in nodes(path) if isinstance(node, ast.ClassDef) for part in node.body}
    for node in nodes(path):
        if isinstance(node, Function):
            yield (f"{owners[node]}.{node.name}" if node in owners else node.name), node


def length(function: Function) -> int:
    """Lines of a function, but for its decorators and docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    own = (function.end_lineno or 0) - function.lineno + 1
    return own - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def parameters(function: Function) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


def test_no_name_has_two_meanings() -> None:
    places = defaultdict(list)
    for name, path in FILES.items():
        for one in defined(path):
            places[one].append(name)
    twice = {one for one, found in places.items() if len(found) > 1}
    assert not {one: places[one] for one in twice - SAME_MEANING}


def test_files_are_short() -> None:
    found = {name for name, path in FILES.items() if len(path.read_text().splitlines()) > 300}
    assert found == LONG_FILES


def test_functions_are_short() -> None:
    every = [(name, one, function) for name, path in FILES.items() for one, function in functions(path)]
    found = {f"{name}:{one}" for name, one, function in every if length(function) > 60}
    assert found == LONG_FUNCTIONS
    many = {f"{name}:{one}" for name, one, f in every if parameters(f) > 7 and one not in CALLED_BY_USERS}
    assert many == MANY_PARAMETERS


def is_a_value(function: Function) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in function.decorator_list)


def test_docstrings_of_functions_start_with_a_verb() -> None:
    every = [
        (name, one, ast.get_docstring(function) or "Return")
        for name, path in FILES.items()
        for one, function in functions(path)
        # functions of users and of the literature, by what they compute
        if not name.startswith("bench/") and not is_a_value(function)
    ]
    first = {(name, one): text.split()[0].rstrip(".,:") for name, one, text in every}
    found = {f"{name}:{one}": word for (name, one), word in first.items() if re.fullmatch(NO_VERB, word)}
    assert not found


def test_functions_are_named_by_verbs_or_by_the_values_that_they_return() -> None:
    found = {
        f"{name}:{function.name}"
        for name, path in FILES.items()
        for owner in nodes(path)
        if isinstance(owner, (ast.Module, ast.ClassDef))
        for function in owner.body
        if isinstance(function, Function) and not is_a_value(function)
        # predicates may be adjectives
        if re.fullmatch(BARE, function.name.lstrip("_")) and ast.unparse(function.returns or function) != "bool"
    }
    assert not found
