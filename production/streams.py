"""Closes the streams that a component was reading when its client left.

The streams of some SDKs, OpenAI's among them, are in reference cycles: they would stay open, and be paid for, until the
next garbage collection. A component does not say where it keeps a stream. It may be in a local variable, or only in a
`for` loop. So this looks at the component's frames while they end, one by one.
"""

import contextlib
import gc
import inspect
import sys
import traceback
from types import FrameType
from typing import Any


class StreamCloser:
    """A profile function of the thread.

    `Lockstep.send` sets it before it raises, and `Lockstep.running` removes it, so the frames that end in between are
    the component's. Python reports each of them with a "return", whose value is None after an exception.
    """

    def __init__(self) -> None:
        self.previous = sys.getprofile()
        self._frames = {frame for frame, _ in traceback.walk_stack(sys._getframe(1))}

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        if event != "return":
            return
        # A generator in a `for` loop was suspended, so it is not among the frames. It is closed when the loop's frame
        # ends. Python reports a "return" for each `yield` as well, but with the value.
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
    """Put back what the thread's StreamCloser has replaced, if there is one."""
    while isinstance(closer := sys.getprofile(), StreamCloser):
        sys.setprofile(closer.previous)
