"""Lets an OpenAIGenerator cope with what OpenAI-compatible upstreams refuse and send."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import openai
from hayhooks import log
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk, ChoiceDelta

from .request import PARAMETERS, text_of

if TYPE_CHECKING:  # Haystack 3 has no OpenAIGenerator, but the rest of this package works there
    from haystack.components.generators import OpenAIGenerator

Generator = TypeVar("Generator", bound="OpenAIGenerator")

# Without `stop`, `response_format` or `logit_bias`, an answer would be a different one.
DISPENSABLE = tuple(name for name in PARAMETERS if name not in ("stop", "response_format", "logit_bias"))


def tolerant(llm: Generator) -> Generator:
    """Let an OpenAIGenerator cope with what OpenAI-compatible upstreams refuse and send, and return it.

    OpenAIGenerator calls the SDK's `create` and iterates over what it returns, so this replaces `create`.
    """
    create = llm.client.chat.completions.create
    refused: set[tuple[str, str | None]] = set()  # a name with a value, or with None for all values

    def is_refused(name: str, value: Any) -> bool:
        return (name, None) in refused or (name, repr(value)) in refused

    def without_refused(arguments: dict[str, Any]) -> dict[str, Any]:
        if "max_tokens" in arguments and ("max_tokens", None) in refused:  # newer models use another name for it
            arguments.setdefault("max_completion_tokens", arguments["max_tokens"])
        return {name: value for name, value in arguments.items() if not is_refused(name, value)}

    def create_without_refused(**arguments: Any) -> Any:
        while True:  # each round leaves out one more, so this ends
            sent = without_refused(arguments)
            try:
                return create(**sent)
            except openai.BadRequestError as error:
                if error.param not in DISPENSABLE or error.param not in sent:
                    raise
                value = sent[error.param]
                match error.code:
                    case "unsupported_parameter":
                        refused.add((error.param, None))
                    case "unsupported_value":
                        refused.add((error.param, repr(value)))
                    case _:
                        raise
                log.warning("The model does not support {}={!r}, so it is left out.", error.param, value)

    def read(**arguments: Any) -> Iterator[ChatCompletionChunk]:
        arguments["stream_options"] = {"include_usage": True}  # traces need it, too
        has_finished = False
        try:
            # Without `with`, the connection would stay open until a garbage collection.
            with create_without_refused(**arguments) as chunks:
                for chunk in chunks:
                    normalize(chunk)
                    has_finished = has_finished or any(choice.finish_reason for choice in chunk.choices)
                    yield chunk
        except Exception:
            if not has_finished:  # after the finish_reason, some upstreams cut the connection, or stall until a timeout
                raise

    def tolerant_create(**arguments: Any) -> Any:
        return read(**arguments) if arguments.get("stream") else create_without_refused(**arguments)

    llm.client.chat.completions.create = tolerant_create  # type: ignore[method-assign]
    return llm


def normalize(chunk: ChatCompletionChunk) -> None:
    """Change a chunk in place, so that OpenAIGenerator can read what some upstreams send."""
    chunk.choices = chunk.choices or []  # null or missing
    for choice in chunk.choices:
        choice.delta = choice.delta or ChoiceDelta()  # null or missing
        # If a schema was asked for, OpenAI sends a refusal in place of content. Mistral sends content in parts.
        choice.delta.content = text_of(choice.delta.content or choice.delta.refusal)
        choice.delta.tool_calls = None  # the request offered no tools
