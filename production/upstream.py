"""Lets an OpenAIGenerator work with upstreams that refuse some parameters or send unusual chunks."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
from hayhooks import log
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk, ChoiceDelta

from .request import PARAMETERS
from .text import text_of

# Without `stop`, `response_format` or `logit_bias`, an answer could break its caller.
DISPENSABLE = [name for name in PARAMETERS if name not in ("stop", "response_format", "logit_bias")]
OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
MAX_KNOWN = 200  # refusals


def tolerant(llm: Any) -> Any:
    """Let an OpenAIGenerator work with upstreams that refuse some parameters or send unusual chunks, and return it.

    Raises TypeError for any other component.
    """
    # Haystack 3 has no such class to import, but the rest of this package works there.
    if "OpenAIGenerator" not in [cls.__name__ for cls in type(llm).__mro__]:
        raise TypeError(f"{type(llm).__name__} is not an OpenAIGenerator: leave out tolerant.")
    if "_is_tolerant" in vars(llm):
        return llm
    create, refusals = llm.client.chat.completions.create, Refusals()

    def tolerant_create(**arguments: Any) -> Any:
        for limit, other in OTHER_LIMIT.items():  # upstreams refuse both, as when a request has not the default's name
            if limit in llm.generation_kwargs and other in arguments and other not in llm.generation_kwargs:
                arguments.pop(limit, None)
        if not arguments.get("stream"):
            return refusals.create_without_refused(create, arguments)
        arguments["stream_options"] = {"include_usage": True}  # traces also need the usage
        return read_stream(lambda: refusals.create_without_refused(create, arguments))

    # OpenAIGenerator calls the SDK's `create`, and iterates over what it returns.
    llm.client.chat.completions.create, llm._is_tolerant = tolerant_create, True
    return llm


class Refusals:
    """The parameters that a model has refused.

    A model may refuse one only in combination with others, such as `temperature` beside `reasoning_effort: high`. So a
    refusal is known by all parameters that were sent, and applies to requests with the same ones.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._logged: set[str] = set()

    def create_without_refused(self, create: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the SDK's `create`, without what the model is known to refuse, and again without what it refuses now."""
        sent, refused = dict(arguments), set[str]()
        while name := next((name for name in sent if name not in refused and self._is_refused(name, sent)), None):
            drop(name, sent, refused)
        while True:  # each round refuses one more, so this ends
            try:
                return create(**sent)
            except openai.BadRequestError as error:
                name, is_refusal = error.param, error.code in ("unsupported_parameter", "unsupported_value")
                if not is_refusal or name not in DISPENSABLE or name not in sent:
                    raise
                value, refusal = sent[name], fingerprint(name, sent, error.code == "unsupported_value")
                if not drop(name, sent, refused):
                    raise
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known.add(refusal)
            if name not in self._logged:
                self._logged.add(name)
                log.warning("The model does not support {}={:.100}, so it is left out.", name, repr(value))

    def _is_refused(self, name: str, sent: dict[str, Any]) -> bool:
        return any(
            fingerprint(name, sent, only_this_value) in self._known for only_this_value in (True, False) if self._known
        )


def fingerprint(name: str, sent: dict[str, Any], only_this_value: bool) -> int:
    """Return a hash of a parameter, with its value or whatever its value, and of all others: values can be large."""
    others = [(other, sent[other]) for other in PARAMETERS if other in sent and other != name]
    return hash(repr((name, sent[name] if only_this_value else None, others)))


def drop(name: str, sent: dict[str, Any], refused: set[str]) -> bool:
    """Remove a refused parameter from those to send; a limit is sent under its other name.

    Returns False, and removes nothing, if both names of a limit are refused: the answer would have no limit.
    """
    refused.add(name)
    other = OTHER_LIMIT.get(name)
    if other in refused:
        return False
    value = sent.pop(name)
    if other:
        sent.setdefault(other, value)
    return True


def read_stream(open_stream: Callable[[], Any]) -> Iterator[ChatCompletionChunk]:
    """Yield the chunks of an upstream's stream; raises what its SDK raises, and ValueError if there is no choice."""
    has_choice = has_reason = has_text_after_reason = False
    unsent: list[ChatCompletionChunk] = []
    try:
        # Without `with`, the connection would stay open until a garbage collection.
        with open_stream() as chunks:
            for chunk in chunks:
                normalize(chunk)
                for choice in chunk.choices:
                    has_choice = True
                    has_text_after_reason |= has_reason and bool(choice.delta.content)
                    has_reason |= bool(choice.finish_reason)
                unsent.append(chunk)
                if has_choice:  # before the first one, a failure can still have a status
                    yield from unsent
                    unsent.clear()
    except Exception:
        # After the finish_reason, some upstreams cut the connection, or stall until a timeout: the answer is whole.
        # Others send it too early, even with each chunk: after further text, only a proper end counts.
        if not has_reason or has_text_after_reason:
            raise
    if not has_choice:
        raise ValueError("The upstream has not answered: it sent no choice.")


def normalize(chunk: ChatCompletionChunk) -> None:
    """Change a chunk in place, so that OpenAIGenerator can read what some upstreams send."""
    chunk.choices = chunk.choices or []  # null or missing
    for choice in chunk.choices:
        choice.delta = choice.delta or ChoiceDelta()  # null or missing
        # If a schema was asked for, OpenAI sends a refusal in place of content. Mistral sends content in parts.
        choice.delta.content = text_of(choice.delta.content or choice.delta.refusal)
        choice.delta.tool_calls = None  # the request offered no tools
