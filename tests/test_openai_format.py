"""From a component's chunks to the events of a stream, and to one completion."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import HTTPException
from haystack.dataclasses import StreamingChunk

from production.failure import FAILED
from production.openai_format import as_completion, as_events


def chunk(content: Any = "", reason: Any = None, **meta: Any) -> StreamingChunk:
    return StreamingChunk(content, meta=meta, finish_reason=reason)


async def answer(items: Any) -> AsyncGenerator[Any]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def events_of(items: list[Any], include_usage: bool = True) -> list[Any]:
    """Return the events of an answer that end with [DONE]."""

    async def read() -> list[str]:
        return [one.model_dump_json() async for one in as_events(items[0], answer(items[1:]), "model", include_usage)]

    *events, last = asyncio.run(read())
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def completion_of(items: Any) -> Any:
    return asyncio.run(as_completion(answer(items), "model")).model_dump()


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DETAILS = {"details": {"cached": 1, "audio": None, "text": "x", "object": object()}, "cost": None}
PARTS = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
FULL = ("max_tokens", "model_context_window_exceeded")
ODD: list[Any] = [True, 5, [5], {}, "", None, object()]


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_is_what_openai_sends_to_the_field(include_usage: bool) -> None:
    # The second chunk has no text, as of a model that reasons. An emoji comes in two halves, another one is cut off.
    chunks = [chunk("Hi \ud83d"), chunk(), chunk("\ude00!\ud83d"), chunk(reason="length"), chunk(usage=USAGE)]
    events = events_of(chunks, include_usage)
    head = {**events[0], "object": "chat.completion.chunk", "model": "model"}
    texts = "Hi ", "", "\U0001f600!", "\ufffd"
    deltas: list[Any] = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts), {}]
    choices = [{"index": 0, "delta": delta, "finish_reason": None if delta else "length"} for delta in deltas]
    with_usage = [{**head, "choices": [], "usage": USAGE}] if include_usage else []
    assert events == [*({**head, "choices": [choice]} for choice in choices), *with_usage]
    assert head.keys() == {"id", "object", "created", "model", "choices"}
    assert completion_of(chunks)["choices"][0]["message"]["content"] == "".join(texts)


@pytest.mark.parametrize(
    ("chunks", "reason", "usage"),
    [
        ([chunk("ab")], "stop", None),
        ([chunk(PARTS), chunk(None), chunk(5), chunk({})], "stop", None),
        ([chunk("a", finish_reason=None), chunk("b")], None, None),  # it may have been cut off
        *(([chunk("a"), chunk("b", **{name: "length"})], "length", None) for name in ("done_reason", "stop_reason")),
        *(([chunk("a", word, finish_reason=None), chunk("b")], word, None) for word in ("length", "model_length")),
        *(([chunk("ab", finish_reason=word)], "stop", None) for word in ("end_turn", "stop_sequence")),
        *(([chunk("ab"), chunk(delta={"stop_reason": word, "x": None})], "length", None) for word in FULL),
        *(
            ([chunk("ab", "tool_call_results")], "stop", None),
            ([chunk("ab", stop_reason="tool_use")], "tool_calls", None),
        ),
        ([chunk("a", "tool_calls"), chunk("b"), chunk("", "length"), chunk(finish_reason=None)], "length", None),
        *(([chunk("ab", done_reason=odd, delta=odd)], "stop", None) for odd in ODD),
        ([chunk("ab", "length", usage=USAGE)], "length", USAGE),
        ([chunk("a", usage={**USAGE, "prompt_tokens": 1}), chunk("b", usage=USAGE), chunk(usage=None)], "stop", USAGE),
        ([chunk("ab", usage={**USAGE, **DETAILS})], "stop", {**USAGE, "details": {"cached": 1}}),
        ([chunk("ab", usage={"input_tokens": 3, "output_tokens": 2, "total_tokens": 5})], "stop", None),
        *(([chunk("ab", usage={name: USAGE[name]})], "stop", None) for name in USAGE),
        *(([chunk("ab", usage={**USAGE, name: None})], "stop", None) for name in list(USAGE)[:2]),
        *(([chunk("ab", usage=odd)], "stop", None) for odd in ODD),
    ],
)
def test_the_text_is_whole_and_followed_by_one_finish_reason_and_usage(chunks: Any, reason: Any, usage: Any) -> None:
    events = events_of(chunks)
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "ab"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [reason]
    assert [event["usage"] for event in events if "usage" in event] == ([usage] if usage else [])
    completion = completion_of(chunks)
    choice = completion["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], completion["usage"]) == ("ab", reason, usage)
    assert (completion["object"], completion["model"]) == ("chat.completion", "model")


@pytest.mark.parametrize(("error", "told"), [(HTTPException(504, "Late."), "Late."), (ValueError("/opt"), FAILED)])
def test_a_failure_is_an_event_of_its_own_or_raised(error: Exception, told: str) -> None:
    chunks = [chunk("a"), chunk("b", "stop", usage=USAGE), error]
    *events, failure = events_of(chunks)
    assert [event["choices"][0]["delta"]["content"] for event in events] == ["", "a", "b"]
    assert not any(event["choices"][0]["finish_reason"] for event in events)
    assert failure == {"error": {"message": told, "type": "server_error"}}
    with pytest.raises(type(error)):
        completion_of(chunks)
