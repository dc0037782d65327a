"""Components that stream without OpenAI. Tests use them themselves, or deploy this file as a part of a pipeline.

They say what the prompt returns, a Python expression in the terms of this module: chunks, or an error to raise. A
comment in it can make a sync component work in a thread of its own ("pooled"), or a component catch what its callback
raises ("stubborn") or fail when it ends ("bitter").
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, repeat  # noqa: F401
from typing import Any

from fastapi import HTTPException  # noqa: F401
from hayhooks.events import PipelineEvent  # noqa: F401
from haystack import component
from haystack.dataclasses import StreamingChunk
from starlette.exceptions import HTTPException as StarletteHTTPException  # noqa: F401

say = partial(map, StreamingChunk)


class StatusError(Exception):
    """As SDKs raise it."""

    def __init__(self, status: int) -> None:
        super().__init__("at /opt/models")
        self.status_code, self.headers, self.body = status, {"Retry-After": 7}, {"message": "top_p is too high"}


class Cursor:
    """Looks like an SDK's stream."""

    response, is_open = None, True

    def close(self) -> None:
        self.is_open = False


class Speech:
    def __init__(self, speech: Callable[[str], Iterable[Any]] | None = None) -> None:
        self.speech = speech or (lambda prompt: eval(prompt, globals(), {"self": self}))
        self.pool, self.feeds = ThreadPoolExecutor(1), {"news": (StreamingChunk(f"{number} ") for number in count())}
        self.sent = self.runs = self.lost = 0

    @contextlib.contextmanager
    def one_run(self, prompt: str) -> Iterator[Iterable[Any]]:
        self.runs, cursor = self.runs + 1, Cursor()
        try:
            yield self.speech(prompt)
        finally:
            self.runs, self.lost = self.runs - 1, self.lost + (not cursor.is_open)
            if "bitter" in prompt:
                raise RuntimeError("bitter")

    def turn(self, item: Any, prompt: str) -> contextlib.AbstractContextManager[None]:
        """Count an item, raise it if it is an error, and return the context in which to send it."""
        self.sent += 1
        if isinstance(item, BaseException):
            raise item
        return contextlib.suppress(*[Exception] * ("stubborn" in prompt))


@component
class SyncSpeaker(Speech):
    @component.output_types(sent=int)
    def run(self, prompt: str = "", streaming_callback: Any = None, after: Any = 0) -> Any:
        work = partial(self.work, prompt, streaming_callback)
        return self.pool.submit(contextvars.copy_context().run, work).result() if "pooled" in prompt else work()

    def work(self, prompt: str, callback: Any) -> dict[str, Any]:
        with self.one_run(prompt) as items:
            for item in items:
                with self.turn(item, prompt):
                    callback(item)
        return {"sent": self.sent}


@component
class AsyncSpeaker(Speech):
    @component.output_types(sent=int)
    def run(self, prompt: str = "", streaming_callback: Any = None) -> Any:
        raise NotImplementedError

    @component.output_types(sent=int)
    async def run_async(self, prompt: str = "", streaming_callback: Any = None) -> Any:
        with self.one_run(prompt) as items:
            for item in items:
                with self.turn(item, prompt):
                    await streaming_callback(item)
                    await asyncio.sleep(0.001)
        return {"sent": self.sent}
