"""Turns the failure of an answer, whichever SDK raised it, into what the client may know about it."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import HTTPException
from starlette.exceptions import HTTPException as StarletteHTTPException

from .text import whole

FAILED = "The answer could not be completed."
TOO_LATE = "The upstream did not answer in time."
BUSY = "The upstream is busy, or its quota is used up."
NO_CREDENTIALS = "The upstream refused the server's credentials."
REFUSED = "The upstream refused the request."

# OpenAI's SDKs obey this header. Other clients retry after most statuses, some for minutes, but not after a 400.
NO_RETRY = {"x-should-retry": "false"}
MAX_MESSAGE = 1000  # characters
MARKUP = re.compile(r"<[a-zA-Z!/][^>]*>")


def as_http_exception(error: BaseException, component_errors: Sequence[BaseException] = ()) -> HTTPException:
    """Return the status and the sentence for a client whose answer failed with this error.

    An HTTPException among its causes is passed on. The status of a cause, or a timeout, counts only if a component that
    streams raised it, or raised an error because of it. All else is the server's own failure.
    """
    with contextlib.suppress(Exception):  # an attribute of a foreign error can itself raise
        is_of_upstream = False
        for cause in causes_of(error):
            if isinstance(cause, StarletteHTTPException):
                return HTTPException(cause.status_code, cause.detail, cause.headers)
            is_of_upstream |= any(cause is one for one in component_errors)
            if is_of_upstream and isinstance(cause, Exception) and (status := status_of(cause)):
                return failure_with(status, cause)
            if is_of_upstream and "Timeout" in type(cause).__name__:  # each SDK has its own
                return HTTPException(504, TOO_LATE)
    return HTTPException(502, FAILED)


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it: Haystack wraps a component's, and SDKs wrap lower-level ones."""
    yield error  # its `__context__` is left out, as that can be the timeout with which Hayhooks polls
    pending, seen = [error.__cause__], {id(error)}
    while pending:
        cause = pending.pop()
        if cause is not None and id(cause) not in seen:  # an error can be its own cause
            seen.add(id(cause))
            yield cause
            context = None if cause.__suppress_context__ else cause.__context__
            pending += [
                *getattr(cause, "exceptions", ()),
                context,
                cause.__cause__,
            ]  # popped from the end, so `__cause__` comes first


def status_of(error: BaseException) -> int | None:
    """Return the status that the upstream sent, wherever the SDK keeps it; botocore's and Google's are special."""
    response = response_of(error)
    found = [getattr(one, name, None) for name in ("status_code", "code") for one in (error, response)]
    if isinstance(response, dict):
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return next((status for status in found if isinstance(status, int) and 400 <= status < 600), None)


def failure_with(status: int, error: BaseException) -> HTTPException:
    """Return the status and the sentence for a client whose answer failed because the upstream sent this status."""
    match status:
        case 400 | 422:
            return HTTPException(400, message_of(error) or REFUSED)
        case 429 | 503 | 529:
            retry_after = headers_of(response_of(error)).get("retry-after")
            return HTTPException(429, BUSY, {"Retry-After": retry_after} if retry_after else None)
        case 401 | 403:
            return HTTPException(400, NO_CREDENTIALS, NO_RETRY)
        case 408 | 504:
            return HTTPException(504, TOO_LATE)
        case _ if status < 500 and status != 409:  # a 409 may succeed later
            return HTTPException(400, REFUSED, NO_RETRY)
    return HTTPException(502, FAILED)


def message_of(error: Any) -> str | None:
    """Return the sentence that the upstream wrote for a person, without the key of the request, or None."""
    response = response_of(error)
    # Most SDKs keep the response; some only the body, Ollama's only the message, botocore's a dict.
    bodies = [response, getattr(error, "body", None), {"error": getattr(error, "error", None)}]
    with contextlib.suppress(Exception):  # it is not JSON, or was not read
        bodies.insert(0, response.json())
    message = next(filter(None, map(message_in, bodies)), None)
    if not message or MARKUP.search(message):
        return None
    for name, value in headers_of(getattr(response, "request", None)).items():
        key = value.split(" ")[-1]  # without "Bearer"
        if (name == "authorization" or name.endswith("api-key")) and len(key) >= 8:  # a shorter one may be a word
            message = message.replace(key, "[key]")
    return whole(message[:MAX_MESSAGE])


def message_in(body: Any) -> str | None:
    """Return the message in the body of an error, which may have OpenAI's form, FastAPI's, Cloudflare's or another."""
    match body:
        case [inner, *_]:
            return message_in(inner)
        case {"msg": str(message), "loc": [*_, field]}:
            return f"{field}: {message}"
        case dict():
            found = [body.get(name) for name in ("message", "Message", "detail", "msg", "error", "Error", "errors")]
            return next(filter(None, (one if isinstance(one, str) else message_in(one) for one in found)), None)
    return None


def response_of(error: BaseException) -> Any:
    """Return the response that an SDK keeps with an error, or with the error's context, as Ollama's does.

    Without one, returns the error, which then may have what a response has.
    """
    kept = [getattr(one, "response", None) for one in (error, error.__context__)]
    return next((response for response in kept if response is not None), error)


def headers_of(message: Any) -> dict[str, str]:
    """Return the headers of a request or a response by their names in lower case, if there are any."""
    headers = (getattr(message, "headers", None) or {}).items()
    return {str(name).lower(): value.decode() if isinstance(value, bytes) else str(value) for name, value in headers}
