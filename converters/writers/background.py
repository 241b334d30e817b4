"""Work in a second thread: results that are wanted later, items made ahead of their use."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Later(Generic[T]):
    """Calls a function in a thread at once; `result()` waits for its value.

    The thread does not keep the process alive: an interrupted run ends without waiting for it.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """The function's value, or the exception it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def read_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items in the same order, made in a second thread.

    At most `depth` of them exist at a time, with the one in use and the one being made: `depth`
    buffers suffice. An exception in the thread is raised here, after the items before it. Closing
    the iterator waits for the thread's end.
    """
    slots = threading.Semaphore(depth)
    ready = queue.SimpleQueue[tuple[T] | None]()
    stopped = threading.Event()

    def produce() -> None:
        slots.acquire()
        try:
            with contextlib.closing(items):
                for item in items:
                    ready.put((item,))
                    slots.acquire()
                    if stopped.is_set():
                        return
        finally:
            ready.put(None)

    producer = Later(produce)
    try:
        while (item := ready.get()) is not None:
            yield item[0]
            slots.release()
    finally:
        stopped.set()
        slots.release()
        producer.result()
