"""Makes a component end when its client leaves. The component needs no change."""

import asyncio
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from .lockstep import CURRENT_LOCKSTEP, Callback, Lockstep

Component = TypeVar("Component", bound=Any)


def stoppable(component: Component) -> Component:
    """Make a component end when its client leaves, and return it.

    In an answer, a sync component that Hayhooks runs in a thread gets at most eight chunks ahead of its client. When
    the client has left, the `streaming_callback` raises a BaseException, and the streams in the component's local
    variables are closed. An async component is cancelled. Outside of an answer, nothing changes.

    Raises TypeError if the component's `run` takes no `streaming_callback`.
    """
    if "streaming_callback" not in getattr(component, "__haystack_input__", ()):  # the inputs that Haystack knows
        raise TypeError(f"{type(component).__name__} is not a component whose run takes a streaming_callback.")
    original_run = late_bound(component, "run")

    @functools.wraps(type(component).run)  # Haystack and Hayhooks read its signature
    def run(self: Any, *args: Any, **inputs: Any) -> Any:
        lockstep, callback = CURRENT_LOCKSTEP.get(), inputs.get("streaming_callback")
        if lockstep is None:  # outside of an answer
            return original_run(self, *args, **inputs)
        if callback is not None and not inspect.iscoroutinefunction(callback):  # Haystack refuses an async one
            inputs["streaming_callback"] = in_step(lockstep, self, callback)
        return lockstep.run(functools.partial(original_run, self, *args, **inputs))

    component.run = MethodType(run, component)  # a deep copy of the component gets a method of its own
    if hasattr(component, "run_async"):
        original_run_async = late_bound(component, "run_async")

        @functools.wraps(type(component).run_async)
        async def run_async(self: Any, *args: Any, **inputs: Any) -> Any:
            lockstep, call = CURRENT_LOCKSTEP.get(), functools.partial(original_run_async, self, *args, **inputs)
            return await (call() if lockstep is None else lockstep.run_async(call))

        component.run_async = MethodType(run_async, component)
    return component


def in_step(lockstep: Lockstep, component: Any, callback: Callback) -> Callback:
    """Return the callback for a run of a sync component in an answer."""
    leads_to_client = (getattr(callback, "__module__", None) or "").startswith("hayhooks.")
    if leads_to_client and asyncio._get_running_loop() is None:  # on the event loop's thread, waiting would block it
        return lockstep.waiting_callback(component, callback)
    return lockstep.stopping_callback(callback)


def late_bound(component: Any, name: str) -> Callable[..., Any]:
    """Return a function that calls a component's method, and looks it up in the class each time: tracers replace it."""
    own = vars(component).get(name)  # a replacement for this component alone
    return lambda self, *args, **inputs: (own or getattr(type(self), name).__get__(self))(*args, **inputs)
