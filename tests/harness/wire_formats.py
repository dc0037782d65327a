"""What the scripted upstream sends in the wire formats of providers other than OpenAI: tokens, and what is around."""

import base64
import json
import zlib
from collections.abc import Iterable
from typing import Any

from harness.upstream import Reply, Script, sse


def ollama(request: dict[str, Any], reply: Reply) -> Script:
    """Write what Ollama's `/api/generate` and `/api/chat` send."""

    def line(text: str, **fields: Any) -> bytes:
        answer = {"message": {"role": "assistant", "content": text}} if "messages" in request else {"response": text}
        return json.dumps({"model": "m", "created_at": "2026-01-01T00:00:00Z", **answer, **fields}).encode() + b"\n"

    counts = {"prompt_eval_count": 11, "eval_count": 7}
    after = [line("", done=True, done_reason=reply.finish_reason, **counts)]
    return Script("application/x-ndjson", [], (line(token, done=False) for token in reply.tokens), after)


def anthropic_events(reply: Reply) -> tuple[list[Any], Iterable[Any], list[Any]]:
    """Return the events before the tokens, with each of them, and after the last."""
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
    }
    before = [
        {"type": "message_start", "message": {**message, "usage": {"input_tokens": 11, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    ]
    deltas = ({"type": "text_delta", "text": token} for token in reply.tokens)
    reason = {"stop": "end_turn", "length": "max_tokens"}[reply.finish_reason]
    after = [
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 7}},
        {"type": "message_stop"},
    ]
    return before, ({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas), after


def anthropic(_: dict[str, Any], reply: Reply) -> Script:
    def named(event: Any) -> bytes:
        return f"event: {event['type']}\n".encode() + sse(event)

    return Script("text/event-stream", *(map(named, events) for events in anthropic_events(reply)))


def bedrock(_: dict[str, Any], reply: Reply) -> Script:
    """Write what Amazon Bedrock sends for one of Anthropic's models: its events in a binary framing."""

    def framed(event: Any) -> bytes:
        payload = json.dumps({"bytes": base64.b64encode(json.dumps(event).encode()).decode()}).encode()
        headers = b""
        for name, value in ((b":event-type", b"chunk"), (b":message-type", b"event")):
            headers += len(name).to_bytes(1, "big") + name + b"\x07" + len(value).to_bytes(2, "big") + value
        lengths = (len(headers) + len(payload) + 16, len(headers))
        message = b"".join(length.to_bytes(4, "big") for length in lengths)
        message += zlib.crc32(message).to_bytes(4, "big") + headers + payload
        return message + zlib.crc32(message).to_bytes(4, "big")

    return Script("application/vnd.amazon.eventstream", *(map(framed, events) for events in anthropic_events(reply)))


def hugging_face(_: dict[str, Any], reply: Reply) -> Script:
    """Write what Hugging Face's Text Generation Inference sends."""

    def token_event(text: str, **fields: Any) -> bytes:
        return sse({"index": 1, "token": {"id": 1, "text": text, "logprob": 0.0, "special": False}, **fields})

    reason = {"stop": "eos_token", "length": "length"}[reply.finish_reason]
    details = {"finish_reason": reason, "generated_tokens": 7, "input_length": 11}
    after = [token_event("", generated_text="".join(reply.tokens), details=details)]
    return Script("text/event-stream", [], map(token_event, reply.tokens), after)
