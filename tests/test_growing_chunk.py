"""What is joined while the client is behind, and what ends that."""

import copy
import dataclasses
import operator
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from haystack.dataclasses import ComponentInfo, StreamingChunk, ToolCall, ToolCallDelta, ToolCallResult

from production.growing_chunk import GrowingChunk, is_growing


class OwnChunk(StreamingChunk):
    """A component may send a class of its own."""


def test_at_most_eight_texts_are_joined() -> None:
    chunks = [OwnChunk(f"{number} ", meta={"model": "m", "received_at": number}) for number in range(9)]
    before, growing = copy.deepcopy(chunks), GrowingChunk.copy_of(chunks[0], threading.Condition())
    assert [growing.try_join(chunk) for chunk in chunks[1:]] == [True] * 7 + [False]
    assert copy.copy(growing) == dataclasses.replace(chunks[0], content="0 1 2 3 4 5 6 7 ")
    assert chunks == before  # the component builds its reply from them


PLAIN, OWN = (one_class("a", meta={"model": "m"}, index=0) for one_class in (StreamingChunk, OwnChunk))
CALL, RESULT = ToolCallDelta(index=0, tool_name="clock"), ToolCallResult("12:00", ToolCall("clock", {}), error=False)
SPECIAL: list[dict[str, Any]] = [
    *({"meta": meta} for meta in ({}, {"model": "n"}, {"model": "m", "finish_reason": None})),
    *(
        {"index": None},
        {"start": True},
        {"finish_reason": "stop"},
        {"component_info": ComponentInfo("Generator", "llm")},
    ),
    *({"content": "", "tool_calls": [CALL]}, {"content": "", "tool_call_result": RESULT}),
    *({"content": ""}, {"content": None}, {"content": []}),
]


@pytest.mark.parametrize("special", [*(dataclasses.replace(PLAIN, **fields) for fields in SPECIAL), OWN])
def test_what_differs_in_more_than_its_text_is_not_joined(special: StreamingChunk) -> None:
    pairs = [(PLAIN, special), (special, PLAIN)] + [(special, special)] * (not special.content)  # two equal tool calls
    for one, other in pairs:
        growing = GrowingChunk.copy_of(one, threading.Condition())
        assert not growing.try_join(other)
        assert is_growing(growing)
        assert copy.copy(growing) == one


READ: list[Callable[[Any], Any]] = [operator.attrgetter(field.name) for field in dataclasses.fields(StreamingChunk)]
READ += [dataclasses.asdict, lambda chunk: hasattr(chunk, "reasoning")]
READ += [copy.copy, copy.deepcopy, lambda chunk: pickle.loads(pickle.dumps(chunk))]


@pytest.mark.parametrize("read", READ)
def test_one_that_is_read_is_an_ordinary_chunk_and_its_thread_goes_on(read: Callable[[Any], Any]) -> None:
    condition, is_waiting = threading.Condition(), threading.Event()
    growing: Any = GrowingChunk.copy_of(OWN, condition)

    def wait() -> bool:
        with condition:
            is_waiting.set()
            return condition.wait(timeout=10)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait)
        is_waiting.wait()
        found = read(growing)
        assert (type(growing), vars(growing)) == (OwnChunk, vars(OWN))
        assert waiting.result()
    assert (found, type(found)) == (read(OWN), type(read(OWN)))
