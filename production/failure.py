"""Turns the failure of an answer, whichever SDK raised it, into what the client may know about it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import HTTPException

from .request import replace_lone_surrogates


def as_http_exception(error: BaseException) -> HTTPException:
    """Return the status and the sentence for a client whose answer failed with this error."""
    with contextlib.suppress(Exception):  # an attribute of a foreign error can itself raise
        for cause in causes_of(error):
            if isinstance(cause, HTTPException):
                return cause
            status = getattr(cause, "status_code", None) or getattr(response_of(cause), "status_code", None)
            if isinstance(status, int):
                return failure_with(status, cause)
            if "Timeout" in type(cause).__name__:  # each SDK has its own
                return HTTPException(504, "The upstream did not answer in time.")
    return HTTPException(502, "The answer could not be completed.")


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it. Haystack wraps what a component raises, and SDKs wrap theirs."""
    yield error  # its `__context__` is left out, as that can be the timeout with which Hayhooks polls
    pending, seen = [error.__cause__], {id(error)}
    while pending:
        cause = pending.pop()
        if cause is not None and id(cause) not in seen:  # an error can be its own cause
            seen.add(id(cause))
            yield cause
            context = None if cause.__suppress_context__ else cause.__context__
            pending += [*getattr(cause, "exceptions", ()), context, cause.__cause__]  # taken from the end


# OpenAI's SDKs obey this header, and most other clients do not retry a 4xx. Agents retry a 5xx for minutes.
NO_RETRY = {"x-should-retry": "false"}


def failure_with(status: int, error: BaseException) -> HTTPException:
    """Return the status and the sentence for a client whose answer failed because the upstream sent this status."""
    match status:
        case 400 | 422:
            return HTTPException(status, replace_lone_surrogates(without_key(message_of(error), error)))
        case 429 | 503:
            retry_after = headers_of(response_of(error)).get("retry-after")
            headers = {"Retry-After": str(retry_after)} if retry_after else None
            return HTTPException(status, "The upstream is busy, or its quota is used up.", headers)
        case 401 | 403:
            return HTTPException(424, "The upstream refused the server's credentials.", NO_RETRY)
        case 408 | 504:
            return HTTPException(504, "The upstream did not answer in time.")
        case _ if 400 <= status < 500 and status != 409:  # a 409 may succeed later
            return HTTPException(424, "The upstream refused the request.", NO_RETRY)
    return HTTPException(502, "The answer could not be completed.")


def message_of(error: Any) -> str:
    """Return the upstream's message. Some SDKs keep the body of its error, some the response, Ollama's the message."""
    response = response_of(error)
    reads: list[Callable[[], Any]] = [
        lambda: error.body,
        lambda: response.json(),
        lambda: response.text,
        lambda: error.error,
    ]
    for read in reads:
        with contextlib.suppress(Exception):
            if body := read():
                return message_in(body)
    return "The upstream refused the request."


def message_in(body: Any) -> str:
    """Return the message in the body of an error, which may have OpenAI's form, FastAPI's, Gemini's or another."""
    match body:
        case str():
            return body
        case [inner, *_]:
            return message_in(inner)
        case dict():
            for name in ("message", "detail", "msg", "error"):
                if body.get(name):
                    return message_in(body[name])
    return json.dumps(body, default=str)


def without_key(message: str, error: BaseException) -> str:
    """Return the message without the key of the failed request. A short key is no secret, and may be part of a word."""
    for name, value in headers_of(getattr(response_of(error), "request", None)).items():
        key = value.split(" ")[-1]  # without "Bearer"
        if (name == "authorization" or name.endswith("api-key")) and len(key) >= 8:
            message = message.replace(key, "[key]")
    return message


def response_of(error: BaseException) -> Any:
    """Return the response that an SDK keeps with an error, or the error, which then may have what a response has."""
    response = getattr(error, "response", None)
    return error if response is None else response


def headers_of(request_or_response: Any) -> dict[str, str]:
    """Return the headers by their names in lower case, if there are any."""
    return {name.lower(): value for name, value in (getattr(request_or_response, "headers", None) or {}).items()}
