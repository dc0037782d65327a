"""A pipeline of one's own: no OpenAI, one component, which behaves as the first word of the prompt says.

SPEAKER chooses the component, sync or async. For each run there is a file in MARKS, which its `finally` block removes.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from hayhooks import AsyncPipeline, BasePipelineWrapper, async_streaming_generator
from hayhooks.events import PipelineEvent
from haystack import component
from haystack.dataclasses import StreamingChunk, ToolCallDelta
from starlette.datastructures import Headers

from .production import openai_response, parse_messages, stoppable  # type: ignore[import-not-found]


class StatusError(Exception):
    """As SDKs raise it: with a status, or with a response that has one."""

    def __init__(self, status: int) -> None:
        super().__init__(f"at /opt/models: {status}")
        self.status_code = status
        self.headers = {"Retry-After": 7}


def raise_deeply(status: int) -> None:
    try:
        try:
            raise StatusError(status)
        except StatusError as error:
            raise KeyError("first") from error
    except KeyError:
        raise RuntimeError("second")  # noqa: B904


def speak(prompt: str) -> Iterator[StreamingChunk]:
    how, *words = prompt.split()
    match how:
        case "status":
            raise StatusError(int(words[0]))
        case "deep":
            raise_deeply(int(words[0]))
        case "http":
            raise HTTPException(418, "short and stout", {"x-tea": "yes"})
        case "broken":
            raise RuntimeError("my secret")
        case "circle":
            error = RuntimeError("my secret")
            raise error from error
        case "next":
            next(iter(()))
        case "silent":
            return
        case "endless" | "stubborn" | "bitter":
            while True:
                yield StreamingChunk("word " if not words else "x" * 64 * 1024)
        case "reuse":
            chunk = StreamingChunk("")
            for chunk.content in words:
                yield chunk
            return
        case "odd":
            yield StreamingChunk(None)  # type: ignore[arg-type]
            yield StreamingChunk("half \ud83d", meta={"finish_reason": 5})
            yield "text"  # type: ignore[misc]
            return
        case "usage":
            yield StreamingChunk("Hi", meta={"usage": {"input_tokens": 1, "output_tokens": 2}})
            yield StreamingChunk("", meta={"usage": {"prompt_tokens": {1, 2}}})
        case "tool":
            yield StreamingChunk("", tool_calls=[ToolCallDelta(0, "clock", "{}")], index=0)
    for word in words:
        yield StreamingChunk(f"{word} ", meta={"finish_reason": word} if how == "finish" else {})
    if how == "cut":
        raise RuntimeError("my secret")


class Mark:
    """The file of one run."""

    def __init__(self, prompt: str) -> None:
        self.bitter = prompt.startswith("bitter")
        handle, path = tempfile.mkstemp(dir=os.environ["MARKS"])
        os.close(handle)
        self.path = Path(path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.path.unlink()
        if self.bitter:
            raise RuntimeError("bitter")


@component
class Speaker:
    @component.output_types(replies=list[str])
    def run(self, prompt: str, streaming_callback: Callable[[StreamingChunk], None] | None = None) -> dict[str, Any]:
        with Mark(prompt):
            said = []
            for chunk in speak(prompt):
                said.append(str(chunk))
                if streaming_callback:
                    try:
                        streaming_callback(chunk)
                    except Exception:
                        if not prompt.startswith("stubborn"):
                            raise
            return {"replies": ["".join(said)]}


@component
class AsyncSpeaker:
    @component.output_types(replies=list[str])
    def run(self, prompt: str, streaming_callback: Callable[[StreamingChunk], None] | None = None) -> dict[str, Any]:
        raise NotImplementedError

    @component.output_types(replies=list[str])
    async def run_async(
        self, prompt: str, streaming_callback: Callable[[StreamingChunk], None] | None = None
    ) -> dict[str, Any]:
        with Mark(prompt):
            said = []
            for chunk in speak(prompt):
                said.append(str(chunk))
                try:
                    if streaming_callback:
                        await streaming_callback(chunk)  # type: ignore[misc]
                    await asyncio.sleep(0.01)
                except Exception:
                    if not prompt.startswith("stubborn"):
                        raise
            return {"replies": ["".join(said)]}


class PipelineWrapper(BasePipelineWrapper):
    def setup(self) -> None:
        self.pipeline = AsyncPipeline()
        speaker = AsyncSpeaker() if os.environ["SPEAKER"] == "async" else Speaker()
        self.pipeline.add_component("speaker", stoppable(stoppable(speaker)))  # twice is harmless

    @openai_response  # type: ignore[untyped-decorator]
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any], headers: Headers | None = None
    ) -> AsyncGenerator[Any]:
        prompt = parse_messages(messages).prompt
        if prompt == "headers":
            prompt = f"say {headers and headers['x-name']}"
        if prompt == "unstarted":
            raise LookupError("my secret")
        if prompt == "text":
            return "my secret"  # type: ignore[return-value]
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={} if prompt == "unfed" else {"speaker": {"prompt": prompt}},
            streaming_components=["llm" if prompt.startswith("misnamed") else "speaker"],
            allow_sync_streaming_callbacks=True,
            on_tool_call_start=lambda name, arguments, call: [
                PipelineEvent(type="status", data={"tool": name}),
                "[clock] ",
            ],
            on_pipeline_end=lambda result: "(end)" if prompt.startswith("tool") else None,
        )
