"""Any component behind `stoppable`, sync or async, on Haystack 2 and 3; and what wrapping changes in this process."""

import asyncio
import contextlib
import copy
from collections.abc import Callable, Iterator
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

FAILED, REFUSED = "The answer could not be completed.", "The upstream refused the request."
BUSY, LATE = "The upstream is busy, or its quota is used up.", "The upstream did not answer in time."


class Speaker(Chat):
    """A client of one of the speakers, each of which has one slot."""

    def __init__(self, server: Server, model: str) -> None:
        super().__init__(server)
        self.model, self.logged = model, len(server.log)

    def request(self, messages: Any = "Hi", **body: Any) -> dict[str, Any]:
        return {**super().request(messages, **body), "model": self.model}

    def log(self) -> str:
        return self.server.log[self.logged :]


@pytest.fixture(scope="module", params=["", pytest.param("haystack_3", marks=ONE_RUN_IS_ENOUGH)])
def speakers(request: pytest.FixtureRequest) -> Iterator[Server]:
    with served_from(request.param, SPEAKERS, MAX_CONCURRENT_STREAMS="1") as server:  # and no variable of OpenAI's
        yield server


@pytest.fixture(params=SPEAKERS)
def chat(request: pytest.FixtureRequest, speakers: Server) -> Speaker:
    return Speaker(speakers, request.param)


ANSWERS: dict[str, tuple[str, str, list[Any]]] = {
    "say(['one ', 'two '])": ("one two ", "stop", []),
    "[StreamingChunk(x, meta={'finish_reason': x}) for x in ('stop', 'length')]": ("stoplength", "length", []),
    r"[StreamingChunk(None), 'half \ud83d', None, *say('!')]": ("half \ufffd!", "stop", []),
    "[PipelineEvent(type='x', data={'a': 1}), *say('a')]": ("a", "stop", [{"type": "x", "data": {"a": 1}}]),
    "[{'a': 1}, *say('a')]": ("a", "stop", []),
}


@pytest.mark.parametrize("question", ANSWERS)
def test_what_it_sends_arrives(chat: Speaker, question: str) -> None:
    events, (text, reason, added) = chat.events(question), ANSWERS[question]
    assert (text_of(events), finish_reasons(events), finish_reasons(events[-1:])) == (text, [reason], [reason])
    assert [event["event"] for event in events if "event" in event] == added
    [whole] = chat.post(question).json()["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (text, reason)
    assert " | ERROR " not in chat.log()


FAILURES: dict[str, tuple[int, str, dict[str, str]]] = {
    "StatusError(400)": (400, "top_p is too high", {}),
    "StatusError(404)": (400, REFUSED, {"x-should-retry": "false"}),
    "StatusError(503)": (429, BUSY, {"retry-after": "7"}),
    "StatusError(500)": (502, FAILED, {}),
    "TimeoutError('my secret')": (504, LATE, {}),
    "HTTPException(418, 'short and stout', {'x-tea': 'yes'})": (418, "short and stout", {"x-tea": "yes"}),
    "StarletteHTTPException(404, 'no such tenant')": (404, "no such tenant", {}),
    "RuntimeError('my secret')": (502, FAILED, {}),
}
WHOSE = [(model, error) for model in SPEAKERS for error in FAILURES]
for name in (
    "StopIteration",
    "SystemExit",
    "GeneratorExit",
    "asyncio.CancelledError",
):  # asyncio takes them for its own
    FAILURES[error := f"{name}('my secret')"] = (502, FAILED, {})
    WHOSE.append(("sync_speaker", error))


@pytest.mark.parametrize(("chat", "error"), WHOSE, indirect=["chat"])
def test_whatever_it_raises_is_its_failure(chat: Speaker, error: str) -> None:
    status, detail, headers = FAILURES[error]
    for stream in (True, False):
        failed = chat.post(f"[{error}]", stream=stream)
        assert (failed.status_code, failed.json()) == (status, {"detail": detail})
        assert {name: failed.headers[name] for name in headers} == headers
    events = chat.events(f"[*say('a'), {error}]")
    assert (text_of(events), finish_reasons(events)) == ("a", [])
    assert events[-1] == {"error": {"message": detail, "type": "server_error"}}
    assert chat.log().count(" | ERROR ") >= 3
    assert ("my secret" in error) == ("my secret" in chat.log())


ENDLESS = ["self.feeds['news']", *(f"say(repeat('word')) # {how}" for how in ("", "stubborn", "bitter", "pooled"))]


@pytest.mark.parametrize("question", ENDLESS)
def test_it_ends_when_the_client_has_left(chat: Speaker, question: str) -> None:
    counts = "say([f'{self.runs - 1} {self.lost}'])"  # of other runs, and of those whose clean-up found a closed stream
    for _ in range(3):
        with chat.open(question) as events:
            next(texts_of(events))
        wait_until(lambda: '"0 0"' in chat.post(counts).text, "the slot and the run to end")
    assert text_of(chat.events("say('abc')  # pooled")) == "abc"
    assert not [word for word in ("Traceback", " | ERROR ") if word in chat.log()]


# In this process


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


def keepers_answer(words: str, *components: Any) -> Chunks:
    return chunks_of(pipeline_of(*components), {"words": words})


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

    pipeline = pipeline_of(wrap(SyncSpeaker(relay)))
    assert asyncio.run(text_from(lambda: chunks_of(pipeline))) == ascii_letters


@pytest.mark.timeout(90)
def test_a_run_on_the_event_loops_thread_does_not_wait_for_itself() -> None:
    words = ascii_letters * 20  # even a wait of a second for each eight would be too much
    keeper, inner = Keeper(), stoppable(SyncSpeaker(lambda _: say(words)))
    pipeline = pipeline_of(keeper, AsyncSpeaker(lambda _: [inner.run(streaming_callback=keeper.kept)][:0]))
    pipeline.connect("0.said", "1.prompt")
    assert asyncio.run(text_from(lambda: chunks_of(pipeline, {"words": ""}))) == words


WAYS = [stoppable, lambda one: stoppable(stoppable(one)), lambda one: copy.deepcopy(stoppable(one))]


@pytest.mark.parametrize("wrap", WAYS, ids=["once", "twice", "a deep copy"])
def test_a_wrapped_component_is_itself_to_others(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen, heard, run = Keeper(), list[str](), list[StreamingChunk](), Keeper.run

    def traced(self: Any, words: str, streaming_callback: Any) -> Any:
        seen.append(words)
        return run(self, words, streaming_callback)

    pipeline = pipeline_of(keeper := wrap(original))
    monkeypatch.setattr(Keeper, "run", traced)  # as tracers do
    result = asyncio.run(pipeline.run_async({"words": "abc", "streaming_callback": heard.append}))
    assert (result, [chunk.content for chunk in heard]) == ({"0": {"said": "abc"}}, ["a", "b", "c"])
    keeper.kept = None
    assert asyncio.run(text_from(lambda: chunks_of(pipeline, {"words": "Hi"}))) == "Hi"
    assert seen == ["abc", "Hi"]
    assert (keeper is original) == bool(original.kept)


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


OWN_FAILURES: dict[str, Callable[[], Any]] = {  # by what is in the log
    "Mute": lambda: keepers_answer("a", stoppable(Keeper()), Mute()),  # a retriever's 400
    "streaming_components": lambda: keepers_answer("", stoppable(Keeper())),
    "No streaming-capable": lambda: keepers_answer("", Mute()),
    "Missing": lambda: chunks_of(pipeline_of(stoppable(Keeper()))),
    "must return": lambda: "text",
    "no attribute 'upper'": lambda: (chunk.upper() async for chunk in keepers_answer("a", stoppable(Keeper()))),
}


@pytest.mark.parametrize("logged", OWN_FAILURES)
def test_any_other_failure_is_the_servers_own_and_in_the_log(logged: str) -> None:
    sink = log.add((lines := list[str]()).append, level="ERROR")
    with pytest.raises(HTTPException) as failure:
        asyncio.run(text_from(OWN_FAILURES[logged]))
    log.remove(sink)
    assert (failure.value.status_code, failure.value.detail) == (502, FAILED)
    assert logged in "".join(lines)
