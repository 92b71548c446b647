"""Work in the background: one piece after the other, in the order that it was given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """A thread that does what it is given, and that does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, action: Callable[[], Any]) -> Future[Any]:
        """Do something once all that was given before is done; errors are those of the future."""
        future: Future[Any] = Future()
        self._tasks.put((future, action))
        if self._thread is None:
            # Not the executor of the standard library, which the end of a process waits for: nor does Ctrl-C end that.
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return future

    def _work(self) -> None:
        while True:
            future, action = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except BaseException as error:
                    future.set_exception(error)
