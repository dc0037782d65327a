"""Bad input gets a 400 with a sentence that names the field, and costs no upstream call."""

import json
import math
from typing import Any

import pytest
from harness.client import Chat
from harness.upstream import Upstream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

USER = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
TEXT = {"type": "text", "text": "Hi"}

BAD_MESSAGES: list[tuple[str, list[Any]]] = [
    ("messages must end", []),
    ("messages must end", [{"role": "system", "content": "Be brief."}]),
    ("messages must end", [USER, {"role": "assistant", "content": "Hello"}]),
    ("messages must end", [USER, {"role": "assistant", "content": None}]),
    ("messages must end", [USER, {"role": "system", "content": "Be brief."}]),
    ("messages[0].content", [{"role": "user", "content": ""}]),
    ("messages[0].content", [{"role": "user", "content": " \n\t"}]),
    ("messages[0].content", [{"role": "user", "content": "\u2003"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": None}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
    ("messages[0].content", [{"role": "user", "content": {"text": "Hi"}}]),
    ("messages[0].content", [{"role": "user", "content": []}]),
    ("messages[0].content", [{"role": "user", "content": ["Hi"]}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "text", "text": " "}]}]),
    ("messages[0].content", [{"role": "user", "content": ""}, USER]),
    ("text only", [{"role": "user", "content": [TEXT, IMAGE]}]),
    ("text only", [{"role": "user", "content": [IMAGE]}, USER]),
    ("text only", [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}, USER]),
    ("text only", [{"role": "system", "content": [IMAGE]}, USER]),
    ("messages[0].content", [{"role": "system", "content": None}, USER]),
    ("messages[0].content", [{"role": "assistant", "content": 5}, USER]),
    ("messages[0].role", [{"content": "Hi"}]),
    ("messages[0].role", [{"role": None, "content": "Hi"}]),
    ("messages[0].role", [{"role": ["user"], "content": "Hi"}]),
    ("messages[0].role", [{"role": "User", "content": "Hi"}]),
    ("messages[1].role", [USER, {"role": "tool", "content": "42", "tool_call_id": "1"}, USER]),
]
BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("n must", {"n": 2}),
    ("n must", {"n": 0}),
    ("n must", {"n": "1"}),
    ("tools must", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("functions must", {"functions": [{"name": "f"}]}),
    ("temperature must", {"temperature": math.nan}),
    ("stop must", {"stop": "\ud800"}),
    ("messages must be", {"messages": [{"role": "user", "content": "\ud800"}]}),
]
BAD = [(sentence, {"messages": messages}) for sentence, messages in BAD_MESSAGES] + BAD_FIELDS


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("sentence", "body"), BAD)
def test_bad_input(chat: Chat, upstream: Upstream, sentence: str, body: dict[str, Any], stream: bool) -> None:
    content = json.dumps({**chat.request(), "stream": stream, **body})
    response = chat.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert sentence in response.json()["detail"]
    assert not upstream.received


def test_a_blank_question(chat: Chat, upstream: Upstream) -> None:
    response = chat.http.post("/async_hybrid_streaming/run", json={"question": " "})
    assert response.status_code == 400
    assert not upstream.received


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text") | st.text(), "text": st.text() | ANYTHING}), max_size=3)
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLES | ANYTHING, "content": st.text() | PARTS | ANYTHING})
PARAMETERS = [
    "temperature",
    "max_tokens",
    "stop",
    "logit_bias",
    "seed",
    "response_format",
    "n",
    "tools",
    "stream_options",
]


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=ANYTHING | st.lists(MESSAGE | ANYTHING, max_size=4) | st.just([USER]),
    parameters=st.dictionaries(st.sampled_from(PARAMETERS), ANYTHING),
    stream=st.booleans() | ANYTHING,
)
def test_no_input_breaks_the_server(chat: Chat, messages: Any, parameters: dict[str, Any], stream: Any) -> None:
    body = {"model": "async_hybrid_streaming", "messages": messages, **parameters, "stream": stream}
    assert chat.http.post("/v1/chat/completions", json=body).status_code in (200, 400, 422)
    assert chat.post().json()["choices"][0]["message"]["content"] == "Hello, world!"
