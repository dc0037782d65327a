"""Closes the streams that a component was reading when its client left.

The streams of some SDKs, OpenAI's among them, are in reference cycles, and would otherwise stay open, and be paid for,
until the next garbage collection. Components do not tell where they keep a stream: it may be in a local variable, or
only be known to a `for` loop. So this looks at the component's frames while an exception ends them, one by one.
"""

import contextlib
import gc
import inspect
import sys
import traceback
from types import FrameType
from typing import Any


class StreamCloser:
    """A profile function, which Python calls at the end of each frame of the thread that has set it."""

    def __init__(self) -> None:
        self._frames = {frame for frame, _ in traceback.walk_stack(sys._getframe(1))}

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        if event != "return":
            return
        # A `for` loop that ends closes its generator, whose value is None then, while one that yields has a value.
        is_closed_generator = bool(frame.f_code.co_flags & inspect.CO_GENERATOR) and value is None
        if frame in self._frames or is_closed_generator:
            with contextlib.suppress(Exception):
                close_streams_in(frame)


def close_streams_in(frame: FrameType) -> None:
    """Close the streams in a frame's local variables, except those that its module or its object keeps for others."""
    variables = frame.f_locals
    owner = getattr(variables.get("self"), "__dict__", {})
    kept = {id(value) for value in [*frame.f_globals.values(), *owner.values()]}
    for value in list(variables.values()):
        if id(value) not in kept:
            close(value)


def close(value: Any) -> None:
    """Close a value if it is a stream and, if it is a generator, the streams from which it reads."""
    if is_stream(value):
        inner = gc.get_referents(value, value.gi_frame) if inspect.isgenerator(value) else []
        with contextlib.suppress(Exception):
            value.close()
        for one in inner:
            close(one)


def is_stream(value: Any) -> bool:
    """Return whether a value can be iterated over and closed, and is neither a file nor a collection."""
    cls = type(value)
    has_methods = hasattr(cls, "__iter__") and hasattr(cls, "close")
    return has_methods and not hasattr(cls, "__len__") and not hasattr(value, "write")


def stop_closing() -> None:
    """Remove the thread's StreamCloser, if it has one."""
    if isinstance(sys.getprofile(), StreamCloser):
        sys.setprofile(None)
