"""Hybrid mode: stream a component that only works synchronously from an async Hayhooks server.

AsyncPipeline runs OpenAIGenerator, which has no `run_async`, in a thread. There OpenAIGenerator reads the upstream's
chunks in a loop, and calls Hayhooks' callback for each one. Hayhooks carries the chunk to the event loop, which sends
it to the client. Only then does the thread read the next one.

When a client leaves in the middle of a stream, the event loop tells the thread. The thread leaves its loop, as if the
answer were complete, and closes the connection to the upstream. A thread that is just waiting for the upstream does so
with the next chunk, or fails after OPENAI_TIMEOUT. (A client that leaves before the first chunk is noticed with this
chunk, and one that wants no stream not at all: Hayhooks does not tell.)

When the upstream fails, the thread keeps the failure, and sends an empty chunk in its place. When this chunk arrives,
the event loop raises the failure.

`PipelineWrapper` is the example, and `for_every_caller` gives its chunks the form that each caller expects. What these
two need in production follows: the settings, the request, the thread and its client, the answer.
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
from threading import Semaphore
from typing import Annotated, Any, NoReturn

import openai
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import BasePipelineWrapper, async_streaming_generator, log
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk
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

# A single question is the whole prompt, as it is; earlier turns stand before it.
PROMPT = "{% if history %}{{ history }}\n\nuser: {% endif %}{{ question }}"


def for_every_caller(chat: Callable[..., Awaitable[AsyncGenerator[StreamingChunk]]]) -> Callable[..., Awaitable[Any]]:
    """Make a chat method, which returns chunks, return what its caller expects."""

    @functools.wraps(chat)
    async def chat_for_every_caller(
        self: "PipelineWrapper", model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk] | AsyncGenerator[ChatCompletion] | ChatCompletion:
        provide_threads(asyncio.get_running_loop())
        chunks = Relay().take(await chat(self, model, messages, body))
        # A request to /v1/chat/completions always has `stream`; Hayhooks' A2A server and `run_api_async` send none.
        if "stream" not in body:
            return chunks
        if not body["stream"]:
            return await collect_completion(chunks, model)
        # The response begins when this method returns. A failure before the first chunk can still be its status.
        first = await anext(chunks, None)
        return stream_completion(first, chunks, model)

    return chat_for_every_caller


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
        # Without it the upstream goes on when a client has left, and a wrong key or a rate limit is a 500.
        watch_upstream(llm, settings)
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")
        # Without it the garbage collector goes through the objects of all libraries, and all streams wait for it.
        gc.freeze()

    @for_every_caller
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk]:
        """Return the chunks of an answer, for the decorator; raises HTTPException for bad input."""
        system_prompt, history, question = read_messages(messages)
        parameters = read_parameters(body)
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={
                "prompt": {"history": history, "question": question},
                "llm": {"system_prompt": system_prompt, "generation_kwargs": parameters},
            },
            # Without it HAYHOOKS_STREAMING_COMPONENTS, set for another pipeline, decides which component streams here.
            streaming_components=["llm"],
            # Hybrid mode. Without it Hayhooks raises a ValueError, since OpenAIGenerator has no `run_async`. Once the
            # component has one, delete this line, the part "The thread and its client" below, and what uses it above:
            # `provide_threads(…)`, `Relay().take(…)` around the chunks, and `watch_upstream(…)`. Clients that leave and
            # failures are then up to the component and to Hayhooks.
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        chunks = await self.run_chat_completion_async("", [{"role": "user", "content": question}], {})
        return "".join([chunk.content async for chunk in chunks])


# The settings


class Settings(BaseSettings):
    """Environment variables, with those that Hayhooks reads from `.env`; one that is empty counts as unset."""

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

    Without the history a chat has no memory. Where that is wanted, return "" for it.
    """
    if len(messages) > 2000:  # all streams wait while the event loop reads them; a long text costs little
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
    *earlier, (_, question) = turns
    history = "\n\n".join(f"{role}: {text}" for role, text in earlier)
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
    if body.get("n") not in (None, 1) or body.get("n") is True:
        bad_request("n must be 1.")
    for field in ("tools", "functions"):
        if body.get(field):
            bad_request(f"{field} must be empty: OpenAIGenerator takes text only.")
    parameters = {field: body[field] for field in PARAMETERS if body.get(field) is not None}
    # All streams wait while Haystack copies them, item by item, on the event loop.
    if sum(check_json(value, field) for field, value in parameters.items()) > 64 * 1024:
        bad_request(f"{', '.join(parameters)} must not be more than 64 KiB.")
    # The upstream always streams. A whole answer has to have usage, and a stream only when the client asked for it.
    options = body.get("stream_options")
    if not body.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True):
        parameters["stream_options"] = {"include_usage": True}
    return parameters


def check_json(value: Any, field: str) -> int:
    """Return how many bytes a value takes as JSON; raises HTTPException for what cannot be sent on, such as NaN or half
    a surrogate pair. The SDK would raise an exception for it, too, as if the upstream had failed."""
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        bad_request(f"{field} must be valid JSON.")


def bad_request(sentence: str) -> NoReturn:
    raise HTTPException(400, sentence)


# The thread and its client


@functools.cache  # once for each event loop, and again after a deploy, which loads this file anew
def provide_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Let all streams run at once. asyncio's own executor has min(32, cores + 4) threads: on two cores the seventh
    stream would wait.

    An event loop has one default executor, also for other pipelines and other copies of this file. So its limit is far
    above MAX_CONCURRENT_STREAMS; a thread is made only when none is free. The threads of the executor before it end
    with their streams.
    """
    loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


PATIENCE = 60  # seconds; without a limit a client that stays, but reads no more, would hold its thread for good


class Relay:
    """What the thread of an answer and the event loop, which serves its client, tell each other.

    Without it the upstream goes on after Stop, and somebody pays for an answer that nobody reads. And threads that read
    ahead of their clients take the time in which the event loop could send other clients their first chunk.
    """

    def __init__(self) -> None:
        self.taken = Semaphore(0)  # released once for each chunk that the client took, and when it takes no more
        self.over = False  # the client takes no more
        self.failure: HTTPException | None = None  # why the answer failed

    def wait(self) -> bool:
        """In the thread, after each chunk: wait until it is taken, and return whether to read on; raises
        BrokenPipeError when that takes longer than PATIENCE."""
        if not self.taken.acquire(timeout=PATIENCE):
            raise BrokenPipeError(f"the client took no chunk for {PATIENCE} seconds")
        return not self.over

    async def take(self, chunks: AsyncGenerator[StreamingChunk]) -> AsyncGenerator[StreamingChunk]:
        """On the event loop: yield the chunks that come from Hayhooks; raises HTTPException when the answer failed."""
        RELAY.set(self)
        async with aclosing(chunks):
            try:
                async for chunk in chunks:
                    if self.failure:
                        raise self.failure
                    yield chunk
                    self.taken.release()
            except HTTPException:
                raise
            except Exception:  # another component's, say: Hayhooks has logged it, and it is not for the caller's eyes
                raise HTTPException(500, "The pipeline failed.") from None
            finally:  # the client may have left
                self.over = True
                self.taken.release()


# How the thread finds its Relay: `take` sets it before it asks Hayhooks for the first chunk. Only then does the
# pipeline start, and AsyncPipeline runs the thread in a copy of the context.
RELAY: ContextVar[Relay] = ContextVar("RELAY")

# Comes last when the answer failed, so that `take` looks at the failure. An exception in its place would be logged by
# Hayhooks, with all that the upstream said.
FAILED = ChatCompletionChunk(id="", choices=[], created=0, model="", object="chat.completion.chunk")


def watch_upstream(llm: OpenAIGenerator, settings: Settings) -> None:
    """Replace the SDK's `create`, for this component, by one that is limited in number, reads no further than its
    client, closes the connection, and keeps a failure for `Relay.take`.

    A component without the OpenAI SDK can do the same: leave its loop when `RELAY.get().wait()` is False, and after a
    failure set `RELAY.get().failure` and send an empty chunk.
    """
    places = Semaphore(settings.MAX_CONCURRENT_STREAMS)

    # A generator does nothing until it is asked for its first chunk: all of this happens in OpenAIGenerator's loop.
    def watched_create(**request: Any) -> Iterator[ChatCompletionChunk]:
        relay, request_id, finished = RELAY.get(), None, False
        if not places.acquire(blocking=False):  # waiting, it would stand in line behind clients that have long gone
            relay.failure = HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
            yield FAILED
            return
        try:
            # `create` itself would do the same, but make chunks where this gets JSON data, for `read_chunk`.
            stream = llm.client.post(
                "/chat/completions", body=request, cast_to=object, stream=True, stream_cls=openai.Stream[object]
            )
            request_id = stream.response.headers.get("x-request-id")
            # An abandoned connection stays open until the garbage collector comes by, and the upstream goes on.
            with stream:
                for data in stream:
                    chunk = read_chunk(data, "stream_options" in request)
                    finished = finished or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk
                    if not relay.wait():
                        return
            if not finished:
                raise EOFError("the answer ended without a finish_reason")
        except Exception as error:
            relay.failure = as_http_exception(error, request_id, settings.OPENAI_API_KEY)
            yield FAILED
        finally:
            places.release()

    completions: Any = llm.client.chat.completions  # a type checker takes `create` for read-only
    completions.create = watched_create


def read_chunk(data: Any, with_usage: bool) -> ChatCompletionChunk:
    """Return a chunk with text, finish_reason and usage from its JSON data; raises an exception if its text is no text.

    All else that the upstream sent is left out: at an odd tool call, say, OpenAIGenerator would fail in its loop, and
    the connection would stay open. The SDK itself takes several times as long to make a chunk.
    """
    head = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": str(data.get("model"))}
    texts = [encodable((choice.get("delta") or {}).get("content") or "") for choice in data["choices"][:1]]
    chunk: Any = ChatCompletionChunk.model_validate(
        {**head, "choices": [{"index": 0, "delta": {"content": text}} for text in texts]}
    )
    if texts and (finish_reason := data["choices"][0].get("finish_reason")):
        chunk.choices[0].finish_reason = encodable(str(finish_reason))  # also one that the SDK does not know
    if with_usage and (usage := data.get("usage")):  # some upstreams send it unasked
        with suppress(ValidationError):  # some upstreams send something else in its place
            chunk.usage = CompletionUsage.model_validate_json(json.dumps(usage, ensure_ascii=False))
    return chunk


def as_http_exception(error: Exception, request_id: str | None, key: str) -> HTTPException:
    """Log why an answer failed, and return what its caller may know.

    In both, the key, which an upstream may quote, is replaced, and each text of the upstream cut to 2000 characters.
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
    facts = (status, safe(request_id), type(cause).__name__, message)
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
                if chunk.content or not finish_reason:  # the finish_reason goes out last
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
