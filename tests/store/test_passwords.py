"""No form of URL shows its password: not in a repr, a warning, an error or its causes, and not at a prompt."""

from __future__ import annotations

import sqlite3
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from click.testing import CliRunner

import autojac
from autojac import PlanStore
from autojac.cli import main
from autojac.core.options import Options
from autojac.errors import StoreError
from autojac.store import database
from autojac.store.location import readable_location
from stores import ENV, OP, PLAN

SECRET = "hunter2secret"

PARSED = [
    f"postgresql+psycopg://me:{SECRET}@host:5432/plans",
    f"postgresql+psycopg://:{SECRET}@host/plans",
    f"postgresql+psycopg://{SECRET}@host/plans",
    f"postgresql+psycopg://host/plans?password={SECRET}",
    f"postgresql+psycopg://me@host/plans?user=me&password={SECRET}",
    f"postgresql+psycopg://host/plans?sslpassword={SECRET}&sslmode=require",
    f"postgresql+psycopg://host/plans?passfile=/home/me/{SECRET}",
    f"postgresql+psycopg://host/plans?passfile={SECRET}&passfile=other",
    f"postgresql+psycopg://host/plans?token={SECRET}",
    f"postgresql+psycopg://host/plans?AccessKey={SECRET}",
    f"postgresql+psycopg://host/plans?host=a:{SECRET}@b",
    f"postgresql+psycopg://me:pa@{SECRET}@host/plans",
    f"postgresql+psycopg://me:pa/{SECRET}@host/plans",
    f"postgresql+psycopg://me:pa?{SECRET}@host/plans",
    f"postgresql+psycopg://me/pa@{SECRET}@host/plans",
    f"postgresql+psycopg://host/plans;password={SECRET}",
    f"postgresql+psycopg://host/plans&password={SECRET}",
    f"postgresql+psycopg://me:%68unter2{SECRET}%40@host/plans",
    f"mysql+pymysql://me:{SECRET}@host/plans?ssl_key={SECRET}",
    f"nonsense://me:{SECRET}@host/plans",
    f"sqlite:///plans.db?password={SECRET}",
    f"sqlite+pysqlcipher://:{SECRET}@//{{folder}}/plans.db",
    f"postgresql://host:{SECRET}@port/plans:x",
    f"postgresql://[::1:{SECRET}@host/plans",
]
UNPARSED = [
    f"postgresql://me:{SECRET}@host:port/plans",
    f"postgresql://me:{SECRET}",
    f"postgresql://me:{SECRET}/plans",
    f"postgresql://me:{SECRET}@host:5432,other:5432/plans",
    f"postgresql://me:pa:{SECRET}:5432/plans",
    f" postgresql://me:{SECRET}@host/plans",
    f"'postgresql://me:{SECRET}@host/plans'",
    f"AUTOJAC_STORE=postgresql://me:{SECRET}@host/plans",
    f"postgresql-psycopg://me:{SECRET}@host/plans",
    f"postgresql:/me:{SECRET}@host/plans",
    f"postgresql:me:{SECRET}@host/plans",
    f"jdbc:postgresql://host/plans?password={SECRET}",
    f"//me:{SECRET}@host/plans",
    f"me:{SECRET}@host:5432/plans",
    f"host=host user=me password={SECRET} dbname=plans",
    f"Server=host;Pwd={SECRET}",
]


def told(error: BaseException | None) -> str:
    """All that is shown of an error by any handler: itself, what it is chained to, suppressed or not."""
    seen = []
    while error is not None:
        seen += [str(error), repr(error), *traceback.format_exception_only(error)]
        seen += [told(error.__cause__)] if error.__cause__ else []
        error = error.__context__
    return "\n".join(seen)


def everything(location: Any) -> str:
    """What a store at a location says when it is used in every way."""
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = PlanStore(location, timeout_s=0.1)
        said += [repr(store), store.description]
        store.save(OP, ENV, PLAN, "f")
        store.find(OP, ENV)
        store.hints(OP)
        store.refute(OP, ENV, "why")
        said += [repr(store), store.description]
    said += [str(warning.message) for warning in caught]
    asked: list[Callable[[], Any]] = [
        lambda: PlanStore(location).listing(),
        lambda: PlanStore(location).get(7),
        lambda: PlanStore(location).remove(7),
        lambda: PlanStore(location).clear(),
        lambda: PlanStore(location).save(OP, ENV, PLAN, "f"),  # a warning that a filter makes an error
        lambda: PlanStore(location).find(OP, ENV),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in asked:
            try:
                ask()
            except (StoreError, autojac.StoreWarning) as error:
                said.append(told(error))
    return "\n".join(said)


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver that can't connect, and says so with all that it was given."""
    monkeypatch.chdir(tmp_path)
    plain = sa.create_engine

    def create_engine(url: Any, **options: Any) -> Any:
        if str(url).startswith("sqlite"):
            return plain(url, **options)

        def connect() -> Any:
            url_text = url.render_as_string(hide_password=False)
            raise sqlite3.OperationalError(f"no way to {url_text}, {url!r}, {url.password}, {dict(url.query)}")

        return plain("sqlite://", creator=connect)

    monkeypatch.setattr(database.sa, "create_engine", create_engine)


@pytest.mark.parametrize("location", [*PARSED, *UNPARSED])
def test_a_store_never_shows_a_password(location: str, chatty: None, tmp_path: Path) -> None:
    location = location.format(folder=tmp_path)
    said = everything(location)
    assert SECRET not in said
    assert SECRET not in readable_location(location)
    assert SECRET not in repr(Options.from_keywords({"store": location}))
    assert not [path for path in tmp_path.rglob("*") if SECRET in path.name]  # nor is it made the name of a file


@pytest.mark.parametrize("location", UNPARSED)
def test_what_does_not_parse_is_refused_with_what_was_expected(location: str) -> None:
    with pytest.raises(StoreError, match=r"expected a path, ':memory:' or a URL such as postgresql\+psycopg://"):
        PlanStore(location).listing()


@pytest.mark.parametrize(
    ("location", "text"),
    [
        (":memory:", ":memory:"),
        ("sqlite://", ":memory:"),
        ("/data/plans.db", "/data/plans.db"),
        ("/home/me@work/plans.db", "/home/me@work/plans.db"),
        ("sqlite:////data/plans.db?password=x", "/data/plans.db"),
        ("postgresql://me:pw@host:5432/plans", "postgresql://me:***@host:5432/plans"),
        ("postgresql://host/plans", "postgresql://host/plans"),
        ("postgresql://me@host/plans", "postgresql://***@host/plans"),
        ("postgresql:///plans?host=/run/pg&password=x", "postgresql:///plans?host=%2Frun%2Fpg&***"),
        ("postgresql://me:a@b@host/plans", "postgresql://***"),
        ("postgresql://me:pw@host:port/plans", "postgresql://***"),
        ("postgresql:/me:pw@host/plans", "***"),
    ],
)
def test_what_is_shown_of_a_location(location: str, text: str) -> None:
    assert readable_location(location) == text


def test_short_passwords_are_taken_out_as_words(chatty: None) -> None:
    said = everything("postgresql://me:no@host/plans?token=a")
    assert "no way" not in said
    assert "*** way to" in said
    assert "plans" in said


@pytest.mark.parametrize("location", [PARSED[0], PARSED[3], PARSED[11], *UNPARSED[:9]])
def test_the_command_line_never_shows_a_password(location: str, chatty: None) -> None:
    commands = [
        ["plans", "list", "--store", location],
        ["plans", "show", "1", "--store", location],
        ["plans", "rm", "--all", "--store", location],
        ["plans", "list", location],
        ["plans", "rm", location],
        ["plans", location],
        ["tune", "torch:sin", "--shape", "4x2", "--store", location],
        ["explain", "torch:sin", "--shape", "4x2", "--store", location],
        ["probe", location, "--shape", "4x2"],
        ["bench", "--stor", location],
    ]
    for command in commands:
        result = CliRunner().invoke(main, command)
        assert result.exit_code
        assert SECRET not in result.output, command


def test_jacobians_and_their_explanation_never_show_a_password(chatty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOJAC_STORE", PARSED[3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jac = autojac.AutoJacobian(torch.sin, on_miss="estimate")
        jac(torch.rand(3, 2))
        said = [jac.explain(torch.rand(3, 2)), repr(jac), *(str(warning.message) for warning in caught)]
    with pytest.raises(autojac.AutojacError) as error:
        autojac.AutoJacobian(torch.cos, on_miss="error")(torch.rand(3, 2))
    assert caught
    assert SECRET not in "\n".join([*said, told(error.value)])


def test_an_uncaught_error_prints_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(autojac.StoreError) as error:
        autojac.PlanStore(UNPARSED[0]).listing()
    sys.excepthook(error.type, error.value, error.tb)
    printed = capsys.readouterr().err
    assert "StoreError" in printed
    assert SECRET not in printed
