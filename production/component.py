"""Makes a component end when its client leaves. The component needs no change."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .lockstep import CURRENT_LOCKSTEP

Component = TypeVar("Component", bound=Any)


def stoppable(component: Component) -> Component:
    """Make a component end when its client leaves, and return it.

    In an answer, the `streaming_callback` of a sync component waits for the client; when the client has left, it raises
    an exception that is not an Exception, and the streams that the component was reading are closed. An async component
    is cancelled. Outside of an answer, nothing changes.

    Raises TypeError if the component's `run` takes no `streaming_callback`.
    """
    if "streaming_callback" not in getattr(component, "__haystack_input__", ()):  # the inputs that Haystack knows
        raise TypeError(f"{type(component).__name__} is not a component whose run takes a streaming_callback")
    original_run = late_bound(component, "run")

    @functools.wraps(component.run)  # Haystack and Hayhooks read its signature
    def run(*args: Any, **inputs: Any) -> Any:
        lockstep, callback = CURRENT_LOCKSTEP.get(), inputs.get("streaming_callback")
        if lockstep is None or callback is None:  # outside of an answer, or not one of its streaming_components
            return original_run(*args, **inputs)
        with lockstep.running():
            return original_run(*args, **{**inputs, "streaming_callback": functools.partial(lockstep.send, callback)})

    component.run = run
    if hasattr(component, "run_async"):
        original_run_async = late_bound(component, "run_async")

        @functools.wraps(component.run_async)
        async def run_async(*args: Any, **inputs: Any) -> Any:
            lockstep, task = CURRENT_LOCKSTEP.get(), asyncio.current_task()
            if lockstep is None or task is None:
                return await original_run_async(*args, **inputs)
            lockstep.cancel_at_end(task)  # Haystack 2 does not cancel it when it cancels the pipeline
            with lockstep.running():
                return await original_run_async(*args, **inputs)

        component.run_async = run_async
    return component


def late_bound(component: Any, name: str) -> Callable[..., Any]:
    """Return a function that calls a component's method, and looks it up in the class each time: tracers replace it."""
    own = vars(component).get(name)  # a replacement for this component alone

    def call(*args: Any, **inputs: Any) -> Any:
        method = own or getattr(type(component), name).__get__(component)
        return method(*args, **inputs)

    return call
