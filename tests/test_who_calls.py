"""Each of Hayhooks' doors to the wrapper works, and gets the form that it expects."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.serving import KEY, NAME, Server, deployed
from harness.upstream import USAGE, Reply, Upstream
from haystack.dataclasses import StreamingChunk
from haystack.tracing.tracer import NullSpan, Span, Tracer, disable_tracing, enable_tracing
from openai.resources.chat.completions import Completions

REFUSED = "The upstream refused the server's credentials."
BROKE_OFF = "The answer could not be completed."
WRONG_KEY = Reply(status=401, error={"error": {"message": f"Incorrect API key provided: {KEY}"}})
FAILURES = [
    pytest.param(WRONG_KEY, 424, REFUSED, id="wrong key"),
    pytest.param(Reply(then="break"), 502, BROKE_OFF, id="break"),
]


def test_each_token_arrives_before_the_next_one_exists(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=["one", "two", "three"], gated=True)
    upstream.release()
    with chat.open() as events:
        for token in ("one", "two", "three"):
            assert next(texts_of(events)) == token
            upstream.release()
        assert finish_reasons(events) == ["stop"]


def test_the_upstream_sends_no_faster_than_the_client_reads(chat: Chat, upstream: Upstream) -> None:
    token = "x" * 64 * 1024
    upstream.reply = Reply(tokens=[token] * 1000)
    with chat.open() as events:
        assert next(texts_of(events)) == token
        sent = upstream.wait_until_still()
        assert sent < 500  # what the buffers of the connections hold
        assert text_of(events) == token * 999


def events_without_their_values(chat: Chat, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream without what differs from stream to stream, which is checked here."""
    events = chat.events(**body)
    assert len({(event.pop("id"), event.pop("created"), event.pop("object")) for event in events}) == 1
    assert {event.pop("model") for event in events} == {NAME}
    return events


def choice(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def test_a_stream_is_what_openai_sends_to_the_field(chat: Chat) -> None:
    assert events_without_their_values(chat, stream_options={"include_usage": True}) == [
        choice(role="assistant", content=""),
        *(choice(content=token) for token in ("Hello", ", ", "world", "!")),
        choice("stop"),
        {"choices": [], "usage": USAGE},
    ]


def test_the_first_event_of_a_stream_says_what_it_is(chat: Chat) -> None:
    first = chat.events()[0]
    assert first["object"] == "chat.completion.chunk"
    assert first["id"].startswith("chatcmpl-")
    assert isinstance(first["created"], int)


def test_a_whole_answer_has_the_form_of_openais(chat: Chat) -> None:
    answer = chat.post().json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert {name: answer["usage"][name] for name in USAGE} == USAGE


@pytest.mark.parametrize("finish_first", [False, True])
@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "a_new_reason"])
def test_the_finish_reason_is_the_upstreams(chat: Chat, upstream: Upstream, reason: str, finish_first: bool) -> None:
    upstream.reply = Reply(tokens=["Hello"], finish_reason=reason, finish_first=finish_first)
    assert finish_reasons(chat.events()) == [reason]
    assert chat.post().json()["choices"][0]["finish_reason"] == reason


def test_the_last_finish_reason_comes_after_the_last_text(chat: Chat, upstream: Upstream) -> None:
    choices: list[dict[str, Any]] = [
        {"delta": {"content": "Let me see. "}, "finish_reason": "tool_calls"},
        {"delta": {"content": "Hello"}, "finish_reason": None},
        {"delta": {}, "finish_reason": "length"},
    ]
    upstream.reply = Reply(
        raw="".join(f"data: {json.dumps({'choices': [{'index': 0, **one}]})}\n\n" for one in choices)
    )
    assert list(texts_of(answer := chat.events())) == ["Let me see. ", "Hello"]
    assert finish_reasons(answer) == finish_reasons(answer[-1:]) == ["length"]


def test_a_model_that_reasons_is_heard(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(["Hello"], thoughts=2, gated=True)
    with chat.open() as events:
        assert next(events)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        for _ in range(2):
            upstream.release()
            assert next(events)["choices"][0]["delta"]["content"] == ""
            upstream.wait_until(lambda: upstream.received[0].sent == upstream.released)
        upstream.release()
        upstream.release()
        assert text_of(events) == "Hello"


def test_an_empty_answer_is_an_answer(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=[], finish_reason="content_filter")
    assert finish_reasons(chat.events()) == ["content_filter"]
    assert chat.post().json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, [], "include_usage", 5])
def test_usage_does_not_come_unasked(chat: Chat, upstream: Upstream, options: object) -> None:
    assert not any("usage" in event for event in chat.events(stream_options=options))
    assert upstream.received[0].body["stream_options"] == {"include_usage": True}  # for the server's traces


def test_run_answers_a_question(chat: Chat, upstream: Upstream) -> None:
    response = chat.http.post(f"/{NAME}/run", json={"question": "What is {{ 7*7 }}?"})
    assert response.json() == {"result": "Hello, world!"}
    assert upstream.received[0].body["messages"] == [{"role": "user", "content": "What is {{ 7*7 }}?"}]


@pytest.mark.parametrize(("reply", "status", "detail"), FAILURES)
def test_run_fails_with_a_status(chat: Chat, upstream: Upstream, reply: Reply, status: int, detail: str) -> None:
    upstream.reply = reply
    response = chat.http.post(f"/{NAME}/run", json={"question": "Hi"})
    assert response.status_code == status
    assert response.json() == {"detail": detail}


def test_the_model_is_listed(chat: Chat) -> None:
    assert [model["id"] for model in chat.http.get("/v1/models").json()["data"]] == [NAME]


def test_responses_are_not_offered(chat: Chat) -> None:
    assert chat.http.post("/v1/responses", json={"model": NAME, "input": "Hi"}).status_code == 501


# Hayhooks' other servers


@pytest.fixture(scope="module")
def a2a_server(shared_upstream: Upstream) -> Iterator[Server]:
    with deployed(command="a2a run", OPENAI_BASE_URL=shared_upstream.url) as server:
        yield server


def ask_a2a(server: Server, text: str) -> dict[str, Any]:
    message = {"kind": "message", "messageId": "1", "role": "user", "parts": [{"kind": "text", "text": text}]}
    request = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
    task: dict[str, Any] = httpx.post(f"{server.url}/{NAME}/", json=request, timeout=60).json()["result"]
    return task


def test_an_a2a_task_completes_with_the_answer(a2a_server: Server, upstream: Upstream) -> None:
    task = ask_a2a(a2a_server, "What is {{ 7*7 }}?")
    assert task["status"]["state"] == "completed"
    assert "".join(part["text"] for part in task["artifacts"][0]["parts"]) == "Hello, world!"
    assert upstream.received[0].body["messages"] == [{"role": "user", "content": "What is {{ 7*7 }}?"}]


@pytest.mark.parametrize(("reply", "status", "detail"), FAILURES)
def test_an_a2a_task_fails_with_a_safe_sentence(
    a2a_server: Server, upstream: Upstream, reply: Reply, status: int, detail: str
) -> None:
    upstream.reply = reply
    task = ask_a2a(a2a_server, "Hi")
    assert task["status"]["state"] == "failed"
    assert task["status"]["message"]["parts"][0]["text"].endswith(f"{status}: {detail}")
    assert KEY not in json.dumps(task)


@pytest.fixture(scope="module")
def mcp_server(shared_upstream: Upstream) -> Iterator[Server]:
    with deployed("--json-response", command="mcp run", OPENAI_BASE_URL=shared_upstream.url) as server:
        yield server


def ask_mcp(server: Server, method: str, **parameters: Any) -> dict[str, Any]:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
    headers = {"Accept": "application/json, text/event-stream"}
    result: dict[str, Any] = httpx.post(f"{server.url}/mcp/", json=request, headers=headers, timeout=60).json()[
        "result"
    ]
    return result


def test_the_mcp_tool_is_described_and_answers(mcp_server: Server, upstream: Upstream) -> None:
    [tool] = [tool for tool in ask_mcp(mcp_server, "tools/list")["tools"] if tool["name"] == NAME]
    assert tool["description"] == "Answer one question with a language model."
    assert list(tool["inputSchema"]["properties"]) == ["question"]
    result = ask_mcp(mcp_server, "tools/call", name=NAME, arguments={"question": "Hi"})
    assert result == {"content": [{"type": "text", "text": "Hello, world!"}], "isError": False}


def test_the_mcp_tool_fails_with_a_safe_sentence(mcp_server: Server, upstream: Upstream) -> None:
    upstream.reply = WRONG_KEY
    result = ask_mcp(mcp_server, "tools/call", name=NAME, arguments={"question": "Hi"})
    assert result["isError"]
    assert result["content"][0]["text"].endswith(f"424: {REFUSED}")
    assert KEY not in json.dumps(result)


# Python code


HI = [{"role": "user", "content": "Hi"}]


def test_python_code_gets_streaming_chunks(wrapper: Any, upstream: Upstream) -> None:
    async def call() -> list[Any]:
        return [chunk async for chunk in await wrapper.run_chat_completion_async(NAME, HI, {})]

    chunks = asyncio.run(call())
    assert {type(chunk) for chunk in chunks} == {StreamingChunk}
    assert "".join(chunk.content for chunk in chunks) == "Hello, world!"
    assert {chunk.meta["model"] for chunk in chunks} == {"gpt-5-mini"}


def test_python_code_gets_the_failure_after_the_chunks(wrapper: Any, upstream: Upstream) -> None:
    upstream.reply = Reply(then="break")
    texts = []

    async def call() -> None:
        async for chunk in await wrapper.run_chat_completion_async(NAME, HI, {}):
            texts.append(chunk.content)

    with pytest.raises(HTTPException, match=BROKE_OFF):
        asyncio.run(call())
    assert "".join(texts) == "Hello, world!"


def test_a_short_key_is_no_secret(wrapper_class: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    wrapper = wrapper_class()
    wrapper.setup()
    upstream.reply = Reply(status=400, error={"error": {"message": "ollama has no such model"}})
    with pytest.raises(HTTPException, match="ollama has no such model"):
        asyncio.run(wrapper.run_api_async("Hi"))


def test_python_code_can_ask_for_openais_forms(wrapper: Any, upstream: Upstream) -> None:
    async def call() -> tuple[Any, list[Any]]:
        whole = await wrapper.run_chat_completion_async(NAME, HI, {"stream": False})
        stream = await wrapper.run_chat_completion_async(NAME, HI, {"stream": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(call())
    assert whole.choices[0].message.content == "Hello, world!"
    assert all(isinstance(chunk, ChatCompletion) for chunk in [whole, *chunks])


def test_the_pipeline_is_an_ordinary_one(wrapper: Any, upstream: Upstream) -> None:
    whole = asyncio.run(wrapper.pipeline.run_async({"prompt": {"conversation": "Hi"}}))
    assert whole["llm"]["replies"] == ["Hello, world!"]
    assert whole["llm"]["meta"][0]["finish_reason"] == "stop"
    assert not upstream.received[0].body["stream"]


def test_the_pipeline_streams_outside_of_an_answer(wrapper: Any, upstream: Upstream) -> None:
    texts: list[str] = []
    streaming = {"streaming_callback": lambda chunk: texts.append(chunk.content)}
    data = {"prompt": {"conversation": "Hi"}, "llm": streaming}
    assert asyncio.run(wrapper.pipeline.run_async(data))["llm"]["replies"] == ["Hello, world!"]
    assert "".join(texts) == "Hello, world!"


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"stream": False}])
def test_what_instruments_the_sdk_sees_the_call(
    wrapper_class: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    seen, create = [], Completions.create

    def instrumented(self: Any, **request: Any) -> Any:
        seen.append(request)
        return create(self, **request)

    monkeypatch.setattr(Completions, "create", instrumented)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    wrapper = wrapper_class()
    wrapper.setup()

    async def call() -> None:
        answer = await wrapper.run_chat_completion_async(NAME, HI, body)
        if body.get("stream") is not False:
            assert [chunk async for chunk in answer]

    asyncio.run(call())
    assert seen[0]["messages"] == HI


def test_a_failure_is_one_for_haystack_and_its_traces(wrapper: Any, upstream: Upstream) -> None:
    upstream.reply = WRONG_KEY
    spans = Spans()
    enable_tracing(spans)
    try:
        with pytest.raises(HTTPException, match=REFUSED):
            asyncio.run(wrapper.run_chat_completion_async(NAME, HI, {"stream": True}))
    finally:
        disable_tracing()
    assert {"haystack.component.run", "haystack.async_pipeline.run"} <= set(spans.failed)


class Spans(Tracer):
    """A tracer that notes which operations failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    @contextlib.contextmanager
    def trace(self, operation_name: str, tags: Any = None, parent_span: Any = None) -> Iterator[Span]:
        try:
            yield NullSpan()
        except Exception:
            self.failed.append(operation_name)
            raise

    def current_span(self) -> None:
        return None
