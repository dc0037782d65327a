"""What a client gets from upstreams as they are: odd ones, and those that fail."""

import json
from typing import Any

import openai
import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.serving import KEY, NAME, deployed
from harness.upstream import Reply, Upstream

TOLD = "You asked too much, {braces} included."
BROKE_OFF = "The answer could not be completed."
TOO_LATE = "The upstream did not answer in time."
REFUSED = "The upstream refused the server's credentials."
NOT_TAKEN = "The upstream refused the request."
BUSY = "The upstream is busy, or its quota is used up."

# Odd upstreams, streamed and whole


def data(content: Any) -> str:
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"


def choice(delta: Any, **more: Any) -> str:
    return data({"choices": [{"index": 0, "delta": delta, **more}]})


def with_usage(chunk: str) -> str:
    return data({**json.loads(chunk.removeprefix("data: ")), "usage": USAGE})


A, B = choice({"content": "Hello "}), choice({"content": "world"})
STOP, DONE = choice({}, finish_reason="stop"), data("[DONE]")
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
DETAILS = {"prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": None}, "completion_tokens_details": None}

ODD = {
    "usage without choices": Reply(raw=A + B + STOP + data({"usage": USAGE}) + DONE),
    "usage with choices null": Reply(raw=A + B + STOP + data({"choices": None, "usage": USAGE}) + DONE),
    "usage first": Reply(raw=data({"choices": [], "usage": USAGE}) + A + B + STOP + DONE),
    "usage on every chunk": Reply(raw="".join(map(with_usage, (A, B, STOP))) + DONE),
    "usage beside text": Reply(raw=A + with_usage(B) + STOP + DONE),
    "usage beside finish_reason": Reply(raw=A + B + with_usage(STOP) + DONE),
    "usage with nulls": Reply(raw=A + B + STOP + data({"choices": [], "usage": {**USAGE, **DETAILS}}) + DONE),
    "choices null": Reply(raw=A + data({"choices": None}) + B + STOP + DONE),
    "choices missing": Reply(raw=A + data({"id": "ping"}) + B + STOP + DONE),
    "choices empty first": Reply(raw=data({"choices": [], "prompt_filter_results": []}) + A + B + STOP + DONE),
    "stop, then silence": Reply(raw=A + B + STOP, then="stall"),
    "stop, then cut": Reply(raw=A + B + STOP, then="break"),
    "stop, then an error": Reply(raw=A + B + STOP + data({"error": {"message": "late"}}) + DONE),
    "stop without DONE": Reply(raw=A + B + STOP),
    "text beside finish_reason": Reply(raw=A + choice({"content": "world"}, finish_reason="stop") + DONE),
    "text behind finish_reason": Reply(raw=A + STOP + B + DONE),
    "refusal": Reply(raw=choice({"refusal": "Hello "}) + choice({"refusal": "world"}) + STOP + DONE),
    "no finish_reason": Reply(raw=A + B + DONE),
    "neither finish_reason nor DONE": Reply(raw=A + B),
    "delta null": Reply(raw=A + B + choice(None, finish_reason="stop") + DONE),
    "delta missing": Reply(raw=A + B + data({"choices": [{"index": 0, "finish_reason": "stop"}]}) + DONE),
    "content in parts": Reply(
        raw=choice({"content": [{"type": "thinking", "thinking": []}]})
        + choice({"content": [{"type": "text", "text": "Hello "}]})
        + B
        + STOP
        + DONE
    ),
    "content null": Reply(raw=choice({"content": None}) + A + B + STOP + DONE),
    "reasoning": Reply(raw=choice({"reasoning_content": "Hm."}) + A + B + STOP + DONE),
    "another reason": Reply(raw=A + B + choice({}, finish_reason="model_length") + DONE),
    "a tool call": Reply(raw=A + choice({"tool_calls": [{"id": "c1", "function": None}]}) + B + STOP + DONE),
    "comments": Reply(raw=": ping\n\n" + A + ": ping\n\n" + B + STOP + DONE),
    "half a surrogate pair": Reply(raw=choice({"content": "Hello world \ud83d"}) + STOP + DONE),
}
TEXTS = {"half a surrogate pair": "Hello world \ufffd"}
REASONS = {"no finish_reason": None, "neither finish_reason nor DONE": None, "another reason": "model_length"}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_an_answer(small: Chat, upstream: Upstream, name: str) -> None:
    upstream.reply = ODD[name]
    text, reason = TEXTS.get(name, "Hello world"), REASONS.get(name, "stop")
    usage: dict[str, Any] | None = USAGE if name.startswith("usage") else None
    if name == "usage with nulls":
        usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 3}}

    events = small.events(stream_options={"include_usage": True})
    assert text_of(events) == text
    assert finish_reasons(events) == ([reason] if reason else [])
    assert not any("error" in event for event in events)
    assert [event["usage"] for event in events if "usage" in event] == ([usage] if usage else [])

    whole = small.post().json()
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["choices"][0]["finish_reason"] == reason
    assert whole["usage"] == usage
    assert small.http.post(f"/{NAME}/run", json={"question": "Hi"}).json() == {"result": text}
    assert len(upstream.received) == 3


# Failures before the first chunk


def failing(status: int, error: Any, **headers: str) -> Reply:
    return Reply(status=status, error=error, headers=headers)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 422])
def test_what_the_caller_can_correct_is_passed_on(chat: Chat, upstream: Upstream, status: int, stream: bool) -> None:
    upstream.reply = failing(status, {"error": {"message": TOLD}}, **{"X-Internal": "secret"})
    response = chat.post(stream=stream)
    assert response.status_code == status
    assert response.json() == {"detail": TOLD}
    assert "x-internal" not in response.headers


EXTRA = [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": TOLD, "input": {"include_usage": True}}]


@pytest.mark.parametrize(
    "error",
    [
        {"error": TOLD},
        {"message": TOLD},
        {"detail": TOLD},
        {"detail": EXTRA},
        {"object": "error", "message": {"detail": EXTRA}, "type": "invalid_request_error"},
        [{"error": {"code": 400, "message": TOLD}}],
        TOLD,
    ],
)
def test_the_upstreams_sentence_is_found_in_other_forms_too(chat: Chat, upstream: Upstream, error: Any) -> None:
    upstream.reply = failing(422, error)
    assert chat.post().json()["detail"] == TOLD


def test_a_body_without_a_sentence_is_passed_on_whole(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = failing(400, {"error": {"code": "unsupported"}})
    assert "unsupported" in chat.post().json()["detail"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("headers", [{"Retry-After": "17"}, {}])
def test_a_busy_upstream_says_when_to_come_back(
    chat: Chat, upstream: Upstream, status: int, headers: dict[str, str], stream: bool
) -> None:
    upstream.reply = failing(status, {"error": {"message": "Rate limit reached in organization org-7."}}, **headers)
    response = chat.post(stream=stream)
    assert response.status_code == status
    assert response.json() == {"detail": BUSY}
    assert response.headers.get("retry-after") == headers.get("Retry-After")
    assert len(upstream.received) == 1  # retries are the caller's


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "answered", "detail"),
    [
        *((status, 424, REFUSED) for status in (401, 403)),
        *((status, 424, NOT_TAKEN) for status in (402, 404, 413, 418)),
        *((status, 504, TOO_LATE) for status in (408, 504)),
        *((status, 502, BROKE_OFF) for status in (409, 500, 529)),
    ],
)
def test_any_other_status_is_a_failure_of_the_server(
    chat: Chat, upstream: Upstream, status: int, answered: int, detail: str, stream: bool
) -> None:
    upstream.reply = failing(status, {"error": {"message": f"llm at /opt/models refuses {KEY}"}})
    response = chat.post(stream=stream)
    assert response.status_code == answered
    assert response.json() == {"detail": detail}
    assert response.headers.get("x-should-retry") == ("false" if answered == 424 else None)  # SDKs obey it
    assert len(upstream.received) == 1


NOT_AN_ANSWER = {
    "cut": Reply(role=False, tokens=[], then="break"),
    "nothing": Reply(raw=" "),
    "only DONE": Reply(raw=DONE),
    "an error event": Reply(raw=data({"error": {"message": TOLD}}) + DONE),
    "no JSON": Reply(raw="data: {not JSON\n\n"),
    "no object": Reply(raw=data(["Hello"])),
    "a page": Reply(raw="<html>Hello</html>", headers={"content-type": "text/html"}),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", NOT_AN_ANSWER)
def test_what_is_no_answer_is_a_bad_gateway(chat: Chat, upstream: Upstream, name: str, stream: bool) -> None:
    upstream.reply = NOT_AN_ANSWER[name]
    response = chat.post(stream=stream)
    assert response.status_code == 502
    assert response.json() == {"detail": BROKE_OFF}


@pytest.mark.parametrize("stream", [True, False])
def test_a_silent_upstream_is_a_gateway_timeout(small: Chat, upstream: Upstream, stream: bool) -> None:
    upstream.reply = Reply(role=False, tokens=[], then="stall")
    response = small.post(stream=stream)
    assert response.status_code == 504
    assert response.json() == {"detail": TOO_LATE}


@pytest.fixture(scope="module")
def without_upstream() -> Any:
    with Upstream() as closed:
        url = closed.url
    with deployed(OPENAI_BASE_URL=url, OPENAI_MAX_RETRIES="1") as server:
        yield Chat(server)


@pytest.mark.parametrize("stream", [True, False])
def test_no_connection_is_a_bad_gateway(without_upstream: Chat, stream: bool) -> None:
    response = without_upstream.post(stream=stream)
    assert response.status_code == 502
    assert response.json() == {"detail": BROKE_OFF}


@pytest.mark.parametrize("message", [f"Your key {KEY} is bad.", f"{KEY}", "half \ud83d"])
def test_the_key_is_replaced_in_what_is_passed_on(chat: Chat, upstream: Upstream, message: str) -> None:
    for status in (400, 422):
        upstream.reply = failing(status, {"error": {"message": message}})
        assert chat.post(stream=True).json() == {"detail": message.replace(KEY, "[key]").replace("\ud83d", "\ufffd")}


# Failures after the first chunk

FAILING_LATER = {
    "cut": (Reply(raw=A + B, then="break"), BROKE_OFF, 502),
    "an error event": (Reply(raw=A + B + data({"error": {"message": TOLD}}) + DONE), BROKE_OFF, 502),
    "no JSON": (Reply(raw=A + B + "data: {not JSON\n\n"), BROKE_OFF, 502),
    "silence": (Reply(raw=A + B, then="stall"), TOO_LATE, 504),
}


@pytest.mark.parametrize("name", FAILING_LATER)
def test_an_answer_that_fails_later(small: Chat, upstream: Upstream, name: str) -> None:
    upstream.reply, message, status = FAILING_LATER[name]
    *events, last = small.events(stream_options={"include_usage": True})
    assert text_of(events) == "Hello world"
    assert not finish_reasons(events)
    assert not any("error" in event for event in events)
    assert last == {"error": {"message": message, "type": "server_error"}}
    whole = small.post()
    assert (whole.status_code, whole.json()) == (status, {"detail": message})
    upstream.wait_until(lambda: all(one.over for one in upstream.received))  # every connection is closed
    upstream.reply = Reply()
    assert text_of(small.events()) == "Hello, world!"


def test_the_openai_sdk_raises_for_a_stream_that_fails(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(then="break")
    stream = chat.sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], stream=True)
    tokens: list[str | None] = []
    with pytest.raises(openai.APIError, match=BROKE_OFF):
        tokens.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(filter(None, tokens)) == "Hello, world!"


def test_a_failure_is_in_the_log(chat: Chat, upstream: Upstream) -> None:
    before = len(chat.server.log)
    upstream.reply = failing(500, {"error": {"message": TOLD}})
    chat.post()
    logged = chat.server.log[before:]
    assert " | ERROR " in logged
    assert "Error code: 500" in logged
    assert KEY not in logged


# Whatever the upstream's texts hold

TRICKY = [
    "héllo ",
    "日本語 ",
    "👩‍👩‍👧 ",
    "\n",
    "\r\n",
    "\n\n",
    "data: [DONE]\n\n",
    'data: {"error": 1}\n\n',
    ": ping",
    "\u2028",
    "\t\x00 ",
]


def test_any_text_arrives_unharmed(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=TRICKY)
    assert list(texts_of(chat.events())) == TRICKY
    assert chat.post().json()["choices"][0]["message"]["content"] == "".join(TRICKY)
