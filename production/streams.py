"""Closes the streams that a component was reading when its client left.

The streams of some SDKs, OpenAI's among them, are in reference cycles: they would stay open, and be paid for, until the
next garbage collection. A component does not say where it keeps a stream, so this looks into the local variables of the
functions that have ended: it closes `stream` in `stream = client.create(...)`, but not a stream that is only in a `for`
statement, and not one in an attribute, which other answers may use.
"""

import contextlib
import inspect
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

# An object with one of these keeps an HTTP response: OpenAI's and Anthropic's streams, requests, httpx, botocore.
RESPONSE_ATTRIBUTES = ("response", "iter_content", "iter_bytes", "_raw_stream")


def close_streams(error: BaseException) -> None:
    """Close the streams in the local variables of the functions that an error, or one in its context, has unwound."""
    frames, errors = list[FrameType](), [error]
    for one in errors:  # the loop appends to it
        frames += [frame for frame, _ in traceback.walk_tb(one.__traceback__)]
        errors += [one.__context__] if one.__context__ and one.__context__ not in errors else []
    shared = {id(value) for frame in frames for value in shared_values(frame)}
    for frame in frames:
        close_streams_in(frame, shared)


def shared_values(frame: FrameType) -> Iterator[Any]:
    """Yield what other answers can reach: in a module's variables, in an object's attributes, or in a dict there."""
    attributes = getattr(frame.f_locals.get("self"), "__dict__", {})
    for value in [*frame.f_globals.values(), *attributes.values()]:
        yield value
        if isinstance(value, dict):
            yield from list(value.values())


def close_streams_in(frame: FrameType, shared: set[int]) -> None:
    """Close the streams in a function's own local variables, except the shared ones."""
    for name, value in list(frame.f_locals.items()):
        if name not in frame.f_code.co_freevars and id(value) not in shared:
            with contextlib.suppress(BaseException):  # a foreign object can raise anything
                close_if_stream(value, shared)


def close_if_stream(value: Any, shared: set[int]) -> None:
    """Close an SDK's stream, or a generator and, before it, what it reads."""
    if inspect.isgenerator(value):
        if value.gi_frame and not value.gi_running:
            close_if_stream(value.gi_yieldfrom, shared)
            close_streams_in(value.gi_frame, shared)
            value.close()
    elif hasattr(type(value), "close") and any(hasattr(value, name) for name in RESPONSE_ATTRIBUTES):
        value.close()
