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
# Haystack runs each component in a task or a thread with a copy of the context, where the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar["Lockstep | None"] = ContextVar("CURRENT_LOCKSTEP", default=None)


class AnswerOver(asyncio.CancelledError):
    """Ends a component that is still running when its answer is over, usually because the client has left.

    A component that catches every Exception does not catch this one. asyncio logs nothing about a task that raises it,
    because it considers that task cancelled.
    """


class Lockstep:
    """Connects the components of one answer with its client.

    A sync component's thread may be a few chunks ahead of the client: their text is joined in a growing chunk. Then the
    thread waits until the client has read that. Otherwise, somebody would pay for text that nobody reads, and the
    thread would slow down those that make the first chunks of other answers. Async components are only cancelled.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once, as soon as the answer is over: before its threads have ended."""
        self.component_errors: list[BaseException] = []
        self._on_end = on_end
        self._is_over = False
        self._is_client_waiting = True  # for the next chunk
        self._tasks: set[asyncio.Future[Any]] = set()  # in which async components run
        self._last_sent: dict[int, Any] = {}  # by the id of a component, as an Agent runs the same one again and again
        # Guards growing chunks. Notified when one is read, and when the answer is over.
        self._condition = threading.Condition()

    async def to_client(self, chunks: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        """Yield the chunks of the answer, each when the client asks for it. Closing this ends the answer.

        Raises TimeoutError when a client that has stopped reading for too long reads on, as half an answer would look
        complete.
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
            with self._condition:
                self._is_over = True
                self._condition.notify_all()
            self._on_end()
            for task in self._tasks:
                task.cancel()

    def waiting_callback(self, component: Any, callback: Callback) -> Callback:
        """Return a callback for a sync component's threads, which waits until the last growing chunk is read.

        Raises AnswerOver if the answer is over.
        """
        key, send_now = id(component), self.stopping_callback(callback)

        def can_send() -> bool:
            return self._is_over or not is_growing(self._last_sent.get(key))

        def send(chunk: Any) -> None:
            with self._condition:
                last: Any = self._last_sent.get(key)
                if is_growing(last) and not self._is_over and last.try_join(chunk):
                    return
                while not self._condition.wait_for(can_send, timeout=1):
                    if self._is_client_waiting:  # and has not got the last chunk: a chat method has dropped it unread
                        break
                if isinstance(chunk, StreamingChunk):
                    chunk = GrowingChunk.copy_of(chunk, self._condition)
                self._last_sent[key] = chunk
            try:
                send_now(chunk)
            except BaseException:
                self._last_sent[key] = None  # nobody will read it
                raise

        return send

    def stopping_callback(self, callback: Callback) -> Callback:
        """Return a callback that passes chunks on without waiting, and raises AnswerOver if the answer is over."""

        def send(chunk: Any) -> None:
            if self._is_over:
                raise AnswerOver
            callback(chunk)

        return send

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a sync component; raises AnswerOver, or what the component raises, as an Exception."""
        with self._part_of_answer():
            try:
                return call()
            except BaseException as error:
                # asyncio would wait forever for a StopIteration, and end the server for a SystemExit.
                if self._is_over or (isinstance(error, Exception) and not isinstance(error, StopIteration)):
                    raise
                raise RuntimeError(f"The component raised {error!r}.") from error

    async def run_async(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run an async component in a task of its own, which `end` cancels: Haystack 2 does not."""
        with self._part_of_answer():
            task = asyncio.ensure_future(call())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return await task

    @contextlib.contextmanager
    def _part_of_answer(self) -> Iterator[None]:
        """Raise AnswerOver if the answer is over when this block starts or ends, whatever the component has raised."""
        if self._is_over:
            raise AnswerOver
        token = CURRENT_LOCKSTEP.set(None)  # so that a stoppable component inside this one does not wait as well
        try:
            yield
        except BaseException as error:
            if not self._is_over:
                self.component_errors.append(error)
                raise
            close_streams(error)
        finally:
            CURRENT_LOCKSTEP.reset(token)
        if self._is_over:
            raise AnswerOver
