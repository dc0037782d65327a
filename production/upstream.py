"""Lets an OpenAIGenerator cope with what OpenAI-compatible upstreams refuse and send."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import openai
from hayhooks import log
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk, ChoiceDelta

from .request import PARAMETERS
from .text import text_of

if TYPE_CHECKING:  # Haystack 3 has no OpenAIGenerator, but the rest of this package works there
    from haystack.components.generators import OpenAIGenerator

Generator = TypeVar("Generator", bound="OpenAIGenerator")

# Without `stop`, `response_format` or `logit_bias`, an answer would be a different one.
DISPENSABLE = [name for name in PARAMETERS if name not in ("stop", "response_format", "logit_bias")]
OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
MAX_REMEMBERED = 200  # refusals


def tolerant(llm: Generator) -> Generator:
    """Let an OpenAIGenerator cope with what OpenAI-compatible upstreams refuse and send, and return it.

    OpenAIGenerator calls the SDK's `create` and iterates over what it returns, so this replaces `create`.

    Raises TypeError for any other component.
    """
    if "OpenAIGenerator" not in [cls.__name__ for cls in type(llm).__mro__]:
        raise TypeError(f"{type(llm).__name__} is not an OpenAIGenerator: leave out tolerant.")
    if "_is_tolerant" in vars(llm):
        return llm
    llm._is_tolerant = True  # type: ignore[attr-defined]
    create, refusals = llm.client.chat.completions.create, Refusals()

    def tolerant_create(**arguments: Any) -> Any:
        if not arguments.get("stream"):
            return refusals.leave_out(create, arguments)
        arguments["stream_options"] = {"include_usage": True}  # traces need it, too
        return read(lambda: refusals.leave_out(create, arguments))

    llm.client.chat.completions.create = tolerant_create  # type: ignore[method-assign]
    return llm


class Refusals:
    """Remembers what a model has refused.

    A model may refuse a parameter only beside certain others, such as `temperature` beside `reasoning_effort: high`. So
    a refusal is remembered together with all parameters that were sent, and each combination is refused only once.
    """

    def __init__(self) -> None:
        self._remembered: deque[tuple[str, int]] = deque(maxlen=MAX_REMEMBERED)  # names, and hashes of combinations

    def leave_out(self, create: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the SDK's `create` without the parameters that the model refuses."""
        sent, refused = dict(arguments), set[str]()
        while name := next((name for name in sent if name not in refused and self._has(name, sent)), None):
            drop(name, sent, refused)
        while True:  # each round refuses one more, so this ends
            try:
                return create(**sent)
            except openai.BadRequestError as error:
                name, of_value = error.param, error.code == "unsupported_value"
                if (
                    name not in sent
                    or name not in DISPENSABLE
                    or not (of_value or error.code == "unsupported_parameter")
                ):
                    raise
                refusal, value = (name, combination(name, sent, of_value)), repr(sent[name])
                if not drop(name, sent, refused):
                    raise
                if all(name != known for known, _ in self._remembered):
                    log.warning("The model does not support {}={:.100}, so it is left out.", name, value)
                self._remembered.append(refusal)

    def _has(self, name: str, sent: dict[str, Any]) -> bool:
        known = [key for known_name, key in self._remembered if known_name == name]
        return bool(known) and any(combination(name, sent, of_value) in known for of_value in (True, False))


def combination(name: str, sent: dict[str, Any], of_value: bool) -> int:
    """Return what stands for a parameter, with its value or with any, beside the others. Values can be large."""
    others = sorted((other, sent[other]) for other in PARAMETERS if other in sent and other != name)
    return hash(repr((sent[name] if of_value else None, others)))


def drop(name: str, sent: dict[str, Any], refused: set[str]) -> bool:
    """Remove a refused parameter from those to send; a limit gets its other name.

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


def read(open_stream: Callable[[], Any]) -> Iterator[ChatCompletionChunk]:
    """Yield the chunks of an upstream's stream; raises what its SDK raises, and ValueError if there is no choice."""
    has_choice, is_whole, has_early_reason = False, False, False
    try:
        # Without `with`, the connection would stay open until a garbage collection.
        with open_stream() as chunks:
            for chunk in chunks:
                normalize(chunk)
                for choice in chunk.choices:
                    has_choice = True
                    has_early_reason = has_early_reason or (is_whole and bool(choice.delta.content))
                    is_whole = is_whole or bool(choice.finish_reason)
                yield chunk
    except Exception:
        # After the finish_reason, some upstreams cut the connection, or stall until a timeout. Others send it too
        # early, even with each chunk: after further text, only a proper end counts.
        if not is_whole or has_early_reason:
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
