from typing import Any

from hayhooks import AsyncPipeline, BasePipelineWrapper, async_streaming_generator, get_last_user_message
from haystack.components.generators import OpenAIGenerator


class PipelineWrapper(BasePipelineWrapper):
    def setup(self) -> None:
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("llm", OpenAIGenerator())

    async def run_chat_completion_async(self, model: str, messages: list[Any], body: dict[str, Any]) -> Any:
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={"llm": {"prompt": get_last_user_message(messages)}},
            allow_sync_streaming_callbacks=True,
        )
