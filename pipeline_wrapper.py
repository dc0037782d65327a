"""Hybrid mode: stream a component that only works synchronously from an async Hayhooks server.

`PipelineWrapper` is the example, and `allow_sync_streaming_callbacks=True` is the line to notice. It is for components
that you cannot replace by async ones; OpenAIGenerator stands for them here. Below the class is what a chat needs in
production, in the order in which data flows: settings, request, thread and caller, failures, response.
"""

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
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

    An OpenAI client, for whom Hayhooks always sets `stream`, gets the events of a stream or one whole completion.
    Hayhooks' A2A server and Python code, whose `body` has no `stream`, get the chunks.
    """

    @functools.wraps(chat)
    async def respond(self: "PipelineWrapper", model: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> Any:
        chunks = in_lockstep(await chat(self, model, messages, body), self.slots, self.settings.OPENAI_API_KEY)
        if "stream" not in body:
            return chunks
        if not body["stream"]:
            return as_completion([chunk async for chunk in chunks], model)
        stream_options = body.get("stream_options")
        include_usage = isinstance(stream_options, dict) and bool(stream_options.get("include_usage"))
        # Hayhooks sends status 200 when this function returns. Until then, a failure can have a status of its own.
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
        make_stoppable(llm)
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
        self.pipeline.add_component("llm", llm)
        self.pipeline.connect("prompt.prompt", "llm.prompt")

    @openai_response
    async def run_chat_completion_async(
        self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]
    ) -> AsyncGenerator[StreamingChunk]:
        """Return the chunks of an answer, from which the decorator makes what the caller gets.

        Raises HTTPException for a request that cannot be answered.
        """
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
    OPENAI_MODEL: str = Field("gpt-5-mini", min_length=1)
    OPENAI_BASE_URL: str = Field(
        "https://api.openai.com/v1", pattern=r"^(?i:https?)://(\S+@)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[!-~]*)?$"
    )
    OPENAI_TIMEOUT: float = Field(120, gt=0, le=3600)  # seconds without a byte from the upstream
    OPENAI_MAX_RETRIES: int = Field(0, ge=0, le=10)  # the SDK sleeps in the thread before each
    MAX_CONCURRENT_STREAMS: int = Field(500, ge=1, le=1000)  # whole answers count, too; the SDK has 1000 connections


# The request. What chat front-ends send by default is left out rather than refused.


def parse_messages(messages: list[dict[str, Any]]) -> tuple[str | None, str]:
    """Return the system prompt, if there is one, and the conversation as one prompt; raises HTTPException."""
    instructions: list[str] = []
    turns: list[tuple[str, str, bool]] = []  # role, text, whether it can be the last one
    for message in messages:
        text, is_text_only = parse_content(message.get("content"))
        match message.get("role"):
            case "system" | "developer":
                instructions.append(text)
            case "user":
                turns.append(("user", text, is_text_only and bool(text.strip())))
            case "assistant":
                if text.strip():
                    turns.append(("assistant", text, True))  # the last one is to be continued
            case "tool" | "function":
                pass
            case _:
                raise HTTPException(400, "Each of messages must have a role that OpenAI knows.")
    if turns and not turns[-1][2]:
        raise HTTPException(400, "messages must not end with a blank or an image: OpenAIGenerator takes text only.")
    conversation = [(role, text) for role, text, _ in turns if text.strip()]
    if not any(role == "user" for role, _ in conversation):
        raise HTTPException(400, "messages must have text from the user.")
    system_prompt = "\n".join(text for text in instructions if text.strip())
    if len(conversation) == 1:
        return system_prompt or None, conversation[0][1]
    return system_prompt or None, "\n\n".join(f"{role}: {text}" for role, text in conversation)


def parse_content(content: Any) -> tuple[str, bool]:
    """Return the text of a message or a delta, and whether that is all it holds. Content is text or a list of parts.

    An unpaired half of a surrogate pair is replaced: JavaScript's `slice` makes them, and UTF-8 cannot carry them.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
    text = "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, len(texts) == len(parts)


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
    match body.get("tool_choice"):
        case "required" | {"type": "function" | "custom"}:
            raise HTTPException(400, "tool_choice must be auto or none: OpenAIGenerator answers with text only.")
    parameters = {name: body[name] for name in PARAMETERS if body.get(name) is not None}
    try:
        # Haystack copies the parameters item by item on the event loop, and all streams wait for it.
        is_acceptable = len(json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode()) <= 64 * 1024
    except (ValueError, RecursionError):  # JSON in UTF-8 cannot carry them
        is_acceptable = False
    if not is_acceptable:
        raise HTTPException(400, f"{', '.join(parameters)} must be valid JSON of at most 64 KiB together.")
    if "max_tokens" in parameters and urlsplit(base_url).hostname == "api.openai.com":
        # OpenAI's newer models refuse the older name, and all take the newer one.
        max_tokens = parameters.pop("max_tokens")
        parameters.setdefault("max_completion_tokens", max_tokens)
    return {**parameters, "stream_options": {"include_usage": True}}  # for Haystack's and Hayhooks' traces, too


# The thread of an answer, and its caller. This part depends on how Hayhooks, AsyncPipeline and OpenAIGenerator work
# together, which tests/test_client_leaves.py checks with their oldest and newest releases.

LOOPS: WeakSet[asyncio.AbstractEventLoop] = WeakSet()  # those with an executor of this file


def provide_threads() -> None:
    """Give the event loop an executor with a thread for each answer; asyncio's own has only min(32, cores + 4).

    Other pipelines share it, and a thread that waits for its upstream may outlive its answer. So its limit is far above
    MAX_CONCURRENT_STREAMS; a thread is only started when none is free.
    """
    loop = asyncio.get_running_loop()
    if loop not in LOOPS:
        LOOPS.add(loop)
        loop.set_default_executor(ThreadPoolExecutor(10_000, "stream"))


class Lockstep:
    """Keeps the thread of an answer in step with its caller.

    The rule: after each chunk that it has sent, the thread calls `wait`. When the caller asks for the chunk after it,
    the event loop calls `proceed`, and when the caller has left, `stop`.

    Without the rule, the thread would read the answer to its end, which somebody pays for, although the caller has
    left; and threads that run ahead of their callers would delay the first chunks of others. It needs each chunk to
    arrive: if one got lost on its way to the caller, its thread would wait in vain, and fail after a minute.

    OpenAIGenerator keeps the rule after `make_stoppable`. A component of your own calls `wait` itself.
    """

    def __init__(self) -> None:
        self._signals: SimpleQueue[bool] = SimpleQueue()  # True for `proceed`, False for `stop`
        self.is_stopped = False

    def proceed(self) -> None:
        self._signals.put(True)

    def stop(self) -> None:
        self.is_stopped = True
        self._signals.put(False)

    def wait(self) -> bool:
        """Block until `proceed`, and return True, or until `stop`, and return False.

        Raises RuntimeError after a minute in which the caller has stopped reading. A caller who reads on later finds
        the failure, and not half an answer that looks complete.
        """
        try:
            proceed = self._signals.get(timeout=60)
        except Empty:
            raise RuntimeError("the caller has asked for no chunk for 60 seconds") from None
        if not proceed:
            self._signals.put(False)  # again, for other components of the same pipeline that stream
        return proceed


# AsyncPipeline runs a sync component in a thread, with a copy of the context: there the component finds its Lockstep.
CURRENT_LOCKSTEP: ContextVar[Lockstep | None] = ContextVar("CURRENT_LOCKSTEP", default=None)


async def in_lockstep(
    chunks: AsyncGenerator[StreamingChunk], slots: asyncio.Semaphore, key: str
) -> AsyncGenerator[StreamingChunk]:
    """Yield the chunks of an answer, which holds a slot, in lockstep with its thread.

    Raises HTTPException if no slot is free or if the answer fails; `key` is kept out of its text.
    """
    if slots.locked():
        raise HTTPException(503, "All streams are in use: try again.", {"Retry-After": "1"})
    provide_threads()
    lockstep = Lockstep()
    async with slots:  # does not wait, as nothing was awaited since `locked`
        try:
            token = CURRENT_LOCKSTEP.set(lockstep)
            try:
                chunk = await anext(chunks, None)  # starts the pipeline, which copies the context
            finally:
                CURRENT_LOCKSTEP.reset(token)
            while chunk is not None:
                yield chunk
                lockstep.proceed()
                chunk = await anext(chunks, None)
        except Exception as error:  # Hayhooks has logged it
            raise as_http_exception(error, key) from None
        finally:  # also when the caller has left: Hayhooks then cancels the `await`, or closes this at the `yield`
            lockstep.stop()
            await chunks.aclose()


def make_stoppable(llm: OpenAIGenerator) -> None:
    """Let OpenAIGenerator stop at the next chunk after the caller has left: the stream over which it loops ends there.

    The stream is what the SDK's `create` returns, so this replaces `create`.
    """
    create = llm.client.chat.completions.create

    def until_caller_left(request: dict[str, Any]) -> Iterator[ChatCompletionChunk]:
        lockstep = CURRENT_LOCKSTEP.get()  # None outside of an answer, as in a `pipeline.run_async` of your own
        is_whole = False
        try:
            with create(**request) as stream:  # without `with`, the connection stays open until a garbage collection
                for chunk in stream:
                    normalize(chunk)
                    is_whole = is_whole or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk  # OpenAIGenerator sends it before it asks for the next one
                    if lockstep and not lockstep.wait():
                        return
        except Exception:
            # Some upstreams cut the connection after the finish_reason, or keep it open until the timeout. And nobody
            # handles a failure for a caller who has left: asyncio would log its traceback.
            caller_left = lockstep is not None and lockstep.is_stopped
            if not is_whole and not caller_left:
                raise

    def stoppable_create(**request: Any) -> Any:
        return until_caller_left(request) if request.get("stream") else create(**request)

    llm.client.chat.completions.create = stoppable_create  # type: ignore[method-assign]


def normalize(chunk: ChatCompletionChunk) -> None:
    """Change a chunk in place, so that OpenAIGenerator can read what some upstreams send."""
    chunk.choices = chunk.choices or []  # null or missing
    for choice in chunk.choices:
        choice.delta = choice.delta or ChoiceDelta()  # null or missing
        # OpenAI sends a refusal in place of content, when a schema was asked for.
        choice.delta.content, _ = parse_content(choice.delta.content or choice.delta.refusal or "")
    if chunk.usage:
        # Without the nulls that the SDK adds for what the upstream left out.
        chunk.usage = chunk.usage.to_dict(exclude_none=True)  # type: ignore[assignment]


# Failures


def as_http_exception(error: Exception, key: str) -> HTTPException:
    """Return what the caller of a failed answer may know."""
    match error.__cause__ or error:  # what the component raised, which newer releases of Haystack wrap
        case openai.APIStatusError(status_code=400 | 422 as status, body=body):
            return HTTPException(status, upstream_message(body).replace(key, "[key]"))
        case openai.APIStatusError(status_code=429 | 503 as status, response=response):
            headers = {name: value for name, value in response.headers.items() if name.lower() == "retry-after"}
            return HTTPException(status, "The upstream is busy: try again later.", headers)
        case openai.APIStatusError(status_code=401 | 403):
            return HTTPException(502, "The upstream refused the server's credentials.")
        case cause if "Timeout" in type(cause).__name__:  # the SDK's, or httpx's, which openai 2 lets through
            return HTTPException(504, "The upstream did not answer in time.")
    return HTTPException(502, "The answer could not be completed.")


def upstream_message(body: Any) -> str:
    """Return the message in the body of an upstream's error: OpenAI's form, FastAPI's, Gemini's or another."""
    match body:
        case str():
            return body
        case {"message": inner} | {"detail": inner} | {"msg": inner} | {"error": inner} | [inner, *_]:
            return upstream_message(inner)
    return json.dumps(body)


# The response


async def as_events(
    first: StreamingChunk | None, rest: AsyncGenerator[StreamingChunk], model: str, include_usage: bool
) -> AsyncGenerator[ChatCompletion]:
    """Yield the events of a stream, from its first chunk, if there is one, and the rest.

    An answer that fails has an event that says so before its end: without it, the answer would look complete.
    """
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }

    def delta_event(delta: dict[str, str], finish_reason: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return Event(json.dumps({**head, "choices": [choice]}))

    chunk, usage = first, None
    try:
        async with aclosing(rest):
            yield delta_event({"role": "assistant", "content": ""})
            while chunk is not None:
                finish_reason = chunk.meta.get("finish_reason") or chunk.finish_reason  # `meta` has the upstream's own
                usage = chunk.meta.get("usage") or usage  # some upstreams send it early, or with each chunk
                if chunk.content or finish_reason:
                    yield delta_event({"content": chunk.content} if chunk.content else {}, finish_reason)
                chunk = await anext(rest, None)
        if usage and include_usage:
            yield Event(json.dumps({**head, "choices": [], "usage": usage}))
    except HTTPException as failure:
        yield Event(json.dumps({"error": {"message": failure.detail, "type": "server_error"}}))
    yield Event("[DONE]")


class Event(ChatCompletion):
    """An event of a stream, which Hayhooks sends as it is.

    Hayhooks' own events have a null for each missing field, and OpenAI's Node SDK throws on those. They also have other
    keys beside `error`, and some clients then take a failed answer for a complete one.
    """

    _data: str

    def __init__(self, data: str) -> None:
        # Hayhooks only takes a ChatCompletion, whose fields are required. It sends what `model_dump_json` returns.
        super().__init__(id="", object="chat.completion.chunk", created=0, model="", choices=[])
        self._data = data

    def model_dump_json(self, **_: Any) -> str:
        return self._data


def as_completion(chunks: list[StreamingChunk], model: str) -> ChatCompletion:
    """Join the chunks of an answer into one whole completion."""
    finish_reason, usage = None, None
    for chunk in chunks:
        finish_reason = chunk.meta.get("finish_reason") or chunk.finish_reason or finish_reason
        usage = chunk.meta.get("usage") or usage
    message = Message(role="assistant", content="".join(chunk.content for chunk in chunks))
    return ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[Choice(index=0, message=message, finish_reason=finish_reason)],
        usage=usage,
    )
