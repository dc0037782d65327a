"""Bad input gets a 400 with one sentence that names the field, and costs no upstream call."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import HTTPException
from harness.client import Chat
from harness.serving import NAME
from harness.upstream import Upstream
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline_wrapper import PARAMETERS, read_messages, read_parameters

USER = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
TEXT = {"type": "text", "text": "Hi"}


def nested(depth: int) -> Any:
    """Return a number in a list in a list, so many levels deep."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("sentence", "messages"),
    [
        ("messages must end", []),
        ("messages must end", [{"role": "system", "content": "Be brief."}]),
        ("messages must end", [USER, {"role": "assistant", "content": "Hello"}]),
        ("messages must end", [USER, {"role": "assistant", "content": None}]),
        ("messages must end", [USER, {"role": "system", "content": "Be brief."}]),
        *(
            ("messages[0].content must not be blank", [{"role": "user", "content": content}])
            for content in ("", " \n\t", "\u2003", [{"type": "text", "text": " "}])
        ),
        *(
            ("messages[0].content must be text", [{"role": "user", "content": content}])
            for content in (
                None,
                5,
                True,
                {"text": "Hi"},
                ["Hi"],
                [{"type": "text"}],
                [{"text": "Hi"}],
                [TEXT, None],
            )
        ),
        ("messages[0].content must be text", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
        ("messages[0].content must have a part", [{"role": "user", "content": []}]),
        ("messages[0].content must be text", [{"role": "user"}]),
        ("messages[0].content must not be blank", [{"role": "user", "content": ""}, USER]),
        ("text only", [{"role": "user", "content": [TEXT, IMAGE]}]),
        ("text only", [{"role": "user", "content": [IMAGE]}, USER]),
        ("text only", [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}, USER]),
        ("text only", [{"role": "system", "content": [IMAGE]}, USER]),
        ("messages[0].content", [{"role": "system", "content": None}, USER]),
        ("messages[0].content", [{"role": "assistant", "content": 5}, USER]),
        *(("messages[0].role", [{"role": role, "content": "Hi"}]) for role in (None, ["user"], "User", "", 5)),
        ("messages[0].role", [{"content": "Hi"}]),
        ("messages[1].role", [USER, {"role": "tool", "content": "42", "tool_call_id": "1"}, USER]),
        ("messages[1].role", [USER, {"role": "function", "content": "42", "name": "f"}, USER]),
        ("messages must be valid JSON", [{"role": "user", "content": "\ud800"}]),
        ("messages must be valid JSON", [{"role": "user", "content": "Hi", "weight": math.nan}]),
        ("messages must be valid JSON", [{"role": "user", "content": "Hi", "name": nested(100_000)}]),
        ("messages must not be more than 2000", [USER] * 2001),
    ],
)
def test_bad_messages(sentence: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(HTTPException) as refused:
        read_messages(messages)
    assert refused.value.status_code == 400
    assert refused.value.detail.startswith("messages")
    assert sentence in refused.value.detail


@pytest.mark.parametrize(
    ("sentence", "body"),
    [
        *(("n must be 1", {"n": n}) for n in (2, 0, "1", -1, 1.5, [1], True)),
        ("tools must be empty", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("functions must be empty", {"functions": [{"name": "f"}]}),
        *(("temperature must be valid JSON", {"temperature": value}) for value in (math.nan, math.inf, -math.inf)),
        ("stop must be valid JSON", {"stop": "\ud800"}),
        ("response_format must be valid JSON", {"response_format": nested(200)}),
        ("response_format must be valid JSON", {"response_format": nested(100_000)}),
        ("stop must not be more than 64 KiB", {"stop": "x" * (64 * 1024 - len('{"stop": ""}') + 1)}),
        ("stop, logit_bias must not be", {"stop": ["x"] * 8000, "logit_bias": {str(n): 1 for n in range(5000)}}),
    ],
)
def test_bad_parameters(sentence: str, body: dict[str, Any]) -> None:
    with pytest.raises(HTTPException) as refused:
        read_parameters(body)
    assert refused.value.status_code == 400
    assert sentence in refused.value.detail


def test_the_limits_themselves_are_allowed() -> None:
    assert read_messages([USER] * 2000)[1].count("user: Hi") == 1999
    stop = "x" * (64 * 1024 - len('{"stop": ""}'))
    assert read_parameters({"stop": stop, "stream": True}) == {"stop": stop}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("sentence", "body"),
    [
        ("messages must end", {"messages": []}),
        ("messages[0].content must not be blank", {"messages": [{"role": "user", "content": " "}]}),
        ("text only", {"messages": [{"role": "user", "content": [TEXT, IMAGE]}]}),
        ("messages[0].role", {"messages": [{"role": "tool", "content": "42"}, USER]}),
        ("messages must not be more than 2000", {"messages": [USER] * 2001}),
        ("n must be 1", {"n": 2}),
        ("tools must be empty", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("temperature must be valid JSON", {"temperature": math.nan}),
        ("stop must be valid JSON", {"stop": "\ud800"}),
        ("response_format must be valid JSON", {"response_format": nested(600)}),
        ("stop must not be more than 64 KiB", {"stop": ["x" * 64] * 1024}),
    ],
)
def test_bad_input_is_a_400_and_no_upstream_call(
    chat: Chat, upstream: Upstream, sentence: str, body: dict[str, Any], stream: bool
) -> None:
    content = json.dumps({**chat.request(), "stream": stream, **body})
    response = chat.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert sentence in response.json()["detail"]
    assert not upstream.received


@pytest.mark.parametrize(
    ("sentence", "question"),
    [
        ("question must not be blank.", " \n"),
        ("question must be valid JSON of fewer than 200 levels.", "\ud800"),
    ],
)
def test_a_bad_question_is_a_400(chat: Chat, upstream: Upstream, sentence: str, question: str) -> None:
    content = json.dumps({"question": question})
    response = chat.http.post(f"/{NAME}/run", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json() == {"detail": sentence}
    assert not upstream.received


def test_deep_parameters_reach_the_upstream(chat: Chat, upstream: Upstream) -> None:
    chat.post(response_format=nested(199))
    assert upstream.received[0].body["response_format"] == nested(199)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text") | st.text(), "text": st.text() | ANYTHING}), max_size=3)
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLES | ANYTHING, "content": st.text() | PARTS | ANYTHING})
BODY = st.dictionaries(st.sampled_from([*PARAMETERS, "n", "tools", "functions", "stream", "stream_options"]), ANYTHING)


def read_or_refuse(read: Callable[[Any], Any], value: Any) -> Any:
    """Return what was read, or None for a 400; let every other exception out."""
    try:
        return read(value)
    except HTTPException as refused:
        if refused.status_code != 400:
            raise
        return None


@settings(max_examples=300, deadline=None, database=None)
@given(messages=st.lists(MESSAGE, max_size=4))
@example(messages=[USER])
def test_any_messages_are_read_or_refused(messages: list[dict[str, Any]]) -> None:
    if reading := read_or_refuse(read_messages, messages):
        assert reading[2].strip()
        json.dumps(reading, ensure_ascii=False).encode()


@settings(max_examples=300, deadline=None, database=None)
@given(body=BODY)
@example(body={"stop": "END"})
def test_any_parameters_are_read_or_refused(body: dict[str, Any]) -> None:
    if parameters := read_or_refuse(read_parameters, body):
        assert set(parameters) <= {*PARAMETERS, "stream_options"}
        json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode()


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, max_size=4) | st.just([USER]), body=BODY, stream=st.booleans())
def test_no_input_breaks_the_server(chat: Chat, messages: Any, body: dict[str, Any], stream: bool) -> None:
    content = json.dumps({**chat.request(), **body, "messages": messages, "stream": stream})
    response = chat.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400)
    assert chat.post().json()["choices"][0]["message"]["content"] == "Hello, world!"
