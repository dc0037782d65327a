"""Writes the chunks of an answer in the format of OpenAI's API: as the events of a stream, or as one completion."""

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import log
from haystack.dataclasses import StreamingChunk

from .failure import as_http_exception
from .request import text_of


def finish_reason_in(chunk: StreamingChunk) -> str | None:
    reason = chunk.finish_reason or chunk.meta.get("finish_reason")  # in OpenAI's words, or else in the upstream's own
    if reason == "tool_call_results":  # an Agent's last step; OpenAI has no such word
        return "stop"
    return reason if isinstance(reason, str) else None


def usage_in(chunk: StreamingChunk) -> dict[str, Any] | None:
    """Return the usage, without nulls, if it has OpenAI's names and can be sent as JSON, or else None."""
    usage = chunk.meta.get("usage")
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(usage, dict) and "prompt_tokens" in usage:
            text = json.dumps(usage)
            return json.loads(text, object_hook=lambda part: {k: v for k, v in part.items() if v is not None})
    return None


async def as_events(first: Any, rest: AsyncGenerator[Any], model: str, include_usage: bool) -> AsyncGenerator[Any]:
    """Yield the events of a stream, given the first item of an answer, read already for its status, and the rest.

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
                    its_reason, its_usage = finish_reason_in(item), usage_in(item)
                    is_end = its_reason or (finish_reason and its_usage)
                    finish_reason = its_reason or finish_reason
                    usage = its_usage or usage  # some upstreams send it early, or with each chunk
                    # While a model reasons, its chunks have no text, and proxies cut idle connections.
                    if item.content or not (is_end or item is first):
                        yield delta_event({"content": text_of(item.content)})
                else:
                    yield item  # what Hayhooks' callbacks add, such as the event of a tool
                item = await anext(rest, None)
        if finish_reason:
            yield delta_event({}, finish_reason)
        if usage and include_usage:
            yield Event(json.dumps({**head, "choices": [], "usage": usage}))
    except Exception as error:
        if not isinstance(error, HTTPException):
            log.opt(exception=True).error("The chunks cannot be read: {}", error)
        failure = as_http_exception(error)
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


async def as_completion(answer: AsyncGenerator[Any], model: str) -> ChatCompletion:
    """Join the chunks of an answer into one whole completion."""
    text, finish_reason, usage = "", None, None
    async for item in answer:
        if isinstance(item, StreamingChunk):
            text += text_of(item.content)
            finish_reason = finish_reason_in(item) or finish_reason
            usage = usage_in(item) or usage
    choice = Choice(index=0, message=Message(role="assistant", content=text), finish_reason=finish_reason)
    return ChatCompletion(**head_of("chat.completion", model), choices=[choice], usage=usage)


def head_of(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
