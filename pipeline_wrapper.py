"""Stream a component that only works synchronously from an async Hayhooks server: hybrid mode.

`PipelineWrapper` is the example. Around it stands what production needs, one function for each fault: it says what
goes wrong without it, and can be deleted alone.
"""

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NoReturn

import openai
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import BasePipelineWrapper, async_streaming_generator, log
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

try:
    from haystack import AsyncPipeline
    from haystack.components.builders import PromptBuilder
    from haystack.components.generators import OpenAIGenerator
    from haystack.utils import Secret
except ImportError as error:  # a plain `pip install hayhooks` brings Haystack 3
    raise ImportError("This example needs haystack-ai 2.x: run `pip install -r requirements.txt`.") from error

# One question stays exactly as it is; earlier turns stand before it, each with its role.
PROMPT = """\
{% for turn in history %}{{ turn.role }}: {{ turn.text }}

{% endfor %}{% if history %}user: {% endif %}{{ question }}"""


def in_production(method: Callable[..., Awaitable[AsyncGenerator[Any, None]]]) -> Callable[..., Awaitable[Any]]:
    """Let a chat method run within the protections below."""

    @functools.wraps(method)
    async def run(self: "PipelineWrapper", model: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> Any:
        # asyncio's own executor has min(32, cores + 4) threads: on two cores the seventh stream would wait.
        asyncio.get_running_loop().set_default_executor(self.threads)
        chunks = until_client_leaves(await method(self, model, messages, body))
        answer = openai_chunks(chunks, model, wants_usage(body))
        return await (stream(answer) if body.get("stream") else collect(answer))

    return run


class PipelineWrapper(BasePipelineWrapper):
    """A chat with OpenAIGenerator, which has no async version, streamed from an async pipeline."""

    def setup(self) -> None:
        """Build the pipeline from the environment; raises ValueError for a variable that is missing or wrong."""
        settings = Settings()
        llm = OpenAIGenerator(
            api_key=Secret.from_token(settings.OPENAI_API_KEY),
            model=settings.OPENAI_MODEL,
            api_base_url=settings.OPENAI_BASE_URL,
            timeout=settings.OPENAI_TIMEOUT,
            max_retries=settings.OPENAI_MAX_RETRIES,
        )
        read_while_wanted(llm)
        self.threads = ThreadPoolExecutor(settings.MAX_CONCURRENT_STREAMS, "stream")
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")

    @in_production
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Answer a chat; raises HTTPException for bad input and when the upstream fails."""
        system_prompt, history, question = read_messages(messages)
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={
                "prompt": {"history": history, "question": question},
                "llm": {"system_prompt": system_prompt, "generation_kwargs": read_parameters(body)},
            },
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        messages = [{"role": "user", "content": question}]
        completion = await self.run_chat_completion_async("", messages, {"messages": messages})
        return completion.choices[0].message.content


class Settings(BaseSettings):
    """What the environment sets. Optional variables that are set but empty count as unset."""

    model_config = SettingsConfigDict(
        title="`hayhooks run`, to be set in its environment or in .env",
        env_ignore_empty=True,
        str_strip_whitespace=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )
    OPENAI_API_KEY: str = Field(min_length=1)
    OPENAI_MODEL: str = "gpt-5-mini"
    OPENAI_BASE_URL: str = "https://api.openai.com/v1"
    OPENAI_TIMEOUT: PositiveFloat = 30.0
    OPENAI_MAX_RETRIES: NonNegativeInt = 2
    MAX_CONCURRENT_STREAMS: PositiveInt = 256


def read_messages(messages: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, str]], str]:
    """Return system prompt, earlier turns and question. Without it a chat has no memory."""
    system: list[str] = []
    turns: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        role, field = message.get("role"), f"messages[{index}].content"
        if role not in ("system", "developer", "user", "assistant"):
            bad_request(f"messages[{index}].role must be system, developer, user or assistant.")
        if role == "assistant" and message.get("content") is None:
            continue
        text = read_text(message.get("content"), field)
        if role == "user" and not text.strip():
            bad_request(f"{field} must not be blank.")
        if role in ("user", "assistant"):
            turns.append({"role": role, "text": text})
        else:
            system.append(text)
    if not messages or messages[-1]["role"] != "user":
        bad_request("messages must end with a message from the user.")
    return "\n".join(system) or None, turns[:-1], turns[-1]["text"]


def read_text(content: Any, field: str) -> str:
    """Join a list of text parts; Hayhooks' get_last_user_message would send the model Python's repr of the list."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not parts or len(texts) < len(parts) or not all(isinstance(part.get("text"), str) for part in texts):
        bad_request(f"{field} must be text, or a list of text parts: OpenAIGenerator takes text only.")
    return "".join(part["text"] for part in texts)


PARAMETERS = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "response_format", "reasoning_effort", "verbosity"),
)


def read_parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Return what is forwarded: chat UIs add fields of their own, and OpenAI refuses a request with one of those."""
    if body.get("n") not in (None, 1):
        bad_request("n must be 1.")
    for field in ("tools", "functions"):
        if body.get(field):
            bad_request(f"{field} must be empty: OpenAIGenerator takes text only.")
    for field in ("messages", *PARAMETERS):
        try:
            json.dumps(body.get(field), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            bad_request(f"{field} must be valid JSON.")
    usage = {"stream_options": {"include_usage": True}} if wants_usage(body) else {}
    return {field: body[field] for field in PARAMETERS if body.get(field) is not None} | usage


def wants_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    return not body.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True)


def bad_request(sentence: str) -> NoReturn:
    raise HTTPException(400, sentence)


@dataclass
class Reading:
    """What the event loop and the component's thread share about one answer."""

    more_wanted: SimpleQueue[bool] = field(default_factory=SimpleQueue)
    upstream: openai.Stream[Any] | None = None


READING: ContextVar[Reading] = ContextVar("reading")


async def until_client_leaves(chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Tell the component's thread, which gets a copy of this context, after each chunk whether the client is there."""
    reading = Reading()
    READING.set(reading)
    try:
        async for chunk in chunks:
            yield chunk
            reading.more_wanted.put(True)
    except Exception:
        if reading.upstream:  # left open, the garbage collector closes it, and httpcore's pool can lock up at that
            reading.upstream.close()
        raise
    finally:
        reading.more_wanted.put(False)


def read_while_wanted(llm: OpenAIGenerator) -> None:
    """Close the upstream when the client has left, and read no further ahead than the client does.

    Without it a user who presses Stop goes on being billed, as cancelling a pipeline does not end its threads; and
    threads that read ahead, a hundred of them, keep the event loop from sending first tokens.
    """
    create = llm.client.chat.completions.create

    def read(upstream: openai.Stream[Any], more_wanted: SimpleQueue[bool]) -> Iterator[Any]:
        try:
            with upstream:
                for chunk in upstream:
                    yield chunk
                    if not more_wanted.get():
                        return
        except Exception:
            if more_wanted.empty():  # if not, nobody is left to fetch it, and asyncio would log a traceback
                raise

    def create_and_read(**kwargs: Any) -> Any:
        upstream, reading = create(**kwargs), READING.get(None)
        if reading is None:
            return upstream
        reading.upstream = upstream
        return read(upstream, reading.more_wanted)

    vars(llm.client.chat.completions).update(create=create_and_read)


async def openai_chunks(
    chunks: AsyncGenerator[Any, None], model: str, with_usage: bool
) -> AsyncGenerator[ChatCompletion, None]:
    """Without it usage is lost, and an answer that broke off ends with Hayhooks' own finish_reason "stop"."""
    start = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time())}
    complete, usage = False, None
    async for chunk in chunks:
        finish_reason = chunk.meta.get("finish_reason")
        usage = chunk.meta.get("usage") or usage
        if chunk.content or finish_reason:
            complete = complete or bool(finish_reason)
            delta = Message(role="assistant", content=chunk.content)
            choice = Choice(index=0, delta=delta, finish_reason=finish_reason)
            yield ChatCompletion(**start, model=model, choices=[choice])
    if not complete:
        raise EOFError("the upstream's answer ended without a finish_reason")
    if usage and with_usage:
        yield ChatCompletion(**start, model=model, choices=[], usage=usage)


async def collect(answer: AsyncGenerator[ChatCompletion, None]) -> ChatCompletion:
    """Return the whole answer with its usage and finish_reason, which Hayhooks' own collecting would drop."""
    try:
        chunks = [chunk async for chunk in answer]
    except Exception as error:
        raise http_error(error) from None
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices if choice.delta)
    whole = Choice(index=0, message=Message(role="assistant", content=text), finish_reason=choices[-1].finish_reason)
    return chunks[-1].model_copy(update={"object": "chat.completion", "choices": [whole]})


async def stream(answer: AsyncGenerator[ChatCompletion, None]) -> AsyncGenerator[ChatCompletion, None]:
    """Wait for the first token. Without it a wrong key looks like an empty 200, as the response has then begun."""
    try:
        first = await anext(answer)
    except Exception as error:
        raise http_error(error) from None

    async def chunks() -> AsyncGenerator[ChatCompletion, None]:
        yield first
        try:
            async for chunk in answer:
                yield chunk
        except Exception as error:
            event = {"message": http_error(error).detail, "type": "server_error"}
            yield first.model_copy(update={"choices": [], "error": event})

    return chunks()


def http_error(error: BaseException) -> HTTPException:
    """Tell the caller what the upstream did, but nothing of the server's key, and the operator's log the cause."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    api = next((cause for cause in causes if isinstance(cause, openai.APIError)), None)
    status, request_id = getattr(api, "status_code", None), getattr(api, "request_id", None)
    log.error("The upstream failed: status {}, request id {}, {!r}", status, request_id, api if status else causes[-1])
    if isinstance(api, openai.APIStatusError) and api.status_code in (400, 422, 429):
        message = api.body.get("message") if isinstance(api.body, dict) else None
        headers = {name: value for name, value in api.response.headers.items() if name.lower() == "retry-after"}
        return HTTPException(api.status_code, message or api.response.text or api.message, headers)
    if status in (401, 403):
        return HTTPException(502, "The upstream refused the server's credentials.")
    if any(isinstance(cause, (TimeoutError, openai.APITimeoutError)) for cause in causes):
        return HTTPException(504, "The upstream did not answer in time.")
    if type(api) is openai.APIError:  # an error event within the answer
        return HTTPException(502, api.message)
    return HTTPException(502, "The upstream failed before its answer was complete.")
