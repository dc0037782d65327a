"""A client that leaves, or reads no more, stops the upstream and every component, and frees its slot."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from harness.client import Chat, finish_reasons, texts_of
from harness.in_process import Chunks, ask, chunks_of, pipeline_of, text_from
from harness.other_environments import SPEAKERS, served_from
from harness.serving import EXAMPLE, KEY, NAME, deployed, wait_until
from harness.speaking import AsyncSpeaker, SyncSpeaker, say
from harness.stopping import assert_stops
from harness.upstream import Reply, Upstream
from haystack import Pipeline
from haystack.dataclasses import ComponentInfo, StreamingChunk

from production import stoppable

LONG = [f"{number} " for number in range(10_000)]


@pytest.fixture(scope="module")
def impatient(shared_upstream: Upstream) -> Iterator[Chat]:
    """A client of pipelines with one slot each, whose clients may stop reading for a second."""
    pipelines = {NAME: {"pipeline_wrapper.py": (EXAMPLE / "pipeline_wrapper.py").read_text()}, **SPEAKERS}
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": shared_upstream.url, "MAX_CONCURRENT_STREAMS": "1"}
    with served_from("", pipelines, patience=1, **variables) as server:
        yield Chat(server)


@pytest.mark.parametrize("reply", [Reply(LONG), Reply(thoughts=99)], ids=["text", "thoughts"])
def test_the_upstream_is_closed_within_two_chunks(impatient: Chat, upstream: Upstream, reply: Reply) -> None:
    assert_stops(impatient, upstream, reply)


def test_a_server_that_stops_closes_its_streams(upstream: Upstream) -> None:
    upstream.reply = Reply(LONG, pace=0.1)
    variables = {"OPENAI_BASE_URL": upstream.url, "HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT": "1"}
    with deployed(**variables) as server, contextlib.ExitStack() as clients:
        for events in [clients.enter_context(Chat(server).open()) for _ in range(5)]:
            next(texts_of(events))
        server.process.terminate()
        server.process.wait(timeout=30)
        upstream.wait_until(lambda: not upstream.open)
    assert all(one.left for one in upstream.received)


@pytest.mark.parametrize("model", [NAME, *SPEAKERS])
def test_a_client_that_reads_no_more_is_given_up(impatient: Chat, upstream: Upstream, model: str) -> None:
    upstream.reply, logged = Reply(["x" * 64 * 1024] * 10_000, pace=0.001), len(impatient.server.log)
    with impatient.open("say(repeat('word' * 9999))  # stubborn", model=model) as events:
        next(texts_of(events))
        wait_until(lambda: "The client has not read for" in impatient.server.log[logged:], "the server to give up")
        upstream.wait_until(lambda: not upstream.open)
        upstream.reply, no_runs = Reply(["0"]), "say([str(self.runs - 1)])"
        wait_until(lambda: '"0"' in impatient.post(no_runs, model=model).text, "its slot and its thread")
        rest = list(events)
    assert rest[-1] == {"error": {"message": "The answer could not be completed.", "type": "server_error"}}
    assert not finish_reasons(rest)


# In this process


def endless() -> Any:
    return stoppable(SyncSpeaker(lambda _: say("x" * 100_000)))


def leave(chat: Callable[[], Chunks], *speakers: Any) -> None:
    """Ask, leave when all speakers have begun, and wait until their threads have ended, far from their end."""

    async def ask_and_leave() -> None:
        async with contextlib.aclosing(await ask(chat)) as chunks:
            while not all(speaker.sent for speaker in speakers):
                await anext(chunks)
        await asyncio.sleep(0)  # raises if this task has been cancelled

    asyncio.run(ask_and_leave())
    assert all(speaker.sent < 1000 for speaker in speakers)


def test_every_component_stops() -> None:
    speakers = [endless() for _ in range(3)]
    leave(lambda: chunks_of(pipeline_of(*speakers)), *speakers)


async def method(last: Any) -> Chunks:
    await stoppable(AsyncSpeaker(lambda _: [])).run_async()
    yield StreamingChunk("Searching ... ")
    for speaker in (stoppable(SyncSpeaker(lambda _: say("abc"))), last):
        async for chunk in chunks_of(pipeline_of(speaker)):
            yield chunk


def test_a_method_that_does_more_than_hayhooks_generator_stops_and_its_caller_goes_on() -> None:
    leave(partial(method, speaker := endless()), speaker)


def test_no_component_starts_after_the_client_has_left() -> None:
    """A sync pipeline runs on in its thread."""
    reached, gate, speaker, pipeline = threading.Event(), threading.Event(), endless(), Pipeline()

    def wait(_: str) -> list[Any]:
        reached.set()
        gate.wait()
        return []

    pipeline.add_component("0", SyncSpeaker(wait))
    pipeline.add_component("1", speaker)
    pipeline.connect("0.sent", "1.after")

    async def ask_and_leave() -> None:
        reading = asyncio.ensure_future(anext(await ask(lambda: chunks_of(pipeline))))
        await asyncio.to_thread(reached.wait)
        reading.cancel()
        await asyncio.wait([reading])
        gate.set()

    asyncio.run(ask_and_leave())
    assert not speaker.sent


INFO = ComponentInfo("Agent")
DROPPED = [StreamingChunk("-", meta={"thought": number}, component_info=INFO) for number in range(120)]
KEEP = [lambda chunk: chunk.content != "-", lambda chunk: not chunk.meta, lambda chunk: not chunk.component_info]


@pytest.mark.parametrize("keep", KEEP, ids=["content", "meta", "component"])
@pytest.mark.parametrize("instead", [(), (None,)], ids=["nothing", "None"])
def test_a_method_drops_chunks_without_waits(keep: Callable[[Any], bool], instead: tuple[None, ...]) -> None:
    pipeline = pipeline_of(stoppable(SyncSpeaker(lambda _: [*say("a"), *DROPPED, *say("b")])))

    async def kept() -> Chunks:
        async for chunk in chunks_of(pipeline):
            for item in (chunk,) if keep(chunk) else instead:
                yield item

    # A second for each would be too much.
    assert asyncio.run(asyncio.wait_for(text_from(kept), 60)) == "ab"
