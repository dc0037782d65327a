"""From an OpenAI request to a prompt and parameters. What chat front-ends send by default is dropped, not refused."""

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
    """What the messages of a request say."""

    system_prompt: str | None  # the instructions before the first turn
    prompt: str  # all turns, each after its role; a single one as it is
    question: str  # the last text from the user, for instance to search for


def parse_messages(messages: list[dict[str, Any]]) -> Conversation:
    """Return the conversation in the messages; raises HTTPException if there is nothing to answer."""
    instructions: list[str] = []
    turns: list[tuple[str, str]] = []
    refusal = None  # of the last turn
    for message in messages:
        role, content = message.get("role"), message.get("content")
        text = text_of(content)
        match role:
            case "system" | "developer":
                if text.strip() and turns:
                    turns.append(("system", text))  # agents without tools put their tools' results there
                elif text.strip():
                    instructions.append(text)
            case "user":
                refusal = refusal_of(content)
                if text.strip():
                    turns.append(("user", text))
            case "assistant":
                if text.strip():  # as the last turn, it is there to be continued
                    refusal = None
                    turns.append(("assistant", text))
            case "tool" | "function":
                pass
            case _:
                raise HTTPException(400, "Each of the messages must have a role that OpenAI's API knows.")
    if refusal:
        raise HTTPException(400, refusal)
    system_prompt = "\n".join(instructions) or None
    questions = [text for role, text in turns if role == "user"]
    if not questions:
        if not system_prompt:
            raise HTTPException(400, "The messages must have text from the user.")
        # Some front-ends ask for a title with a system prompt alone.
        turns.insert(0, ("system", system_prompt))
        questions, system_prompt = [system_prompt], None
    prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)
    return Conversation(system_prompt, prompt, questions[-1])


def text_of(content: Any) -> str:
    """Return the text in a message's content, which is a string, a list of parts or null."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if is_text_part(part))
    return replace_lone_surrogates(content) if isinstance(content, str) else ""


def refusal_of(content: Any) -> str | None:
    """Return why a message from the user cannot be answered, in a sentence for that user, or None if it can."""
    if isinstance(content, list) and not all(is_text_part(part) for part in content):
        return "This model reads text only: remove the image or other file from the last of the messages."
    if not text_of(content).strip():
        return "The last of the messages is blank: write something."
    return None


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def replace_lone_surrogates(text: str) -> str:
    """Replace what UTF-8 cannot encode: halves of surrogate pairs, which JavaScript's `slice` can leave."""
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
        # Haystack deep-copies the parameters on the event loop, where all streams wait for it.
        is_acceptable = len(json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode()) <= 64 * 1024
    except (ValueError, RecursionError):  # a NaN, a lone surrogate or too many levels
        is_acceptable = False
    if not is_acceptable:
        raise HTTPException(400, f"{', '.join(parameters)} must be valid JSON of at most 64 KiB together.")
    return parameters
