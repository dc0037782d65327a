"""Lets a component end when its client has left, without its knowledge."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .lockstep import CURRENT_LOCKSTEP

Component = TypeVar("Component", bound=Any)


def stoppable(component: Component) -> Component:
    """Let a component end at its next chunk after its client has left, and return it.

    In an answer, the `streaming_callback` of a sync component waits for the client, and raises ClientLeft when it has
    left; an async component is cancelled. Outside of an answer, nothing changes. Raises TypeError if the component's
    `run` takes no `streaming_callback`.
    """
    if "streaming_callback" not in getattr(component, "__haystack_input__", ()):
        raise TypeError(f"{type(component).__name__} is not a component whose run takes a streaming_callback")
    original_run = method_of(component, "run")

    @functools.wraps(component.run)  # Haystack and Hayhooks read its signature
    def run(*args: Any, **inputs: Any) -> Any:
        lockstep, callback = CURRENT_LOCKSTEP.get(), inputs.get("streaming_callback")
        if lockstep is None or callback is None:
            return original_run(*args, **inputs)
        with lockstep.while_client_stays():
            return original_run(*args, **{**inputs, "streaming_callback": functools.partial(lockstep.send, callback)})

    component.run = run
    if hasattr(component, "run_async"):
        original_run_async = method_of(component, "run_async")

        @functools.wraps(component.run_async)
        async def run_async(*args: Any, **inputs: Any) -> Any:
            lockstep, task = CURRENT_LOCKSTEP.get(), asyncio.current_task()
            if lockstep is None or task is None:
                return await original_run_async(*args, **inputs)
            lockstep.cancel_at_end(task)  # Haystack 2 lets it run on
            with lockstep.while_client_stays():
                return await original_run_async(*args, **inputs)

        component.run_async = run_async
    return component


def method_of(component: Any, name: str) -> Callable[..., Any]:
    """Return a function that calls a component's method, found in the class at each call: tracers replace it there."""
    own = vars(component).get(name)  # one that was set on this component alone

    def call(*args: Any, **inputs: Any) -> Any:
        method = own or getattr(type(component), name).__get__(component)
        return method(*args, **inputs)

    return call
