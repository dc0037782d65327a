"""Each of Hayhooks' doors, and the form of what comes through it."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion
from harness.client import Chat
from harness.other_environments import wrapper_of, write_pipelines
from harness.serving import KEY, NAME, Server, deployed
from harness.upstream import USAGE, Reply, Upstream
from haystack.dataclasses import StreamingChunk
from haystack.tracing.tracer import NullSpan, NullTracer, Span, disable_tracing, enable_tracing
from openai.resources.chat.completions import Completions

HI = [{"role": "user", "content": "Hi"}]
REFUSED, FAILED = "The upstream refused the server's credentials.", "The answer could not be completed."
WRONG_KEY = Reply(status=401, error={"error": {"message": f"Incorrect API key provided: {KEY}"}})


def choice(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def test_a_stream_comes_token_by_token_and_is_openais_to_the_field(chat: Chat, upstream: Upstream) -> None:
    upstream.reply, events = Reply(finish_reason="length", gated=True), []
    with chat.open(stream_options={"include_usage": True}) as stream:
        for event in stream:
            events.append(event)
            upstream.release()  # the next token exists only after this event has come
    [(name, *head)] = {tuple(event.pop(field) for field in ("id", "object", "model", "created")) for event in events}
    assert (name[:9], head[:2], type(head[2])) == ("chatcmpl-", ["chat.completion.chunk", NAME], int)
    tokens = [choice(content=token) for token in ("Hello", ", ", "world", "!")]
    usage = {"choices": [], "usage": USAGE}
    assert events == [choice(role="assistant", content=""), *tokens, choice("length"), usage]


def test_a_whole_answer_is_a_completion_of_openais(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(finish_reason="length")
    answer = chat.post().json()
    [one] = answer["choices"]
    assert (answer["object"], answer["model"], one["finish_reason"]) == ("chat.completion", NAME, "length")
    assert (one["message"]["role"], one["message"]["content"]) == ("assistant", "Hello, world!")
    assert USAGE.items() <= answer["usage"].items()


def test_a_method_gets_the_headers_of_the_request(chat: Chat, upstream: Upstream, tmp_path: Path) -> None:
    source = wrapper_of("haystack.components.generators.OpenAIGenerator", inputs='{"prompt": headers["x-name"]}')
    source = source.replace("body):", "body, headers: Headers | None = None):")
    pipeline = {"pipeline_wrapper.py": f"from starlette.datastructures import Headers\n{source}"}
    write_pipelines(tmp_path, {"named": pipeline})
    chat.server.deploy(tmp_path / "named", "named")
    chat.http.post("/v1/chat/completions", json=chat.request(model="named"), headers={"x-name": "Ada"})
    assert upstream.received[0].body["messages"][0]["content"] == "Ada"


def test_the_responses_api_is_not_offered(chat: Chat) -> None:
    assert chat.http.post("/v1/responses", json={"model": NAME, "input": "Hi"}).status_code == 501


# A question, and whether it is answered, with the answer or the failure


def ask_run(server: Server, text: str) -> tuple[bool, str]:
    response = httpx.post(f"{server.url}/{NAME}/run", json={"question": text}, timeout=60)
    body = response.json()
    return response.is_success, body["result"] if response.is_success else f"{response.status_code}: {body['detail']}"


def call(url: str, method: str, **parameters: Any) -> Any:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
    headers = {"Accept": "application/json, text/event-stream"}
    return httpx.post(url, json=request, headers=headers, timeout=60).json()["result"]


def ask_a2a(server: Server, text: str) -> tuple[bool, str]:
    message = {"kind": "message", "messageId": "1", "role": "user", "parts": [{"kind": "text", "text": text}]}
    task = call(f"{server.url}/{NAME}/", "message/send", message=message)
    is_answered = task["status"]["state"] == "completed"
    said = task["artifacts"][0] if is_answered else task["status"]["message"]
    return is_answered, "".join(part["text"] for part in said["parts"])


def ask_mcp(server: Server, text: str) -> tuple[bool, str]:
    [tool] = [one for one in call(f"{server.url}/mcp/", "tools/list")["tools"] if one["name"] == NAME]
    assert tool["description"] == "Answer one question with a language model."
    [parameter] = tool["inputSchema"]["properties"]
    result = call(f"{server.url}/mcp/", "tools/call", name=NAME, arguments={parameter: text})
    return not result["isError"], result["content"][0]["text"]


DOORS = [(ask_run, "run"), (ask_a2a, "a2a run"), (ask_mcp, "mcp run", "--json-response")]
Ask = Callable[[str], tuple[bool, str]]


@pytest.fixture(scope="module", params=DOORS, ids=["run", "a2a", "mcp"])
def ask(request: pytest.FixtureRequest, shared_upstream: Upstream) -> Iterator[Ask]:
    ask, command, *options = request.param
    with deployed(*options, command=command, OPENAI_BASE_URL=shared_upstream.url) as server:
        yield partial(ask, server)


ANSWERS = [(Reply(), (True, "Hello, world!")), (WRONG_KEY, (False, f"400: {REFUSED}"))]
ANSWERS += [(Reply(then="break"), (False, f"502: {FAILED}"))]


@pytest.mark.parametrize(("reply", "answer"), ANSWERS, ids=["answer", "wrong key", "cut"])
def test_a_question_is_answered_or_fails(ask: Ask, upstream: Upstream, reply: Reply, answer: tuple[bool, str]) -> None:
    upstream.reply = reply
    is_answered, said = ask("What is {{ 7*7 }}?")
    assert (is_answered, said[-len(answer[1]) :]) == answer
    assert KEY not in said
    assert upstream.received[0].body["messages"] == [{"role": "user", "content": "What is {{ 7*7 }}?"}]


# Python code


def test_python_code_gets_what_its_body_asks_for(wrapper: Any, upstream: Upstream) -> None:
    async def ask(body: dict[str, Any]) -> Any:
        answer = await wrapper.run_chat_completion_async(NAME, HI, body)
        return [item async for item in answer] if body.get("stream", True) else answer

    chunks, events, whole = (asyncio.run(ask(body)) for body in ({}, {"stream": True}, {"stream": False}))
    assert {type(chunk) for chunk in chunks} == {StreamingChunk}
    assert "".join(chunk.content for chunk in chunks) == whole.choices[0].message.content == "Hello, world!"
    assert all(isinstance(one, ChatCompletion) for one in [whole, *events])
    upstream.reply = Reply(then="break")
    with pytest.raises(HTTPException, match=FAILED):
        asyncio.run(ask({}))


def test_the_pipeline_is_an_ordinary_one_outside_of_an_answer(wrapper: Any, upstream: Upstream) -> None:
    texts: list[str] = []
    streaming = {"llm": {"streaming_callback": lambda chunk: texts.append(chunk.content)}}

    async def leave_and_run() -> list[Any]:
        upstream.reply = Reply(["token "] * 1000, pace=0.01)
        chunks = await wrapper.run_chat_completion_async(NAME, HI, {})
        await anext(chunks)
        await chunks.aclose()
        upstream.reply = Reply()
        prompt = {"prompt": {"conversation": "Hi"}}
        return [await wrapper.pipeline.run_async({**prompt, **more}) for more in ({}, streaming)]

    results = asyncio.run(leave_and_run())
    upstream.wait_until(lambda: not upstream.open)
    assert [one.left for one in upstream.received] == [True, False, False]
    for result in results:
        assert (result["llm"]["replies"], result["llm"]["meta"][0]["finish_reason"]) == (["Hello, world!"], "stop")
    assert "".join(texts) == "Hello, world!"
    assert [bool(one.body.get("stream")) for one in upstream.received] == [True, False, True]


class Spans(NullTracer):
    """Notes which operations failed."""

    failed: tuple[str, ...] = ()

    @contextlib.contextmanager
    def trace(self, operation_name: str, tags: Any = None, parent_span: Any = None) -> Iterator[Span]:
        try:
            yield NullSpan()
        except Exception:
            self.failed += (operation_name,)
            raise


def test_tracers_see_the_call_and_its_failure(
    wrapper: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.reply, seen, spans, create = WRONG_KEY, list[Any](), Spans(), Completions.create

    def instrumented(self: Any, **request: Any) -> Any:
        seen.append(request["messages"])
        return create(self, **request)

    monkeypatch.setattr(Completions, "create", instrumented)
    wrapper.setup()
    enable_tracing(spans)
    with pytest.raises(HTTPException, match=REFUSED):
        asyncio.run(wrapper.run_api_async("Hi"))
    disable_tracing()
    assert seen == [HI]
    assert {"haystack.component.run", "haystack.async_pipeline.run"} <= {*spans.failed}
