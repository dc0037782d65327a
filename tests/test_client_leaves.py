"""A client that leaves stops the upstream, and frees its thread and its slot."""

import asyncio
import contextlib
import gc
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.elsewhere import let_clients_pause
from harness.serving import KEY, TESTS_OTHER_WRAPPER, WRAPPER, Server, copy_wrapper, deployed, wait_until
from harness.upstream import Reply, Upstream

LONG = [f"{number} " for number in range(10_000)]
HAYHOOKS_INNER_GENERATOR = "_stream_chunks_from_queue"  # Hayhooks drops it without closing it


def wait_until_over(upstream: Upstream, requests: int = 1) -> None:
    """Block until every answer has ended, and check that it was the server that closed it."""
    upstream.wait_until(lambda: len(upstream.received) == requests and all(one.over for one in upstream.received))
    assert all(one.left for one in upstream.received)


def connections(server: Server, port: int) -> int:
    """Count the server's open connections from or to a port."""
    found = psutil.Process(server.process.pid).net_connections()
    return sum(
        bool(one.raddr) and port in (one.laddr.port, one.raddr.port) and one.status == "ESTABLISHED" for one in found
    )


def send_and_leave(chat: Chat, upstream: Upstream, stream: bool = True) -> None:
    """Send a request, and close the connection when it has reached the upstream, which has not answered yet."""
    before = len(upstream.received)
    request = chat.http.build_request("POST", "/v1/chat/completions", json=chat.request(stream=stream))
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", chat.server.port)) as client:
        client.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        upstream.wait_until(lambda: len(upstream.received) > before)


@pytest.mark.parametrize(
    "reply", [Reply(LONG, gated=True), Reply(thoughts=10_000, gated=True)], ids=["text", "thoughts"]
)
def test_the_upstream_is_closed_within_two_chunks(chat: Chat, upstream: Upstream, reply: Reply) -> None:
    upstream.reply = reply
    with chat.open():
        for _ in range(5):
            upstream.release()
            upstream.wait_until(lambda: upstream.received[0].sent == upstream.released)
    for _ in range(2):
        upstream.release()
        upstream.wait_until(lambda: upstream.received[0].over or upstream.received[0].sent == upstream.released)
    wait_until_over(upstream)
    upstream.reply = Reply()
    assert text_of(chat.events()) == "Hello, world!"


def test_nothing_is_logged_about_it(upstream: Upstream) -> None:
    upstream.reply = Reply(LONG, pace=0.01)
    with deployed(OPENAI_BASE_URL=upstream.url) as server:
        chat = Chat(server)
        with chat.open() as events:
            next(texts_of(events))
        wait_until_over(upstream)
        upstream.reply = Reply()
        chat.events()
        usual = (" | INFO ", " | SUCCESS ", "CORS settings", "deprecat", "Async streaming generator was cancelled")
        assert not [line for line in server.log.splitlines() if not any(words in line for words in usual)]


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_chunk_frees_the_slot(small: Chat, upstream: Upstream, stream: bool) -> None:
    upstream.reply = Reply(role=False, tokens=["one", "two", "three"], gated=True)
    for _ in range(8):
        send_and_leave(small, upstream, stream)
    assert small.post().status_code == 503
    for _ in range(4):
        upstream.release()
    upstream.wait_until(lambda: all(one.over for one in upstream.received))
    upstream.reply = Reply()
    with small.open_patiently() as events:
        assert text_of(events) == "Hello, world!"


@pytest.mark.skipif(TESTS_OTHER_WRAPPER, reason="shortens the minute in this folder's package")
def test_a_client_that_reads_no_more_fails_and_finds_the_failure(upstream: Upstream, tmp_path: Path) -> None:
    impatient = tmp_path / "impatient"
    copy_wrapper(WRAPPER, impatient)
    let_clients_pause(impatient, 1)
    upstream.reply = Reply(["x" * 64 * 1024] * 10_000, pace=0.001)
    with deployed(wrapper=impatient, OPENAI_BASE_URL=upstream.url) as server, Chat(server).open() as events:
        next(texts_of(events))
        wait_until_over(upstream)
        rest = list(events)
        assert rest[-1] == {"error": {"message": "The answer could not be completed.", "type": "server_error"}}
        assert not finish_reasons(rest)


async def leave(chunks: Any) -> None:
    await anext(chunks)
    await chunks.aclose()


@pytest.mark.parametrize("body", [{}, {"stream": True}], ids=["chunks", "events"])
def test_python_code_that_leaves_stops_the_upstream(wrapper: Any, upstream: Upstream, body: dict[str, Any]) -> None:
    upstream.reply = Reply(LONG, pace=0.01)

    async def ask_and_leave() -> None:
        await leave(await wrapper.run_chat_completion_async("", [{"role": "user", "content": "Hi"}], body))

    asyncio.run(ask_and_leave())
    wait_until_over(upstream)


def test_a_failure_after_the_client_left_is_not_logged(wrapper: Any, upstream: Upstream) -> None:
    upstream.reply = Reply(["Hello"], role=False, gated=True, then="break")
    logged: list[dict[str, Any]] = []

    async def ask_and_leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        chunks = await wrapper.run_chat_completion_async("", [{"role": "user", "content": "Hi"}], {})
        upstream.release()
        await anext(chunks)
        reading = asyncio.create_task(anext(chunks))
        await asyncio.sleep(0)  # the task starts, and the thread reads the next chunk
        reading.cancel()
        await asyncio.wait([reading])
        upstream.release()
        await asyncio.gather(reading, return_exceptions=True)
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        del others
        gc.collect()  # when a task is dropped, asyncio logs the exception that nobody has retrieved

    asyncio.run(ask_and_leave())
    assert logged == []


@pytest.mark.skipif(TESTS_OTHER_WRAPPER, reason="others may leave the closing to Python")
def test_a_stream_that_is_closed_closes_all_below_it(wrapper: Any, upstream: Upstream) -> None:
    upstream.reply = Reply(LONG, pace=0.01)
    unclosed: list[Any] = []

    async def ask_and_leave() -> None:
        # Python calls the finalizer for each async generator that is dropped before it was closed.
        sys.set_asyncgen_hooks(finalizer=unclosed.append)
        await leave(await wrapper.run_chat_completion_async("", [{"role": "user", "content": "Hi"}], {"stream": True}))
        gc.collect()

    asyncio.run(ask_and_leave())
    assert [one.__name__ for one in unclosed if one.__name__ != HAYHOOKS_INNER_GENERATOR] == []


def test_a_pipeline_of_ones_own_is_not_stopped_by_a_client_that_left(wrapper: Any, upstream: Upstream) -> None:
    texts: list[str] = []

    async def leave_and_run() -> Any:
        await leave(await wrapper.run_chat_completion_async("", [{"role": "user", "content": "Hi"}], {}))
        upstream.reply = Reply()
        streaming = {"streaming_callback": lambda chunk: texts.append(chunk.content)}
        return await wrapper.pipeline.run_async({"prompt": {"conversation": "Hi"}, "llm": streaming})

    upstream.reply = Reply(LONG, pace=0.01)
    assert asyncio.run(leave_and_run())["llm"]["replies"] == ["Hello, world!"]
    assert "".join(texts) == "Hello, world!"


def test_a_server_that_stops_closes_its_streams(upstream: Upstream) -> None:
    upstream.reply = Reply(LONG, pace=0.1)
    variables = {"OPENAI_BASE_URL": upstream.url, "HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT": "1"}
    with deployed(**variables) as server, contextlib.ExitStack() as clients:
        for events in [clients.enter_context(Chat(server).open()) for _ in range(5)]:
            next(texts_of(events))
        server.process.terminate()
        server.process.wait(timeout=30)
        wait_until_over(upstream, 5)
        assert KEY not in server.log


def test_threads_and_connections_return(chat: Chat, upstream: Upstream) -> None:
    process = psutil.Process(chat.server.process.pid)
    threads = []
    for _ in range(3):
        upstream.forget()
        upstream.reply = Reply(LONG, pace=0.1)
        with contextlib.ExitStack() as leaving:
            for events in [leaving.enter_context(chat.open()) for _ in range(20)]:
                next(texts_of(events))
        wait_until_over(upstream, 20)
        assert all(one.sent < 50 for one in upstream.received)
        upstream.forget()
        assert text_of(chat.events()) == "Hello, world!"
        threads.append(process.num_threads())
        wait_until(lambda: connections(chat.server, upstream.port) <= 1, "the connections of 20 clients to close")
    assert threads[0] == threads[1] == threads[2]
