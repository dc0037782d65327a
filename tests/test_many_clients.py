"""Each open stream holds a thread and a slot; a request beyond `MAX_CONCURRENT_STREAMS` is refused at once."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.client import Chat, text_of, texts_of
from harness.serving import NAME, deployed, wait_until
from harness.upstream import Reply, Upstream


@contextlib.contextmanager
def open_streams(chat: Chat, number: int) -> Iterator[list[Iterator[dict[str, Any]]]]:
    """Open streams whose questions are their numbers; yields their events."""
    with ThreadPoolExecutor(number) as threads, contextlib.ExitStack() as clients:
        yield list(threads.map(lambda name: clients.enter_context(chat.open(str(name))), range(number)))


def echo(body: dict[str, Any]) -> Reply:
    return Reply(tokens=[body["messages"][0]["content"]] * 2, gated=True)


def test_200_streams_are_open_at_once_and_do_not_mix(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = echo
    upstream.release()
    with open_streams(chat, 200) as streams:
        firsts = [next(texts_of(events)) for events in streams]
        assert firsts == [str(number) for number in range(200)]
        assert upstream.open == 200
        upstream.release()
        upstream.release()
        assert [text_of(events) for events in streams] == firsts


def test_what_exceeds_the_slots_is_refused_at_once(small: Chat, upstream: Upstream) -> None:
    upstream.reply = echo
    upstream.release()
    with open_streams(small, 8) as streams:
        for stream in (True, False):
            refused = small.post(stream=stream)
            assert refused.status_code == 503
            assert refused.json() == {"detail": "All streams are in use: try again."}
            assert refused.headers["retry-after"] == "1"
        assert small.http.post(f"/{NAME}/run", json={"question": "Hi"}).status_code == 503
        assert len(upstream.received) == 8
        upstream.release()
        upstream.release()
        assert [text_of(events) for events in streams] == [str(number) * 2 for number in range(8)]
    assert text_of(small.events("again")) == "againagain"


LEAVING = Reply(tokens=["token "] * 1000, pace=0.02)


def leave(chat: Chat) -> None:
    with chat.open() as events:
        next(texts_of(events))


@pytest.mark.parametrize(
    ("reply", "ask"),
    [
        (Reply(), Chat.events),
        (Reply(), Chat.post),
        (Reply(status=500, error={}), Chat.post),
        (Reply(then="break"), Chat.events),
        (Reply(role=False, tokens=[], then="stall"), Chat.post),
        (LEAVING, leave),
        (Reply(), lambda chat: chat.post(" ")),
    ],
    ids=["stream", "whole", "500", "break", "stall", "client left", "bad input"],
)
def test_a_slot_is_always_freed(small: Chat, upstream: Upstream, reply: Reply, ask: Callable[[Chat], Any]) -> None:
    upstream.reply = reply
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, [small] * 8))
    upstream.wait_until(lambda: all(one.over for one in upstream.received))
    upstream.forget()
    upstream.reply = echo
    upstream.release()
    with contextlib.ExitStack() as streams:
        for _ in range(8):
            streams.enter_context(small.open_patiently())
        assert upstream.open == 8
    upstream.release()
    upstream.release()
    upstream.wait_until(lambda: all(one.over for one in upstream.received))


def test_a_thread_is_used_again(wrapper: Any) -> None:
    async def chats() -> tuple[set[threading.Thread], set[threading.Thread]]:
        before = set(threading.enumerate())
        await wrapper.run_api_async("Hi")
        first = set(threading.enumerate()) - before
        for _ in range(10):
            await wrapper.run_api_async("Hi")
        return first, set(threading.enumerate()) - before

    first, last = asyncio.run(chats())
    assert first
    assert first <= last


# A good neighbour

NEIGHBOUR = """
import threading
from hayhooks import BasePipelineWrapper
from haystack import AsyncPipeline
from haystack.components.builders import PromptBuilder


class PipelineWrapper(BasePipelineWrapper):
    def setup(self) -> None:
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder("Hello {{ name }}", required_variables="*"))

    async def run_api_async(self, name: str) -> str:
        result = await self.pipeline.run_async({"prompt": {"name": name}})
        return result["prompt"]["prompt"]
"""


@pytest.fixture
def neighbour(tmp_path: Path) -> Path:
    file = tmp_path / "neighbour.py"
    file.write_text(NEIGHBOUR)
    return file


def test_neighbours_and_deploys_go_on_when_all_slots_are_taken(
    small: Chat, upstream: Upstream, neighbour: Path
) -> None:
    upstream.reply = echo
    upstream.release()
    with open_streams(small, 8):
        small.server.deploy(neighbour, "neighbour")
        with ThreadPoolExecutor(40) as threads:
            asked = [threads.submit(small.http.post, "/neighbour/run", json={"name": "Ada"}) for _ in range(40)]
            assert [answer.result().json() for answer in asked] == [{"result": "Hello Ada"}] * 40
    upstream.release()
    upstream.release()


def test_a_neighbours_settings_change_nothing(upstream: Upstream) -> None:
    with deployed(OPENAI_BASE_URL=upstream.url, HAYHOOKS_STREAMING_COMPONENTS="other") as server:
        assert text_of(Chat(server).events()) == "Hello, world!"


def test_deploying_again_leaves_no_thread_behind_and_breaks_no_stream(upstream: Upstream) -> None:
    with deployed(OPENAI_BASE_URL=upstream.url) as server:
        chat, process = Chat(server), psutil.Process(server.process.pid)
        upstream.reply = echo
        upstream.release()
        with open_streams(chat, 80) as streams, contextlib.ExitStack() as clients:
            firsts = [next(texts_of(events)) for events in streams]
            threads = []
            for _ in range(3):
                server.deploy()
                again = clients.enter_context(chat.open("again"))
                assert next(texts_of(again)) == "again"
                threads.append(process.num_threads())
            upstream.release()
            upstream.release()
            assert [text_of(events) for events in streams] == firsts
        upstream.wait_until(lambda: all(one.over for one in upstream.received))
        upstream.reply = Reply()
        assert text_of(chat.events()) == "Hello, world!"
        before = threads[0]
        wait_until(
            lambda: process.num_threads() < before / 2, "80 streams and three deploys to leave no threads behind"
        )
