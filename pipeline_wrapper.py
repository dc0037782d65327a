"""Hybrid mode: stream a component that only works synchronously, from an async Hayhooks server.

The class `PipelineWrapper` is the example. Below it stands what it needs in production: the settings, the request, the
thread and its client, the upstream, the answer.

The way of a chunk: AsyncPipeline runs OpenAIGenerator, which has no `run_async`, in a thread. There OpenAIGenerator
loops over `watched_create`, which reads the upstream, and calls Hayhooks' callback for each chunk. Hayhooks carries the
chunk to the event loop, where `in_step` passes it on. Then `in_step` lets `watched_create` read the next one.

When the client of a stream leaves, `in_step` tells `watched_create` to stop. It stops at once, or, if it waits for the
upstream just then, with the next chunk or the SDK's timeout. Then it closes the connection, and OpenAIGenerator's loop
ends.

When `watched_create` fails, it yields one last chunk, whose finish_reason is an HTTPException. `in_step` raises it.
"""

import asyncio
import functools
import gc
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from threading import Semaphore
from typing import Annotated, Any

import openai
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import BasePipelineWrapper, async_streaming_generator, log
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk, chat_completion_chunk
from pydantic import AfterValidator, Field, HttpUrl, ValidationError
from pydantic_core import from_json
from pydantic_settings import BaseSettings, SettingsConfigDict

try:
    from haystack import AsyncPipeline
    from haystack.components.builders import PromptBuilder
    from haystack.components.generators import OpenAIGenerator
    from haystack.dataclasses import StreamingChunk
    from haystack.utils import Secret
except ImportError as error:  # a plain `pip install hayhooks` brings Haystack 3
    raise ImportError("This example needs haystack-ai 2.x: run `pip install -r requirements.txt`.") from error

# A single question is sent unchanged. After earlier turns, which begin with their roles, it begins with `user:`.
PROMPT = "{% if history %}{{ history }}\n\nuser: {% endif %}{{ question }}"


def for_every_caller(chat: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that returns chunks. `in_step`, below, keeps their thread and their client in step, and
    `answer_caller` gives the answer the form that its caller expects."""

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
            model=settings.OPENAI_MODEL,  # not the `model` of a request, which names this pipeline
            api_base_url=settings.OPENAI_BASE_URL,
            timeout=settings.OPENAI_TIMEOUT,
            max_retries=settings.OPENAI_MAX_RETRIES,
        )
        # Without this line the upstream goes on when a client has left, nothing here limits the streams, and no caller
        # learns why an answer failed.
        watch_upstream(llm, settings)
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")
        # For the whole process. Without this line all streams wait now and then, while the garbage collector goes
        # through the objects of all libraries.
        gc.freeze()

    @for_every_caller
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk]:
        """Return the chunks of an answer, to the decorator; raises HTTPException for a bad request."""
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
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        messages = read_question(question)
        # With no `stream` in the body the decorator returns the chunks.
        chunks = await self.run_chat_completion_async("", messages, {})
        return "".join([chunk.content async for chunk in chunks])


# The settings


# Without the pattern HttpUrl would read http:///v1 as a host called v1.
Url = Annotated[str, Field(pattern="^https?://[^/]"), AfterValidator(lambda url: str(HttpUrl(url)))]


class Settings(BaseSettings):
    """Environment variables, to which Hayhooks has added those in `.env`; one that is empty counts as unset."""

    model_config = SettingsConfigDict(env_ignore_empty=True, str_strip_whitespace=True)

    OPENAI_API_KEY: str = Field(pattern="^[!-~]+$", description="a key in ASCII without spaces or line breaks")
    OPENAI_MODEL: str = Field("gpt-5-mini", min_length=1, description="the name of a model")
    OPENAI_BASE_URL: Url = Field("https://api.openai.com/v1", description="a URL with http:// or https:// and a host")
    OPENAI_TIMEOUT: float = Field(30, ge=0.1, le=3600, description="a number of seconds from 0.1 to 3600")
    OPENAI_MAX_RETRIES: int = Field(0, ge=0, le=10, description="a whole number from 0 to 10")
    # The OpenAI client's pool has 1000 connections; further streams would wait for one.
    MAX_CONCURRENT_STREAMS: int = Field(500, ge=1, le=1000, description="a whole number from 1 to 1000")


def read_settings() -> Settings:
    """Return the settings; raises ValueError, which does not quote what is set, as that can be a mistyped key."""
    try:
        return Settings()
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        expected = Settings.model_fields[name].description
        raise ValueError(f"{name} must be {expected}, set where `hayhooks run` starts or in the .env there.") from None


# The request


def read_messages(messages: list[dict[str, Any]]) -> tuple[str | None, str, str]:
    """Return system prompt, history ("role: text" for each earlier turn) and question; raises HTTPException.

    Without the history a chat has no memory. To send none of it, return "" in its place.
    """
    if len(messages) > 2000:  # all streams wait while the event loop goes through them
        raise HTTPException(400, "messages must not be more than 2000.")
    check_json(messages, "messages")
    system, turns = [], []
    for index, message in enumerate(messages):
        role, content, field = message.get("role"), message.get("content"), f"messages[{index}]"
        if role not in ("system", "developer", "user", "assistant"):
            raise HTTPException(400, f"{field}.role must be system, developer, user or assistant.")
        if role == "assistant" and content is None:  # a turn without text, such as one of tool calls
            continue
        text = read_text(content, f"{field}.content")
        if role == "user" and not text.strip():
            raise HTTPException(400, f"{field}.content must not be blank.")
        if role in ("user", "assistant"):
            turns.append((role, text))
        else:
            system.append(text)
    if not messages or messages[-1]["role"] != "user":
        raise HTTPException(400, "messages must end with a message from the user.")
    _, question = turns.pop()  # the last message is the last turn, as it is the user's
    history = "\n\n".join(f"{role}: {text}" for role, text in turns)
    return "\n".join(system) or None, history, question


def read_question(question: str) -> list[dict[str, Any]]:
    """Return the messages of a chat that is one question; raises HTTPException."""
    check_json(question, "question")
    if not question.strip():
        raise HTTPException(400, "question must not be blank.")
    return [{"role": "user", "content": question}]


def read_text(content: Any, field: str) -> str:
    """Return the text of a message; raises HTTPException. OpenAI's API allows a list of parts, too."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise HTTPException(
                    400, f"{field} must be text, or a list of text parts: OpenAIGenerator takes text only."
                )
    if not texts:
        raise HTTPException(400, f"{field} must have a part.")
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
    """Return the parameters for the upstream; raises HTTPException. Fields that are not read here are dropped."""
    if body.get("n") not in (None, 1) or body.get("n") is True:  # True equals 1
        raise HTTPException(400, "n must be 1.")
    for field in ("tools", "functions"):
        if body.get(field):
            raise HTTPException(400, f"{field} must be empty: OpenAIGenerator takes text only.")
    parameters = {field: body[field] for field in PARAMETERS if body.get(field) is not None}
    # All streams wait while Haystack copies the parameters, item by item, on the event loop.
    size = sum(check_json({field: value}, field) for field, value in parameters.items())
    if size > 64 * 1024:
        raise HTTPException(400, f"{', '.join(parameters)} must not be more than 64 KiB together.")
    # OpenAI streams every answer to this server, and sends usage only when asked. A whole answer must have usage, a
    # stream when its client asks for it.
    options = body.get("stream_options")
    if not body.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True):
        parameters["stream_options"] = {"include_usage": True}
    return parameters


def check_json(value: Any, field: str) -> int:
    """Return the size of a value as JSON, in bytes; raises HTTPException for what the SDK cannot send, such as NaN or
    half a surrogate pair, and for what is nested too deep for Haystack to copy."""
    try:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        from_json(data)  # refuses more than 200 levels, of which a parameter's name is one
        return len(data)
    except (ValueError, RecursionError):
        raise HTTPException(400, f"{field} must be valid JSON of fewer than 200 levels.") from None


# The thread and its client


# From `in_step` to the thread, after each chunk: True to read the next one, False to stop.
READ_ON: ContextVar[SimpleQueue[bool]] = ContextVar("READ_ON")


async def in_step(chunks: AsyncGenerator[StreamingChunk]) -> AsyncGenerator[StreamingChunk]:
    """Yield the chunks of an answer, and let its thread read on after each; raises HTTPException if the answer failed.

    A thread that did not wait would read the whole answer, for which somebody pays, also when the client has left. And
    such threads take so much of the interpreter's time that other clients get their first chunk late.
    """
    provide_threads(asyncio.get_running_loop())
    read_on: SimpleQueue[bool] = SimpleQueue()
    # Before the first chunk is asked for: AsyncPipeline then starts the thread, in a copy of this context.
    READ_ON.set(read_on)
    try:
        async for chunk in chunks:
            failure = chunk.meta.get("finish_reason")
            if isinstance(failure, HTTPException):
                raise failure
            yield chunk
            read_on.put(True)
    except HTTPException:
        raise
    except Exception:  # of another component, say; Hayhooks has logged it, and its text is not for the caller
        raise HTTPException(500, "The pipeline failed.") from None
    finally:  # also when the client has left, which ends this generator at `async for` or `yield`
        read_on.put(False)
        await chunks.aclose()


PATIENCE = 60  # seconds that a thread waits for its client, which may have stopped reading without leaving


def wait_for_client() -> bool:
    """Wait, in the thread, for `in_step`; return True to read on, False to stop; raises BrokenPipeError after
    PATIENCE."""
    read_on = READ_ON.get()
    try:
        return read_on.get(timeout=PATIENCE)
    except Empty:
        raise BrokenPipeError(f"the client took no chunk for {PATIENCE} seconds") from None


@functools.cache  # once for each event loop, and again after a deploy, which loads this file anew
def provide_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Let all streams run at once. asyncio's own executor has min(32, cores + 4) threads: on two cores the seventh
    stream would wait.

    An event loop has one default executor, also for other pipelines and other copies of this file. So the limit here is
    far above MAX_CONCURRENT_STREAMS; a thread is made only when none is free. The executor that is replaced gets no new
    work, and its threads end with their streams.
    """
    loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


# The upstream


def watch_upstream(llm: OpenAIGenerator, settings: Settings) -> None:
    """In this component, let `watched_create` take the place of the SDK's `create`, from which OpenAIGenerator gets its
    chunks."""
    places = Semaphore(settings.MAX_CONCURRENT_STREAMS)

    # A generator: all of it runs in the thread, when OpenAIGenerator's loop asks for a chunk.
    def watched_create(**request: Any) -> Iterator[ChatCompletionChunk]:
        if not places.acquire(blocking=False):  # refuse at once: a queue would first serve clients that have left
            busy = HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
            yield new_chunk(finish_reason=busy)
            return
        request_id, failure = "", None
        try:
            # Without `with` the connection stays open until a garbage collection, and the upstream goes on.
            with ask_upstream(llm.client, request) as stream:
                request_id = stream.response.headers.get("x-request-id", "")
                yield from read_upstream(stream, with_usage="stream_options" in request)
        except Exception as error:
            failure = as_http_exception(error, request_id, settings.OPENAI_API_KEY)
        finally:
            places.release()
        if failure:  # raised here, it would be wrapped by Haystack, and logged once more by Hayhooks
            yield new_chunk(finish_reason=failure)

    completions: Any = llm.client.chat.completions  # a type checker takes `create` for read-only
    completions.create = watched_create


def ask_upstream(client: openai.OpenAI, request: dict[str, Any]) -> openai.Stream[object]:
    """Send what `create` would send, and return the answer's chunks as JSON data, which `read_chunk` reads."""
    return client.post("/chat/completions", body=request, cast_to=object, stream=True, stream_cls=openai.Stream[object])


def read_upstream(stream: openai.Stream[object], with_usage: bool) -> Iterator[ChatCompletionChunk]:
    """Yield the chunks of an answer to its end, or until its client has left; raises an exception when the upstream
    breaks off, or the client takes no chunk."""
    finish_reason = None
    for data in stream:
        chunk = read_chunk(data, with_usage)
        finish_reason = chunk.choices[0].finish_reason or finish_reason
        yield chunk
        if not wait_for_client():
            return
    if not finish_reason:
        raise EOFError("the answer ended without a finish_reason")


def read_chunk(data: Any, with_usage: bool) -> ChatCompletionChunk:
    """Make a chunk with model, text, finish_reason and usage from JSON data of the upstream; raises an exception for
    data that it cannot read.

    All else is left out: at an odd tool call, say, OpenAIGenerator would fail. The SDK's own way from JSON data to a
    chunk takes several times as long.
    """
    choice: Any = next(iter(data["choices"]), {})  # usage comes without a choice
    text = encodable((choice.get("delta") or {}).get("content") or "")
    finish_reason = choice.get("finish_reason")
    chunk = new_chunk(text, encodable(str(finish_reason)) if finish_reason else None)
    chunk.model = encodable(str(data.get("model", "")))
    usage = data.get("usage") if with_usage else None  # some upstreams send it unasked
    if usage:
        with suppress(ValidationError):  # some send something else in its place, or half a surrogate pair in it
            chunk.usage = CompletionUsage.model_validate_json(json.dumps(usage, ensure_ascii=False))
    return chunk


def new_chunk(text: str = "", finish_reason: str | HTTPException | None = None) -> ChatCompletionChunk:
    choice = chat_completion_chunk.Choice(index=0, delta=chat_completion_chunk.ChoiceDelta(content=text))
    if finish_reason:  # `model_copy` does not check it: the SDK's type does not allow an HTTPException
        choice = choice.model_copy(update={"finish_reason": finish_reason})
    return ChatCompletionChunk(id="", object="chat.completion.chunk", created=0, model="", choices=[choice])


def as_http_exception(error: Exception, request_id: str, key: str) -> HTTPException:
    """Log why an answer failed, and return what its caller may know.

    In log and answer, the key is replaced where the upstream quotes it whole, and each text is cut to 2000 characters.
    """

    def safe(text: object) -> str:
        return encodable(str(text)).replace(key, "[key]")[:2000]

    cause: BaseException = error  # the SDK's exception for a refused connection, say, holds the reason in another one
    while cause.__cause__:
        cause = cause.__cause__
    status, headers, message = None, None, safe(cause)
    if isinstance(error, openai.APIStatusError):
        status, request_id, message = error.status_code, error.request_id or "", safe(read_error(error))
        retry_after = safe(error.response.headers.get("Retry-After", ""))
        if re.fullmatch("[ -~]+", retry_after):  # what a header can hold
            headers = {"Retry-After": retry_after}
    facts = (status, safe(request_id), type(cause).__name__, message)
    log.error("The answer failed: status {}, request id {!r}, {}: {!r}", *facts)

    if status in (400, 422):
        return HTTPException(status, message)
    if status == 429:
        return HTTPException(status, message, headers)
    if status in (401, 403):
        return HTTPException(502, "The upstream refused the server's credentials.")
    if "Timeout" in type(error).__name__:  # the SDK's, or httpx's, which older SDKs let through
        return HTTPException(504, "The upstream did not answer in time.")
    if type(error) is openai.APIError:  # the SDK raises exactly this for an error event in the answer
        return HTTPException(502, message)
    return HTTPException(502, "The answer could not be completed.")


def read_error(error: openai.APIStatusError) -> str:
    """Return the upstream's message from an answer that reports an error."""
    match error.body:
        case {"message": str(text)} | {"detail": str(text)} | str(text) if text:  # OpenAI's form, FastAPI's, or text
            return text
    return error.response.text or str(error)


def encodable(text: str) -> str:
    """Put U+FFFD in the place of half a surrogate pair, which would cut the stream, as UTF-8 cannot carry it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# The answer


async def answer_caller(
    chunks: AsyncGenerator[StreamingChunk], model: str, body: dict[str, Any]
) -> AsyncGenerator[StreamingChunk] | AsyncGenerator[ChatCompletion] | ChatCompletion:
    """Return an answer in the form that its caller expects; raises HTTPException."""
    # A request to /v1/chat/completions always has `stream`; Hayhooks' A2A server and `run_api_async` send none.
    if "stream" not in body:
        return chunks
    events = as_events(chunks, model)
    if not body["stream"]:
        return await collect_completion(events)
    # The response begins when this function returns. Until then a failure can still be its status.
    first = await anext(events)
    return stream_completion(first, events)


async def as_events(chunks: AsyncGenerator[StreamingChunk], model: str) -> AsyncGenerator[ChatCompletion]:
    """Yield the events of a stream, at least one; raises HTTPException. If Hayhooks made them, usage would be lost."""
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }
    finish_reason, usage = None, None
    async with aclosing(chunks):
        async for chunk in chunks:
            finish_reason = chunk.meta.get("finish_reason") or finish_reason
            usage = chunk.meta.get("usage") or usage
            # From the finish_reason on, empty chunks are left out: it and usage go out last, below.
            if chunk.content or not finish_reason:
                yield ChatCompletion(**head, choices=[delta(chunk.content)])
    # "stop" for a component that gives no finish_reason; an answer of OpenAIGenerator without one has failed.
    yield ChatCompletion(**head, choices=[delta("", finish_reason or "stop")])
    if usage:
        yield ChatCompletion(**head, choices=[], usage=usage)


def delta(text: str, finish_reason: str | None = None) -> Choice:
    return Choice(index=0, delta=Message(role="assistant", content=text), finish_reason=finish_reason)


async def stream_completion(
    first: ChatCompletion, others: AsyncGenerator[ChatCompletion]
) -> AsyncGenerator[ChatCompletion]:
    """Yield the events of a stream, and one with `error` if the answer fails. Without that one the answer would break
    off, and look like a lost connection."""
    try:
        async with aclosing(others):
            yield first
            async for event in others:
                yield event
    except HTTPException as failure:
        yield first.model_copy(update={"choices": [], "error": {"message": failure.detail, "type": "server_error"}})


async def collect_completion(events: AsyncGenerator[ChatCompletion]) -> ChatCompletion:
    """Join the events of a stream to one whole chat completion; raises HTTPException."""
    all_events = [event async for event in events]
    choices = [choice for event in all_events for choice in event.choices]
    text = "".join(choice.delta.content or "" for choice in choices if choice.delta)
    message = Message(role="assistant", content=text)
    choice = Choice(index=0, message=message, finish_reason=choices[-1].finish_reason)
    last = all_events[-1]  # which holds the usage, if there is any
    return last.model_copy(update={"object": "chat.completion", "choices": [choice]})


# To adapt this file
#
# Once the component has a `run_async`, delete the parts about the thread and about the upstream, the call of
# `watch_upstream`, MAX_CONCURRENT_STREAMS and `allow_sync_streaming_callbacks=True`, and write `chunks` in place of
# `in_step(chunks)`. Clients that leave, failures and a limit on streams are then up to the component and to Hayhooks.
#
# With a component of your own, in this file, that does not use the OpenAI SDK, delete the part about the upstream, the
# call of `watch_upstream` and MAX_CONCURRENT_STREAMS, and put the component's inputs into `pipeline_run_args`. In its
# loop, after each chunk, call `wait_for_client()`, and end the loop when it returns False. A chunk's `meta` can hold
# `finish_reason` and `usage`. An exception is a 500, or an error event in a stream that has begun. For another status
# send a chunk with an HTTPException as `finish_reason`.
#
# A component whose loop you cannot change streams as it is, but goes on to its end when the client has left.
