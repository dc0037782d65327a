"""Stream a component that only works synchronously from an async Hayhooks server: hybrid mode.

`PipelineWrapper` is the example. Around it stands what production needs, one small piece for each fault; each says
what goes wrong without it, and can be deleted alone.
"""

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
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

Chunks = AsyncGenerator[Any, None]
Object = dict[str, Any]

# A single question stays exactly as it is; earlier turns stand before it, each with its role.
PROMPT = """\
{% for turn in history %}{{ turn.role }}: {{ turn.text }}

{% endfor %}{% if history %}user: {% endif %}{{ question }}"""


def in_production(method: Callable[..., Awaitable[Chunks]]) -> Callable[..., Awaitable[Any]]:
    """Let a chat method run within the protections below."""

    @functools.wraps(method)
    async def run(self: "PipelineWrapper", model: str, messages: list[Object], body: Object) -> Any:
        # asyncio's own executor has min(32, cores + 4) threads: on two cores the seventh stream would wait.
        asyncio.get_running_loop().set_default_executor(self.threads)
        chunks = until_client_leaves(await method(self, model, messages, body))
        answer = as_openai_chunks(chunks, model, wants_usage(body))
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
        read_as_the_client_does(llm)
        self.threads = ThreadPoolExecutor(settings.MAX_CONCURRENT_STREAMS, "stream")
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")

    @in_production
    async def run_chat_completion_async(self, model: str, messages: list[Object], body: Object) -> Chunks:
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
    """What the environment sets; optional variables that are set but empty count as unset. Times are in seconds."""

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


def read_messages(messages: list[Object]) -> tuple[str | None, list[Object], str]:
    """Return system prompt, earlier turns and question. Without it a chat has no memory."""
    system, turns = [], []
    for index, message in enumerate(messages):
        role, content, name = message.get("role"), message.get("content"), f"messages[{index}]"
        if role not in ("system", "developer", "user", "assistant"):
            bad_request(f"{name}.role must be system, developer, user or assistant.")
        if role == "assistant" and content is None:  # it called a tool
            continue
        text = read_text(content, f"{name}.content")
        if role == "user" and not text.strip():
            bad_request(f"{name}.content must not be blank.")
        if role in ("user", "assistant"):
            turns.append({"role": role, "text": text})
        else:
            system.append(text)
    if not messages or messages[-1]["role"] != "user":
        bad_request("messages must end with a message from the user.")
    return "\n".join(system) or None, turns[:-1], turns[-1]["text"]


def read_text(content: Any, name: str) -> str:
    """Join a list of text parts. Without it the model gets Python's repr of the list."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not parts or len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        bad_request(f"{name} must be text, or a list of text parts: OpenAIGenerator takes text only.")
    return "".join(map(str, texts))


PARAMETERS = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "response_format", "reasoning_effort", "verbosity"),
)


def read_parameters(body: Object) -> Object:
    """Return what is forwarded. Chat UIs add fields of their own, for which OpenAI would refuse the request."""
    if body.get("n") not in (None, 1):
        bad_request("n must be 1.")
    for name in ("tools", "functions"):
        if body.get(name):
            bad_request(f"{name} must be empty: OpenAIGenerator takes text only.")
    for name in ("messages", *PARAMETERS):
        try:
            json.dumps(body.get(name), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            bad_request(f"{name} must be valid JSON.")
    usage = {"stream_options": {"include_usage": True}} if wants_usage(body) else {}
    return {name: body[name] for name in PARAMETERS if body.get(name) is not None} | usage


def wants_usage(body: Object) -> bool:
    options = body.get("stream_options")
    return not body.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True)


def bad_request(sentence: str) -> NoReturn:
    raise HTTPException(400, sentence)


async def as_openai_chunks(chunks: Chunks, model: str, with_usage: bool) -> Chunks:
    """Without it usage is lost, and an answer that broke off ends with Hayhooks' own finish_reason "stop"."""
    start = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time())}
    complete, usage = False, None
    async for chunk in chunks:
        finish_reason = chunk.meta.get("finish_reason")
        complete, usage = complete or finish_reason is not None, chunk.meta.get("usage") or usage
        if chunk.content or finish_reason:
            delta = Message(role="assistant", content=chunk.content)
            choice = Choice(index=0, delta=delta, finish_reason=finish_reason)
            yield ChatCompletion(**start, model=model, choices=[choice])
    if not complete:
        raise EOFError("the upstream's answer ended without a finish_reason")
    if usage and with_usage:
        yield ChatCompletion(**start, model=model, choices=[], usage=usage)


async def collect(answer: Chunks) -> ChatCompletion:
    """Return the whole answer with its usage and finish_reason, which Hayhooks' own collecting would drop."""
    try:
        chunks = [chunk async for chunk in answer]
    except Exception as error:
        raise http_error(error) from None
    choices = [choice for chunk in chunks for choice in chunk.choices]
    message = Message(role="assistant", content="".join(choice.delta.content for choice in choices))
    choice = Choice(index=0, message=message, finish_reason=choices[-1].finish_reason)
    return chunks[-1].model_copy(update={"object": "chat.completion", "choices": [choice]})


async def stream(answer: Chunks) -> Chunks:
    """Wait for the first token. Without it a wrong key looks like an empty 200, as the response has then begun."""
    try:
        first = await anext(answer)
    except Exception as error:
        raise http_error(error) from None

    async def chunks() -> Chunks:
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
    while cause := causes[-1].__cause__:
        causes.append(cause)
    api = next((cause for cause in causes if isinstance(cause, openai.APIError)), None)
    status, request_id = getattr(api, "status_code", None), getattr(api, "request_id", None)
    cause = api if status else causes[-1]
    log.error("The upstream failed: status {}, request id {}, {!r}", status, request_id, cause)
    if isinstance(api, openai.APIStatusError) and status in (400, 422, 429):
        message = api.body.get("message") if isinstance(api.body, dict) else None
        headers = {name: value for name, value in api.response.headers.items() if name.lower() == "retry-after"}
        return HTTPException(api.status_code, str(message or api.response.text or api.message), headers)
    if status in (401, 403):
        return HTTPException(502, "The upstream refused the server's credentials.")
    if any("Timeout" in type(cause).__name__ for cause in causes):  # up to openai 2.x it can be httpx's own
        return HTTPException(504, "The upstream did not answer in time.")
    if type(api) is openai.APIError:  # an error event within the answer
        return HTTPException(502, api.message)
    return HTTPException(502, "The upstream failed before its answer was complete.")


READ: ContextVar[Callable[[openai.Stream[Any]], Iterator[Any]]] = ContextVar("read")


async def until_client_leaves(chunks: Chunks) -> Chunks:
    """Read the upstream no further ahead than the client does, and close it when the client has left.

    Without it a user who presses Stop goes on being billed, as cancelling a pipeline does not end its threads; and
    a hundred threads that read ahead keep the event loop from sending first tokens.
    """
    more_wanted: SimpleQueue[bool] = SimpleQueue()
    opened: list[openai.Stream[Any]] = []

    def read(upstream: openai.Stream[Any]) -> Iterator[Any]:  # runs in the component's thread
        opened.append(upstream)
        try:
            with upstream:
                for chunk in upstream:
                    yield chunk
                    if not more_wanted.get():
                        return
        except Exception:
            if more_wanted.empty():  # if not, nobody is left to fetch it, and asyncio would log a traceback
                raise

    READ.set(read)  # the thread gets a copy of this context
    try:
        async for chunk in chunks:
            yield chunk
            more_wanted.put(True)
    except Exception:
        for upstream in opened:  # left to the garbage collector, it can lock up the pool of connections
            upstream.close()
        raise
    finally:
        more_wanted.put(False)


def read_as_the_client_does(llm: OpenAIGenerator) -> None:
    """Let `until_client_leaves` read what this component's client opens."""
    create = llm.client.chat.completions.create

    def create_and_read(**kwargs: Any) -> Any:
        upstream, read = create(**kwargs), READ.get(None)
        return read(upstream) if read else upstream

    vars(llm.client.chat.completions).update(create=create_and_read)
