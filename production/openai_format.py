"""Writes the chunks of an answer in the format of OpenAI's API: as the events of a stream, or as one completion."""

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi_openai_compat import ChatCompletion, Choice, Message
from haystack.dataclasses import StreamingChunk

from .failure import as_http_exception
from .text import SurrogateDecoder, text_of, whole

REASON_KEYS = ("finish_reason", "done_reason", "stop_reason")  # the names that SDKs give it in a chunk's `meta`
# Anthropic's words, and Haystack's after the results of tools. All others go to the client as they are.
IN_OPENAIS_WORDS = {
    **dict.fromkeys(("end_turn", "stop_sequence", "tool_call_results"), "stop"),
    **dict.fromkeys(("max_tokens", "model_context_window_exceeded"), "length"),
    "tool_use": "tool_calls",
}


class Ending:
    """What the chunks of an answer say about its end. The last report wins, as each step of an Agent has an end."""

    def __init__(self) -> None:
        self.usage: dict[str, Any] | None = None
        self._reason: str | None = None
        self._is_reported = False

    def note(self, chunk: StreamingChunk) -> bool:
        """Record what a chunk says; returns whether the chunk is about the end."""
        reason, usage = finish_reason_in(chunk), usage_in(chunk)
        # Even a None is a report: a component whose chunks have the field, but no reason, may have been cut off.
        self._is_reported |= reason is not None or "finish_reason" in chunk.meta
        self._reason = reason or self._reason
        self.usage = usage or self.usage
        return bool(reason or (self._reason and usage))  # some upstreams send usage early, or with each chunk

    @property
    def finish_reason(self) -> str | None:
        """The finish_reason of an answer that did not fail: "stop" if the component never reports one."""
        return self._reason if self._is_reported else "stop"


def finish_reason_in(chunk: StreamingChunk) -> str | None:
    """Return the finish_reason in a chunk, in OpenAI's words where they are known."""
    delta = chunk.meta.get("delta")  # where Anthropic has it
    sources = [chunk.meta, delta] if isinstance(delta, dict) else [chunk.meta]
    found = [chunk.finish_reason, *(source.get(name) for source in sources for name in REASON_KEYS)]
    reason = next((one for one in found if one and isinstance(one, str)), None)
    return reason and IN_OPENAIS_WORDS.get(reason, reason)


def usage_in(chunk: StreamingChunk) -> dict[str, Any] | None:
    """Return the usage in a chunk, if it has OpenAI's names: some clients fail on any others."""
    usage = numbers_in(chunk.meta.get("usage"))
    return usage if {"prompt_tokens", "completion_tokens"} <= usage.keys() else None


def numbers_in(usage: Any) -> dict[str, Any]:
    """Return the numbers in a usage, and those in its nested details."""
    values = usage.items() if isinstance(usage, dict) else ()
    details = {name: numbers_in(value) for name, value in values if isinstance(value, dict)}
    return {name: value for name, value in values if isinstance(value, int | float)} | details


class Event(ChatCompletion):
    """An event with this data, or else with `[DONE]`, which Hayhooks sends as it is.

    Hayhooks' own events contain nulls, which make OpenAI's Node SDK throw, and put other keys beside `error`, so that
    some clients miss it.
    """

    _data: str

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        # Hayhooks sends what `model_dump_json` returns, but only of a ChatCompletion, which requires these fields.
        super().__init__(id="", object="chat.completion.chunk", created=0, model="", choices=[])
        self._data = json.dumps(data) if data else "[DONE]"

    def model_dump_json(self, **_: Any) -> str:
        return self._data


async def as_events(first: Any, rest: AsyncGenerator[Any], model: str, include_usage: bool) -> AsyncGenerator[Any]:
    """Yield the events of a stream, given the first item of an answer, already read for its status, and the rest.

    If the answer fails, there is an error event before `[DONE]`. Without that event, the answer would look complete.
    """
    head, ending, decoder = head_of("chat.completion.chunk", model), Ending(), SurrogateDecoder()

    def delta_event(delta: dict[str, str], finish_reason: str | None = None) -> Event:
        return Event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})

    item, end = first, object()
    try:
        async with contextlib.aclosing(rest):
            yield delta_event({"role": "assistant", "content": ""})
            while item is not end:
                if isinstance(item, StreamingChunk):
                    is_about_end = ending.note(item)
                    # While a model reasons, its chunks have no text, and proxies cut idle connections. Before the first
                    # item, the event with the role has just been sent.
                    if item.content or not (is_about_end or item is first):
                        yield delta_event({"content": decoder.decode(text_of(item.content))})
                elif isinstance(item, ChatCompletion) or hasattr(item, "to_event_dict"):
                    yield item  # Hayhooks adds a finish_reason of its own after any other item
                item = await anext(rest, end)
        if half_an_emoji := decoder.decode("", is_last=True):
            yield delta_event({"content": half_an_emoji})
        if ending.finish_reason:
            yield delta_event({}, ending.finish_reason)
        if ending.usage and include_usage:
            yield Event({**head, "choices": [], "usage": ending.usage})
    except Exception as error:
        yield Event({"error": {"message": str(as_http_exception(error).detail), "type": "server_error"}})
    yield Event()


async def as_completion(answer: AsyncGenerator[Any], model: str) -> ChatCompletion:
    """Join the chunks of an answer into one whole completion."""
    text, ending = "", Ending()
    async for item in answer:
        if isinstance(item, StreamingChunk):
            text += text_of(item.content)
            ending.note(item)
    message = Message(role="assistant", content=whole(text))
    choice = Choice(index=0, message=message, finish_reason=ending.finish_reason)
    return ChatCompletion(**head_of("chat.completion", model), choices=[choice], usage=ending.usage)


def head_of(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
