"""What all commands share: loaded when called, and one clear line for whatever goes wrong."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from autojac.errors import AutojacError, AutojacWarning, TargetError


class Group(click.Group):
    """A group that answers with its help where no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


class Commands(Group):
    """A group whose commands are imported by name, and whose errors are one line and an exit status.

    Status 2 says that the command can't be carried out as it was given, 1 that the user's own code raised.

    Args:
        sources: for each command, `module:attribute` of the click command.
    """

    def __init__(self, *args: Any, sources: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sources = sources

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.sources if self.get_command(ctx, name) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module, _, attribute = self.sources.get(cmd_name, "").partition(":")
        if not module:
            return None
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            return None  # an installation without this part
        assert isinstance(command, click.Command)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        with _warnings_told():
            try:
                status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            except click.ClickException as error:
                _fail(error.format_message(), error.exit_code)
            except click.Abort:
                _fail("interrupted", 130)
            except AutojacError as error:
                _fail(str(error), 2)
        sys.exit(status if isinstance(status, int) else 0)


class TargetRaised(click.ClickException):
    """The user's own code raised."""

    exit_code = 1


@contextmanager
def blame_on(target: str, call: str | None = None) -> Iterator[None]:
    """Report what is raised inside, and where: unless it is autojac's or click's, it came out of the user's code.

    Args:
        target: as the user named it.
        call: the arguments that it is called with, human-readable.

    Raises:
        TargetError: torch or Python found that the call does not fit the target.
        TargetRaised: the user's code raised of its own accord.
    """
    try:
        yield
    except (AutojacError, AutojacWarning, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except (Exception, SystemExit) as error:
        what, deliberate = _account(error)
        if call and not deliberate and isinstance(error, (RuntimeError, TypeError, ValueError, IndexError)):
            raise TargetError(
                f"{target} can't be called with {call}: {what}. Describe its arguments by --shape and --dtype"
            ) from error
        raise TargetRaised(f"{target} raised {what}") from error


def _account(error: BaseException) -> tuple[str, bool]:
    """Return what was raised and where in the user's code, and whether by a `raise` of theirs."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith((str(Path(__file__).parents[1]), "<"))]
    own = [frame for frame in outside if "site-packages" not in frame.filename]
    place = [f"{frame.filename}:{frame.lineno}" for frame in (own or outside)[-1:]]
    message = str(error)
    if isinstance(error, SyntaxError):
        message, place = error.msg, [f"{error.filename}:{error.lineno}"]
    deliberate = bool(own) and own[-1] is frames[-1] and re.search(r"\braise\b", own[-1].line or "") is not None
    what = f"{type(error).__name__}: {message}".rstrip(": ")
    return " ".join([what, *(f"({where})" for where in place)]), deliberate


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Show autojac's warnings as one line each; all others as Python shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AutojacWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, AutojacWarning):
                click.echo(f"autojac: warning: {_one_line(str(message))}", err=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"autojac: {_one_line(message)}", err=True)
    sys.exit(status)


def _one_line(text: str) -> str:
    if "://" in text:
        from autojac.store.location import without_passwords

        text = without_passwords(text)  # a URL in the wrong place of a command is quoted in what is said of it
    return " ".join(text.split())
