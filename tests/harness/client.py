"""A client of the chat endpoint."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai

from harness.serving import NAME, PATIENCE, Server, wait_until


class Chat:
    """A client of one server, whose streams end with `[DONE]` unless told otherwise."""

    def __init__(self, server: Server, done: bool = True) -> None:
        self.server, self.done = server, done
        self.http = httpx.Client(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))
        self.sdk = openai.OpenAI(api_key="unused", base_url=f"{server.url}/v1", timeout=PATIENCE, max_retries=0)

    def request(self, messages: Any = "Hi", **body: Any) -> dict[str, Any]:
        """Return a request; a plain string stands for one message from the user."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return {"model": NAME, "messages": messages, **body}

    def post(self, messages: Any = "Hi", **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=self.request(messages, **body))

    @contextlib.contextmanager
    def open(self, messages: Any = "Hi", **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Open a stream and yield its events; leaving the block closes the connection.

        Raises httpx.HTTPStatusError, its response read, when the server answers anything but 200.
        """
        request = self.request(messages, stream=True, **body)
        with self.http.stream("POST", "/v1/chat/completions", json=request) as response:
            if response.is_error:
                response.read()
            response.raise_for_status()
            yield events_of(response.iter_raw(), self.done)

    @contextlib.contextmanager
    def open_patiently(self, messages: Any = "Hi") -> Iterator[Iterator[dict[str, Any]]]:
        """Open a stream; ask again while all places are taken, as a thread may outlive its client for a moment."""
        with contextlib.ExitStack() as stack:
            opened: list[Iterator[dict[str, Any]]] = []

            def is_open() -> bool:
                try:
                    opened.append(stack.enter_context(self.open(messages)))
                except httpx.HTTPStatusError as refused:
                    if refused.response.status_code != 503:
                        raise
                return bool(opened)

            wait_until(is_open, "a place")
            yield opened[0]

    def events(self, messages: Any = "Hi", **body: Any) -> list[dict[str, Any]]:
        """Return every event of a stream."""
        with self.open(messages, **body) as events:
            return list(events)


def events_of(content: Iterator[bytes], done: bool = True) -> Iterator[dict[str, Any]]:
    """Parse the events of a body, which must end with `[DONE]` unless told otherwise.

    httpx.iter_lines would also split at U+2028, which an event may hold.
    """
    rest, ended = b"", False
    for piece in content:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            assert not ended, f"after [DONE] came {event!r}"
            ended = event == b"data: [DONE]"
            if not ended:
                yield json.loads(event.removeprefix(b"data: "))
    assert rest == b"", f"the stream broke off within an event: {rest!r}"
    assert ended or not done, "the stream did not end with [DONE]"


def content_of(event: dict[str, Any]) -> str:
    """Return the text of an event, of which one that names a role, a finish_reason, usage or an error has none."""
    return "".join(choice["delta"].get("content", "") for choice in event.get("choices", []))


def texts_of(events: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the texts of a stream, without the empty ones."""
    return filter(None, map(content_of, events))


def text_of(events: Iterable[dict[str, Any]]) -> str:
    return "".join(texts_of(events))


def finish_reasons(events: Iterable[dict[str, Any]]) -> list[str]:
    choices = [choice for event in events for choice in event.get("choices", [])]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
