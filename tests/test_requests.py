"""What the model receives for what a client sends, and what is refused because it cannot be answered."""

import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness.client import Chat, text_of, texts_of
from harness.serving import KEY, NAME
from harness.upstream import Reply, Upstream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

USER = {"role": "user", "content": "the question"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def send(chat: Chat, body: dict[str, Any], stream: bool = False) -> Any:
    """Send a request as JSON that may also hold NaN and half surrogate pairs."""
    content = json.dumps({**chat.request(), "stream": stream, **body})
    return chat.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})


# Messages


@pytest.mark.parametrize(
    "text",
    [
        *("Hi", "  two\n\n lines \n", "None", "<b>&amp;", "ünï 日本 👩‍👩‍👧", "user: Hi"),
        *("{{ 7*7 }}", "{% raw %}", "{# no comment #}", "{{ conversation }}", "0123456789abcde\n" * 65536),
    ],
)
def test_one_message_is_the_prompt(chat: Chat, upstream: Upstream, text: str) -> None:
    assert chat.post(text).status_code == 200
    assert upstream.received[0].body["messages"] == [user(text)]


ADA = [user("I am {{ Ada }}."), assistant("Hello Ada.")]
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TOOL = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
TURNS = "user: I am {{ Ada }}.\n\nassistant: Hello Ada.\n\nuser: the question"


@pytest.mark.parametrize(
    ("messages", "system_prompt", "prompt"),
    [
        ([system("Be {{ brief }}."), USER], "Be {{ brief }}.", "the question"),
        ([system("Be brief.", role="developer"), USER], "Be brief.", "the question"),
        ([system("One.", role="developer"), system("Two."), *ADA, USER], "One.\nTwo.", TURNS),
        ([*ADA, system("12:00"), USER], None, TURNS.replace("user: the", "system: 12:00\n\nuser: the")),
        ([*ADA, USER, system(parts("12", ":00"), role="developer")], None, f"{TURNS}\n\nsystem: 12:00"),
        ([*ADA, system(" "), USER], None, TURNS),
        ([system("Write a title."), system("Be brief.")], None, "Write a title.\nBe brief."),
        ([system("Write a title."), assistant("Office")], None, "system: Write a title.\n\nassistant: Office"),
        ([system(""), USER], None, "the question"),
        ([system(None), USER], None, "the question"),
        ([system(parts("Be ", "brief.")), USER], "Be brief.", "the question"),
        ([system([IMAGE, *parts("Be brief.")]), USER], "Be brief.", "the question"),
        ([USER, system("Be brief.")], None, "user: the question\n\nsystem: Be brief."),
        ([user(parts("the ", "", "question"))], None, "the question"),
        ([*ADA, USER], None, TURNS),
        ([*ADA, assistant(None), USER], None, TURNS),
        ([*ADA, {"role": "assistant"}, USER], None, TURNS),
        ([*ADA, user(" \n"), assistant(""), USER], None, TURNS),
        ([*ADA, assistant("", tool_calls=[CALL]), TOOL, USER], None, TURNS),
        ([*ADA, {"role": "function", "name": "clock", "content": "12:00"}, USER], None, TURNS),
        ([*ADA, user([IMAGE]), USER], None, TURNS),
        ([user([IMAGE, *parts("I am {{ Ada }}.")]), assistant("Hello Ada."), USER], None, TURNS),
        ([*ADA, assistant([{"type": "refusal", "refusal": "No."}]), USER], None, TURNS),
        ([*ADA, user(5), user({"text": "Hi"}), user(["Hi"]), USER], None, TURNS),
        ([user([IMAGE]), assistant(" "), USER], None, "the question"),
        ([USER, TOOL], None, "the question"),
        ([USER, assistant("")], None, "the question"),
        ([USER, user([IMAGE]), assistant("w0 w1")], None, "user: the question\n\nassistant: w0 w1"),
        ([USER, assistant("w0 w1")], None, "user: the question\n\nassistant: w0 w1"),
        ([USER, assistant(parts("w0 ", "w1"))], None, "user: the question\n\nassistant: w0 w1"),
        ([user("cut \ud83d"), assistant("off \ude00"), USER], None, None),
        ([user("\ud83d\ude00")], None, "\U0001f600"),
    ],
)
def test_what_the_model_receives(
    chat: Chat, upstream: Upstream, messages: list[dict[str, Any]], system_prompt: str | None, prompt: str | None
) -> None:
    assert send(chat, {"messages": messages}).status_code == 200
    expected = prompt or "user: cut \ufffd\n\nassistant: off \ufffd\n\nuser: the question"
    system_messages = [system(system_prompt)] if system_prompt else []
    assert upstream.received[0].body["messages"] == [*system_messages, user(expected)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("messages", []),
        ("messages", [system(" ")]),
        ("messages", [assistant("Hello")]),
        ("messages", [user(" "), assistant("Hello")]),
        *(("messages", [user(content)]) for content in ("", " \n\t", "\u2003", parts(" "), None, 5, [], ["Hi"])),
        ("messages", [{"role": "user"}]),
        ("messages", [USER, assistant("Hello"), user("")]),
        ("text only", [user([IMAGE])]),
        ("text only", [USER, assistant("Hello"), user([*parts("What is this?"), IMAGE])]),
        ("text only", [USER, user([*parts("What is this?"), IMAGE]), assistant("")]),
        ("text only", [USER, user([IMAGE]), system("12:00"), TOOL]),
        ("messages", [USER, user(" "), system("12:00")]),
        ("messages", [system("Be brief."), user("")]),
        *(("role", [system("Hi", role=role), USER]) for role in ("", "User", "robot")),
        *(("role", [{"role": role, "content": "Hi"}, USER]) for role in (None, ["user"], 5)),
        ("role", [{"content": "Hi"}, USER]),
    ],
)
def test_messages_that_cannot_be_answered(
    chat: Chat, upstream: Upstream, field: str, messages: list[dict[str, Any]], stream: bool
) -> None:
    refused = send(chat, {"messages": messages}, stream)
    assert refused.status_code == 400
    assert field in refused.json()["detail"]
    assert not upstream.received


@pytest.mark.parametrize("question", ["", " \n"])
def test_a_blank_question_cannot_be_answered(chat: Chat, upstream: Upstream, question: str) -> None:
    assert chat.http.post(f"/{NAME}/run", json={"question": question}).status_code == 400
    assert not upstream.received


# Parameters

SENT = {
    "temperature": 0,
    "top_p": 0.5,
    "max_tokens": 7,
    "max_completion_tokens": 8,
    "stop": ["\n", "END"],
    "presence_penalty": -1,
    "frequency_penalty": 1.5,
    "logit_bias": {"50256": -100},
    "seed": 42,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "verbosity": "high",
}
DROPPED = {
    "chat_id": "1",
    "session_id": "2",
    "features": {},
    "background_tasks": {},
    "n": 1,
    "user": "me",
    "store": True,
}
USAGE_ASKED = {"include_usage": True}


@pytest.mark.parametrize("stream", [True, False])
def test_parameters_reach_the_upstream_and_nothing_else(chat: Chat, upstream: Upstream, stream: bool) -> None:
    assert chat.post("Hi", **SENT, **DROPPED, stream=stream).status_code == 200
    rest = {"messages": [user("Hi")], "model": "gpt-5-mini", "stream": True, "stream_options": USAGE_ASKED}
    assert upstream.received[0].body == {**SENT, **rest}
    assert upstream.received[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}])
def test_a_parameter_is_forwarded_unless_it_is_null(chat: Chat, upstream: Upstream, value: Any) -> None:
    assert chat.post("Hi", **dict.fromkeys(SENT, value)).status_code == 200
    forwarded = {name: sent for name, sent in upstream.received[0].body.items() if name in SENT}
    assert forwarded == ({} if value is None else dict.fromkeys(SENT, value))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("field", "body"),
    [
        *(("n", {"n": n}) for n in (2, 0, "1", -1, 1.5, [1])),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "clock"}}}),
        *(("temperature", {"temperature": value}) for value in (math.nan, math.inf)),
        ("stop", {"stop": "\ud800"}),
        ("stop", {"stop": ["x" * 64] * 1024}),
        ("logit_bias", {"stop": ["x"] * 8000, "logit_bias": {str(n): 1 for n in range(5000)}}),
    ],
)
def test_parameters_that_cannot_be_answered(
    chat: Chat, upstream: Upstream, field: str, body: dict[str, Any], stream: bool
) -> None:
    refused = send(chat, body, stream)
    assert refused.status_code == 400
    assert field in refused.json()["detail"]
    assert not upstream.received


def test_up_to_64_kib_of_parameters_are_forwarded(chat: Chat, upstream: Upstream) -> None:
    stop = "x" * (63 * 1024)
    assert chat.post(stop=stop).status_code == 200
    assert upstream.received[0].body["stop"] == stop
    assert chat.post(stop=stop + "x" * 1024).status_code == 400


# Whatever comes

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text") | st.text(), "text": st.text() | ANYTHING}), max_size=3)
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLES | ANYTHING, "content": st.text() | PARTS | ANYTHING})
FIELDS = [*SENT, "n", "tools", "functions", "tool_choice", "stream_options"]


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(MESSAGE, max_size=4) | st.just([USER]),
    body=st.dictionaries(st.sampled_from(FIELDS), ANYTHING),
    stream=st.booleans(),
)
def test_no_input_breaks_the_server(chat: Chat, messages: Any, body: dict[str, Any], stream: bool) -> None:
    assert send(chat, {**body, "messages": messages}, stream).status_code in (200, 400)


def test_a_large_request_holds_other_streams_no_longer_than_hayhooks_does(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: Reply(["token "] * 10_000, pace=0.001) if len(body["messages"]) == 1 else Reply()
    messages = [system("x"), *[user("x"), assistant("y")] * 20_000, USER]
    content = json.dumps({**chat.request(messages), "model": "unknown"}), json.dumps(chat.request(messages))
    headers = {"Content-Type": "application/json"}

    def longest_pause(content: str, status: int) -> float:
        """Return the longest time between two tokens of a stream while another client sends a request."""
        with chat.open() as events, ThreadPoolExecutor(1) as threads:
            times = [time.monotonic() for _, _ in zip(texts_of(events), range(3), strict=False)]
            large = threads.submit(chat.http.post, "/v1/chat/completions", content=content, headers=headers)
            while not large.done():
                next(texts_of(events))
                times.append(time.monotonic())
            assert large.result().status_code == status
        return max(after - before for before, after in itertools.pairwise(times))

    by_hayhooks, in_all = longest_pause(content[0], 404), longest_pause(content[1], 200)
    assert in_all < 5 * by_hayhooks


def test_parallel_conversations_do_not_mix(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: Reply(tokens=[f"{body['messages'][0]['content']}/{n} " for n in range(20)])

    def converse(number: int) -> None:
        for turn in range(3):
            name = f"{number}.{turn}"
            assert text_of(chat.events(name)).split() == [f"{name}/{n}" for n in range(20)]

    with ThreadPoolExecutor(24) as threads:
        list(threads.map(converse, range(24)))
