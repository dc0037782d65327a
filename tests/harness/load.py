"""Many streams at once, and what their clients and the server's process show."""

import asyncio
import contextlib
import itertools
import json
import math
import re
import statistics
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import psutil

from harness.serving import KEY, NAME

TEXT = re.compile(rb'"content": ?"([^"]+)"')  # no token of the scripted upstream needs an escape
LONGEST = 900  # seconds that an answer may take: 300 streams of the plain version take 200


@dataclass
class Variant:
    """One way to the same upstream; `process` is the server's, None for the upstream itself."""

    name: str
    port: int
    process: psutil.Process | None = None


@dataclass
class Answer:
    """Seconds from the request to the first token, to the last one and to the end; `complete` if nothing is missing."""

    first: float
    last: float
    end: float
    complete: bool


@dataclass
class Round:
    """Many answers at once. The whole round and the server's CPU time are in seconds.

    The memory, in bytes, is how much more the server had at its peak than before.
    """

    answers: list[Answer]
    tokens: int
    seconds: float
    cpu: float
    memory: int

    @property
    def complete(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.complete]

    def first_token(self, percent: int) -> float:
        return percentile([answer.first for answer in self.complete], percent)

    def whole_answer(self, percent: int) -> float:
        return percentile([answer.end for answer in self.complete], percent)

    def each_stream(self) -> float:
        """Return tokens per second from the first to the last token of a stream, the median of all streams."""
        return percentile([(self.tokens - 1) / max(answer.last - answer.first, 1e-6) for answer in self.complete], 50)

    def together(self) -> float:
        """Return tokens per second of all streams."""
        return self.tokens * len(self.complete) / self.seconds

    def cpu_per_token(self) -> float:
        """Return the server's CPU time in microseconds, nan for the upstream itself."""
        return self.cpu / (self.tokens * len(self.complete)) * 1e6 if self.cpu and self.complete else math.nan

    def memory_per_stream(self) -> float:
        """Return KiB, nan for the upstream itself."""
        return self.memory / 1024 / len(self.answers) if self.cpu else math.nan


def percentile(values: list[float], percent: int) -> float:
    """Return nan if there is no value."""
    if len(values) < 2:
        return values[0] if values else math.nan
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Reader(asyncio.Protocol):
    """A client that only notes what comes, and when: parsing it at once would delay the other streams."""

    def __init__(self, tokens: int, pace: float) -> None:
        prompt = json.dumps({"tokens": tokens, "pace": pace})
        body = json.dumps({"model": NAME, "stream": True, "messages": [{"role": "user", "content": prompt}]})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.request = (head + body).encode()
        self.start = time.perf_counter()
        self.pieces: list[tuple[float, bytes]] = []
        self.closed = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter() - self.start, data))

    def connection_lost(self, _: Exception | None) -> None:
        self.closed.set()

    def answer(self, tokens: int) -> Answer:
        """Parse what came."""
        content = b"".join(data for _, data in self.pieces)
        texts = list(TEXT.finditer(content))
        if not texts:
            return Answer(math.nan, math.nan, math.nan, complete=False)
        ends = list(itertools.accumulate(len(data) for _, data in self.pieces))
        first, last = (self.pieces[bisect_left(ends, text.end())][0] for text in (texts[0], texts[-1]))
        is_whole = b"".join(text[1] for text in texts) == b"".join(b"%d " % number for number in range(tokens))
        return Answer(first, last, self.pieces[-1][0], is_whole and content.endswith(b"\r\n0\r\n\r\n"))


async def ask(port: int, tokens: int, pace: float) -> Reader:
    """Stream one answer; one that fails or takes too long is not complete."""
    reader = Reader(tokens, pace)
    with contextlib.suppress(OSError, asyncio.TimeoutError):  # two different errors on Python 3.10
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: reader, "127.0.0.1", port)
        with contextlib.closing(transport):
            await asyncio.wait_for(reader.closed.wait(), LONGEST)
    return reader


async def measure(variant: Variant, streams: int, tokens: int, pace: float) -> Round:
    """Open so many streams at once, whose upstream sends a token every `pace` seconds, and wait for all of them."""
    processes = [variant.process, *variant.process.children(recursive=True)] if variant.process else []

    def cpu() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    def resident() -> int:
        return sum(process.memory_info().rss for process in processes)

    start, used, before, memory = time.perf_counter(), cpu(), resident(), 0
    asking = [asyncio.ensure_future(ask(variant.port, tokens, pace)) for _ in range(streams)]
    pending = set(asking)
    while pending:
        _, pending = await asyncio.wait(pending, timeout=0.2)
        memory = max(memory, resident() - before)
    seconds, used = time.perf_counter() - start, cpu() - used
    return Round([one.result().answer(tokens) for one in asking], tokens, seconds, used, memory)
