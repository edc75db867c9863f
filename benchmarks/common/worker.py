"""Contenders in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["Worker"]


class Worker:
    """A contender in a process of its own: its memory is its own, and it rests while others run.

    ``target(*arguments)``, run there, returns the function that :meth:`run` calls.
    """

    def __init__(
        self, target: Callable, *arguments: Any, environment: dict[str, str] | None = None
    ) -> None:
        # a server that has imported torch once and never computed: forks of it start at once and are clean
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "slide_torch"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, environment or {}, target, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def run(self, *arguments: Any) -> Any:
        """What the contender's function returns for ``arguments``."""
        self._pipe.send(arguments)
        return self._answer()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a process that died, which `run` has told
            self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a contender's process died (out of memory?)") from None
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(pipe: Any, environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    try:
        run = target(*arguments)
        pipe.send(("ok", None))
        while (message := pipe.recv()) is not None:
            pipe.send(("ok", run(*message)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))
