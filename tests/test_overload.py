"""Many streams at once: slots, threads, and what each client reads; other pipelines, deploys and redeploys."""

import asyncio
import contextlib
import contextvars
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import psutil
import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.in_process import ask, chunks_of, pipeline_of, text_from
from harness.serving import EXAMPLE, NAME, deployed, wait_until
from harness.speaking import SyncSpeaker, say
from harness.upstream import Reply, Upstream
from haystack import component
from haystack.dataclasses import StreamingChunk

from production import stoppable


@contextlib.contextmanager
def open_streams(chat: Chat, upstream: Upstream, number: int) -> Iterator[None]:
    """Hold streams open whose clients have read half of their answers; check at the end that they get the rest."""
    upstream.reply = lambda body: Reply([body["messages"][0]["content"]] * 2, gated=True)
    names = [str(name) for name in range(number)]
    upstream.release()
    with ThreadPoolExecutor(number) as threads, contextlib.ExitStack() as clients:
        streams = list(threads.map(lambda name: clients.enter_context(chat.open_patiently(name)), names))
        assert [next(texts_of(events)) for events in streams] == names
        assert upstream.open == number
        yield
        upstream.release()
        upstream.release()
        assert [text_of(events) for events in streams] == names


def test_200_streams_do_not_mix(chat: Chat, upstream: Upstream) -> None:
    with open_streams(chat, upstream, 200):
        pass


def test_what_exceeds_the_slots_is_refused_at_once(small: Chat, upstream: Upstream) -> None:
    with open_streams(small, upstream, 8):
        run = small.http.post(f"/{NAME}/run", json={"question": "Hi"})
        for refused in (small.post(stream=True), small.post(stream=False), run):
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json() == {"detail": "All streams are in use: try again."}
        assert len(upstream.received) == 8


def leave(chat: Chat) -> None:
    with chat.open() as events:
        next(texts_of(events))


def leave_early(chat: Chat, upstream: Upstream, stream: bool) -> None:
    """Close the connection when a request has reached the upstream, which has not answered yet."""
    request = chat.http.build_request("POST", "/v1/chat/completions", json=chat.request(stream=stream))
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", chat.server.port)) as client:
        client.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        upstream.wait_until(lambda: len(upstream.received) == 8)


LONG, LATE = Reply(["token "] * 1000, pace=0.02), Reply(role=False, pace=0.5)
WAYS: dict[str, tuple[Reply, Callable[..., Any]]] = {
    "stream": (Reply(), lambda chat, _: chat.events()),
    "whole": (Reply(), lambda chat, _: chat.post()),
    "bad input": (Reply(), lambda chat, _: chat.post(" ")),
    "500": (Reply(status=500, error={}), lambda chat, _: chat.post()),
    "break": (Reply(then="break"), lambda chat, _: chat.events()),
    "stall": (Reply(role=False, tokens=[], then="stall"), lambda chat, _: chat.post()),
    "left": (LONG, lambda chat, _: leave(chat)),
    "left early": (LATE, partial(leave_early, stream=True)),
    "left early, whole": (LATE, partial(leave_early, stream=False)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_slot_always_returns(small: Chat, upstream: Upstream, way: str) -> None:
    upstream.reply, ask = WAYS[way]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: ask(small, upstream), range(8)))
    upstream.wait_until(lambda: not upstream.open)
    upstream.forget()
    with open_streams(small, upstream, 8):
        pass


def test_threads_do_not_add_up(chat: Chat, upstream: Upstream) -> None:
    process, threads, upstream.reply = psutil.Process(chat.server.process.pid), list[int](), LONG
    for _ in range(3):
        with ThreadPoolExecutor(20) as clients:
            list(clients.map(leave, [chat] * 20))
        upstream.wait_until(lambda: not upstream.open)
        threads.append(process.num_threads())
    assert threads[2] < threads[0] + 20


def test_others_go_on_when_all_slots_are_taken(small: Chat, upstream: Upstream) -> None:
    with open_streams(small, upstream, 8):
        upstream.reply, neighbour = Reply(), Chat(small.server, done=False)
        small.server.deploy(EXAMPLE / "tests" / "harness" / "plain_wrapper.py", "neighbour")
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda _: text_of(neighbour.events(model="neighbour")), range(12)))
        assert answers == ["Hello, world!"] * 12


def test_redeploys_break_no_stream_and_leave_no_thread_behind(upstream: Upstream) -> None:
    # With a neighbour's setting, which does not switch streaming off.
    with deployed(OPENAI_BASE_URL=upstream.url, HAYHOOKS_STREAMING_COMPONENTS="other") as server:
        chat, process = Chat(server), psutil.Process(server.process.pid)
        with open_streams(chat, upstream, 40):
            for _ in range(3):
                server.deploy()
                leave(chat)
            before = process.num_threads()
        upstream.reply = Reply()
        assert text_of(chat.events()) == "Hello, world!"
        wait_until(lambda: process.num_threads() < before / 2, "the threads of 40 streams to end")


# In this process


LETTERS = [ascii_lowercase, ascii_uppercase]  # of each author


def script(letters: str, seed: str, pause: Callable[[float], None] = lambda _: None) -> Iterator[StreamingChunk]:
    """Yield a random answer: texts of all sizes, and what comes between them."""
    dice, written = random.Random(letters + seed), []
    for number in range(dice.randint(1, 12)):
        usage, reason = {"prompt_tokens": int(seed), "completion_tokens": number}, dice.choice(["stop", "length"])
        meta: dict[str, Any] = dice.choice(
            [*[{}] * 9, {"thought": number}, {"usage": usage}, {"finish_reason": reason}]
        )
        text = "".join(dice.choices(letters, k=dice.choice([0, 1, 5, 300])))
        pause(dice.choice([*[0] * 9, 0.003]))
        yield (chunk := StreamingChunk(text, meta=dict(meta)))
        written.append((chunk, text, meta))
    assert all((chunk.content, chunk.meta) == (text, meta) for chunk, text, meta in written)  # a reply is built from it


def assert_complete(authors: list[str], seed: str, items: list[str]) -> None:
    events, sent = list(map(json.loads, items[:-1])), [list(script(letters, seed)) for letters in authors]
    texts = ["".join(letter for letter in text_of(events) if letter in letters) for letters in authors]
    assert texts == ["".join(chunk.content for chunk in chunks) for chunks in sent]

    def last(key: str) -> list[Any]:
        return [chunk.meta[key] for chunks in sent for chunk in [one for one in chunks if key in one.meta][-1:]]

    [reason] = finish_reasons(events)
    assert finish_reasons(events[-2:]) == [reason]
    assert reason in (last("finish_reason") or ["stop"])
    assert [event["usage"] in last("usage") for event in events if "usage" in event] == [True] * bool(last("usage"))
    assert items[-1] == "[DONE]"


def test_what_5000_clients_read_is_what_components_sent_in_order_and_once() -> None:
    turns, pipelines = asyncio.Semaphore(200), list[Any]()
    for number in (1, 2):
        speakers = (SyncSpeaker(partial(script, letters, pause=time.sleep)) for letters in LETTERS[:number])
        pipelines.append(pipeline_of(*map(stoppable, speakers)))

    async def read(seed: int) -> None:
        number, items = 1 if seed % 3 else 2, list[str]()
        chat = partial(chunks_of, pipelines[number - 1], *[{"prompt": str(seed)}] * number)
        async with turns:
            async for item in await ask(chat, stream=True, stream_options={"include_usage": True}):
                items.append(item.model_dump_json())
                await asyncio.sleep(seed % 3 / 1000)  # some read slowly
        assert_complete(LETTERS[:number], str(seed), items)

    async def read_all() -> None:
        await asyncio.gather(*map(read, range(5000)))

    asyncio.run(read_all())


def test_a_thread_is_at_most_eight_chunks_ahead() -> None:
    ahead, other = (stoppable(SyncSpeaker(lambda _: say("x" * 2000))) for _ in range(2))

    async def read_one_and_another_answer() -> int:
        async with contextlib.aclosing(await ask(lambda: chunks_of(pipeline_of(ahead)))) as chunks:
            read = len((await anext(chunks)).content)
            await text_from(lambda: chunks_of(pipeline_of(other)))  # in the time of which it could send all
            return ahead.sent - read

    # One more waits to be sent.
    assert 1 <= asyncio.run(read_one_and_another_answer()) <= 8 + 1


@component
class Duet:
    """Calls back from two threads of its own."""

    @component.output_types(sent=int)
    def run(self, streaming_callback: Any = None) -> dict[str, Any]:
        with ThreadPoolExecutor(2) as threads:
            for letters in LETTERS:
                work: Any = partial(list, map(streaming_callback, say(letters * 20)))
                threads.submit(contextvars.copy_context().run, work)
        return {"sent": 0}


def test_each_thread_of_a_component_keeps_its_order(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    pipeline = pipeline_of(stoppable(Duet()))
    for _ in range(50):
        text = asyncio.run(text_from(lambda: chunks_of(pipeline)))
        assert ["".join(filter(case, text)) for case in (str.islower, str.isupper)] == [one * 20 for one in LETTERS]
