"""Turns an OpenAI request into a prompt and parameters.

Chat front-ends send much that this model cannot use, such as tools and earlier images. It is ignored: a request is only
refused if the answer that it asks for is impossible.
"""

import json
from typing import Any, NamedTuple

from fastapi import HTTPException

PARAMETERS = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "response_format",
    "reasoning_effort",
    "verbosity",
)


class Conversation(NamedTuple):
    """The text in the messages of a request."""

    system_prompt: str | None  # from the system messages before the first turn
    prompt: str  # all turns, with their roles; if there is only one, its text alone
    question: str  # the last text from the user; if there is none, the system prompt


def parse_messages(messages: list[dict[str, Any]]) -> Conversation:
    """Return the conversation in the messages; raises HTTPException if there is nothing to answer."""
    instructions: list[str] = []
    turns: list[tuple[str, str]] = []
    problem = None  # with the last turn so far
    for message in messages:
        role, content = message.get("role"), message.get("content")
        text = text_of(content)
        match role:
            case "system" | "developer":
                if text.strip() and turns:
                    turns.append(("system", text))  # some agents send the results of their tools in this way
                elif text.strip():
                    instructions.append(text)
            case "user":
                problem = problem_with(content)
                if text.strip():
                    turns.append(("user", text))
            case "assistant":
                if text.strip():  # as the last turn, it asks the model to continue it
                    problem = None
                    turns.append(("assistant", text))
            case "tool" | "function":
                pass
            case _:
                raise HTTPException(400, "Each of the messages must have one of OpenAI's roles.")
    if problem:
        raise HTTPException(400, problem)
    system_prompt = "\n".join(instructions) or None
    questions = [text for role, text in turns if role == "user"]
    if not questions:
        if not system_prompt:
            raise HTTPException(400, "The messages must have text from the user.")
        # Some front-ends ask for a title in a system message, without a message from the user.
        turns.insert(0, ("system", system_prompt))
        questions, system_prompt = [system_prompt], None
    prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)
    return Conversation(system_prompt, prompt, questions[-1])


def text_of(content: Any) -> str:
    """Return the text in a message's content, which is a string, a list of parts or null."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if is_text_part(part))
    return replace_lone_surrogates(content) if isinstance(content, str) else ""


def problem_with(content: Any) -> str | None:
    """Return a sentence that tells the user why a message cannot be answered, or None if it can."""
    if isinstance(content, list) and not all(is_text_part(part) for part in content):
        return "This model reads text only: remove the image or file from the last of your messages."
    if not text_of(content).strip():
        return "The last of your messages is blank: write something."
    return None


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def replace_lone_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which UTF-8 cannot encode. JavaScript's `slice` makes them out of emojis."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters in a request's body, without its other fields; raises HTTPException."""
    if body.get("n") not in (None, 1):
        raise HTTPException(400, "n must be 1.")
    match body.get("tool_choice"):
        case "required" | {"type": "function" | "custom"}:
            raise HTTPException(400, "tool_choice must be auto or none, as this model answers with text only.")
    parameters = {name: body[name] for name in PARAMETERS if body.get(name) is not None}
    try:
        # Haystack deep-copies the parameters on the event loop, and large ones would hold up all streams.
        is_acceptable = len(json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode()) <= 64 * 1024
    except (ValueError, RecursionError):  # a NaN, a lone surrogate or too many levels
        is_acceptable = False
    if not is_acceptable:
        raise HTTPException(400, f"{', '.join(parameters)} must be valid JSON of at most 64 KiB together.")
    return parameters
