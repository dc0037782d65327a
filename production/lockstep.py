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

Callback = Callable[[Any], None]
# Haystack runs each component in a task or a thread with a copy of the context, where the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar["Lockstep | None"] = ContextVar("CURRENT_LOCKSTEP", default=None)


class AnswerOver(asyncio.CancelledError):
    """Ends a component when its answer is over. Not an Exception, which it may catch; asyncio logs nothing about it."""


class Lockstep:
    """Connects the components of one answer with its client.

    A sync component's thread may be a few chunks ahead: their text is joined in a growing chunk. Then it waits until
    that is read. Otherwise, somebody would pay for text that nobody reads, and other answers would begin late.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.component_errors: list[BaseException] = []
        # On the event loop:
        self._on_end = on_end  # called once, as soon as the answer is over: before its threads have ended
        self._tasks: list[asyncio.Future[Any]] = []  # in which async components run
        # Set on the event loop, read in the components' threads:
        self._is_over = False
        self._is_client_waiting = True  # for the next chunk
        # In the components' threads, while they hold the condition:
        self._last_sent: dict[int, Any] = {}  # by the id of a component, as an Agent runs the same one again and again
        self._condition = threading.Condition()  # guards growing chunks; notified when one is read, and by `end`

    async def to_client(self, chunks: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        """Yield the chunks, each when the client asks for it; raises TimeoutError if it has stalled for too long."""
        end = object()
        try:
            while (chunk := await self._next(chunks, end)) is not end:
                timer = asyncio.get_running_loop().call_later(PATIENCE, self.end, STALLED)
                self._is_client_waiting = False
                try:
                    yield chunk
                finally:
                    timer.cancel()
                self._is_client_waiting = True
                if self._is_over:
                    raise TimeoutError(STALLED)  # half an answer must not look complete
        finally:
            self.end()
            await chunks.aclose()

    async def _next(self, chunks: AsyncGenerator[Any], end: object) -> Any:
        token = CURRENT_LOCKSTEP.set(self)  # each time, as a chat method may start its pipeline late
        try:
            return await anext(chunks, end)
        finally:
            CURRENT_LOCKSTEP.reset(token)

    def end(self, warning: str = "") -> None:
        """End the answer, and the components that are still running. Called on the event loop."""
        if warning:
            log.warning(warning)
        if not self._is_over:
            with self._condition:
                self._is_over = True
                self._condition.notify_all()
            self._on_end()
            for task in self._tasks:
                task.cancel()

    def waiting_callback(self, component: Any, callback: Callback) -> Callback:
        """Return a callback like `stopping_callback`'s, which also waits, in its thread, until a chunk is read."""
        key, send_now = id(component), self.stopping_callback(callback)

        def send(chunk: Any) -> None:
            if CURRENT_LOCKSTEP.get() is not self:  # Hayhooks' callback would send the chunk to the client of this run
                raise RuntimeError("This streaming_callback belongs to another answer.")
            with self._condition:
                last: Any = self._last_sent.get(key)
                if is_growing(last) and not self._is_over and last.try_join(chunk):
                    return
                self._wait_until_read(key)
                if isinstance(chunk, StreamingChunk):
                    chunk = self._last_sent[key] = GrowingChunk.copy_of(chunk, self._condition)
            try:
                send_now(chunk)
            except BaseException:
                self._last_sent[key] = None  # nobody will read it
                raise

        return send

    def _wait_until_read(self, key: int) -> None:
        """Wait until the last chunk is read, or the answer is over. Called with the condition held."""

        def is_read() -> bool:
            return self._is_over or not is_growing(self._last_sent.get(key))

        while not self._condition.wait_for(is_read, timeout=1):
            if self._is_client_waiting:  # and has not got the chunk: a chat method has probably dropped it unread
                return

    def stopping_callback(self, callback: Callback) -> Callback:
        """Return a callback that passes chunks on without waiting, and raises AnswerOver if the answer is over."""

        def send(chunk: Any) -> None:
            if self._is_over:
                raise AnswerOver
            callback(chunk)

        return send

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a sync component; raises AnswerOver, or the component's error, wrapped if asyncio cannot carry it."""
        with self._part_of_answer():
            try:
                return call()
            except BaseException as error:
                if self._is_over:
                    close_streams(error)
                elif not isinstance(error, Exception) or isinstance(error, StopIteration | TimeoutError):
                    # asyncio would replace a TimeoutError, wait forever for a StopIteration, and end for a SystemExit.
                    raise RuntimeError(f"The component raised {error!r}.") from error
                raise

    async def run_async(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run an async component in a task of its own, which `end` cancels: Haystack 2 does not."""
        with self._part_of_answer():
            self._tasks.append(task := asyncio.ensure_future(call()))
            return await task

    @contextlib.contextmanager
    def _part_of_answer(self) -> Iterator[None]:
        """Raise AnswerOver if the answer is over when this block starts or ends, whatever the component has raised."""
        if self._is_over:
            raise AnswerOver
        try:
            yield
        except BaseException as error:
            if not self._is_over:
                self.component_errors.append(error)
                raise
        if self._is_over:
            raise AnswerOver
