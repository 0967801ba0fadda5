"""Every exception and warning that autojac raises, in one small tree, and how their messages name a value."""

import difflib
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called autojac, however deep inside the package this is."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def kind_of(value: Any) -> str:
    """Return the type of a value as a message names it: "an int", "a dict", "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name.lower().startswith((*'aeiou', 'nd')) else 'a'} {name}"


def plural(count: int, noun: str) -> str:
    """Return a number and its noun: "1 argument", "2 arguments"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def nearest(name: str, known: Collection[str]) -> str:
    """Return " (did you mean 'x'?)" for a misspelled name, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_choice(option: str, value: Any, accepted: Collection[str]) -> None:
    """Raise `OptionError` unless `value` is one of `accepted`."""
    if not isinstance(value, str) or value not in accepted:
        listed = ", ".join(repr(choice) for choice in accepted)
        raise OptionError(f"{option} must be one of {listed}, got {value!r}{nearest(value, accepted)}")


class AutojacError(Exception):
    """Base of every error that autojac raises itself."""


class OptionError(AutojacError, ValueError):
    """An option is unknown or has a value that is not accepted."""


class InputError(AutojacError, ValueError):
    """The arguments of a call can't be differentiated: dtype, shape or batch size."""


class OutputError(AutojacError, ValueError):
    """The function's outputs can't have the Jacobian that was asked for."""


class MutationError(AutojacError, RuntimeError):
    """The function writes into one of its inputs."""


class RandomnessError(AutojacError, RuntimeError):
    """The function draws random numbers, or is not repeatable at all."""


class UnsupportedError(AutojacError, RuntimeError):
    """A method can't compute this Jacobian; the message is the reason shown by `explain`."""


class SearchError(AutojacError, RuntimeError):
    """No candidate could compute the Jacobian within the limits.

    Args:
        message: the text.
        reasons: what was wrong with each candidate.
    """

    def __init__(self, message: str, reasons: str = "") -> None:
        super().__init__(message)
        self.reasons = reasons


class PlanMissError(AutojacError, LookupError):
    """No plan is stored for this signature and `on_miss="error"` forbids making one."""


class VerificationError(AutojacError, ArithmeticError):
    """A Jacobian disagrees with the function's own vector-Jacobian products."""


class SingularJacobianError(AutojacError, ArithmeticError):
    """Some Jacobians have no inverse.

    Args:
        message: the text.
        singular: indices of the samples whose Jacobian is singular to working precision.
        not_finite: indices of the samples whose Jacobian has infinite entries or NaN.
    """

    def __init__(self, message: str, singular: tuple[int, ...] = (), not_finite: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.singular = singular
        self.not_finite = not_finite


class StoreError(AutojacError, RuntimeError):
    """A plan store can't be used for what was asked."""


class TargetError(AutojacError, ValueError):
    """A command-line argument can't be understood."""


class AutojacWarning(UserWarning):
    """Base of every warning that autojac issues."""


class StoreWarning(AutojacWarning):
    """The plan store is unusable; plans live in memory for this process."""


class StructureChangedWarning(AutojacWarning):
    """The runtime guard caught a plan whose structure no longer holds."""


class ModesDisagreeWarning(AutojacWarning):
    """Forward and reverse mode give different derivatives; reverse mode's are returned."""


class PerformanceWarning(AutojacWarning):
    """Calls take more time or memory than they need to."""


class NoGraphWarning(AutojacWarning):
    """A derivative is zero, or a Jacobian can't be trained, because func leaves autograd somewhere."""
