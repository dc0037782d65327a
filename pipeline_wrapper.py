"""Hybrid mode: stream a component that only works synchronously from an async Hayhooks server.

`PipelineWrapper` is the example, and `allow_sync_streaming_callbacks=True` is the line to notice. It is for components
that you cannot replace by async ones. The rest of the file is what the chat needs in production, in the order in which
data flows: settings, request, thread and caller, failures, response.
"""

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import openai
from fastapi import HTTPException
from fastapi_openai_compat import ChatCompletion, Choice, Message
from hayhooks import BasePipelineWrapper, async_streaming_generator
from haystack import AsyncPipeline
from haystack.components.builders import PromptBuilder
from haystack.components.generators import OpenAIGenerator
from haystack.dataclasses import StreamingChunk
from haystack.utils import Secret
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk, ChoiceDelta
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

PROMPT = "{{ conversation }}"  # the place for instructions of your own, or for retrieved documents


def openai_response(chat: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the PipelineWrapper's method that returns chunks, so that each caller gets what it expects.

    An OpenAI client gets the events of a stream or one whole completion. Hayhooks' A2A server and Python code, whose
    `body` has no `stream`, get the chunks.
    """

    @functools.wraps(chat)
    async def respond(self: Any, model: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> Any:
        chunks = in_lockstep(await chat(self, model, messages, body), self.settings.OPENAI_API_KEY)
        chunks = in_slot(chunks, self.slots)
        if "stream" not in body:
            return chunks
        if not body["stream"]:
            return as_completion([chunk async for chunk in chunks], model)
        stream_options = body.get("stream_options")
        include_usage = isinstance(stream_options, dict) and bool(stream_options.get("include_usage"))
        # Hayhooks sends status 200 when this function returns. Until then a failure can be a status of its own.
        first = await anext(chunks, None)
        return as_events(first, chunks, model, include_usage)

    return respond


class PipelineWrapper(BasePipelineWrapper):
    """A chat with OpenAIGenerator, which has no `run_async`, streamed from an async pipeline."""

    def setup(self) -> None:
        """Build the pipeline; raises ValueError for a missing or invalid environment variable."""
        self.settings = Settings()
        self.slots = asyncio.Semaphore(self.settings.MAX_CONCURRENT_STREAMS)
        llm = OpenAIGenerator(
            api_key=Secret.from_token(self.settings.OPENAI_API_KEY),
            model=self.settings.OPENAI_MODEL,  # not the `model` of a request, which names this pipeline
            api_base_url=self.settings.OPENAI_BASE_URL,
            timeout=self.settings.OPENAI_TIMEOUT,
            max_retries=self.settings.OPENAI_MAX_RETRIES,
        )
        stop_with_caller(llm)
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")

    @openai_response
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk]:
        """Return the chunks of an answer, to the decorator; raises HTTPException for a request without an answer."""
        system_prompt, conversation = parse_messages(messages)
        parameters = parse_parameters(body, self.settings.OPENAI_BASE_URL)
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={
                "prompt": {"conversation": conversation},
                "llm": {"system_prompt": system_prompt, "generation_kwargs": parameters},
            },
            # Without this line HAYHOOKS_STREAMING_COMPONENTS, set for another pipeline, decides what streams here.
            streaming_components=["llm"],
            # Hybrid mode. Without this line Hayhooks raises a ValueError, since OpenAIGenerator has no `run_async`.
            allow_sync_streaming_callbacks=True,
        )

    async def run_api_async(self, question: str) -> str:
        """Answer one question with a language model."""
        messages = [{"role": "user", "content": question}]
        chunks = await self.run_chat_completion_async(model="", messages=messages, body={})
        return "".join([chunk.content async for chunk in chunks])


class Settings(BaseSettings):
    """The environment variables, to which Hayhooks has added those in `.env`. An empty one counts as unset."""

    # Without `hide_input_in_errors` a mistyped key would be in the log.
    model_config = SettingsConfigDict(env_ignore_empty=True, str_strip_whitespace=True, hide_input_in_errors=True)

    OPENAI_API_KEY: str = Field(pattern="^[!-~]+$")  # what an HTTP header can carry
    OPENAI_MODEL: str = "gpt-5-mini"
    OPENAI_BASE_URL: str = Field("https://api.openai.com/v1", pattern=r"^https?://[^\s/?#:]\S*$")
    OPENAI_TIMEOUT: float = Field(120, gt=0, le=3600)  # seconds without a byte from the upstream
    OPENAI_MAX_RETRIES: int = Field(0, ge=0, le=10)  # the SDK sleeps in the thread before each
    MAX_CONCURRENT_STREAMS: int = Field(500, ge=1, le=1000)  # whole answers count, too; the SDK has 1000 connections


# The request. What chat front-ends send by default is left out rather than refused.


def parse_messages(messages: list[dict[str, Any]]) -> tuple[str | None, str]:
    """Return the system prompt, if there is one, and the conversation as one prompt; raises HTTPException."""
    instructions: list[str] = []
    turns: list[tuple[str, str]] = []
    can_answer = False
    for message in messages:
        text, is_text_only = parse_content(message.get("content"))
        match message.get("role"):
            case "system" | "developer":
                instructions.append(text)
            case "user":
                turns.append(("user", text))
                can_answer = is_text_only and bool(text.strip())
            case "assistant":
                turns.append(("assistant", text))
                can_answer = True  # if it is the last message, the model continues it
            case "tool" | "function":
                pass
            case _:
                raise HTTPException(400, "messages must have the roles system, developer, user, assistant or tool.")
    turns = [(role, text) for role, text in turns if text.strip()]
    if not can_answer or not any(role == "user" for role, _ in turns):
        raise HTTPException(
            400, "The last user message of messages must be text, and not blank: OpenAIGenerator takes text only."
        )
    system_prompt = "\n".join(text for text in instructions if text.strip())
    if len(turns) == 1:
        return system_prompt or None, turns[0][1]
    return system_prompt or None, "\n\n".join(f"{role}: {text}" for role, text in turns)


def parse_content(content: Any) -> tuple[str, bool]:
    """Return the text of a message, and whether that is all it holds. Content is text or a list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
    return replace_surrogates("".join(texts)), len(texts) == len(parts)


def replace_surrogates(text: str) -> str:
    """Replace each unpaired half of a surrogate pair: JavaScript's `slice` makes them, and UTF-8 cannot carry them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


PARAMETERS = (
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
)


def parse_parameters(body: dict[str, Any], base_url: str) -> dict[str, Any]:
    """Return the parameters for the upstream; raises HTTPException. All other fields of the body are dropped."""
    if body.get("n") not in (None, 1):
        raise HTTPException(400, "n must be 1.")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise HTTPException(400, "tool_choice must be auto or none: OpenAIGenerator answers with text only.")
    parameters = {name: body[name] for name in PARAMETERS if body.get(name) is not None}
    try:
        size = len(json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        size = None
    # Haystack copies the parameters item by item on the event loop, and all streams wait for it.
    if size is None or size > 64 * 1024:
        raise HTTPException(400, f"{', '.join(parameters)} must be valid JSON of at most 64 KiB together.")
    if "max_tokens" in parameters and urlsplit(base_url).hostname == "api.openai.com":
        # OpenAI's newer models refuse the older name, and all take the newer one.
        max_tokens = parameters.pop("max_tokens")
        parameters.setdefault("max_completion_tokens", max_tokens)
    return {**parameters, "stream_options": {"include_usage": True}}


# The thread of an answer, and the caller who reads it. This part depends on how Hayhooks, AsyncPipeline and
# OpenAIGenerator work together; tests/test_client_leaves.py checks it with their oldest and newest allowed releases.

LOOPS: WeakSet[asyncio.AbstractEventLoop] = WeakSet()  # those that have an executor of this file


async def in_slot(chunks: AsyncGenerator[StreamingChunk], slots: asyncio.Semaphore) -> AsyncGenerator[StreamingChunk]:
    """Yield the chunks of an answer while it holds a slot; raises HTTPException if there is none.

    An answer also holds a thread. asyncio's own executor has only min(32, cores + 4) threads, so this file replaces it,
    once for each event loop. Other pipelines share the new one, so its limit is far above MAX_CONCURRENT_STREAMS.
    """
    if slots.locked():
        raise HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
    loop = asyncio.get_running_loop()
    if loop not in LOOPS:
        LOOPS.add(loop)
        loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))  # starts a thread only when none is free
    async with slots, aclosing(chunks):
        async for chunk in chunks:
            yield chunk


class Lockstep:
    """Keeps the thread of an answer in step with its caller.

    The rule: after each chunk that it sends, the thread calls `wait`; after each chunk that the caller has taken, the
    event loop calls `chunk_taken`. When `wait` returns False, the thread must stop.

    Without the rule, a thread would read an answer to its end, which somebody pays for, after the caller has left. And
    threads that run ahead of their callers would delay the first chunks of others.
    """

    def __init__(self) -> None:
        self._signals: SimpleQueue[bool] = SimpleQueue()  # what `wait` returns

    def chunk_taken(self) -> None:
        """Let the thread send its next chunk."""
        self._signals.put(True)

    def close(self) -> None:
        """Stop the thread: the caller has left, or the answer is over."""
        self._signals.put(False)

    def wait(self) -> bool:
        """Block the thread until its chunk has been taken; return whether to continue.

        Raises BrokenPipeError if nobody takes it for a minute. A caller who then reads on finds a failure, and not an
        answer that looks complete.
        """
        try:
            read_on = self._signals.get(timeout=60)
        except Empty:
            raise BrokenPipeError("the caller has taken no chunk for 60 seconds") from None
        if not read_on:
            self.close()  # again, for the threads of other components in the same answer
        return read_on


# AsyncPipeline runs a sync component in a thread, with a copy of the context: there the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar[Lockstep | None] = ContextVar("CURRENT_LOCKSTEP", default=None)


async def in_lockstep(chunks: AsyncGenerator[StreamingChunk], key: str) -> AsyncGenerator[StreamingChunk]:
    """Yield the chunks of an answer, in lockstep with its thread; raises HTTPException if the answer fails."""
    lockstep = Lockstep()
    try:
        token = CURRENT_LOCKSTEP.set(lockstep)
        try:
            chunk = await anext(chunks, None)  # starts the pipeline, which copies the context
        finally:
            CURRENT_LOCKSTEP.reset(token)  # for all else that runs in this context
        while chunk:
            # OpenAIGenerator has the upstream's own finish_reason in `meta`, other components have it in the field.
            chunk.meta.setdefault("finish_reason", chunk.finish_reason)
            yield chunk
            lockstep.chunk_taken()
            chunk = await anext(chunks, None)
    except Exception as error:  # Hayhooks has logged it
        raise as_http_exception(error, key) from None
    finally:  # also if the caller has left: Hayhooks then cancels an `await` or closes this generator at the `yield`
        lockstep.close()
        await chunks.aclose()


def stop_with_caller(llm: OpenAIGenerator) -> None:
    """Replace the SDK's `create`, over whose stream OpenAIGenerator loops, by one whose stream ends with the caller."""
    create = llm.client.chat.completions.create

    def until_caller_left(stream: openai.Stream[ChatCompletionChunk]) -> Iterator[ChatCompletionChunk]:
        lockstep = CURRENT_LOCKSTEP.get()  # None outside of an answer, as in a `pipeline.run_async` of your own
        with stream:  # otherwise the connection stays open until a garbage collection
            for chunk in readable(stream):
                yield chunk  # OpenAIGenerator sends it before it asks for the next one
                if lockstep and not lockstep.wait():
                    return

    def stoppable_create(**request: Any) -> Any:
        response = create(**request)
        return until_caller_left(response) if request.get("stream") else response

    llm.client.chat.completions.create = stoppable_create  # type: ignore[method-assign]


def readable(stream: Iterable[ChatCompletionChunk]) -> Iterator[ChatCompletionChunk]:
    """Yield the chunks of a stream, made readable for OpenAIGenerator, which some upstreams' chunks break.

    What fails after the finish_reason is ignored: some upstreams cut the connection then, or keep it open.
    """
    is_whole = False
    try:
        for chunk in stream:
            chunk.choices = chunk.choices or []  # null or missing
            for choice in chunk.choices:
                choice.delta = choice.delta or ChoiceDelta()
                choice.delta.content = replace_surrogates(choice.delta.content or choice.delta.refusal or "")
                is_whole = is_whole or bool(choice.finish_reason)
            if chunk.usage:
                chunk.usage = chunk.usage.to_dict(exclude_none=True)  # type: ignore[assignment]
            yield chunk
    except Exception:
        if not is_whole:
            raise


# Failures


def as_http_exception(error: Exception, key: str) -> HTTPException:
    """Return what the caller of a failed answer may know."""
    match error.__cause__ or error:  # what the component raised, which newer releases of Haystack wrap
        case openai.APIStatusError(status_code=400 | 422 as status, body=message):
            while not isinstance(message, str):  # the body is in OpenAI's form, FastAPI's, Gemini's or another
                match message:
                    case {"error": inner} | {"message": inner} | {"detail": inner} | {"msg": inner} | [inner, *_]:
                        message = inner
                    case _:
                        message = str(message)
            return HTTPException(status, replace_surrogates(message.replace(key, "[key]")))
        case openai.APIStatusError(status_code=429 | 503 as status, response=response):
            headers = {name: value for name, value in response.headers.items() if name.lower() == "retry-after"}
            return HTTPException(status, "The upstream is busy: try again later.", headers)
        case openai.APIStatusError(status_code=401 | 403):
            return HTTPException(502, "The upstream refused the server's credentials.")
        case cause if "Timeout" in type(cause).__name__:  # the SDK's, or httpx's, which openai 2 lets through
            return HTTPException(504, "The upstream did not answer in time.")
    return HTTPException(502, "The answer could not be completed.")


# The response


async def as_events(
    chunk: StreamingChunk | None, others: AsyncGenerator[StreamingChunk], model: str, include_usage: bool
) -> AsyncGenerator[ChatCompletion]:
    """Yield the events of a stream, from its first chunk and the others.

    An answer that fails ends with an event that says so: without it, the answer would look complete.
    """
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }

    def event(delta: dict[str, str], finish_reason: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return Event({**head, "choices": [choice]})

    usage = None
    try:
        async with aclosing(others):
            yield event({"role": "assistant", "content": ""})
            while chunk:
                finish_reason = chunk.meta["finish_reason"]
                usage = chunk.meta.get("usage") or usage  # some upstreams send it early, or with each chunk
                if chunk.content or finish_reason:
                    yield event({"content": chunk.content} if chunk.content else {}, finish_reason)
                chunk = await anext(others, None)
        if usage and include_usage:
            yield Event({**head, "choices": [], "usage": usage})
    except HTTPException as failure:
        yield Event({"error": {"message": failure.detail, "type": "server_error"}})
    yield Event("[DONE]")


class Event(ChatCompletion):
    """An event that Hayhooks sends as it is. Its own have a null for each missing field, on which OpenAI's Node SDK
    throws, and other keys beside `error`, with which some clients take a failed answer for complete."""

    _json: str

    def __init__(self, data: dict[str, Any] | str) -> None:
        super().__init__(id="", object="chat.completion.chunk", created=0, model="", choices=[])  # never sent
        self._json = data if isinstance(data, str) else json.dumps(data)

    def model_dump_json(self, **_: Any) -> str:
        return self._json


def as_completion(chunks: list[StreamingChunk], model: str) -> ChatCompletion:
    """Join the chunks of an answer to one whole completion."""
    meta = {name: value for chunk in chunks for name, value in chunk.meta.items() if value}
    message = Message(role="assistant", content="".join(chunk.content for chunk in chunks))
    return ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[Choice(index=0, message=message, finish_reason=meta.get("finish_reason"))],
        usage=meta.get("usage"),
    )
