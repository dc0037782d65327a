"""The async way on Haystack 2, for comparison: a component with `run_async`, in place of hybrid mode."""

from collections.abc import AsyncGenerator
from typing import Any

from hayhooks import BasePipelineWrapper, async_streaming_generator
from haystack import AsyncPipeline
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage


class PipelineWrapper(BasePipelineWrapper):
    def setup(self) -> None:
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("llm", OpenAIChatGenerator())

    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        conversation = [ChatMessage.from_openai_dict_format(message) for message in messages]
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={"llm": {"messages": conversation}},
        )
