"""Hybrid mode: stream a component that only works synchronously from an async Hayhooks server.

The class `PipelineWrapper` is the example. What it needs in production stands below it, in the order in which data
flows: the settings, the request, the thread and its client, the answer.

The way of a chunk: AsyncPipeline runs OpenAIGenerator, which has no `run_async`, in a thread. There OpenAIGenerator
reads the upstream's chunks in a loop, and calls Hayhooks' callback for each one. Hayhooks carries the chunk to the
event loop, which sends it to the client. This file makes the thread wait until the client has taken the chunk.

When the client leaves, the event loop tells the thread. The thread finds this out after its next chunk at the latest,
ends OpenAIGenerator's loop, and closes the connection to the upstream.

When the answer fails, the thread keeps the reason, and sends an empty chunk, so that the event loop looks for it.
"""

import asyncio
import functools
import gc
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from threading import Semaphore
from typing import Annotated, Any, NoReturn

import openai
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import BasePipelineWrapper, async_streaming_generator, log
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk, chat_completion_chunk
from pydantic import AfterValidator, Field, HttpUrl, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

try:
    from haystack import AsyncPipeline
    from haystack.components.builders import PromptBuilder
    from haystack.components.generators import OpenAIGenerator
    from haystack.dataclasses import StreamingChunk
    from haystack.utils import Secret
except ImportError as error:  # a plain `pip install hayhooks` brings Haystack 3
    raise ImportError("This example needs haystack-ai 2.x: run `pip install -r requirements.txt`.") from error

# A single question is the whole prompt, as it is. After earlier turns it is labelled as they are.
PROMPT = "{% if history %}{{ history }}\n\nuser: {% endif %}{{ question }}"


def for_every_caller(chat: Callable[..., Awaitable[AsyncGenerator[StreamingChunk]]]) -> Callable[..., Awaitable[Any]]:
    """Decorate a method that returns chunks: `in_step`, below, leads them from the thread to the client, and
    `answer_caller` gives them the form that the caller expects."""

    @functools.wraps(chat)
    async def decorated(self: Any, model: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> Any:
        chunks = await chat(self, model, messages, body)
        return await answer_caller(in_step(chunks), model, body)

    return decorated


class PipelineWrapper(BasePipelineWrapper):
    """A chat with OpenAIGenerator, which has no `run_async`, streamed from an async pipeline."""

    def setup(self) -> None:
        """Build the pipeline; raises ValueError for an environment variable that is missing or wrong."""
        settings = read_settings()
        llm = OpenAIGenerator(
            api_key=Secret.from_token(settings.OPENAI_API_KEY),
            model=settings.OPENAI_MODEL,  # the `model` of a request names this pipeline
            api_base_url=settings.OPENAI_BASE_URL,
            timeout=settings.OPENAI_TIMEOUT,
            max_retries=settings.OPENAI_MAX_RETRIES,
        )
        # Without this line the upstream goes on when a client has left, and a wrong key or a rate limit is a 500.
        watch_upstream(llm, settings)
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")
        # Without this line the garbage collector goes through the objects of all libraries, and all streams wait.
        gc.freeze()

    @for_every_caller
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk]:
        """Return the chunks of an answer, which the decorator turns into what the caller expects; raises
        HTTPException for bad input."""
        system_prompt, history, question = read_messages(messages)
        parameters = read_parameters(body)
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={
                "prompt": {"history": history, "question": question},
                "llm": {"system_prompt": system_prompt, "generation_kwargs": parameters},
            },
            # Without this line HAYHOOKS_STREAMING_COMPONENTS, set for another pipeline, decides what streams here.
            streaming_components=["llm"],
            # Hybrid mode. Without this line Hayhooks raises a ValueError, since OpenAIGenerator has no `run_async`.
            # Once it has one, delete the line, the part "The thread and its client" below with MAX_CONCURRENT_STREAMS,
            # and where it is used: `watch_upstream(…)`, and `in_step(…)` around the chunks. Clients that leave,
            # failures and a limit on streams are then up to the component and to Hayhooks.
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        # Without `stream` in the request's body it returns chunks.
        chunks = await self.run_chat_completion_async("", [{"role": "user", "content": question}], {})
        return "".join([chunk.content async for chunk in chunks])


# The settings


class Settings(BaseSettings):
    """Environment variables, to which Hayhooks has added those in `.env`; one that is empty counts as unset."""

    model_config = SettingsConfigDict(env_ignore_empty=True, str_strip_whitespace=True)

    OPENAI_API_KEY: str = Field(pattern="^[!-~]+$", description="a key in ASCII without spaces or line breaks")
    OPENAI_MODEL: str = Field("gpt-5-mini", min_length=1, description="the name of a model")
    # The pattern is checked first: HttpUrl alone would read http:///v1 as a host called v1.
    OPENAI_BASE_URL: Annotated[str, AfterValidator(lambda url: str(HttpUrl(url)))] = Field(
        "https://api.openai.com/v1", pattern="^https?://[^/]", description="a URL with http:// or https:// and a host"
    )
    OPENAI_TIMEOUT: float = Field(30, ge=0.1, le=3600, description="a number of seconds from 0.1 to 3600")
    OPENAI_MAX_RETRIES: int = Field(0, ge=0, le=10, description="a whole number from 0 to 10")
    # The OpenAI client's pool has 1000 connections; further streams would wait for one.
    MAX_CONCURRENT_STREAMS: int = Field(500, ge=1, le=1000, description="a whole number from 1 to 1000")


def read_settings() -> Settings:
    """Return the settings; raises ValueError, without the value, as that can be a mistyped key."""
    try:
        return Settings()
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        value = Settings.model_fields[name].description
        raise ValueError(f"{name} must be {value}, set where `hayhooks run` starts or in the .env there.") from None


# The request


def read_messages(messages: list[dict[str, Any]]) -> tuple[str | None, str, str]:
    """Return system prompt, history ("role: text" for each earlier turn) and question; raises HTTPException.

    Without the history a chat has no memory. For the last message alone, return "" as history.
    """
    if len(messages) > 2000:  # all streams wait while the event loop reads them
        bad_request("messages must not be more than 2000.")
    check_json(messages, "messages")
    system, turns = [], []
    for index, message in enumerate(messages):
        role, content, field = message.get("role"), message.get("content"), f"messages[{index}]"
        if role not in ("system", "developer", "user", "assistant"):
            bad_request(f"{field}.role must be system, developer, user or assistant.")
        if role == "assistant" and content is None:  # only tool calls, no text
            continue
        text = read_text(content, f"{field}.content")
        if role == "user" and not text.strip():
            bad_request(f"{field}.content must not be blank.")
        if role in ("user", "assistant"):
            turns.append((role, text))
        else:
            system.append(text)
    if not messages or messages[-1]["role"] != "user":
        bad_request("messages must end with a message from the user.")
    _, question = turns.pop()
    history = "\n\n".join(f"{role}: {text}" for role, text in turns)
    return "\n".join(system) or None, history, question


def read_text(content: Any, field: str) -> str:
    """Return the text of a message; raises HTTPException. OpenAI's API allows a list of parts, too."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                bad_request(f"{field} must be text, or a list of text parts: OpenAIGenerator takes text only.")
    if not texts:
        bad_request(f"{field} must have a part.")
    return "".join(texts)


# The parameters that make sense for one answer in text.
PARAMETERS = [
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "response_format",
    "reasoning_effort",
    "verbosity",
]


def read_parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters for the upstream; raises HTTPException. Fields that this file does not name are dropped."""
    if body.get("n") not in (None, 1) or body.get("n") is True:  # True equals 1
        bad_request("n must be 1.")
    for field in ("tools", "functions"):
        if body.get(field):
            bad_request(f"{field} must be empty: OpenAIGenerator takes text only.")
    parameters = {field: body[field] for field in PARAMETERS if body.get(field) is not None}
    for field, value in parameters.items():
        check_json(value, field)
    # All streams wait while Haystack copies the parameters, item by item, on the event loop.
    if len(json.dumps(parameters, ensure_ascii=False).encode()) > 64 * 1024:
        bad_request(f"{', '.join(parameters)} must not be more than 64 KiB.")
    # The upstream streams every answer. Only a client that wants a stream, too, has to ask for usage.
    options = body.get("stream_options")
    if not body.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True):
        parameters["stream_options"] = {"include_usage": True}
    return parameters


def check_json(value: Any, field: str) -> None:
    """Raise HTTPException for a value that JSON cannot carry, such as NaN or half a surrogate pair. Otherwise the SDK
    raises an exception for it, as if the upstream had failed."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        bad_request(f"{field} must be valid JSON.")


def bad_request(sentence: str) -> NoReturn:
    raise HTTPException(400, sentence)


# The thread and its client


PATIENCE = 60  # seconds that a thread waits for its client, which may have stopped reading without leaving


class Relay:
    """What the event loop and the thread tell each other about one answer."""

    def __init__(self) -> None:
        # From the event loop: True after each chunk, when the client is ready for the next one, and False at the end.
        self.ready: SimpleQueue[bool] = SimpleQueue()
        # Mostly from the thread: why the answer failed.
        self.failure: HTTPException | None = None

    def wait(self) -> bool:
        """In the thread, after each chunk: return True when the client is ready for the next one, False when it has
        left; raises BrokenPipeError after PATIENCE. A component of your own calls `RELAY.get().wait()` in its loop."""
        try:
            return self.ready.get(timeout=PATIENCE)
        except Empty:
            raise BrokenPipeError(f"the client took no chunk for {PATIENCE} seconds") from None


RELAY: ContextVar[Relay] = ContextVar("RELAY")  # how a thread finds the relay of its answer


async def in_step(chunks: AsyncGenerator[StreamingChunk]) -> AsyncGenerator[StreamingChunk]:
    """Yield the chunks of an answer, and let its thread go on after each; raises HTTPException when the answer failed.

    A thread that does not hear of Stop lets somebody pay for the rest of the answer. Threads that do not wait take the
    time in which the event loop could send other clients their first chunk.
    """
    provide_threads(asyncio.get_running_loop())
    relay = Relay()
    # Hayhooks starts the pipeline when this task asks for the first chunk, and AsyncPipeline runs the thread in a copy
    # of the task's context. So there `RELAY.get()` is this relay.
    RELAY.set(relay)
    try:
        async for chunk in chunks:
            if relay.failure:
                break
            yield chunk
            relay.ready.put(True)
    except Exception:  # outside `watched_create`; Hayhooks has logged it, and its text is not for the caller
        relay.failure = HTTPException(500, "The pipeline failed.")
    finally:  # also when the client has left, which ends this generator at `async for` or `yield`
        relay.ready.put(False)
        await chunks.aclose()
    if relay.failure:
        raise relay.failure


@functools.cache  # once for each event loop, and again after a deploy, which loads this file anew
def provide_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Let all streams run at once. asyncio's own executor has min(32, cores + 4) threads: on two cores the seventh
    stream would wait.

    An event loop has one default executor, also for other pipelines and other copies of this file. So its limit is far
    above MAX_CONCURRENT_STREAMS; a thread is made only when none is free. The threads of the executor before it end
    with their streams.
    """
    loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


def watch_upstream(llm: OpenAIGenerator, settings: Settings) -> None:
    """Replace the SDK's `create`, which OpenAIGenerator calls for its chunks, in this component by `watched_create`."""
    places = Semaphore(settings.MAX_CONCURRENT_STREAMS)

    # A generator: all of it runs in the thread, when OpenAIGenerator's loop asks for a chunk.
    def watched_create(**request: Any) -> Iterator[ChatCompletionChunk]:
        relay, request_id, finished = RELAY.get(), None, False
        # Without a limit threads pile up; with a line to wait in, clients that have gone would be served first.
        if not places.acquire(blocking=False):
            relay.failure = HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
            yield EMPTY_CHUNK
            return
        try:
            # `create` would do the same, `stream=True` is in the request; but here `read_chunk` makes the chunks.
            stream = llm.client.post(
                "/chat/completions", body=request, cast_to=object, stream=True, stream_cls=openai.Stream[object]
            )
            request_id = stream.response.headers.get("x-request-id")
            # Without `with` the connection stays open until the garbage collector comes by, and the upstream goes on.
            with stream:
                for data in stream:
                    chunk = read_chunk(data, with_usage="stream_options" in request)
                    finished = finished or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk
                    if not relay.wait():
                        return
            if not finished:
                raise EOFError("the answer ended without a finish_reason")
        except Exception as error:
            relay.failure = as_http_exception(error, request_id, settings.OPENAI_API_KEY)
            # With this chunk `in_step` finds the failure. Raised here, Hayhooks would log all that the upstream said.
            yield EMPTY_CHUNK
        finally:
            places.release()

    completions: Any = llm.client.chat.completions  # a type checker takes `create` for read-only
    completions.create = watched_create


def read_chunk(data: Any, with_usage: bool) -> ChatCompletionChunk:
    """Return a chunk with the text, finish_reason and usage in its JSON data; raises an exception if the data has no
    `choices`, or something else in place of the text.

    All else is left out: at an odd tool call, say, OpenAIGenerator would fail in its loop, and the connection would
    stay open. And the SDK takes several times as long to make a chunk.
    """
    chunk = ChatCompletionChunk(id="", object="chat.completion.chunk", created=0, model="", choices=[])
    for choice in data["choices"][:1]:
        text = encodable((choice.get("delta") or {}).get("content") or "")
        only = chat_completion_chunk.Choice(index=0, delta=chat_completion_chunk.ChoiceDelta(content=text))
        if finish_reason := choice.get("finish_reason"):
            # A copy is not checked: some upstreams have reasons that the SDK does not know.
            only = only.model_copy(update={"finish_reason": encodable(str(finish_reason))})
        chunk.choices.append(only)
    if with_usage and (usage := data.get("usage")):  # some upstreams send it unasked
        with suppress(ValidationError):  # some send something else in its place
            chunk.usage = CompletionUsage.model_validate_json(json.dumps(usage, ensure_ascii=False))
    return chunk


EMPTY_CHUNK = read_chunk({"choices": []}, with_usage=False)


def as_http_exception(error: Exception, request_id: str | None, key: str) -> HTTPException:
    """Log why an answer failed, and return what its caller may know.

    In log and answer, the key is replaced if the upstream quotes it, and each text is cut to 2000 characters.
    """

    def safe(text: object) -> str:
        return encodable(str(text)).replace(key, "[key]")[:2000]

    cause: BaseException = error  # the SDK's exception for a refused connection, say, holds the reason in another one
    while cause.__cause__:
        cause = cause.__cause__
    if isinstance(error, openai.APIStatusError):
        status, request_id = error.status_code, error.request_id
        match error.body:
            case {"message": str(told)} | {"detail": str(told)} | str(told):
                message = safe(told or error)
            case _:
                message = safe(error.response.text or error)
    else:
        status, message = None, safe(cause)
    facts = (status, safe(request_id or ""), type(cause).__name__, message)
    log.error("The answer failed: status {}, request id {!r}, {}: {!r}", *facts)

    match error:
        case openai.BadRequestError() | openai.UnprocessableEntityError():
            return HTTPException(error.status_code, message)
        case openai.RateLimitError():
            retry_after = safe(error.response.headers.get("Retry-After", ""))
            if not re.fullmatch("[ -~]+", retry_after):  # missing, or no text for a header
                return HTTPException(429, message)
            return HTTPException(429, message, {"Retry-After": retry_after})
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return HTTPException(502, "The upstream refused the server's credentials.")
        case _ if "Timeout" in type(error).__name__:  # the SDK's, or httpx's, which older SDKs let through
            return HTTPException(504, "The upstream did not answer in time.")
        case _ if type(error) is openai.APIError:  # not a subclass: an error event within the answer
            return HTTPException(502, message)
    return HTTPException(502, "The answer could not be completed.")


def encodable(text: str) -> str:
    """Put U+FFFD in the place of half a surrogate pair, which would cut the stream, as UTF-8 cannot carry it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# The answer


async def answer_caller(
    chunks: AsyncGenerator[StreamingChunk], model: str, body: dict[str, Any]
) -> AsyncGenerator[StreamingChunk] | AsyncGenerator[ChatCompletion] | ChatCompletion:
    """Return an answer in the form that its caller expects; raises HTTPException if it has failed already."""
    # A request to /v1/chat/completions always has `stream`; Hayhooks' A2A server and `run_api_async` send none.
    if "stream" not in body:
        return chunks
    if not body["stream"]:
        return await collect_completion(chunks, model)
    # The response begins when this function returns. A failure before the first chunk can still be its status.
    first = await anext(chunks, None)
    return stream_completion(first, chunks, model)


async def stream_completion(
    first: StreamingChunk | None, others: AsyncGenerator[StreamingChunk], model: str
) -> AsyncGenerator[ChatCompletion]:
    """Yield chat completion chunks. Left to Hayhooks, usage is lost, and an answer that failed ends with "stop"."""
    head = new_head("chat.completion.chunk", model)
    chunk, finish_reason, usage = first, None, None
    try:
        async with aclosing(others):
            while chunk is not None:
                finish_reason = chunk.meta.get("finish_reason") or finish_reason
                usage = chunk.meta.get("usage") or usage
                if chunk.content or not finish_reason:  # the last chunks are empty: what they hold goes out below
                    yield ChatCompletion(**head, choices=[delta(chunk.content)])
                chunk = await anext(others, None)
    except HTTPException as failure:
        yield ChatCompletion(**head, choices=[], error={"message": failure.detail, "type": "server_error"})
        return
    yield ChatCompletion(**head, choices=[delta("", finish_reason or "stop")])
    if usage:
        yield ChatCompletion(**head, choices=[], usage=usage)


def delta(text: str, finish_reason: str | None = None) -> Choice:
    return Choice(index=0, delta=Message(role="assistant", content=text), finish_reason=finish_reason)


async def collect_completion(chunks: AsyncGenerator[StreamingChunk], model: str) -> ChatCompletion:
    """Return one whole chat completion. Left to Hayhooks, every answer is a stream."""
    text, finish_reason, usage = "", None, None
    async for chunk in chunks:
        text += chunk.content
        finish_reason = chunk.meta.get("finish_reason") or finish_reason
        usage = chunk.meta.get("usage") or usage
    message = Message(role="assistant", content=text)
    choice = Choice(index=0, message=message, finish_reason=finish_reason or "stop")
    return ChatCompletion(**new_head("chat.completion", model), choices=[choice], usage=usage)


def new_head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
