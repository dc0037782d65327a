"""What a client gets when the upstream fails, and what the operator finds in the log."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from harness.client import Chat, finish_reasons, text_of
from harness.serving import EXAMPLE, KEY, NAME, Server, hayhooks
from harness.upstream import Reply, Upstream

TOLD = "You asked too much, {braces} included."
QUOTED = "Incorrect API key provided: sk-test-********cdef."


@pytest.fixture(scope="module")
def impatient_server(shared_upstream: Upstream) -> Iterator[Server]:
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": shared_upstream.url, "OPENAI_MAX_RETRIES": "0"}
    with hayhooks(**variables, OPENAI_TIMEOUT="1") as server:
        server.deploy(EXAMPLE / "pipeline_wrapper.py")
        yield server


@pytest.fixture
def impatient(impatient_server: Server, upstream: Upstream) -> Chat:
    return Chat(impatient_server)


def failing(status: int, error: Any, **headers: str) -> Reply:
    return Reply(status=status, error=error, headers={"x-request-id": f"request-{status}", **headers})


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 422, 429])
@pytest.mark.parametrize(
    "error", [{"error": {"message": TOLD}}, {"error": TOLD}, {"message": TOLD}, {"detail": TOLD}, TOLD]
)
def test_what_the_caller_can_mend_is_passed_on(
    chat: Chat, upstream: Upstream, error: Any, status: int, stream: bool
) -> None:
    upstream.reply = failing(status, error, **{"Retry-After": "17", "X-Internal": "secret"})
    response = chat.post(stream=stream)
    assert response.status_code == status
    assert TOLD in response.json()["detail"]
    assert response.headers["retry-after"] == "17"
    assert "x-internal" not in response.headers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [401, 403])
def test_the_callers_never_see_the_key(chat: Chat, upstream: Upstream, status: int, stream: bool) -> None:
    upstream.reply = failing(status, {"error": {"message": QUOTED, "code": "invalid_api_key"}})
    response = chat.post(stream=stream)
    assert response.status_code == 502
    assert response.json() == {"detail": "The upstream refused the server's credentials."}
    assert QUOTED not in str(response.headers)
    assert f"status {status}, request id request-{status}" in chat.server.log
    assert QUOTED in chat.server.log


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [404, 409, 418, 500, 503, 529])
def test_any_other_status_is_a_bad_gateway(chat: Chat, upstream: Upstream, status: int, stream: bool) -> None:
    upstream.reply = failing(status, {"error": {"message": "llm at /opt/models said no"}})
    response = chat.post(stream=stream)
    assert response.status_code == 502
    assert "said no" not in response.text
    assert f"status {status}, request id request-{status}" in chat.server.log


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("then", "status"), [("break", 502), ("end", 502), ("error", 502), ("nonsense", 502), ("stall", 504)]
)
def test_a_failure_before_the_first_token_is_a_status(
    impatient: Chat, upstream: Upstream, then: Any, status: int, stream: bool
) -> None:
    upstream.reply = Reply(tokens=[], then=then, finish_reason=None, error={"message": TOLD})
    response = impatient.post(stream=stream)
    assert response.status_code == status
    assert "OpenAIGenerator" not in response.text


@pytest.mark.parametrize("stream", [True, False])
def test_no_connection_is_a_bad_gateway(stream: bool) -> None:
    with Upstream() as closed:
        url = closed.url
    with hayhooks(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=url, OPENAI_MAX_RETRIES="1") as server:
        server.deploy(EXAMPLE / "pipeline_wrapper.py")
        response = Chat(server).post(stream=stream)
        assert response.status_code == 502
        assert "ConnectionRefusedError" in server.log


@pytest.mark.parametrize("then", ["break", "end", "error", "nonsense", "stall"])
def test_a_stream_that_fails_ends_with_an_error(impatient: Chat, upstream: Upstream, then: Any) -> None:
    upstream.reply = Reply(then=then, finish_reason=None, error={"message": TOLD})
    *events, last = impatient.events()
    assert text_of(events) == "Hello, world!"
    assert not finish_reasons([*events, last])
    assert not any("error" in event for event in events)
    assert set(last["error"]) == {"message", "type"}
    assert (last["error"]["message"] == TOLD) == (then == "error")


def test_the_openai_sdk_raises_for_a_stream_that_fails(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(then="break")
    stream = chat.sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], stream=True)
    tokens: list[str | None] = []
    with pytest.raises(openai.APIError, match="before its answer was complete"):
        tokens.extend(chunk.choices[0].delta.content for chunk in stream)
    assert tokens == ["Hello", ", ", "world", "!"]
    with pytest.raises(openai.InternalServerError):
        chat.sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(("then", "status"), [("break", 502), ("end", 502), ("error", 502), ("stall", 504)])
def test_a_whole_answer_that_breaks_off_is_a_status(
    impatient: Chat, upstream: Upstream, then: Any, status: int
) -> None:
    upstream.reply = Reply(then=then, finish_reason=None, error={"message": TOLD})
    assert impatient.post().status_code == status


def test_run_answers_with_the_same_statuses(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = failing(401, {"error": {"message": QUOTED}})
    response = chat.http.post(f"/{NAME}/run", json={"question": "Hi"})
    assert response.status_code == 502
    assert response.json() == {"detail": "The upstream refused the server's credentials."}


@pytest.mark.parametrize("tokens", [[], ["Hello"]])
def test_a_chunk_that_haystack_cannot_read_closes_the_upstream(
    chat: Chat, upstream: Upstream, tokens: list[str]
) -> None:
    upstream.reply = Reply(tokens=tokens, then="no choices")
    assert chat.post().status_code == 502
    upstream.wait_until(lambda: upstream.received[0].over)
    assert upstream.received[0].left


def test_the_server_goes_on_after_every_failure(chat: Chat, upstream: Upstream) -> None:
    for then in ("break", "error", "end", "nonsense", "no choices"):
        upstream.reply = Reply(then=then, finish_reason=None, error={"message": TOLD})
        chat.events()
        upstream.reply = Reply()
        assert text_of(chat.events()) == "Hello, world!"
