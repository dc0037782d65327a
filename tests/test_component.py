"""Any component behind `stoppable`, sync or async, on Haystack 2 and 3; and what wrapping changes in this process."""

import asyncio
import contextlib
import copy
from collections.abc import Iterator
from string import ascii_letters
from typing import Any

import pytest
from fastapi import HTTPException
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.in_process import Chunks, ask, chunks_of, pipeline_of, text_from
from harness.other_environments import ONE_RUN_IS_ENOUGH, SPEAKERS, served_from
from harness.serving import Server, wait_until
from harness.speaking import AsyncSpeaker, StatusError, SyncSpeaker, say
from hayhooks import log
from haystack import component
from haystack.components.generators import OpenAIGenerator
from haystack.dataclasses import StreamingChunk
from haystack.utils import Secret

from production import stoppable, tolerant

FAILED = "The answer could not be completed."
ERRORS = ["KeyError", "StopIteration", "SystemExit", "GeneratorExit", "asyncio.CancelledError"]
SYNC = pytest.mark.parametrize("chat", ["sync_speaker"], indirect=True)


class Speaker(Chat):
    """A client of one of the speakers, each of which has one slot."""

    def __init__(self, server: Server, model: str) -> None:
        super().__init__(server)
        self.model, self.logged = model, len(server.log)

    def request(self, messages: Any = "Hi", **body: Any) -> dict[str, Any]:
        return {**super().request(messages, **body), "model": self.model}

    def log(self) -> str:
        return self.server.log[self.logged :]

    def wait_until_ended(self) -> None:
        question = "say([str(self.runs - 1 + self.lost)])"
        wait_until(lambda: '"0"' in self.post(question).text, "the slot, and every run to end with what it uses")


@pytest.fixture(scope="module", params=["", pytest.param("haystack_3", marks=ONE_RUN_IS_ENOUGH)])
def speakers(request: pytest.FixtureRequest) -> Iterator[Server]:
    with served_from(request.param, SPEAKERS, MAX_CONCURRENT_STREAMS="1") as server:  # and no variable of OpenAI's
        yield server


@pytest.fixture(params=SPEAKERS)
def chat(request: pytest.FixtureRequest, speakers: Server) -> Speaker:
    return Speaker(speakers, request.param)


@pytest.mark.parametrize(
    ("question", "text", "reason", "added"),
    [
        ("say(['one ', 'two '])", "one two ", "stop", []),
        (
            "[StreamingChunk(x, meta={'finish_reason': x}) for x in ('tool_calls', 'length')]",
            "tool_callslength",
            "length",
            [],
        ),
        (r"[StreamingChunk(None), 'half \ud83d', None, StreamingChunk('!')]", "half \ufffd!", "stop", []),
        ("[PipelineEvent(type='x', data={'a': 1}), *say('a')]", "a", "stop", [{"type": "x", "data": {"a": 1}}]),
        ("[{'a': 1}, *say('a')]", "a", "stop", []),
    ],
    ids=["two chunks", "reasons", "odd", "event", "dict"],
)
def test_what_it_sends_arrives(chat: Speaker, question: str, text: str, reason: str, added: list[Any]) -> None:
    events = chat.events(question)
    assert (text_of(events), finish_reasons(events), finish_reasons(events[-1:])) == (text, [reason], [reason])
    assert [event["event"] for event in events if "event" in event] == added
    [whole] = chat.post(question).json()["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (text, reason)
    assert " | ERROR " not in chat.log()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("question", "status", "detail", "headers"),
    [
        ("[StatusError(400)]", 400, "top_p is too high", {}),
        ("[StatusError(401)]", 400, "The upstream refused the server's credentials.", {"x-should-retry": "false"}),
        ("[StatusError(404)]", 400, "The upstream refused the request.", {"x-should-retry": "false"}),
        ("[StatusError(503)]", 429, "The upstream is busy, or its quota is used up.", {"retry-after": "7"}),
        ("[StatusError(500)]", 502, FAILED, {}),
        ("[TimeoutError('my secret')]", 504, "The upstream did not answer in time.", {}),
        ("[HTTPException(418, 'short and stout', {'x-tea': 'yes'})]", 418, "short and stout", {"x-tea": "yes"}),
        ("[StarletteHTTPException(404, 'no such tenant')]", 404, "no such tenant", {}),
        ("[RuntimeError('my secret')]", 502, FAILED, {}),
        ("[]", 502, FAILED, {}),
    ],
)
def test_a_failure_has_a_status(
    chat: Speaker, stream: bool, question: str, status: int, detail: str, headers: dict[str, str]
) -> None:
    failed = chat.post(question, stream=stream)
    assert (failed.status_code, failed.json()) == (status, {"detail": detail})
    told = {name: failed.headers[name] for name in ("x-should-retry", "retry-after", "x-tea") if name in failed.headers}
    assert told == headers
    assert {"[]": "streaming_components", "[RuntimeError('my secret')]": "my secret"}.get(
        question, "ERROR"
    ) in chat.log()


@SYNC
@pytest.mark.parametrize(
    "error", ["KeyError", "StopIteration", "SystemExit", "GeneratorExit", "asyncio.CancelledError"]
)
def test_whatever_it_raises_is_its_failure(chat: Speaker, error: str) -> None:
    failed = chat.post(f"[{error}('my secret')]", stream=True)
    assert (failed.status_code, failed.json()) == (502, {"detail": FAILED})
    events = chat.events(f"['one', {error}('another')]")
    assert (text_of(events), finish_reasons(events)) == ("one", [])
    assert events[-1] == {"error": {"message": FAILED, "type": "server_error"}}
    assert [words for words in ("my secret", "another") if words not in chat.log()] == []


@pytest.mark.parametrize("how", ["endless", "stubborn", "bitter", "pooled"])
def test_it_ends_when_the_client_has_left(chat: Speaker, how: str) -> None:
    for _ in range(3):
        with chat.open(f"say(repeat('word'))  # {how}") as events:
            assert next(texts_of(events)).startswith("word")
        chat.wait_until_ended()
    assert text_of(chat.events("say('abc')  # pooled")) == "abc"
    assert not [word for word in ("Traceback", " | ERROR ") if word in chat.log()]


def test_what_it_shares_with_other_answers_stays_open(chat: Speaker) -> None:
    for number in range(3):
        with chat.open("self.feeds['news']") as events:
            assert int(next(texts_of(events)).split()[0]) >= number
        chat.wait_until_ended()


# In this process


def text_of_answer(*components: Any, **inputs: Any) -> str:
    return asyncio.run(text_from(lambda: chunks_of(pipeline_of(*components), inputs)))


@component
class Keeper:
    """Keeps the callback of its first run, and uses it in all of them."""

    kept: Any = None

    @component.output_types(said=str)
    def run(self, words: str, streaming_callback: Any = None) -> dict[str, Any]:
        self.kept = self.kept or streaming_callback
        for chunk in say(words):
            self.kept(chunk)
        return {"said": words}


@pytest.mark.timeout(90)
def test_a_callback_of_another_answer_fails_the_run_that_uses_it_alone() -> None:
    pipeline = pipeline_of(stoppable(Keeper()))

    async def ask_both() -> str:
        async with contextlib.aclosing(await ask(lambda: chunks_of(pipeline, {"words": ascii_letters}))) as chunks:
            text = (await anext(chunks)).content
            with pytest.raises(HTTPException, match=FAILED):
                await text_from(lambda: chunks_of(pipeline, {"words": "?"}))
            return text + "".join([chunk.content async for chunk in chunks])

    assert asyncio.run(ask_both()) == ascii_letters


@pytest.mark.timeout(90)
@pytest.mark.parametrize("wrap", [stoppable, lambda outer: outer], ids=["both", "inner"])
def test_a_component_within_another_one_calls_back_as_it_is_told(wrap: Any) -> None:
    inner = stoppable(SyncSpeaker(lambda _: say(ascii_letters)))

    def relay(_: str) -> list[StreamingChunk]:
        inner.run(streaming_callback=(held := list[StreamingChunk]()).append)
        return [chunk for chunk in held if len(chunk.content) == 1]

    assert text_of_answer(wrap(SyncSpeaker(relay))) == ascii_letters


@pytest.mark.timeout(90)
def test_a_run_on_the_event_loops_thread_does_not_wait_for_itself() -> None:
    keeper, inner = Keeper(), stoppable(SyncSpeaker(lambda _: say(ascii_letters)))
    pipeline = pipeline_of(keeper, AsyncSpeaker(lambda _: [inner.run(streaming_callback=keeper.kept)][:0]))
    pipeline.connect("0.said", "1.prompt")
    assert asyncio.run(text_from(lambda: chunks_of(pipeline, {"words": ""}))) == ascii_letters


WAYS = [stoppable, lambda one: stoppable(stoppable(one)), lambda one: copy.deepcopy(stoppable(one))]


@pytest.mark.parametrize("wrap", WAYS, ids=["once", "twice", "a deep copy"])
def test_a_wrapped_component_is_the_same_outside_of_an_answer_and_can_be_copied(wrap: Any) -> None:
    original, heard = Keeper(), list[StreamingChunk]()
    pipeline = pipeline_of(keeper := wrap(original))
    result = asyncio.run(pipeline.run_async({"words": "abc", "streaming_callback": heard.append}))
    assert (result, [chunk.content for chunk in heard]) == ({"0": {"said": "abc"}}, ["a", "b", "c"])
    keeper.kept = None
    assert asyncio.run(text_from(lambda: chunks_of(pipeline, {"words": "abc"}))) == "abc"
    assert (keeper is original) == bool(original.kept)


def test_a_tracer_that_replaces_run_in_the_class_sees_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, run, seen = stoppable(Keeper()), Keeper.run, []

    def traced(*args: Any, **inputs: Any) -> Any:
        seen.append(inputs["words"])
        return run(*args, **inputs)

    monkeypatch.setattr(Keeper, "run", traced)
    assert text_of_answer(keeper, words="Hi") == "Hi"
    assert seen == ["Hi"]


@component
class Mute:
    @component.output_types(said=str)
    def run(self) -> dict[str, Any]:
        raise StatusError(400)


@pytest.mark.parametrize(("wrap", "wrong"), [(stoppable, Mute()), (stoppable, object()), (tolerant, Mute())])
def test_what_cannot_be_wrapped_is_refused_by_name(wrap: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=type(wrong).__name__):
        wrap(wrong)


def test_tolerant_twice_is_harmless() -> None:
    create = tolerant(llm := OpenAIGenerator(Secret.from_token("unused"))).client.chat.completions.create
    assert tolerant(llm).client.chat.completions.create is create


def answer_of(*components: Any) -> Chunks:
    return chunks_of(pipeline_of(*components), {"words": "a"})


OWN_FAILURES = {
    "Mute": lambda: answer_of(stoppable(Keeper()), Mute()),  # a retriever's 400
    "No streaming-capable": lambda: answer_of(Mute()),
    "Missing": lambda: chunks_of(pipeline_of(stoppable(Keeper()))),
    "must return": lambda: "text",
    "no attribute 'upper'": lambda: (chunk.upper() async for chunk in answer_of(stoppable(Keeper()))),
}


@pytest.mark.parametrize("logged", OWN_FAILURES)
def test_any_other_failure_is_the_servers_own_and_in_the_log(logged: str) -> None:
    sink = log.add((lines := list[str]()).append, level="ERROR")
    with pytest.raises(HTTPException) as failure:
        asyncio.run(text_from(OWN_FAILURES[logged]))
    log.remove(sink)
    assert (failure.value.status_code, failure.value.detail) == (502, FAILED)
    assert logged in "".join(lines)
