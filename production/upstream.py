"""What upstreams refuse, send and raise, and what of it OpenAIGenerator and the client can handle."""

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import openai
from fastapi import HTTPException
from hayhooks import log
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk, ChoiceDelta

from .request import PARAMETERS, text_of

if TYPE_CHECKING:  # Haystack 3 has no OpenAIGenerator, but the rest of this package works there
    from haystack.components.generators import OpenAIGenerator

Generator = TypeVar("Generator", bound="OpenAIGenerator")

# An answer without one of the others would be a different answer.
DISPENSABLE = tuple(name for name in PARAMETERS if name not in ("stop", "response_format", "logit_bias"))


def tolerant(llm: Generator) -> Generator:
    """Let an OpenAIGenerator cope with what OpenAI-compatible upstreams refuse and send, and return it.

    OpenAIGenerator calls the SDK's `create` and iterates over what it returns, so this replaces `create`.
    """
    create = llm.client.chat.completions.create
    refused: set[tuple[str, str | None]] = set()  # a name with a value, or with None for all values

    def is_refused(name: str, value: Any) -> bool:
        return (name, None) in refused or (name, repr(value)) in refused

    def without_refused(arguments: dict[str, Any]) -> dict[str, Any]:
        if ("max_tokens", None) in refused and "max_tokens" in arguments:  # newer models know it by another name
            arguments = {"max_completion_tokens": arguments["max_tokens"], **arguments}
        return {name: value for name, value in arguments.items() if not is_refused(name, value)}

    def create_without_refused(**arguments: Any) -> Any:
        while True:
            sent = without_refused(arguments)
            try:
                return create(**sent)
            except openai.BadRequestError as error:
                if error.param not in DISPENSABLE or error.param not in sent:
                    raise
                value = sent[error.param]
                match error.code:
                    case "unsupported_parameter":
                        refused.add((error.param, None))
                    case "unsupported_value":
                        refused.add((error.param, repr(value)))
                    case _:
                        raise
                log.warning("The model does not support {}={!r}: asking without it.", error.param, value)

    def stream(**arguments: Any) -> Iterator[ChatCompletionChunk]:
        options = {"include_usage": True, **(arguments.pop("stream_options", None) or {})}  # traces show the usage
        is_whole = False
        try:
            # Without `with`, the connection would stay open until a garbage collection.
            with create_without_refused(**arguments, stream_options=options) as chunks:
                for chunk in chunks:
                    normalize(chunk)
                    is_whole = is_whole or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk
        except Exception:
            if not is_whole:  # after the finish_reason, some upstreams cut the connection or keep it open
                raise

    def tolerant_create(**arguments: Any) -> Any:
        return stream(**arguments) if arguments.get("stream") else create_without_refused(**arguments)

    llm.client.chat.completions.create = tolerant_create  # type: ignore[method-assign]
    return llm


def normalize(chunk: ChatCompletionChunk) -> None:
    """Change a chunk in place, so that OpenAIGenerator can read what some upstreams send."""
    chunk.choices = chunk.choices or []  # null or missing
    for choice in chunk.choices:
        choice.delta = choice.delta or ChoiceDelta()  # null or missing
        # If a schema was asked for, OpenAI sends a refusal in place of content. Mistral sends content in parts.
        choice.delta.content = text_of(choice.delta.content or choice.delta.refusal)
        choice.delta.tool_calls = None  # the request offered no tools
    if chunk.usage:
        # Without the nulls that the SDK adds for what the upstream left out.
        chunk.usage = chunk.usage.to_dict(exclude_none=True)  # type: ignore[assignment]


def as_http_exception(error: BaseException) -> HTTPException:
    """Return what the client of a failed answer may know of the error, or of what it wraps. Any SDK may have raised it."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        status = getattr(cause, "status_code", None) or getattr(response, "status_code", None)
        if isinstance(cause, HTTPException):
            return cause
        if isinstance(status, int):
            return failure_of(status, cause, response)
        if "Timeout" in type(cause).__name__:  # each SDK has its own
            return HTTPException(504, "The upstream did not answer in time.")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return HTTPException(502, "The answer could not be completed.")


# OpenAI's SDKs obey this header, and most other clients do not repeat what got a 4xx. After a 5xx, agents ask for minutes.
NO_RETRY = {"x-should-retry": "false"}


def failure_of(status: int, error: BaseException, response: Any) -> HTTPException:
    """Return what the client may know of an error with a status, and with the upstream's response if there is one."""
    match status:
        case 400 | 422:
            return HTTPException(status, without_key(message_of(error, response), response))
        case 429 | 503:
            retry_after = {name: value for name, value in headers_of(response).items() if name == "retry-after"}
            return HTTPException(status, "The upstream is busy, or its quota is used up.", retry_after)
        case 401 | 403:
            return HTTPException(424, "The upstream refused the server's credentials.", NO_RETRY)
        case 408 | 504:
            return HTTPException(504, "The upstream did not answer in time.")
        case _ if 400 <= status < 500 and status != 409:  # such as 404 for an unknown model
            return HTTPException(424, "The upstream refused the request.", NO_RETRY)
    return HTTPException(502, "The answer could not be completed.")


def message_of(error: BaseException, response: Any) -> str:
    """Return the upstream's message, from the body of its error if the SDK has kept that, or else from its response."""
    body = getattr(error, "body", None)
    if body is None:
        with contextlib.suppress(Exception):
            body = response.json()
    return str(error) if body is None else message_in(body)


def message_in(body: Any) -> str:
    """Return the message in the body of an error, which may have OpenAI's form, FastAPI's, Gemini's or another."""
    match body:
        case str():
            return body
        case {"message": inner} | {"detail": inner} | {"msg": inner} | {"error": inner} | [inner, *_]:
            return message_in(inner)
    return json.dumps(body)


def without_key(message: str, response: Any) -> str:
    """Return the message without the key of the request. A short key is no secret, and may be part of a word."""
    for name, value in headers_of(getattr(response, "request", None)).items():
        key = value.removeprefix("Bearer ")
        if (name == "authorization" or name.endswith("api-key")) and len(key) >= 8:
            message = message.replace(key, "[key]")
    return message


def headers_of(message: Any) -> dict[str, str]:
    """Return the headers of a request or a response, whichever HTTP library it is from."""
    return {name.lower(): value for name, value in (getattr(message, "headers", None) or {}).items()}
