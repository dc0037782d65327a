"""Hybrid mode: stream a component that only works synchronously from an async Hayhooks server.

1. AsyncPipeline runs such a component, which has no `run_async`, in a thread of the event loop's executor.
2. For each chunk it calls its `streaming_callback`, in that thread. `Relay.put` gives the chunk to Hayhooks, and waits.
3. Hayhooks carries the chunk over to the event loop, where `Relay.take` yields it to the client.
4. When `take` is asked for the next chunk, `put` returns, and the component reads on.

A client that leaves in the middle of a stream: its generators are closed, `take` among them, and `put` raises an
exception, at once or with the next chunk. This ends the component's `run`, and with it the upstream's connection. If
no chunk comes, the timeout ends both. (Before the first chunk, and without a stream, Hayhooks does not tell that a
client left.)

A failure of the component is kept in the `Relay`, and the pipeline ends as if all were well. Then `take` raises it.

`PipelineWrapper` is the example, `for_every_caller` gives its chunks the form that each caller expects. What they need
in production follows: the settings, the request, the thread and its client, the answer.
"""

import asyncio
import functools
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
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
    from haystack.core.component import Component
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
        if "stream" not in body:  # from Hayhooks' A2A server, `run_api_async` or your own code
            return chunks
        # The others come from /v1/chat/completions.
        if not body["stream"]:
            return await collect_completion(chunks, model)
        # The response begins when this returns. Before the first chunk a wrong key can still have a status.
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
        # Without it a stream goes on when its client has left, and no failure has a status of its own.
        protect_run(llm, settings.MAX_CONCURRENT_STREAMS, settings.OPENAI_API_KEY)
        # Without it only the garbage collector closes the connection, and an answer that broke off looks complete.
        watch_upstream(llm)
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")

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
            # Hybrid mode. Without it Hayhooks raises a ValueError, since OpenAIGenerator has no `run_async`. With a
            # component that has one, delete this line, `protect_run` and `watch_upstream`, which concern `run`. Of
            # `Relay` it needs only the closing; what else they did is up to that component, and its failures are a 500.
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        chunks = await self.run_chat_completion_async("", [{"role": "user", "content": question}], {})
        return "".join([chunk.content async for chunk in chunks])


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

    With the last message alone, a chat would have no memory.
    """
    if len(messages) > 2000:  # all streams wait while the event loop reads them; their length matters little
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
    """Return the parameters for the upstream; raises HTTPException. Fields that are not named here are dropped."""
    if body.get("n") not in (None, 1):
        bad_request("n must be 1.")
    for field in ("tools", "functions"):
        if body.get(field):
            bad_request(f"{field} must be empty: OpenAIGenerator takes text only.")
    parameters = {field: body[field] for field in PARAMETERS if body.get(field) is not None}
    # All streams wait while Haystack copies them, item by item, on the event loop.
    if sum(check_json(value, field) for field, value in parameters.items()) > 64 * 1024:
        bad_request(f"{', '.join(parameters)} must not be more than 64 KiB.")
    # The upstream always streams, and sends usage only when asked: for a whole answer, where clients expect it, and for
    # a stream on request.
    options = body.get("stream_options")
    if not body.get("stream") or (isinstance(options, dict) and options.get("include_usage") is True):
        parameters["stream_options"] = {"include_usage": True}
    return parameters


def check_json(value: Any, field: str) -> int:
    """Return how many bytes a value takes as JSON; raises HTTPException for NaN or half a surrogate pair, say. Later,
    on its way to the upstream, it would raise too, and look as if the upstream had failed."""
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        bad_request(f"{field} must be valid JSON.")


def bad_request(sentence: str) -> NoReturn:
    raise HTTPException(400, sentence)


# The thread and its client, as outlined at the top


@functools.cache  # once for each event loop, and again after a deploy, which loads this file anew
def provide_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Let all streams run at once. asyncio's own executor has min(32, cores + 4) threads: on two cores the seventh
    stream would wait.

    An event loop has one default executor, also for other pipelines and other copies of this file. So its limit is far
    above the places of one copy; a thread is made only when none is free. The threads of the executor before it end
    with their streams.
    """
    loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


PATIENCE = 60  # seconds; without a limit a client that stays, but reads no more, would hold its thread for good


class ClientLeftError(BaseException):
    """The client left, or took no chunk for as long as PATIENCE.

    Were it an Exception, a component could take it for a failure of its own, and try again.
    """


class Relay:
    """Joins one run of the component, in its thread, to its client, on the event loop.

    Without it a run goes on when its client has left, and a user who pressed Stop is billed for all of it. And runs
    that read ahead of their clients keep the event loop from sending other clients their first chunk.
    """

    def __init__(self) -> None:
        self.taken = Semaphore(0)  # released by `take`: once for each chunk that the client took, once at the end
        self.over = False  # the client takes no more chunks
        self.to_close = ExitStack()  # closed when the run ends; `watch_upstream` adds the connection
        self.request_id: str | None = None  # the upstream's, for the log
        self.failure: HTTPException | None = None  # why the run failed

    def put(self, chunk: StreamingChunk, hand_over: Callable[[StreamingChunk], None]) -> None:
        """In the thread: hand over a chunk, and wait until it is taken; raises ClientLeftError, which ends the run."""
        if not isinstance(chunk.content, str):  # some upstreams send a list of parts, which would cut the stream
            raise TypeError("the content of a chunk is not text")
        hand_over(chunk)
        in_time = self.taken.acquire(timeout=PATIENCE)
        if self.over or not in_time:
            raise ClientLeftError

    async def take(self, chunks: AsyncGenerator[StreamingChunk]) -> AsyncGenerator[StreamingChunk]:
        """On the event loop: yield the chunks that come from Hayhooks; raises HTTPException when the run failed."""
        RELAY.set(self)  # for `protected_run`: the pipeline's task, and in it each thread, gets a copy of the context
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
                    self.taken.release()
        except Exception:  # another component's, say: Hayhooks has logged it, and it is not for the caller's eyes
            raise HTTPException(500, "The pipeline failed.") from None
        finally:
            self.over = True
            self.taken.release()
        if self.failure:  # not within the `try`, which would make it a 500
            raise self.failure


RELAY: ContextVar[Relay] = ContextVar("RELAY")


def protect_run(component: Component, max_streams: int, key: str | None = None) -> None:
    """Replace the component's `run` by one that takes one of `max_streams` places, ends with its client, and keeps its
    failure for the caller.

    Hayhooks would log an exception of `run` with a traceback and all that the upstream said. The line in its place,
    and the failure, do not show the `key`.
    """
    run, places = component.run, Semaphore(max_streams)

    @functools.wraps(run)  # Hayhooks looks for `streaming_callback` in its signature
    def protected_run(streaming_callback: Callable[[StreamingChunk], None], **inputs: Any) -> Mapping[str, Any]:
        relay = RELAY.get()
        outputs: Mapping[str, Any] = {"replies": []}  # with no output Haystack logs that the pipeline is blocked
        if not places.acquire(blocking=False):  # waiting, it would stand in line behind clients that have long gone
            relay.failure = HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
            return outputs
        try:
            with relay.to_close:
                outputs = run(streaming_callback=lambda chunk: relay.put(chunk, streaming_callback), **inputs)
        except ClientLeftError:
            # Only a client that has not left will see it.
            relay.failure = HTTPException(408, f"Nothing of the answer was taken for {PATIENCE} seconds.")
        except Exception as error:
            relay.failure = as_http_exception(error, relay.request_id, key)
        finally:
            places.release()
        return outputs

    replaced: Any = component  # a type checker takes `run` for read-only
    replaced.run = protected_run


def watch_upstream(llm: OpenAIGenerator) -> None:
    """Let the run close the upstream's connection, and tell a complete answer from one that broke off.

    The SDK leaves an abandoned connection to the garbage collector, and the upstream goes on until that comes by.
    A component without the OpenAI SDK needs its own way to do both: `RELAY.get().to_close` closes what it enters there.
    """
    completions: Any = llm.client.chat.completions
    create = completions.with_raw_response.create

    # OpenAIGenerator only iterates over what it gets, so the request is sent when it asks for the first chunk.
    def create_watched(**request: Any) -> Iterator[ChatCompletionChunk]:
        relay, finished = RELAY.get(), False
        asked = "stream_options" in request
        response = create(**request)
        relay.request_id = response.request_id
        stream = response.parse(to=openai.Stream[object])  # JSON data, for `read_chunk`
        relay.to_close.enter_context(stream)
        for data in stream:
            chunk = read_chunk(data)
            finished = finished or any(choice.finish_reason for choice in chunk.choices)
            if not asked or not isinstance(chunk.usage, CompletionUsage):
                chunk.usage = None  # some upstreams send usage unasked, or something else in its place
            yield chunk
        if not finished:
            raise EOFError("the answer ended without a finish_reason")

    completions.create = create_watched


def read_chunk(data: object) -> ChatCompletionChunk:
    """Return a chunk of the upstream's answer, made from its JSON data. The SDK itself takes several times as long to
    make one, and while the threads compute, the event loop cannot."""
    text = encodable(json.dumps(data, ensure_ascii=False))
    try:
        return ChatCompletionChunk.model_validate_json(text)
    except ValidationError:  # the SDK's own way, for an upstream that differs from OpenAI in a field
        return ChatCompletionChunk.construct(**json.loads(text))


def as_http_exception(error: Exception, request_id: str | None, key: str | None) -> HTTPException:
    """Log why a run failed, and return what its caller may know.

    In both, the key, which an upstream may quote, is replaced, and each text of the upstream cut to 2000 characters.
    """

    def safe(text: object) -> str:
        encoded = encodable(str(text))
        return (encoded.replace(key, "[key]") if key else encoded)[:2000]

    cause: BaseException = error  # the SDK's exception for a refused connection, say, holds the reason in another one
    while cause.__cause__:
        cause = cause.__cause__
    status, message = None, safe(cause)
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        status, request_id = error.status_code, error.request_id
        message = safe(body.get("message") or error.response.text or error)
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
        case _ if type(error) is openai.APIError:  # an error event within the answer
            return HTTPException(502, message)
    return HTTPException(502, "The upstream failed before its answer was complete.")


def encodable(text: str) -> str:
    """Put U+FFFD in the place of half a surrogate pair, which would cut the stream, as UTF-8 cannot carry it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# The answer


async def stream_completion(
    first: StreamingChunk | None, others: AsyncGenerator[StreamingChunk], model: str
) -> AsyncGenerator[ChatCompletion]:
    """Yield chat completion chunks. Left to Hayhooks, usage is lost, and an answer that failed ends with "stop"."""
    head = new_head("chat.completion.chunk", model)
    chunk, finished, usage = first, False, None
    try:
        async with aclosing(others):
            while chunk is not None:
                reason, its_usage = chunk.meta.get("finish_reason"), chunk.meta.get("usage")
                finished, usage = finished or bool(reason), its_usage or usage
                only_usage = its_usage and not (chunk.content or reason)  # sent last
                if not only_usage:
                    yield ChatCompletion(**head, choices=[delta(chunk.content, reason)])
                chunk = await anext(others, None)
    except HTTPException as failure:
        yield ChatCompletion(**head, choices=[], error={"message": failure.detail, "type": "server_error"})
        return
    if not finished:  # it did not fail, but its component, another one than OpenAIGenerator, gives no finish_reason
        yield ChatCompletion(**head, choices=[delta("", "stop")])
    if usage:
        yield ChatCompletion(**head, choices=[], usage=usage)


def delta(text: str, finish_reason: object) -> Choice:
    reason = str(finish_reason) if finish_reason else None  # an upstream's odd one, a number say, would cut the stream
    return Choice(index=0, delta=Message(role="assistant", content=text), finish_reason=reason)


async def collect_completion(chunks: AsyncGenerator[StreamingChunk], model: str) -> ChatCompletion:
    """Return one whole chat completion. Left to Hayhooks, every answer is a stream."""
    text, finish_reason, usage = "", None, None
    async for chunk in chunks:
        text += chunk.content
        finish_reason = chunk.meta.get("finish_reason") or finish_reason
        usage = chunk.meta.get("usage") or usage
    message = Message(role="assistant", content=text)
    choice = Choice(index=0, message=message, finish_reason=str(finish_reason or "stop"))
    return ChatCompletion(**new_head("chat.completion", model), choices=[choice], usage=usage)


def new_head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
