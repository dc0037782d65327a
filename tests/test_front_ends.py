"""What chat front-ends send with their default settings is answered, whatever they add."""

from typing import Any

import pytest
from harness.client import Chat, text_of
from harness.upstream import Upstream

HELLO = {"role": "user", "content": "hello"}
PHOTO = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AAQ"}}
CALL = {"index": 0, "id": "call_7", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


OPEN_WEBUI = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [tool(f"tool_{number}") for number in range(36)],
    "chat_id": "9f0c",
    "session_id": "x1",
    "id": "m2",
    "features": {"web_search": False},
    "variables": {"{{USER_NAME}}": "Ada"},
    "background_tasks": {"title_generation": True},
    "params": {},
    "tool_ids": [],
}
TASK = {"stream": False, "max_tokens": 1000, "metadata": {"task": "title_generation"}}
LIBRECHAT = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "65f1",
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
CHAINLIT = {"stream": True}

EARLIER_IMAGE = [turn("user", [{"type": "text", "text": "What is it?"}, PHOTO]), turn("assistant", "Red."), HELLO]
SINGLE = "hello"
TWO_TURNS = "user: What is it?\n\nassistant: Red.\n\nuser: hello"


@pytest.mark.parametrize(
    ("body", "messages", "prompt"),
    [
        pytest.param(OPEN_WEBUI, [HELLO], SINGLE, id="Open WebUI: a message"),
        pytest.param({**OPEN_WEBUI, "tool_choice": "auto"}, [HELLO], SINGLE, id="tool_choice auto"),
        pytest.param({**OPEN_WEBUI, "tool_choice": "none"}, [HELLO], SINGLE, id="tool_choice none"),
        pytest.param({**OPEN_WEBUI, "tool_choice": {"type": "auto"}}, [HELLO], SINGLE, id="tool_choice type auto"),
        pytest.param({"functions": [{"name": "f"}], "stream": True}, [HELLO], SINGLE, id="functions"),
        pytest.param(
            OPEN_WEBUI,
            [turn("user", [{"type": "text", "text": ""}]), turn("assistant", "I see a file."), HELLO],
            "assistant: I see a file.\n\nuser: hello",
            id="Open WebUI: a file without text",
        ),
        pytest.param(
            OPEN_WEBUI,
            EARLIER_IMAGE,
            TWO_TURNS,
            id="Open WebUI: an earlier image",
        ),
        pytest.param(
            OPEN_WEBUI,
            [
                turn("user", "What is it?"),
                turn("assistant", "", tool_calls=[CALL]),
                turn("tool", "12:00", tool_call_id="call_7"),
                turn("assistant", "Red."),
                HELLO,
            ],
            TWO_TURNS,
            id="Open WebUI: another model's tool call",
        ),
        pytest.param(
            OPEN_WEBUI,
            [HELLO, turn("assistant", "Hello th")],
            "user: hello\n\nassistant: Hello th",
            id="Open WebUI: Continue Response",
        ),
        pytest.param(TASK, [HELLO], SINGLE, id="Open WebUI: title, tags, follow-ups"),
        pytest.param(LIBRECHAT, [HELLO], SINGLE, id="LibreChat: a message"),
        pytest.param(
            LIBRECHAT,
            EARLIER_IMAGE,
            TWO_TURNS,
            id="LibreChat: an earlier image",
        ),
        pytest.param(
            CHAINLIT,
            [turn("user", "What is it?"), turn("assistant", "Red."), HELLO],
            TWO_TURNS,
            id="Hayhooks' chat page",
        ),
    ],
)
def test_a_default_request_is_answered(
    chat: Chat, upstream: Upstream, body: dict[str, Any], messages: list[dict[str, Any]], prompt: str
) -> None:
    if body["stream"]:
        assert text_of(chat.events(messages, **{name: body[name] for name in body if name != "stream"})) == (
            "Hello, world!"
        )
    else:
        assert chat.post(messages, **body).json()["choices"][0]["message"]["content"] == "Hello, world!"
    assert upstream.received[0].body["messages"] == [{"role": "user", "content": prompt}]
    assert not {"tools", "functions", "tool_choice", "metadata", "chat_id", "user"} & set(upstream.received[0].body)


def test_an_image_in_the_last_message_is_refused_with_a_sentence(chat: Chat, upstream: Upstream) -> None:
    refused = chat.post([turn("user", [{"type": "text", "text": "What is it?"}, PHOTO])], **OPEN_WEBUI)
    assert refused.status_code == 400
    assert "text only" in refused.json()["detail"]
    assert not upstream.received
