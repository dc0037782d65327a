"""Keeps components in step with the client of their answer, and ends them when that client has left."""

import asyncio
import contextlib
import functools
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

from haystack.dataclasses import StreamingChunk

Component = TypeVar("Component", bound=Any)


class ClientLeft(asyncio.CancelledError):
    """Ends a component whose client has left.

    It is not an Exception, which the component might catch. And asyncio treats a task that ends with it as cancelled:
    it logs nothing.
    """


class Lockstep:
    """Keeps the components of one answer in step with its client.

    A component's thread sends a chunk, and waits until the client has taken it and asks for more. Without that, the
    thread would read an answer to its end that nobody wants but somebody pays for, and threads that run ahead of their
    clients would delay the first chunks of others. An async component is not paced, only cancelled at the end.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._has_stalled = False
        self._untaken: dict[int, threading.Event] = {}  # by the id of the chunk that a thread has sent
        self._tasks: set[asyncio.Task[Any]] = set()

    def take(self, chunk: Any) -> None:
        """Let the thread that sent this chunk read its next one. Called on the event loop."""
        taken = self._untaken.pop(id(chunk), None)
        if taken:
            taken.set()

    def end(self) -> None:
        """End the components that still run, as the answer is complete or the client has left. Called on the event loop."""
        self._is_over = True
        for taken in list(self._untaken.values()):
            taken.set()
        for task in self._tasks:
            task.cancel()

    def cancel_at_end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)

    def send(self, callback: Callable[[StreamingChunk], None], chunk: StreamingChunk) -> None:
        """Send a chunk, and wait until the client has taken it. Called in a component's thread.

        Raises ClientLeft if the client has left, or has not taken the chunk within a minute.
        """
        taken = self._untaken[id(chunk)] = threading.Event()
        if not self._is_over:  # checked only now, as `end` may have come before `taken` was there to be set
            callback(chunk)
            if not taken.wait(timeout=60):
                self._has_stalled = True
        if self._is_over or self._has_stalled:
            raise ClientLeft

    @contextlib.contextmanager
    def while_client_stays(self) -> Iterator[None]:
        """Run a component in this block. Raises ClientLeft if the client has left, however the component has ended.

        Raises RuntimeError if the client has stopped reading. If it reads on later, it finds this failure rather than
        half an answer that looks complete.
        """
        if self._is_over:
            raise ClientLeft
        token = CURRENT_LOCKSTEP.set(None)  # a component inside this one shall not wait for the same client again
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


# Haystack runs a component in a task or a thread with a copy of the context, in which the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar[Lockstep | None] = ContextVar("CURRENT_LOCKSTEP", default=None)


async def in_lockstep(chunks: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """Yield the chunks of an answer, each when the client asks for it. Closing this ends the components behind it."""
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
    """Give the running event loop an executor with a thread for each stream; its own has only min(32, cores + 4).

    The other pipelines of the process use it, too, and a thread that waits for its upstream can outlive its answer. So
    its limit is far above MAX_CONCURRENT_STREAMS. A thread is only started when none is idle.
    """
    loop = asyncio.get_running_loop()
    if loop not in LOOPS_WITH_THREADS:
        LOOPS_WITH_THREADS.add(loop)
        loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


def stoppable(component: Component) -> Component:
    """Let a component end when its client has left, without its knowledge, and return it.

    A sync component's `streaming_callback` then waits for the client, and raises ClientLeft when it has left. An async
    one is cancelled. Outside of an answer nothing changes. Raises TypeError if `run` takes no `streaming_callback`.
    """
    if "streaming_callback" not in getattr(component, "__haystack_input__", {}):
        raise TypeError(f"{type(component).__name__} is no component whose run takes a streaming_callback")
    run_freely = method_of(component, "run")

    @functools.wraps(component.run)  # Haystack and Hayhooks read its signature
    def run(*args: Any, **inputs: Any) -> Any:
        lockstep, callback = CURRENT_LOCKSTEP.get(), inputs.get("streaming_callback")
        if lockstep is None or callback is None:
            return run_freely(*args, **inputs)
        with lockstep.while_client_stays():
            return run_freely(*args, **{**inputs, "streaming_callback": functools.partial(lockstep.send, callback)})

    component.run = run
    if hasattr(component, "run_async"):
        run_freely_async = method_of(component, "run_async")

        @functools.wraps(component.run_async)
        async def run_async(*args: Any, **inputs: Any) -> Any:
            lockstep, task = CURRENT_LOCKSTEP.get(), asyncio.current_task()
            if lockstep is None or task is None:
                return await run_freely_async(*args, **inputs)
            lockstep.cancel_at_end(task)  # AsyncPipeline leaves it running
            with lockstep.while_client_stays():
                return await run_freely_async(*args, **inputs)

        component.run_async = run_async
    return component


def method_of(component: Any, name: str) -> Callable[..., Any]:
    """Return a function that calls a method of a component, looking it up each time: tracers replace it in the class."""
    replaced = vars(component).get(name)

    def call(*args: Any, **inputs: Any) -> Any:
        method = replaced or getattr(type(component), name).__get__(component)
        return method(*args, **inputs)

    return call


def close_streams(error: BaseException) -> None:
    """Close the streams that a component was reading when this error ended it.

    The streams of some SDKs are in reference cycles, and would stay open until a garbage collection.
    """
    assert error.__traceback__
    for frame, _ in traceback.walk_tb(error.__traceback__.tb_next):  # not the caller's own, which holds the error
        for value in frame.f_locals.values():
            if is_stream(value):
                with contextlib.suppress(Exception):
                    value.close()


def is_stream(value: Any) -> bool:
    """Return whether a value is iterable and can be closed, and is not a file, which may be shared."""
    cls = type(value)
    return hasattr(cls, "__iter__") and hasattr(cls, "close") and not hasattr(value, "write")
