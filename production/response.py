"""Turns the chunks of a pipeline into the response to a client, and limits the number of clients."""

import asyncio
import contextlib
import functools
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import HTTPException
from hayhooks import log
from haystack.dataclasses import StreamingChunk

from .failure import FAILED, as_http_exception
from .lockstep import CURRENT_LOCKSTEP, Lockstep
from .openai_format import as_completion, as_events
from .settings import Limits

NO_SLOT = "All streams are in use: try again."


def openai_response(chat: Callable[..., Awaitable[AsyncGenerator[Any]]]) -> Callable[..., Any]:
    """Decorate a `run_chat_completion_async` that returns the chunks of an answer.

    The caller's `body` decides what it returns: the events of a stream if `stream` is true, one ChatCompletion if it is
    false, and the chunks if there is no `stream`, as in calls from Hayhooks' A2A server. Hayhooks always sets it
    for OpenAI clients.

    Raises HTTPException if the answer fails before its first chunk, or if the pipeline has MAX_CONCURRENT_STREAMS
    clients already. A stream that fails later ends with an error event; chunks and a ChatCompletion raise even then.
    """
    slots = asyncio.Semaphore(Limits().MAX_CONCURRENT_STREAMS)

    @functools.wraps(chat)  # Hayhooks reads its signature, and passes `headers` if it has that parameter
    async def respond(self: Any, model: str, messages: list[Any], body: dict[str, Any], **optional: Any) -> Any:
        try:
            chunks = await chat(self, model, messages, body, **optional)
            if not isinstance(chunks, AsyncGenerator):
                raise TypeError(f"{chat.__name__} must return async_streaming_generator(...).")
        except HTTPException:
            raise
        except Exception as error:
            log.opt(exception=True).error("The pipeline was not started: {}", error)
            raise as_http_exception(error) from error
        answer = in_slot(chunks, slots)
        if "stream" not in body:
            return answer
        if not body["stream"]:
            return await as_completion(answer, model)
        stream_options = body.get("stream_options")
        include_usage = isinstance(stream_options, dict) and bool(stream_options.get("include_usage"))
        # Hayhooks sends status 200 as soon as this function returns. Until then, a failure can have its own status.
        first = await anext(answer)
        return as_events(first, answer, model, include_usage)

    return respond


async def in_slot(chunks: AsyncGenerator[Any], slots: asyncio.Semaphore) -> AsyncGenerator[Any]:
    """Yield the chunks of an answer, and the items that Hayhooks' callbacks add, holding a slot.

    Raises HTTPException if no slot is free, if the answer fails, or if there is no chunk.
    """
    if slots.locked():
        raise HTTPException(503, NO_SLOT, {"Retry-After": "1"})
    replace_default_executor()
    await slots.acquire()  # does not wait, as nothing has been awaited since `locked`
    lockstep, is_empty = Lockstep(on_end=slots.release), True
    async with contextlib.aclosing(lockstep.to_client(chunks)) as items:
        try:
            async for item in items:
                if item is None:  # a chat method may yield None in place of a chunk that it drops
                    continue
                is_empty = is_empty and not isinstance(item, StreamingChunk | str)
                yield StreamingChunk(item) if isinstance(item, str) else item
        except Exception as error:
            failure = as_http_exception(error, lockstep.component_errors)
            # Hayhooks has logged the error of a component, but not that of a chat method, and knows no status.
            log.error("An answer has failed, with status {} for the client: {!r}", failure.status_code, error)
            raise failure from error
    if is_empty:
        log.error("No component has streamed: does streaming_components name one that takes a streaming_callback?")
        raise HTTPException(502, FAILED)


LOOPS_WITH_OUR_EXECUTOR: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def replace_default_executor() -> None:
    """Give the event loop an executor with a thread for each stream; asyncio's has only min(32, cores + 4).

    All pipelines of the process use it, and a thread that waits for its upstream can outlive its answer, so the limit
    is far above MAX_CONCURRENT_STREAMS. The executor starts a thread only when none is idle.
    """
    loop = asyncio.get_running_loop()
    if loop not in LOOPS_WITH_OUR_EXECUTOR:
        LOOPS_WITH_OUR_EXECUTOR.add(loop)
        # A free-threaded Python gives a new thread the context of the answer that starts it.
        executor = ThreadPoolExecutor(10_000, "stream", initializer=CURRENT_LOCKSTEP.set, initargs=(None,))
        loop.set_default_executor(executor)
