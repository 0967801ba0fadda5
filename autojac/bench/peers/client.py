"""A peer in a process of its own, which works only while it is asked to."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from autojac.bench.peers.program import Program

WORKER = Path(__file__).with_name("worker.py")
PATIENCE_S = 300.0
"""Seconds after which an answer is no longer waited for."""


class PeerError(Exception):
    """A peer that did not start, failed, or did not answer."""


class Peer:
    """A library in a process of its own.

    Args:
        python: the interpreter of its environment.
        library: `jax`, `asdex` or `tensorflow`.
        threads: that it may use.
        worker: the script that it runs.

    Raises:
        PeerError: if it does not start.
    """

    def __init__(self, python: str, library: str, threads: int, worker: Path = WORKER) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command = [python, str(worker), library, str(threads)]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            self._folder.cleanup()
            raise PeerError(f"{python} can't be run: {error.strerror}. `make bench-peers` makes it") from error
        self.about = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            # what was written to a process that has ended is of no use
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        self._folder.cleanup()

    def prepare(
        self, way: str, program: Program, arrays: dict[str, np.ndarray[Any, Any]]
    ) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
        """Have a way built and run once.

        Args:
            way: as the worker calls it.
            program: the function.
            arrays: its weights, and `x`, where the Jacobian is taken.

        Returns:
            What it computed, and the seconds of this first call.

        Raises:
            PeerError: if the peer can't.
        """
        source, result = (str(Path(self._folder.name) / name) for name in ("arrays.npz", "result.npz"))
        np.savez(source, **arrays)  # type: ignore[arg-type]
        answer = self._ask({"do": "prepare", "way": way, "program": program, "arrays": source, "result": result})
        with np.load(result) as data:
            return {name: data[name] for name in data.files}, float(answer["seconds"])

    def time(self, way: str, calls: int) -> tuple[float, float]:
        """Have a block of calls timed: wall seconds per call, and processor seconds per wall second."""
        answer = self._ask({"do": "time", "way": way, "calls": calls})
        return float(answer["seconds"]), float(answer["cores"])

    def _start(self) -> dict[str, Any]:
        try:
            return self._read()
        except PeerError:
            self.__exit__(None, None, None)
            raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps(request)}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError("the peer's process has ended") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        """Return the next answer; a watchdog ends a process that has none."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(PATIENCE_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise PeerError(f"the peer's process has ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer
