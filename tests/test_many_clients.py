"""Each open stream holds one thread; the number of threads is set, and not derived from the number of cores."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

from harness.client import Chat, text_of
from harness.serving import EXAMPLE, KEY, hayhooks
from harness.upstream import Reply, Upstream


def test_256_streams_are_open_at_once(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: Reply(tokens=[body["messages"][0]["content"]] * 2, gated=True)
    upstream.release()
    with ThreadPoolExecutor(256) as threads, contextlib.ExitStack() as clients:
        streams = list(threads.map(lambda number: clients.enter_context(chat.open(str(number))), range(256)))
        firsts = [next(events)["choices"][0]["delta"]["content"] for events in streams]
        assert firsts == [str(number) for number in range(256)]
        assert upstream.open == 256
        upstream.release()
        upstream.release()
        assert [text_of(list(events)) for events in streams] == firsts


def test_further_requests_wait_in_line(upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=["one ", "two "] * 10, pace=0.01)
    with hayhooks(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=upstream.url, MAX_CONCURRENT_STREAMS="2") as server:
        server.deploy(EXAMPLE / "pipeline_wrapper.py")
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: Chat(server).events(), range(8)))
    assert [text_of(answer) for answer in answers] == ["one two " * 10] * 8
    assert upstream.most_open == 2
