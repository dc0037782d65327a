"""What a client gets when the upstream fails, and what the operator finds in the log."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.serving import KEY, NAME, WRAPPER, Server, deployed
from harness.upstream import USAGE, Reply, Upstream

from pipeline_wrapper import encodable

TOLD = "You asked too much, {braces} included."
REFUSED = "The upstream refused the server's credentials."
BROKE_OFF = "The answer could not be completed."
TOO_LATE = "The upstream did not answer in time."


def failing(status: int, error: Any, **headers: str) -> Reply:
    return Reply(status=status, error=error, headers={"x-request-id": f"request-{status}", **headers})


def last_failure(server: Server) -> str:
    """Return the last line of the log that tells of a failure."""
    return [line for line in server.log.splitlines() if "The answer failed: " in line][-1]


# Before the first chunk


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 422, 429])
def test_what_the_caller_can_mend_is_passed_on(chat: Chat, upstream: Upstream, status: int, stream: bool) -> None:
    upstream.reply = failing(status, {"error": {"message": TOLD}}, **{"X-Internal": "secret"})
    response = chat.post(stream=stream)
    assert response.status_code == status
    assert response.json() == {"detail": TOLD}
    assert "x-internal" not in response.headers
    assert f"status {status}, request id 'request-{status}', " in last_failure(chat.server)
    assert TOLD in last_failure(chat.server)


@pytest.mark.parametrize("error", [{"error": TOLD}, {"message": TOLD}, {"detail": TOLD}, TOLD])
def test_the_message_is_found_in_other_forms_too(chat: Chat, upstream: Upstream, error: Any) -> None:
    upstream.reply = failing(400, error)
    assert chat.post().json()["detail"] == TOLD


@pytest.mark.parametrize(
    "error", [[TOLD], {"error": {"message": {"text": TOLD}}}, {"error": {"message": "", "code": "unsupported"}}]
)
def test_a_body_without_a_message_is_passed_on_whole(chat: Chat, upstream: Upstream, error: Any) -> None:
    upstream.reply = failing(400, error)
    assert json.loads(chat.post().json()["detail"]) == error


@pytest.mark.parametrize("stream", [True, False])
def test_a_rate_limit_says_when_to_come_back(chat: Chat, upstream: Upstream, stream: bool) -> None:
    upstream.reply = failing(429, {"error": {"message": TOLD}}, **{"Retry-After": "17"})
    assert chat.post(stream=stream).headers["retry-after"] == "17"


@pytest.mark.parametrize("value", ["", "1\x85", "é", "ÿ" * 10])
def test_a_header_that_http_cannot_carry_is_left_out(chat: Chat, upstream: Upstream, value: str) -> None:
    upstream.reply = failing(429, {"error": {"message": TOLD}}, **{"Retry-After": value})
    response = chat.post()
    assert response.status_code == 429
    assert "retry-after" not in response.headers


def test_a_rate_limit_without_a_time_stays_so(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = failing(429, {"error": {"message": TOLD}})
    assert "retry-after" not in chat.post().headers


def test_retries_are_the_callers(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = failing(429, {"error": {"message": TOLD}}, **{"Retry-After": "1"})
    assert chat.post().status_code == 429
    assert len(upstream.received) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_stay_with_the_operator(chat: Chat, upstream: Upstream, status: int, stream: bool) -> None:
    upstream.reply = failing(status, {"error": {"message": "Incorrect API key provided: sk-test-****cdef."}})
    response = chat.post(stream=stream)
    assert response.status_code == 502
    assert response.json() == {"detail": REFUSED}
    assert f"status {status}, request id 'request-{status}', " in last_failure(chat.server)
    assert "sk-test-****cdef" in last_failure(chat.server)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [404, 409, 500, 503, 529])
def test_any_other_status_is_a_bad_gateway(chat: Chat, upstream: Upstream, status: int, stream: bool) -> None:
    upstream.reply = failing(status, {"error": {"message": "llm at /opt/models said no"}})
    response = chat.post(stream=stream)
    assert response.status_code == 502
    assert response.json() == {"detail": BROKE_OFF}
    assert f"status {status}, request id 'request-{status}', " in last_failure(chat.server)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("then", "status", "detail"),
    [
        ("break", 502, BROKE_OFF),
        ("end", 502, BROKE_OFF),
        ("error", 502, TOLD),
        ("nonsense", 502, BROKE_OFF),
        ("no choices", 502, BROKE_OFF),
        ("stall", 504, TOO_LATE),
    ],
)
def test_a_failure_before_the_first_chunk_is_a_status(
    small: Chat, upstream: Upstream, then: Any, status: int, detail: str, stream: bool
) -> None:
    upstream.reply = Reply(role=False, tokens=[], then=then, finish_reason=None, error={"message": TOLD})
    response = small.post(stream=stream)
    assert response.status_code == status
    assert response.json() == {"detail": detail}


@pytest.mark.parametrize("stream", [True, False])
def test_no_connection_is_a_bad_gateway(stream: bool) -> None:
    with Upstream() as closed:
        url = closed.url
    with deployed(OPENAI_BASE_URL=url, OPENAI_MAX_RETRIES="1") as server:
        response = Chat(server).post(stream=stream)
        assert response.status_code == 502
        assert response.json() == {"detail": BROKE_OFF}
        assert "Connection refused" in last_failure(server)


# After the first chunk


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("break", BROKE_OFF),
        ("end", BROKE_OFF),
        ("error", TOLD),
        ("nonsense", BROKE_OFF),
        ("no choices", BROKE_OFF),
        ("stall", TOO_LATE),
    ],
)
def test_a_stream_that_fails_ends_with_an_error(small: Chat, upstream: Upstream, then: Any, message: str) -> None:
    upstream.reply = Reply(then=then, finish_reason=None, error={"message": TOLD}, headers={"x-request-id": "late"})
    *events, last = small.events()
    assert text_of(events) == "Hello, world!"
    assert not finish_reasons([*events, last])
    assert not any("error" in event for event in events)
    assert last["error"] == {"message": message, "type": "server_error"}
    assert "request id 'late'" in last_failure(small.server)


def test_the_openai_sdk_raises_for_a_stream_that_fails(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(then="break")
    stream = chat.sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], stream=True)
    tokens: list[str | None] = []
    with pytest.raises(openai.APIError, match=BROKE_OFF):
        tokens.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(filter(None, tokens)) == "Hello, world!"


@pytest.mark.parametrize(
    ("then", "status"), [("break", 502), ("end", 502), ("error", 502), ("no choices", 502), ("stall", 504)]
)
def test_a_whole_answer_that_breaks_off_is_a_status(small: Chat, upstream: Upstream, then: Any, status: int) -> None:
    upstream.reply = Reply(then=then, finish_reason=None, error={"message": TOLD})
    assert small.post().status_code == status


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [[], ["Hello"]])
def test_a_chunk_that_cannot_be_read_closes_the_upstream(
    chat: Chat, upstream: Upstream, tokens: list[str], stream: bool
) -> None:
    upstream.reply = Reply(tokens=tokens, then="no choices")
    assert "choices" in chat.post(stream=stream).text or not stream
    upstream.wait_until(lambda: upstream.received[0].over)
    assert upstream.received[0].left


def test_the_server_goes_on_after_every_failure(chat: Chat, upstream: Upstream) -> None:
    for then in ("break", "error", "end", "nonsense", "no choices"):
        upstream.reply = Reply(then=then, finish_reason=None, error={"message": TOLD})
        assert "error" in chat.events()[-1]
        upstream.reply = Reply()
        assert text_of(chat.events()) == "Hello, world!"


@pytest.mark.parametrize("stream", [True, False])
def test_the_failure_of_another_component_stays_with_the_operator(tmp_path: Path, stream: bool) -> None:
    file = tmp_path / "failing_prompt.py"
    file.write_text(f"{WRAPPER.read_text()}\nPROMPT = '{{{{ history }}}}{{{{ question.missing() }}}}'\n")
    with deployed(wrapper=file) as server:
        response = Chat(server).post(stream=stream)
        assert response.status_code == 500
        assert response.json() == {"detail": "The pipeline failed."}
        assert "has no attribute 'missing'" in server.log


# What nobody must see, and what cannot be sent

QUOTING = [
    *(failing(status, {"error": {"message": f"Your key {KEY} is bad."}}) for status in (400, 401, 403, 404, 422, 429)),
    failing(400, f"Bearer {KEY}"),
    failing(429, {"error": {"message": "slow"}}, **{"Retry-After": KEY}),
    failing(400, {"error": {"message": "x" * 1990 + KEY}}),
    Reply(then="error", error={"message": f"Your key {KEY} is bad."}),
    Reply(role=False, tokens=[], then="error", error={"message": f"Your key {KEY} is bad."}),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reply", QUOTING, ids=range(len(QUOTING)))
def test_no_answer_and_no_log_has_the_key(chat: Chat, upstream: Upstream, reply: Reply, stream: bool) -> None:
    upstream.reply = reply
    response = chat.post(stream=stream)
    assert KEY[:12] not in response.text
    assert KEY[:12] not in str(response.headers)
    assert "The answer failed: " in last_failure(chat.server)
    assert KEY[:12] not in chat.server.log


def test_a_failure_is_one_short_line_of_the_log(chat: Chat, upstream: Upstream) -> None:
    before = len(chat.server.log)
    message = "first\nsecond\r\x1b[31m\u2028" + "x" * 5_000_000
    upstream.reply = Reply(status=500, error={"error": {"message": message}}, headers={"x-request-id": "\x85é" * 3000})
    assert chat.post().status_code == 502
    logged = chat.server.log[before:]
    [line] = [line for line in logged.split("\n") if line and " | INFO " not in line]
    assert "The answer failed: status 500, " in line
    assert "first\\nsecond\\r\\x1b[31m\\u2028x" in line
    assert len(logged) < 20_000


def test_a_long_message_is_cut(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = failing(400, {"error": {"message": "x" * 5_000_000}})
    assert chat.post().json()["detail"] == "x" * 2000


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("Hi", "Hi"),
        ("\ud83d", "\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("a\ud83db", "a\ufffdb"),
        ("", ""),
    ],
)
def test_half_a_surrogate_pair_is_replaced(text: str, encoded: str) -> None:
    assert encodable(text) == encoded


def test_half_a_surrogate_pair_arrives_as_a_replacement_character(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=["one ", "\ud83d", "\ude00", " two"])
    assert list(texts_of(chat.events())) == ["one ", "\ufffd", "\ufffd", " two"]
    assert chat.post().json()["choices"][0]["message"]["content"] == "one \ufffd\ufffd two"
    assert (
        json.loads(chat.http.post(f"/{NAME}/run", json={"question": "Hi"}).content)["result"] == "one \ufffd\ufffd two"
    )


@pytest.mark.parametrize("content", [["a part"], {"text": "Hi"}, 5, True], ids=["list", "object", "number", "boolean"])
def test_content_that_is_no_text_is_a_failure(chat: Chat, upstream: Upstream, content: Any) -> None:
    upstream.reply = Reply(tokens=["Hello", content])
    *events, last = chat.events()
    assert list(texts_of(events)) == ["Hello"]
    assert last["error"] == {"message": BROKE_OFF, "type": "server_error"}
    failure = chat.post()
    assert (failure.status_code, failure.json()) == (502, {"detail": BROKE_OFF})
    assert chat.http.post(f"/{NAME}/run", json={"question": "Hi"}).status_code == 502


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(finish_reason="st\ud800"), "st\ufffd"),
        (Reply(finish_reason=5), "5"),
        (Reply(finish_reason=["stop"]), "['stop']"),
        (Reply(usage="odd", usage_unasked=True), "stop"),
        (Reply(usage=[1], usage_unasked=True), "stop"),
        (Reply(usage={**USAGE, "note": "\udfff"}, usage_unasked=True), "stop"),
    ],
    ids=["half a pair", "number", "list", "usage text", "usage list", "usage half a pair"],
)
def test_an_odd_finish_reason_or_usage_does_not_cut_the_answer(
    chat: Chat, upstream: Upstream, reply: Reply, reason: str, stream: bool
) -> None:
    upstream.reply = reply
    if stream:
        events = chat.events(stream_options={"include_usage": True})
        assert text_of(events) == "Hello, world!"
        assert finish_reasons(events) == [reason]
        assert not any("error" in event for event in events)
    else:
        [choice] = chat.post().json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello, world!", reason)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": f"{{ {KEY}\n forged line"}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "calls",
    [[CALL], [{"index": 0, **CALL}], "text", [None], 5],
    ids=["no index", "no JSON", "text", "null", "number"],
)
def test_an_odd_tool_call_is_left_out(small: Chat, upstream: Upstream, calls: Any, stream: bool) -> None:
    before = len(small.server.log)
    upstream.reply = Reply(besides={"tool_calls": calls}, finish_reason="tool_calls")
    for _ in range(9):  # one more than there are places
        answer = small.post(stream=stream)
        assert answer.status_code == 200
        assert "world" in answer.text
        assert '"error":{' not in answer.text
    logged = small.server.log[before:]
    assert KEY not in logged
    assert "forged line" not in logged


def test_half_a_surrogate_pair_in_a_message_is_replaced(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = failing(400, {"error": {"message": "bad \ud83d"}})
    assert chat.post().json() == {"detail": "bad \ufffd"}
    upstream.reply = Reply(then="error", error={"message": "bad \ud83d"})
    assert chat.events()[-1]["error"]["message"] == "bad \ufffd"
