"""One upstream and one Hayhooks server for all tests, and a client to talk to it."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import EXAMPLE, NAME, Server, hayhooks
from upstream import Upstream

KEY = "sk-test-0123456789abcdef"


class Chat:
    """A client of one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None))
        self.sdk = openai.OpenAI(api_key="unused", base_url=f"{server.url}/v1", max_retries=0)

    def request(self, messages: Any = "Hi", **body: Any) -> dict[str, Any]:
        """Return a request; a plain string stands for one message from the user."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return {"model": NAME, "messages": messages, **body}

    def post(self, messages: Any = "Hi", **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=self.request(messages, **body))

    @contextlib.contextmanager
    def open(self, messages: Any = "Hi", **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Open a stream and yield its events; leaving the block closes the connection."""
        request = self.request(messages, stream=True, **body)
        with self.http.stream("POST", "/v1/chat/completions", json=request) as response:
            assert response.status_code == 200, response.read()
            yield (json.loads(event.removeprefix(b"data: ")) for event in split(response.iter_raw()))

    def events(self, messages: Any = "Hi", **body: Any) -> list[dict[str, Any]]:
        """Return every event of a stream."""
        with self.open(messages, **body) as events:
            return list(events)


def split(content: Iterator[bytes]) -> Iterator[bytes]:
    """Return the events of a body; httpx.iter_lines would also split at U+2028, which an event may hold."""
    rest = b""
    for piece in content:
        *events, rest = (rest + piece).split(b"\n\n")
        yield from events
    assert rest == b""


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"]["content"] for event in events for choice in event["choices"])


def finish_reasons(events: list[dict[str, Any]]) -> list[str]:
    return [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    shared_upstream.forget()
    return shared_upstream


@pytest.fixture(scope="session")
def server(shared_upstream: Upstream) -> Iterator[Server]:
    with hayhooks(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=shared_upstream.url, OPENAI_MAX_RETRIES="0") as server:
        server.deploy(EXAMPLE / "pipeline_wrapper.py")
        yield server


@pytest.fixture
def chat(server: Server, upstream: Upstream) -> Chat:
    return Chat(server)
