"""Keeps the components of an answer in step with its client, and ends them when the client leaves."""

import asyncio
import contextlib
import inspect
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

from haystack.dataclasses import StreamingChunk

from .streams import StreamCloser, stop_closing

PATIENCE = 60  # seconds for which a client may stop reading


class AnswerOver(asyncio.CancelledError):
    """Ends a component that still runs when its answer is over, usually because the client has left.

    A component that catches every Exception does not catch this one. asyncio logs nothing about a task that raises it,
    as it takes that task for cancelled.
    """


class ClientStalledError(Exception):
    """Fails an answer whose client has stopped reading.

    If the client reads on after all, it finds an error rather than half an answer that looks complete.
    """


class Lockstep:
    """Connects the components of one answer with its client.

    A component's thread sends a chunk and waits until the client asks for the next one. Otherwise, if the client left,
    the thread would read the rest of the answer, and somebody would pay for it. Threads that run ahead of their clients
    would also slow down those that make the first chunks of other answers. Async components are only cancelled.
    """

    def __init__(self) -> None:
        self.is_client_waiting = True  # for the next chunk
        self._over: type[BaseException] | None = None  # once the answer is over: what `running` raises
        self._untaken: dict[int, threading.Lock] = {}  # by the id of a chunk, which Hayhooks passes on as it is
        self._tasks: set[asyncio.Task[Any]] = set()

    def send(self, callback: Callable[[StreamingChunk], None], chunk: StreamingChunk) -> None:
        """Pass a chunk to the callback and wait until the client has taken it. Called in a component's thread.

        Does not wait if the callback is not one of Hayhooks', as the chunk might never reach the client. Raises
        AnswerOver if the answer is over.
        """
        if leads_to_client(callback):
            taken = threading.Lock()
            taken.acquire()
            self._untaken[id(chunk)] = taken
            # Looked up only now: `end` first sets `_over`, then releases the locks that it finds.
            if not self._over:
                callback(chunk)
                # Waits for `take` or `end`. A chunk that never reaches the client leaves it waiting for another one.
                while not taken.acquire(timeout=1) and not self.is_client_waiting:
                    pass
        elif not self._over:
            callback(chunk)
        if self._over:
            sys.setprofile(StreamCloser())
            raise AnswerOver  # whatever the reason, as a component may catch every Exception

    def take(self, chunk: Any) -> None:
        """Let the thread that sent this chunk continue: the client wants the next one. Called on the event loop."""
        self.is_client_waiting = True
        if taken := self._untaken.pop(id(chunk), None):
            taken.release()
        else:  # another object in place of a chunk that was sent
            self._release_all()

    def end(self, reason: type[BaseException]) -> None:
        """End the components that are still running. Called on the event loop."""
        self._over = self._over or reason
        self._release_all()
        for task in self._tasks:
            task.cancel()

    def _release_all(self) -> None:
        while self._untaken:
            _, taken = self._untaken.popitem()
            taken.release()

    def cancel_at_end(self, task: asyncio.Task[Any]) -> None:
        """Let `end` cancel the task in which an async component runs. Called on the event loop."""
        self._tasks.add(task)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run a component in this block.

        Once the answer is over, raises AnswerOver or ClientStalledError: before the block, or after it, in place of
        whatever the component returns or raises.
        """
        if self._over:
            raise self._over
        token = CURRENT_LOCKSTEP.set(None)  # so that a stoppable component inside this one does not wait as well
        try:
            yield
        except StopIteration as error:  # asyncio cannot pass it on, and would wait forever
            raise TypeError("a component must not raise StopIteration") from error
        except BaseException:
            if not self._over:
                raise
        finally:
            stop_closing()
            CURRENT_LOCKSTEP.reset(token)
        if self._over:
            raise self._over


# Haystack runs each component in a task or a thread with a copy of the context, where the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar[Lockstep | None] = ContextVar("CURRENT_LOCKSTEP", default=None)


def leads_to_client(callback: Callable[[StreamingChunk], None]) -> bool:
    return getattr(callback, "__module__", "").startswith("hayhooks.") and not inspect.iscoroutinefunction(callback)


async def in_lockstep(chunks: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """Yield the chunks of an answer, each when the client asks for it. Closing this ends the components."""
    lockstep = Lockstep()
    try:
        token = CURRENT_LOCKSTEP.set(lockstep)
        try:
            chunk = await anext(chunks, None)  # starts the pipeline, which copies the context
        finally:
            CURRENT_LOCKSTEP.reset(token)
        while chunk is not None:
            timer = asyncio.get_running_loop().call_later(PATIENCE, lockstep.end, ClientStalledError)
            lockstep.is_client_waiting = False
            try:
                yield chunk
            finally:
                timer.cancel()
            lockstep.take(chunk)
            chunk = await anext(chunks, None)
    finally:
        lockstep.end(AnswerOver)
        await chunks.aclose()
