"""Keeps the components of an answer in step with its client, and ends them when the client has left."""

import asyncio
import contextlib
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from haystack.dataclasses import StreamingChunk


class ClientLeft(asyncio.CancelledError):
    """Ends a component whose client has left.

    It is not an Exception, which the component might catch. asyncio treats a task that raises it as cancelled, and logs
    nothing.
    """


class Lockstep:
    """Connects the components of one answer with its client.

    A component's thread sends a chunk, and waits until the client has taken it and asks for the next one. Without that,
    the thread would read, and somebody would pay for, an answer whose client has left, and threads that run ahead of
    their clients would delay the first chunks of others. An async component is not paced, only cancelled.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._has_stalled = False
        self._untaken: dict[int, threading.Event] = {}  # by the id of the chunk that a thread has sent
        self._tasks: set[asyncio.Task[Any]] = set()

    def send(self, callback: Callable[[StreamingChunk], None], chunk: StreamingChunk) -> None:
        """Send a chunk to the callback, and wait until the client has taken it. Called in a component's thread.

        Raises ClientLeft if the client has left, or has not taken the chunk within a minute.
        """
        taken = self._untaken[id(chunk)] = threading.Event()
        if not self._is_over:  # looked up after `taken` was added, so that `end` cannot miss both
            callback(chunk)
            if not taken.wait(timeout=60):
                self._has_stalled = True
        if self._is_over or self._has_stalled:
            raise ClientLeft

    def take(self, chunk: Any) -> None:
        """Let the thread that has sent this chunk read its next one. Called on the event loop."""
        if taken := self._untaken.pop(id(chunk), None):
            taken.set()

    def cancel_at_end(self, task: asyncio.Task[Any]) -> None:
        """Have `end` cancel the task of an async component. Called on the event loop."""
        self._tasks.add(task)

    def end(self) -> None:
        """End the components, as the client has left, or the answer is complete. Called on the event loop."""
        self._is_over = True
        for taken in list(self._untaken.values()):
            taken.set()
        for task in self._tasks:
            task.cancel()

    @contextlib.contextmanager
    def while_client_stays(self) -> Iterator[None]:
        """Run a component in this block. Raises ClientLeft if the client has left, however the component has ended.

        Raises RuntimeError if the client has stopped reading. Should it read on, it finds this failure, and not half an
        answer that looks complete.
        """
        if self._is_over:
            raise ClientLeft
        token = CURRENT_LOCKSTEP.set(None)  # a component within this one must not wait for the same client again
        try:
            yield
        except BaseException as error:
            if not (self._is_over or self._has_stalled):
                raise
            close_streams(error)
        finally:
            CURRENT_LOCKSTEP.reset(token)
        if self._has_stalled:
            raise RuntimeError("the client has not read for a minute")
        if self._is_over:
            raise ClientLeft


# Haystack runs each component in a task or a thread with a copy of the context, where the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar[Lockstep | None] = ContextVar("CURRENT_LOCKSTEP", default=None)


async def in_lockstep(chunks: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """Yield the chunks of an answer, each when the client asks for it. When this is closed, the components end."""
    provide_threads()
    lockstep = Lockstep()
    try:
        token = CURRENT_LOCKSTEP.set(lockstep)
        try:
            chunk = await anext(chunks, None)  # starts the pipeline, which copies the context
        finally:
            CURRENT_LOCKSTEP.reset(token)
        while chunk is not None:
            yield chunk
            lockstep.take(chunk)
            chunk = await anext(chunks, None)
    finally:
        lockstep.end()
        await chunks.aclose()


LOOPS_WITH_THREADS: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def provide_threads() -> None:
    """Give the event loop an executor with a thread for each stream; its own has at most min(32, cores + 4) threads.

    Other pipelines of the process share it, and a thread that waits for its upstream can outlive its answer. So the
    limit is far above MAX_CONCURRENT_STREAMS. A thread is only started when no other is idle.
    """
    loop = asyncio.get_running_loop()
    if loop not in LOOPS_WITH_THREADS:
        LOOPS_WITH_THREADS.add(loop)
        loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


def close_streams(error: BaseException) -> None:
    """Close the streams that a component was reading when this error ended it.

    The streams of some SDKs are in reference cycles, and would stay open until a garbage collection.
    """
    assert error.__traceback__
    for frame, _ in traceback.walk_tb(error.__traceback__.tb_next):  # without the caller's frame, which has the error
        for value in frame.f_locals.values():
            if is_stream(value):
                with contextlib.suppress(Exception):
                    value.close()


def is_stream(value: Any) -> bool:
    """Return whether a value can be iterated over and closed, but is not a file, which others may share."""
    cls = type(value)
    return hasattr(cls, "__iter__") and hasattr(cls, "close") and not hasattr(value, "write")
