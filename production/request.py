"""Turns an OpenAI request into a prompt and parameters.

Chat front-ends send much that this model cannot use, such as tools and earlier images. It is ignored: a request is only
refused if the answer that it asks for is impossible.
"""

import json
from typing import Any, NamedTuple

from fastapi import HTTPException

from .text import text_of, text_of_part, whole

PARAMETERS = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "response_format", "reasoning_effort", "verbosity"),
)
MAX_PARAMETERS_KIB = 64  # Haystack deep-copies them on the event loop, and large ones would hold up all streams

NO_TEXT = "messages must have text from the user."
UNKNOWN_ROLE = "messages must each have one of OpenAI's roles."
NOT_ONLY_TEXT = "messages: this model reads text only, so remove the image or file from your last message."
BLANK = "messages: your last message is blank, so write something."
ONE_CHOICE = "n must be 1."
NO_TOOLS = "tool_choice must be auto or none, as this model answers with text only."
INVALID_PARAMETERS = f"must be valid JSON of at most {MAX_PARAMETERS_KIB} KiB together."


class Conversation(NamedTuple):
    """The text in the messages of a request."""

    system_prompt: str | None  # from the system messages before the first turn
    prompt: str  # all turns, with their roles; if there is only one, its text alone
    question: str  # the last text from the user; if there is none, from the system
    turns: list[dict[str, str]]  # each with `role` and `content`, for a generator that takes ChatMessages


def parse_messages(messages: list[dict[str, Any]]) -> Conversation:
    """Return the conversation in the messages; raises HTTPException if there is nothing to answer."""
    instructions: list[str] = []
    turns: list[dict[str, str]] = []
    problem = None  # with the last message from the user, unless the assistant has answered it
    for message in messages:
        role, content = message.get("role"), message.get("content")
        text = whole(text_of(content, separator="\n"))
        match role:
            case "system" | "developer":
                role = "system"
            case "user":
                problem = problem_with(content)
            case "assistant":
                problem = None if text.strip() else problem
            case "tool" | "function":
                continue
            case _:
                raise HTTPException(400, UNKNOWN_ROLE)
        if text.strip() and role == "system" and not turns:
            instructions.append(text)
        elif text.strip():
            # Also a system message: some agents send the results of their tools in this way.
            turns.append({"role": role, "content": text})
    if problem:
        raise HTTPException(400, problem)
    system_prompt = "\n".join(instructions) or None
    if system_prompt and not any(turn["role"] == "user" for turn in turns):
        # Some front-ends ask for a title in a system message, without a message from the user.
        turns.insert(0, {"role": "system", "content": system_prompt})
        system_prompt = None
    questions = [turn["content"] for role in ("user", "system") for turn in reversed(turns) if turn["role"] == role]
    if not questions:
        raise HTTPException(400, NO_TEXT)
    lines = [f"{turn['role']}: {turn['content']}" for turn in turns]
    prompt = "\n\n".join(lines) if len(turns) > 1 else turns[0]["content"]
    return Conversation(system_prompt, prompt, questions[0], turns)


def problem_with(content: Any) -> str | None:
    """Return a sentence that tells the user why a message cannot be answered, or None if it can."""
    if isinstance(content, list) and None in map(text_of_part, content):
        return NOT_ONLY_TEXT
    return None if text_of(content).strip() else BLANK


def parse_parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters in a request's body, without its other fields; raises HTTPException."""
    if body.get("n") not in (None, 1):
        raise HTTPException(400, ONE_CHOICE)
    match body.get("tool_choice"):
        case "required" | {"type": "function" | "custom"} | {"allowed_tools": {"mode": "required"}}:
            raise HTTPException(400, NO_TOOLS)
    # An empty value means nothing, and some models refuse it.
    parameters = {name: body[name] for name in PARAMETERS if body.get(name) not in (None, "", [], {})}
    try:
        size = len(json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):  # a NaN, a lone surrogate or too many levels
        size = -1
    if not 0 <= size <= MAX_PARAMETERS_KIB * 1024:
        raise HTTPException(400, f"{', '.join(parameters)} {INVALID_PARAMETERS}")
    return parameters
