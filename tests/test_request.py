"""From a client's messages and parameters to what the model receives, or to a refusal that names the field."""

import contextlib
import json
import math
from functools import partial
from typing import Any

import pytest
from fastapi import HTTPException
from hypothesis import given, settings
from hypothesis import strategies as st

from production.request import parse_messages, parse_parameters


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def parts(*texts: Any, kind: str = "text") -> list[Any]:
    return [{"type": kind, "text": text} for text in texts]


system, user, assistant, tool = (partial(turn, role) for role in ("system", "user", "assistant", "tool"))
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USER, ADA = user("And now?"), [user("I am {{ Ada }}."), assistant("Hello Ada.")]
TURNS = "user: I am {{ Ada }}.\n\nassistant: Hello Ada.\n\nuser: And now?"
TEXTS = (
    "Hi",
    "  two\n\n lines \n",
    "None",
    "<b>&amp;",
    "日本 👩‍👩‍👧",
    "user: Hi",
    "{{ 7*7 }}",
    "{% raw %}",
    "{# no comment #}",
)
LEFT_OUT: list[list[Any]] = [
    *([system(" ")], [user(" \n"), assistant("")], [assistant(None), {"role": "assistant"}], [user([IMAGE])]),
    *([assistant("", tool_calls=[{"id": "c1"}]), tool("12:00")], [turn("function", "12:00")], [user(5), user(["Hi"])]),
    [assistant([{"type": "refusal", "refusal": "No."}])],
]


@pytest.mark.parametrize(
    ("messages", "system_prompt", "prompt"),
    [
        *(([user(text)], None, text) for text in TEXTS),
        *(([*ADA, *left_out, USER], None, TURNS) for left_out in LEFT_OUT),
        ([user([IMAGE]), user([IMAGE, *parts("I am {{ Ada }}.")]), ADA[1], USER], None, TURNS),
        ([user(parts("")), assistant("I see a file."), USER], None, "assistant: I see a file.\n\nuser: And now?"),
        ([system("Be {{ brief }}."), USER], "Be {{ brief }}.", "And now?"),
        ([turn("developer", "One."), system("Two."), *ADA, USER], "One.\nTwo.", TURNS),
        ([system(""), system(None), system([IMAGE, *parts("Be", "brief.")]), USER], "Be\nbrief.", "And now?"),
        ([*ADA, system("12:00"), USER], None, TURNS.replace("user: And", "system: 12:00\n\nuser: And")),
        ([*ADA, USER, turn("developer", parts("12", "00"))], None, f"{TURNS}\n\nsystem: 12\n00"),
        ([USER, system("Be brief.")], None, "user: And now?\n\nsystem: Be brief."),
        ([system("Title?"), system("Be brief.")], None, "Title?\nBe brief."),
        ([system("Title?"), assistant("Office")], None, "system: Title?\n\nassistant: Office"),
        ([assistant("Hi"), system("Title?")], None, "assistant: Hi\n\nsystem: Title?"),
        ([user(parts("Summarize:", "", None, "The sun."))], None, "Summarize:\nThe sun."),
        ([user(parts("And now?", kind="input_text"))], None, "And now?"),
        ([USER, assistant("It is")], None, "user: And now?\n\nassistant: It is"),
        ([USER, user([IMAGE]), assistant(parts("It", "is"))], None, "user: And now?\n\nassistant: It\nis"),
        ([USER, tool("12:00"), assistant(""), tool("12:00")], None, "And now?"),
        ([user("cut \ud83d"), assistant("off \ude00")], None, "user: cut \ufffd\n\nassistant: off \ufffd"),
    ],
)
def test_what_the_model_receives(messages: list[dict[str, Any]], system_prompt: str | None, prompt: str) -> None:
    conversation = parse_messages(messages)
    assert conversation[:2] == (system_prompt, prompt)
    texts = ["{role}: {content}".format(**turn) for turn in conversation.turns]
    assert prompt in ("\n\n".join(texts), conversation.turns[0]["content"])


def test_the_question_is_the_users_last_text_or_else_the_systems() -> None:
    assert parse_messages([*ADA, USER, assistant("It is"), system("12:00")]).question == "And now?"
    assert parse_messages([system("One."), system("Two."), assistant("Hi")]).question == "One.\nTwo."
    assert parse_messages([assistant("Hi"), system("Title?")]).question == "Title?"


@pytest.mark.parametrize(
    ("problem", "messages"),
    [
        *(("have text", messages) for messages in ([], [system(" ")], [ADA[1]], [user(" "), ADA[1]], [tool("Hi")])),
        *(("is blank", [user(text)]) for text in list[Any](["", " \n\t", "\u2003", None, 5, [], {"text": "Hi"}])),
        *(("is blank", [*earlier, user(parts(" ", None))]) for earlier in ([], ADA, [system("Be brief.")])),
        *(("is blank", [USER, {"role": "user"}, later]) for later in (system("12:00"), tool("12:00"), assistant(" "))),
        *(("text only", [*ADA, user([*parts("What is it?"), part])]) for part in (IMAGE, "Hi", {"type": "file"}, None)),
        *(("text only", [USER, user([IMAGE]), *later]) for later in ([system("12:00"), tool("Hi")], [assistant("")])),
        *(("role", [USER, turn(role, "Hi")]) for role in ("", "User", "robot", None, ["user"], 5)),
        ("role", [{"content": "Hi"}, USER]),
    ],
)
def test_messages_that_cannot_be_answered(problem: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(HTTPException, match=f"^400: messages.* {problem}"):
        parse_messages(messages)


NAMES = [
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "response_format", "reasoning_effort", "verbosity"),
]
DROPPED = ("model", "messages", "stream", "stream_options", "user", "tools", "functions", "chat_id", "features")
EMPTY: tuple[Any, ...] = (None, "", [], {})


@pytest.mark.parametrize("choice", [None, "auto", "none", {"type": "auto"}, {"allowed_tools": {"mode": "auto"}}])
@pytest.mark.parametrize("value", [*EMPTY, 0, 0.5, False, "low", ["END"], {"type": "json_object"}])
def test_parameters_are_forwarded_unless_empty_and_nothing_else(choice: Any, value: Any) -> None:
    sent = dict.fromkeys(NAMES, value)
    body = {**dict.fromkeys(DROPPED, 1), "n": 1, "tool_choice": choice, **sent}
    assert parse_parameters(body) == ({} if value in EMPTY else sent)


CALLS: list[Any] = ["required", {"type": "function"}, {"type": "custom"}, {"allowed_tools": {"mode": "required"}}]
KIB_64 = "é" * ((64 * 1024 - len(json.dumps({"stop": ""}))) // 2)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        *(("n", {"n": n}) for n in (2, 0, "1", -1, 1.5, [1])),
        *(("tool_choice", {"tool_choice": choice}) for choice in CALLS),
        *(("seed", {"seed": value}) for value in (math.nan, math.inf, ["\ud800"])),
        *(("stop.* KiB", body) for body in ({"stop": f"{KIB_64}x"}, {"stop": ["x"] * 9999, "logit_bias": [10] * 9999})),
    ],
)
def test_parameters_that_cannot_be_answered(field: str, body: dict[str, Any]) -> None:
    assert parse_parameters({"stop": KIB_64}) == {"stop": KIB_64}
    with pytest.raises(HTTPException, match=f"^400: {field}"):
        parse_parameters(body)


ODD = st.none() | st.booleans() | st.floats() | st.text(st.characters(exclude_categories=()))
ANYTHING = st.recursive(ODD, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
PART = st.fixed_dictionaries({"type": st.just("text") | ANYTHING, "text": ANYTHING})
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLES, "content": st.lists(PART) | ANYTHING}) | st.just(USER)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(MESSAGE), st.dictionaries(st.sampled_from([*NAMES, "n", "tool_choice"]), ANYTHING))
def test_whatever_comes_can_be_sent_or_is_refused(messages: Any, body: Any) -> None:
    with contextlib.suppress(HTTPException):
        json.dumps([parse_messages(messages), parse_parameters(body)], ensure_ascii=False, allow_nan=False).encode()
