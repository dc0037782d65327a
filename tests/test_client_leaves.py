"""A client that leaves stops the upstream, and gives its thread back."""

import contextlib
import socket

import psutil
from harness.client import Chat, text_of
from harness.serving import EXAMPLE, KEY, Server, hayhooks
from harness.upstream import Received, Reply, Upstream

LONG = Reply(tokens=[f"{number} " for number in range(10_000)], pace=0.1)


def read_five_and_leave(chat: Chat, clients: int) -> None:
    with contextlib.ExitStack() as leaving:
        for events in [leaving.enter_context(chat.open()) for _ in range(clients)]:
            for _ in range(5):
                next(events)


def wait_until_over(upstream: Upstream, requests: int = 1) -> list[int]:
    """Return how many tokens each answer had sent when the server closed it."""
    upstream.wait_until(lambda: len(upstream.received) == requests and all(one.over for one in upstream.received))
    assert all(one.left for one in upstream.received)
    return [one.sent for one in upstream.received]


def connections(server: Server, port: int) -> int:
    """Count the server's open connections from or to a port."""
    found = psutil.Process(server.process.pid).net_connections()
    return sum(bool(one.raddr) and port in (one.laddr.port, one.raddr.port) for one in found)


def test_the_upstream_stops_within_two_tokens(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = LONG
    with chat.open() as events:
        for _ in range(5):
            next(events)
        before = upstream.received[0].sent
    assert wait_until_over(upstream)[0] - before <= 2
    upstream.reply = Reply()
    assert text_of(chat.events()) == "Hello, world!"
    assert "Traceback" not in chat.server.log
    assert "never retrieved" not in chat.server.log


def test_leaving_before_the_first_token_is_noticed_with_it(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=LONG.tokens, gated=True)
    with socket.create_connection(("127.0.0.1", chat.server.port)) as client:
        body = chat.http.build_request("POST", "/v1/chat/completions", json=chat.request(stream=True))
        head = "".join(f"{name}: {value}\r\n" for name, value in body.headers.items())
        client.sendall(f"POST {body.url.path} HTTP/1.1\r\n{head}\r\n".encode() + body.content)
        upstream.wait_until(lambda: upstream.received)
    received: Received = upstream.received[0]
    while not received.over:
        upstream.release()
        upstream.wait_until(lambda: received.over or received.sent == upstream.released)
    assert received.left
    assert "Traceback" not in chat.server.log


def test_an_upstream_that_breaks_off_after_that_is_nobodys_error(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=["one"], gated=True, then="break")
    upstream.release()
    with chat.open() as events:
        next(events)
    while connections(chat.server, chat.server.port):
        pass
    upstream.release()
    upstream.wait_until(lambda: upstream.received[0].over)
    for _ in range(100):  # enough for the garbage collector to come by
        chat.events()
    assert "never retrieved" not in chat.server.log


def test_a_server_that_stops_closes_its_streams(upstream: Upstream) -> None:
    upstream.reply = LONG
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT": "1"}
    with hayhooks(**variables) as server, contextlib.ExitStack() as clients:
        server.deploy(EXAMPLE / "pipeline_wrapper.py")
        for events in [clients.enter_context(Chat(server).open()) for _ in range(5)]:
            next(events)
        server.process.terminate()
        server.process.wait()
        wait_until_over(upstream, 5)
        assert "Traceback" not in server.log


def test_threads_and_connections_return(chat: Chat, upstream: Upstream) -> None:
    process = psutil.Process(chat.server.process.pid)
    threads = []
    for _ in range(3):
        upstream.forget()
        upstream.reply = LONG
        read_five_and_leave(chat, clients=20)
        assert all(sent < 50 for sent in wait_until_over(upstream, 20))
        upstream.forget()
        assert text_of(chat.events()) == "Hello, world!"
        threads.append(process.num_threads())
        assert connections(chat.server, upstream.port) <= 1
    assert threads[0] == threads[1] == threads[2]
    assert "Traceback" not in chat.server.log
