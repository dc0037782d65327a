"""Each of Hayhooks' doors to the wrapper works, and gets the form that it expects."""

import asyncio
import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.serving import KEY, NAME, Server, deployed
from harness.upstream import USAGE, Reply, Upstream
from haystack.dataclasses import StreamingChunk

from pipeline_wrapper import PipelineWrapper

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
REFUSED = "The upstream refused the server's credentials."
BROKE_OFF = "The answer could not be completed."
WRONG_KEY = Reply(status=401, error={"error": {"message": f"Incorrect API key provided: {KEY}"}})


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


def test_a_stream_has_the_form_of_openais(chat: Chat) -> None:
    events = chat.events()
    assert text_of(events) == "Hello, world!"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["model"] for event in events} == {NAME}
    assert len({event["id"] for event in events}) == 1
    assert not any(event["usage"] for event in events)


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


def test_a_finish_reason_before_the_last_text_is_kept(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=["Hello"], finish_first=True, then="late text")
    answer = chat.post().json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == "Hello, late"


def test_an_empty_answer_is_an_answer(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=[], finish_reason="content_filter")
    assert finish_reasons(chat.events()) == ["content_filter"]
    assert chat.post().json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("usage_early", [False, True])
def test_usage_comes_once_when_asked_for(chat: Chat, upstream: Upstream, usage_early: bool) -> None:
    upstream.reply = Reply(usage_early=usage_early)
    events = chat.events(stream_options={"include_usage": True})
    with_usage = [event for event in events if event["usage"]]
    assert [event["choices"] for event in with_usage] == [[]]
    assert with_usage[0] is events[-1]
    assert {name: with_usage[0]["usage"][name] for name in USAGE} == USAGE
    assert text_of(events) == "Hello, world!"
    assert len(events) == 7  # the role, four tokens, the finish_reason, usage


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, [], "include_usage"])
def test_usage_does_not_come_unasked(chat: Chat, upstream: Upstream, options: object) -> None:
    upstream.reply = Reply(usage_unasked=True)
    assert not any(event["usage"] for event in chat.events(stream_options=options))
    assert "stream_options" not in upstream.received[0].body


def test_any_text_arrives_unharmed(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=TRICKY)
    assert list(texts_of(chat.events())) == TRICKY
    assert chat.post().json()["choices"][0]["message"]["content"] == "".join(TRICKY)


def test_the_openai_sdk_streams(chat: Chat) -> None:
    stream = chat.sdk.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, world!"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == USAGE["total_tokens"]


def test_the_openai_sdk_gets_a_whole_answer(chat: Chat) -> None:
    answer = chat.sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.usage is not None
    assert answer.usage.total_tokens == USAGE["total_tokens"]


def test_run_answers_a_question(chat: Chat, upstream: Upstream) -> None:
    response = chat.http.post(f"/{NAME}/run", json={"question": "What is {{ 7*7 }}?"})
    assert response.json() == {"result": "Hello, world!"}
    assert upstream.received[0].body["messages"] == [{"role": "user", "content": "What is {{ 7*7 }}?"}]


@pytest.mark.parametrize(
    ("reply", "detail"), [(WRONG_KEY, REFUSED), (Reply(then="break"), BROKE_OFF)], ids=["wrong key", "break"]
)
def test_run_fails_with_a_status(chat: Chat, upstream: Upstream, reply: Reply, detail: str) -> None:
    upstream.reply = reply
    response = chat.http.post(f"/{NAME}/run", json={"question": "Hi"})
    assert response.status_code == 502
    assert response.json() == {"detail": detail}


def test_the_model_is_listed(chat: Chat) -> None:
    assert [model["id"] for model in chat.http.get("/v1/models").json()["data"]] == [NAME]


def test_responses_are_not_offered(chat: Chat) -> None:
    assert chat.http.post("/v1/responses", json={"model": NAME, "input": "Hi"}).status_code == 501


# Hayhooks' other servers


@pytest.fixture(scope="module")
def a2a_server(shared_upstream: Upstream) -> Iterator[Server]:
    if not find_spec("hayhooks.cli.a2a"):
        pytest.skip("this release of Hayhooks has no A2A server")
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


@pytest.mark.parametrize(
    ("reply", "detail"), [(WRONG_KEY, REFUSED), (Reply(then="break"), BROKE_OFF)], ids=["wrong key", "break"]
)
def test_an_a2a_task_fails_with_a_safe_sentence(
    a2a_server: Server, upstream: Upstream, reply: Reply, detail: str
) -> None:
    upstream.reply = reply
    task = ask_a2a(a2a_server, "Hi")
    assert task["status"]["state"] == "failed"
    assert task["status"]["message"]["parts"][0]["text"].endswith(f"502: {detail}")
    assert KEY not in json.dumps(task)
    assert a2a_server.log.count(detail) > 0
    assert KEY not in a2a_server.log


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
    assert result["content"][0]["text"].endswith(f"502: {REFUSED}")
    assert KEY not in mcp_server.log


# Python code


HI = [{"role": "user", "content": "Hi"}]


def test_python_code_gets_streaming_chunks(wrapper: PipelineWrapper, upstream: Upstream) -> None:
    async def call() -> list[Any]:
        return [chunk async for chunk in await wrapper.run_chat_completion_async(NAME, HI, {})]

    chunks = asyncio.run(call())
    assert {type(chunk) for chunk in chunks} == {StreamingChunk}
    assert "".join(chunk.content for chunk in chunks) == "Hello, world!"
    assert {chunk.meta["model"] for chunk in chunks} == {"gpt-5-mini"}


def test_python_code_gets_the_failure_after_the_chunks(wrapper: PipelineWrapper, upstream: Upstream) -> None:
    upstream.reply = Reply(then="break")
    texts = []

    async def call() -> None:
        async for chunk in await wrapper.run_chat_completion_async(NAME, HI, {}):
            texts.append(chunk.content)

    with pytest.raises(HTTPException, match=BROKE_OFF):
        asyncio.run(call())
    assert "".join(texts) == "Hello, world!"


def test_python_code_can_ask_for_openais_forms(wrapper: PipelineWrapper, upstream: Upstream) -> None:
    async def call() -> tuple[Any, list[Any]]:
        whole = await wrapper.run_chat_completion_async(NAME, HI, {"stream": False})
        stream = await wrapper.run_chat_completion_async(NAME, HI, {"stream": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(call())
    assert whole.choices[0].message.content == "Hello, world!"
    assert {type(chunk) for chunk in [whole, *chunks]} == {ChatCompletion}
