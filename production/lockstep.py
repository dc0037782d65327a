"""Keeps the components of an answer in step with its client, and ends them when the client leaves."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

from hayhooks import log
from haystack.dataclasses import StreamingChunk

from .growing_chunk import GrowingChunk, is_growing
from .streams import close_streams

PATIENCE = 60  # seconds for which a client may stop reading
STALLED = f"The client has not read for {PATIENCE} seconds, so its answer has ended."

Callback = Callable[[Any], None]  # takes a StreamingChunk, or what a component sends in place of one


class AnswerOver(asyncio.CancelledError):
    """Ends a component that is still running when its answer is over, usually because the client has left.

    A component that catches every Exception does not catch this one. asyncio logs nothing about a task that raises it,
    because it considers that task cancelled.
    """


class Lockstep:
    """Connects the components of one answer with its client.

    A component's thread may be a few chunks ahead of the client: their text is joined in a growing chunk. Then it waits
    until that is read. If it read on, somebody would pay for what nobody reads, and it would slow down the threads that
    make the first chunks of other answers. Async components do not wait; they are only cancelled.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once, as soon as the answer is over: before its threads have ended."""
        self.failures: list[BaseException] = []  # what its components have raised
        self._on_end = on_end
        self._is_over = False
        self._is_client_waiting = True  # for the next chunk
        self._last_sent: dict[int, Any] = {}  # by the id of a component
        self._changed = threading.Condition()  # one of the last three, or a growing chunk that was read
        self._tasks: set[asyncio.Future[Any]] = set()  # in which async components run

    async def pace(self, chunks: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        """Yield the chunks of the answer, each when the client asks for it. Closing this ends the answer.

        Raises TimeoutError if a client that has stopped reading resumes: half an answer would look complete.
        """
        end = object()
        try:
            while (chunk := await self._next(chunks, end)) is not end:
                timer = asyncio.get_running_loop().call_later(PATIENCE, self._give_up)
                self._is_client_waiting = False
                try:
                    yield chunk
                finally:
                    timer.cancel()
                self._is_client_waiting = True
                if self._is_over:
                    raise TimeoutError(STALLED)
        finally:
            self.end()
            await chunks.aclose()

    async def _next(self, chunks: AsyncGenerator[Any], end: object) -> Any:
        token = CURRENT_LOCKSTEP.set(self)  # each time, as a chat method may start its pipeline late
        try:
            return await anext(chunks, end)
        finally:
            CURRENT_LOCKSTEP.reset(token)

    def _give_up(self) -> None:
        log.warning(STALLED)
        self.end()

    def end(self) -> None:
        """End the answer, and the components that are still running. Called on the event loop."""
        if not self._is_over:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            self._on_end()
            for task in self._tasks:
                task.cancel()

    def paced(self, component: Any, callback: Callback) -> Callback:
        """Return a callback for a sync component's threads; it passes chunks on, and waits until the last one is read.

        Raises AnswerOver if the answer is over.
        """
        key, send_now = id(component), self.stopping(callback)

        def can_send() -> bool:
            return self._is_over or not is_growing(self._last_sent.get(key))

        def send(chunk: Any) -> None:
            with self._changed:
                last: Any = self._last_sent.get(key)
                if is_growing(last) and not self._is_over and last.try_join(chunk):
                    return
                # A client that waits although the last chunk is unread will never get it: a chat method has dropped it.
                while not self._changed.wait_for(can_send, timeout=1) and not self._is_client_waiting:
                    pass
                if isinstance(chunk, StreamingChunk):
                    chunk = GrowingChunk.copy_of(chunk, self._changed)
                self._last_sent[key] = chunk
            try:
                send_now(chunk)
            except BaseException:
                self._last_sent[key] = None  # nobody will read it
                raise

        return send

    def stopping(self, callback: Callback) -> Callback:
        """Return a callback that passes chunks on as they are; it raises AnswerOver if the answer is over."""

        def send(chunk: Any) -> None:
            if self._is_over:
                raise AnswerOver
            callback(chunk)

        return send

    def run(self, component: Callable[[], Any]) -> Any:
        """Run a sync component; raises AnswerOver, or an Exception if the component raises anything."""
        with self._running():
            try:
                return component()
            except BaseException as error:
                # asyncio would wait forever for a StopIteration, and end the server for a SystemExit.
                if self._is_over or (isinstance(error, Exception) and not isinstance(error, StopIteration)):
                    raise
                raise RuntimeError(f"The component raised {error!r}.") from error

    async def run_async(self, component: Callable[[], Awaitable[Any]]) -> Any:
        """Run an async component in a task of its own, which `end` cancels: Haystack 2 does not."""
        with self._running():
            task = asyncio.ensure_future(component())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return await task

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Run a component in this block.

        Raises AnswerOver if the answer is over: before the block, or in place of what the component returns or raises.
        """
        if self._is_over:
            raise AnswerOver
        token = CURRENT_LOCKSTEP.set(None)  # so that a stoppable component inside this one does not wait as well
        try:
            yield
        except BaseException as error:
            if not self._is_over:
                self.failures.append(error)
                raise
            close_streams(error)
        finally:
            CURRENT_LOCKSTEP.reset(token)
        if self._is_over:
            raise AnswerOver


# Haystack runs each component in a task or a thread with a copy of the context, where the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar[Lockstep | None] = ContextVar("CURRENT_LOCKSTEP", default=None)
