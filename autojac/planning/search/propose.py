"""Which candidate next: Optuna walks the space, in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna

from autojac.guards.process_state import unwarned
from autojac.methods.base import Method
from autojac.planning.search.space import choose, path_of
from autojac.planning.search.trial import SearchSession, try_out

BRUTE_FORCE_LIMIT = 128


def propose(session: SearchSession, space: Sequence[Method], first: Sequence[Method]) -> None:
    """Let Optuna walk the space until it is exhausted or time is up."""
    brute = len(space) <= BRUTE_FORCE_LIMIT
    with _quiet_optuna():
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.BruteForceSampler(seed=0)
            if brute
            else optuna.samplers.TPESampler(multivariate=True, group=True, seed=0)
        )
        study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.NopPruner())
        for method in dict.fromkeys(first):
            study.enqueue_trial(path_of(space, method), skip_if_exists=True)

        def objective(trial: optuna.Trial) -> float:
            method = choose(space, trial.suggest_categorical)
            known = session.trials.get(method)
            outcome = known if known is not None else try_out(session, method)
            if outcome.state == "complete" and outcome.seconds is not None:
                return outcome.seconds
            raise optuna.TrialPruned

        def stop(current: optuna.Study, _: Any) -> None:
            if session.out_of_time or session.trials.keys() >= set(space):
                current.stop()

        if not session.out_of_time:
            study.optimize(objective, n_trials=None if brute else 3 * BRUTE_FORCE_LIMIT, callbacks=[stop])


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Silence what Optuna logs in this thread; its level, and what others log, belong to its own users."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    # a filter holds for what is logged under a logger's own name alone
    known = list(logging.root.manager.loggerDict.items())
    loggers = [one for name, one in known if name.startswith("optuna") and isinstance(one, logging.Logger)]
    for logger in loggers:
        logger.addFilter(others)
    try:
        with unwarned():
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(others)
