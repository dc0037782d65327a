"""Hybrid mode: stream from a sync-only component in an async Hayhooks server.

Hybrid mode is one argument, `allow_sync_streaming_callbacks=True`. OpenAIGenerator stands in for a component that you
cannot replace with an async one. Hybrid mode needs nothing from `production`, which adds what a service needs: error
statuses, limits, conversations, and answers that end when the client leaves.
"""

from collections.abc import AsyncGenerator
from typing import Any

from hayhooks import AsyncPipeline, BasePipelineWrapper, async_streaming_generator
from haystack.components.builders import PromptBuilder
from haystack.components.generators import OpenAIGenerator
from haystack.dataclasses import StreamingChunk

from .production import Settings, openai_response, parse_messages, parse_parameters, stoppable, tolerant

PROMPT = "{{ conversation }}"  # retrieved documents can go here, too


class PipelineWrapper(BasePipelineWrapper):
    """A chat with OpenAIGenerator, which has no `run_async`, streamed from an async pipeline."""

    def setup(self) -> None:
        """Build the pipeline; raises ValueError for a missing or invalid OPENAI variable."""
        llm = OpenAIGenerator(**Settings().openai_arguments())
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        # `stoppable` and `tolerant` each return the llm; their order does not matter.
        self.pipeline.add_component("llm", stoppable(tolerant(llm)))
        self.pipeline.connect("prompt.prompt", "llm.prompt")

    @openai_response  # turns the returned chunks into the events of a stream, or into one completion
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk]:
        """Answer a conversation; raises HTTPException for one that cannot be answered."""
        conversation = parse_messages(messages)
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={
                "prompt": {"conversation": conversation.prompt},
                "llm": {"system_prompt": conversation.system_prompt, "generation_kwargs": parse_parameters(body)},
            },
            # Takes precedence over HAYHOOKS_STREAMING_COMPONENTS, which may be set for another pipeline.
            streaming_components=["llm"],
            # Hybrid mode. Without this line, Hayhooks raises a ValueError, as OpenAIGenerator has no `run_async`.
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        messages = [{"role": "user", "content": question}]
        # openai_response turns `"stream": False` into one whole completion.
        completion = await self.run_chat_completion_async(model="", messages=messages, body={"stream": False})
        return completion.choices[0].message.content
