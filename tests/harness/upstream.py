"""A scripted upstream: on the wire it behaves like OpenAI or another provider, and it fails when told to.

A test sets `upstream.reply`, and afterwards asks `upstream.received` what arrived and what became of it.
Run as a program it listens on the given port, and a prompt says which reply it wants.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import uvicorn

USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


class Script(NamedTuple):
    """A streamed answer: what comes before the tokens, with each of them, and after the last."""

    content_type: str
    before: Iterable[bytes]
    tokens: Iterable[bytes]
    after: Iterable[bytes]


def openai(request: dict[str, Any], reply: "Reply") -> Script:
    """Write what OpenAI, Azure and many others send."""

    def choice(delta: Any = None, finish_reason: Any = None) -> bytes:
        choices = [{"index": 0, "delta": delta or {}, "finish_reason": finish_reason}]
        return sse({**frame(".chunk", request), "choices": choices, "usage": None})

    deltas = [{"reasoning_content": "Hm. "}] * reply.thoughts + [{"content": token} for token in reply.tokens]
    after = []
    if reply.then == "error":
        after.append(sse({"error": reply.error}))
    else:
        if reply.finish_reason and not reply.finish_first:
            after.append(choice(finish_reason=reply.finish_reason))
        if (request.get("stream_options") or {}).get("include_usage"):
            after.append(sse({**frame(".chunk", request), "choices": [], "usage": reply.usage}))
    after.append(b"data: [DONE]\n\n")
    return Script(
        "text/event-stream",
        [choice({"role": "assistant", "content": ""})] if reply.role else [],
        (choice(delta, reply.finish_reason if reply.finish_first else None) for delta in deltas),
        after,
    )


def frame(kind: str, request: dict[str, Any]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": f"chat.completion{kind}", "created": 1, "model": request["model"]}


def sse(event: Any) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@dataclass
class Reply:
    """What to answer. `pace` is in seconds; a `gated` reply waits before each token and the end for `release`.

    Before the tokens comes a chunk with the role alone, as OpenAI sends it, and then the `thoughts`, as deltas with
    `reasoning_content` and no text; both are paced and gated like tokens, but for the role.
    """

    tokens: Sequence[Any] = ("Hello", ", ", "world", "!")
    raw: str = ""  # sent as it is, in place of all else but the end
    role: bool = True
    thoughts: int = 0
    pace: float = 0.0
    gated: bool = False
    finish_reason: Any = "stop"
    finish_first: bool = False  # with each token, and not in a chunk of its own
    usage: Any = field(default_factory=USAGE.copy)
    then: Literal["end", "break", "stall", "error"] = "end"
    error: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wire_format: Callable[[dict[str, Any], "Reply"], Script] = openai  # the others are in wire_formats.py


@dataclass
class Received:
    """One request, and how far its answer came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    sent: int = 0
    left: bool = False
    over: bool = False


class Upstream:
    """An ASGI application in a thread of its own; use it as a context manager."""

    def __init__(self, port: int = 0) -> None:
        self.reply: Reply | Callable[[dict[str, Any]], Reply] = Reply()
        self.received: list[Received] = []
        self.released = 0
        self.changed = threading.Condition()
        config = uvicorn.Config(
            self, port=port, log_level="critical", lifespan="off", timeout_keep_alive=60, timeout_graceful_shutdown=0
        )
        self.server = uvicorn.Server(config)

    def __enter__(self) -> "Upstream":
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    @property
    def open(self) -> int:
        return sum(not one.over for one in self.received)

    async def serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.gate = asyncio.Event()
        await self.server.serve()

    def forget(self) -> None:
        """Go back to the beginning."""
        self.reply = Reply()
        self.received = []  # answers that are still open write into the old one
        self.released = 0

    def release(self) -> None:
        """Let every gated reply send one token more."""

        async def release() -> None:
            self.released += 1
            self.gate.set()
            self.gate = asyncio.Event()

        asyncio.run_coroutine_threadsafe(release(), self.loop).result()

    async def is_released(self, number: int, reply: Reply, send: Any) -> None:
        """Wait, with comments of SSE so that nobody takes it for a stall, as a busy machine can be slow to release."""
        while self.released < number:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.gate.wait(), 0.3)
            if reply.wire_format is openai:
                await send(body(b": waiting\n\n"))

    def wait_until(self, condition: Callable[[], Any], timeout: float = 30) -> None:
        """Block until the condition holds; raise TimeoutError after `timeout` seconds."""
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                raise TimeoutError(f"the upstream never came so far: {self.received}")

    def wait_until_still(self, seconds: float = 1) -> int:
        """Block until nothing has been sent for so long; return how many tokens the last answer has sent by then."""
        sent = -1
        with self.changed:
            while sent < self.received[-1].sent:
                sent = self.received[-1].sent
                self.changed.wait_for(lambda: False, seconds)
        return sent

    def note(self, received: Received, **changes: Any) -> None:
        with self.changed:
            for name, value in changes.items():
                setattr(received, name, value)
            self.changed.notify_all()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content = b""
        while (message := await receive())["type"] == "http.request":
            content += message["body"]
            if not message["more_body"]:
                break
        if scope["method"] == "GET":
            return await self.send_json(send, 200, {})
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        received = Received(scope["path"], headers, json.loads(content))
        self.received.append(received)
        self.note(received)
        reply = self.reply(received.body) if callable(self.reply) else self.reply

        answering = asyncio.ensure_future(self.answer(received, reply, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        self.note(received, left=not answering.done(), over=True)
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
        if answering.done() and not answering.cancelled() and answering.exception():
            raise ConnectionAbortedError  # uvicorn closes the connection without ending the body

    async def answer(self, received: Received, reply: Reply, send: Any) -> None:
        if reply.status != 200:
            return await self.send_json(send, reply.status, reply.error, reply.headers)
        if reply.wire_format is openai and not received.body.get("stream"):
            message = {"role": "assistant", "content": "".join(reply.tokens)}
            choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
            return await self.send_json(send, 200, {**frame("", received.body), "choices": [choice], "usage": USAGE})
        script = reply.wire_format(received.body, reply)
        await self.start(send, 200, {"content-type": script.content_type, **reply.headers})
        if reply.raw:
            await send(body(reply.raw.encode()))
        else:
            await self.send_script(received, reply, script, send)
        if reply.then == "stall":
            await asyncio.Event().wait()
        if reply.then == "break":
            raise ConnectionAbortedError
        await send(body(b"", more=False))

    async def send_script(self, received: Received, reply: Reply, script: Script, send: Any) -> None:
        for piece in script.before:
            await send(body(piece))
        begin, number = self.loop.time(), 0
        for number, piece in enumerate(script.tokens, start=1):
            if reply.gated:
                await self.is_released(number, reply, send)
            elif reply.pace:
                await asyncio.sleep(begin + number * reply.pace - self.loop.time())
            await send(body(piece))
            self.note(received, sent=number)
        if reply.gated:
            await self.is_released(number + 1, reply, send)
        if reply.then in ("end", "error"):
            for piece in script.after:
                await send(body(piece))

    async def start(self, send: Any, status: int, headers: dict[str, str]) -> None:
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})

    async def send_json(self, send: Any, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        await self.start(send, status, {"content-type": "application/json", **(headers or {})})
        await send(body(json.dumps(content).encode(), more=False))


def body(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def reply_for(request: dict[str, Any]) -> Reply:
    """Read the reply from the prompt, such as {"tokens": 50, "pace": 0.02}: so many numbered tokens."""
    wanted = json.loads(request["messages"][-1]["content"])
    return Reply(tokens=[f"{number} " for number in range(wanted["tokens"])], pace=wanted["pace"])


if __name__ == "__main__":
    with Upstream(int(sys.argv[1])) as upstream:
        upstream.reply = reply_for
        upstream.thread.join()
