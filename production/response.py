"""Turns the chunks of an answer into what its client expects, and limits how many clients there are."""

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import log
from haystack.dataclasses import StreamingChunk

from .failure import as_http_exception
from .lockstep import in_lockstep
from .request import replace_lone_surrogates
from .settings import Limits


def openai_response(chat: Callable[..., Awaitable[AsyncGenerator[Any]]]) -> Callable[..., Any]:
    """Decorate a `run_chat_completion_async` that returns the chunks of an answer.

    The caller's `body` decides what it returns: the events of a stream if `stream` is true, one ChatCompletion if it is
    false, and the chunks if there is no `stream`, as from Hayhooks' A2A server. Hayhooks always adds it for OpenAI
    clients. Raises HTTPException if the answer fails, or if the pipeline has MAX_CONCURRENT_STREAMS clients already.
    """
    slots = asyncio.Semaphore(Limits().MAX_CONCURRENT_STREAMS)

    @functools.wraps(chat)  # Hayhooks reads its signature, and passes `headers` if it has that parameter
    async def respond(self: Any, model: str, messages: list[Any], body: dict[str, Any], **headers: Any) -> Any:
        try:
            chunks = await chat(self, model, messages, body, **headers)
        except HTTPException:
            raise
        except Exception as error:
            log.opt(exception=True).error("The pipeline was not started: {}", error)
            raise as_http_exception(error) from error
        answer = in_slot(chunks, slots)
        if "stream" not in body:
            return answer
        if not body["stream"]:
            return as_completion([item async for item in answer], model)
        stream_options = body.get("stream_options")
        include_usage = isinstance(stream_options, dict) and bool(stream_options.get("include_usage"))
        # Hayhooks sends status 200 as soon as this function returns. Until then, a failure can have its own status.
        first = await anext(answer)
        return as_events(first, answer, model, include_usage)

    return respond


async def in_slot(chunks: AsyncGenerator[Any], slots: asyncio.Semaphore) -> AsyncGenerator[Any]:
    """Yield the chunks of an answer, and what Hayhooks' callbacks add to them, while holding a slot.

    Ends with a finish_reason, unless the component is one that reports it. Raises HTTPException if no slot is free, if
    the answer fails, or if there is no chunk.
    """
    if slots.locked():
        raise HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
    is_empty, reports_finish = True, False
    async with slots, contextlib.aclosing(in_lockstep(chunks)) as items:  # nothing was awaited since `locked`
        try:
            async for item in items:
                if isinstance(item, StreamingChunk):
                    is_empty = False
                    # A component that could report one, and never does, may have been cut off.
                    reports_finish = reports_finish or "finish_reason" in item.meta or item.finish_reason is not None
                yield StreamingChunk(item) if isinstance(item, str) else item
        except Exception as error:  # Hayhooks has logged it
            raise as_http_exception(error) from error
    if is_empty:
        log.error("No component has streamed: does streaming_components name one that takes a streaming_callback?")
        raise HTTPException(502, "The answer could not be completed.")
    if not reports_finish:
        yield StreamingChunk("", finish_reason="stop")


def finish_reason_in(chunk: StreamingChunk) -> str | None:
    return chunk.finish_reason or chunk.meta.get("finish_reason")  # in OpenAI's words, or else in the upstream's own


def usage_in(chunk: StreamingChunk) -> dict[str, Any] | None:
    """Return the usage, without nulls, if it has OpenAI's names and can be sent as JSON, or else None."""
    usage = chunk.meta.get("usage")
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(usage, dict) and "prompt_tokens" in usage:
            text = json.dumps(usage)
            return json.loads(text, object_hook=lambda part: {k: v for k, v in part.items() if v is not None})
    return None


async def as_events(first: Any, rest: AsyncGenerator[Any], model: str, include_usage: bool) -> AsyncGenerator[Any]:
    """Yield the events of a stream, given the first item of an answer and the rest.

    If the answer fails, there is an error event before `[DONE]`. Without it, the answer would look complete.
    """
    head = head_of("chat.completion.chunk", model)

    def delta_event(delta: dict[str, str], finish_reason: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return Event(json.dumps({**head, "choices": [choice]}))

    item, finish_reason, usage = first, None, None
    try:
        async with contextlib.aclosing(rest):
            yield delta_event({"role": "assistant", "content": ""})
            while item is not None:
                if isinstance(item, StreamingChunk):
                    is_last = finish_reason_in(item) or (finish_reason and usage_in(item))
                    finish_reason = finish_reason_in(item) or finish_reason
                    usage = usage_in(item) or usage  # some upstreams send it early, or with each chunk
                    # While a model reasons, its chunks have no text, and proxies cut idle connections.
                    if item.content or not (is_last or item is first):
                        yield delta_event({"content": replace_lone_surrogates(item.content)})
                else:
                    yield item
                item = await anext(rest, None)
        if finish_reason:
            yield delta_event({}, finish_reason)
        if usage and include_usage:
            yield Event(json.dumps({**head, "choices": [], "usage": usage}))
    except HTTPException as failure:
        yield Event(json.dumps({"error": {"message": str(failure.detail), "type": "server_error"}}))
    yield Event("[DONE]")


class Event(ChatCompletion):
    """An event whose data Hayhooks sends as it is.

    Its own events have nulls, on which OpenAI's Node SDK throws, and keys beside `error`, which some clients overlook.
    """

    _data: str

    def __init__(self, data: str) -> None:
        # Hayhooks sends what `model_dump_json` returns, but only of a ChatCompletion, which requires these fields.
        super().__init__(id="", object="chat.completion.chunk", created=0, model="", choices=[])
        self._data = data

    def model_dump_json(self, **_: Any) -> str:
        return self._data


def as_completion(items: list[Any], model: str) -> ChatCompletion:
    """Join the items of an answer into one whole completion."""
    chunks = [item for item in items if isinstance(item, StreamingChunk)]
    finish_reason, usage = None, None
    for chunk in chunks:
        finish_reason = finish_reason_in(chunk) or finish_reason
        usage = usage_in(chunk) or usage
    text = replace_lone_surrogates("".join(chunk.content for chunk in chunks))
    choice = Choice(index=0, message=Message(role="assistant", content=text), finish_reason=finish_reason)
    return ChatCompletion(**head_of("chat.completion", model), choices=[choice], usage=usage)


def head_of(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
