"""Answers of pipelines in this process, for what a client does not see, and for chat methods of one's own."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from hayhooks import AsyncPipeline, async_streaming_generator

from production import openai_response

Chunks = AsyncGenerator[Any]


def pipeline_of(*components: Any) -> Any:
    """Return a pipeline of components that run at once, named "0", "1" and so on."""
    pipeline = AsyncPipeline()
    for position, one in enumerate(components):
        pipeline.add_component(str(position), one)
    return pipeline


def chunks_of(pipeline: Any, *inputs: dict[str, Any]) -> Chunks:
    """Return what a chat method does, given the inputs of the first components."""
    return async_streaming_generator(
        pipeline=pipeline,
        pipeline_run_args={str(position): one for position, one in enumerate(inputs)},
        streaming_components="all",
        allow_sync_streaming_callbacks=True,
    )


async def ask(chat: Callable[[], Any], **body: Any) -> Any:
    """Return what a caller with this body gets from a chat method."""

    @openai_response  # type: ignore[untyped-decorator]
    async def run_chat_completion_async(self: Any, model: str, messages: Any, body: dict[str, Any]) -> Any:
        return chat()

    return await run_chat_completion_async(None, "", [], body)


async def text_from(chat: Callable[[], Any]) -> str:
    async with contextlib.aclosing(await ask(chat)) as chunks:
        return "".join([chunk.content async for chunk in chunks])
