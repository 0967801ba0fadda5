"""Which candidate next where there are too many for all to be tried: Optuna proposes, in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import optuna

from autojac.core.plan import Trial
from autojac.guards.process_state import ignore_warnings
from autojac.methods.base import Method
from autojac.planning.search.space import choose, path_of

MOST_ASKS = 30
"""Proposals of known candidates in a row after which the cost model's order decides."""


class Proposer:
    """Proposes candidates by a tree of Parzen estimators (Bergstra et al., 2011) over methods and their settings.

    Args:
        space: the candidates.
    """

    def __init__(self, space: Sequence[Method]) -> None:
        self._space = space
        with _quiet_optuna():
            self._study = optuna.create_study(
                sampler=optuna.samplers.TPESampler(multivariate=True, group=True, seed=0),
                pruner=optuna.pruners.NopPruner(),
            )
        self._told: set[Method] = set()

    def tell(self, method: Method, trial: Trial) -> None:
        """Learn what became of a candidate."""
        if method in self._told or method not in self._space:
            return
        self._told.add(method)
        with _quiet_optuna():
            self._study.enqueue_trial(path_of(self._space, method))
            proposal = self._study.ask()
            choose(self._space, proposal.suggest_categorical)
            self._finish(proposal, trial)

    def ask(self, known: Container[Method]) -> Method | None:
        """Return a candidate that is not known yet; None where only known ones are proposed."""
        with _quiet_optuna():
            for _ in range(MOST_ASKS):
                proposal = self._study.ask()
                method = choose(self._space, proposal.suggest_categorical)
                self._study.tell(proposal, state=optuna.trial.TrialState.FAIL)
                if method not in known:
                    return method
        return None

    def _finish(self, asked: optuna.Trial, trial: Trial) -> None:
        if trial.seconds is None:
            self._study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(asked, trial.seconds)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Silence what Optuna logs in this thread; its level, and what others log, belong to its own users."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    # a logger's filters don't apply to its children
    named = list(logging.root.manager.loggerDict.items())
    loggers = [one for name, one in named if name.startswith("optuna") and isinstance(one, logging.Logger)]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        with ignore_warnings():
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)
