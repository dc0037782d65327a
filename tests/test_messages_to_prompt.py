"""What the model receives for what a client sends."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness.client import Chat, text_of
from harness.serving import KEY
from harness.upstream import Reply, Upstream
from haystack.components.builders import PromptBuilder

from pipeline_wrapper import PARAMETERS, PROMPT, read_messages, read_parameters

USER = {"role": "user", "content": "the question"}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ADA = [{"role": "user", "content": "I am {{ Ada }}."}, {"role": "assistant", "content": "Hello Ada."}]


@pytest.mark.parametrize(
    "text",
    [
        *("Hi", "  two\n\n lines \n", "None", "<b>&amp;", "ünï 日本 👩‍👩‍👧", "user: Hi"),
        *("{{ 7*7 }}", "{% raw %}", "{# no comment #}", "{{ history }}", "0123456789abcde\n" * 65536),
    ],
)
def test_one_message_is_the_prompt(text: str) -> None:
    system_prompt, history, question = read_messages([{"role": "user", "content": text}])
    assert system_prompt is None
    assert PromptBuilder(PROMPT).run(history=history, question=question) == {"prompt": text}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "system_prompt", "history"),
    [
        ([USER], None, ""),
        ([system("Be brief."), USER], "Be brief.", ""),
        ([system("Be brief.", role="developer"), USER], "Be brief.", ""),
        (
            [system("One.", role="developer"), *ADA, system("Two."), USER],
            "One.\nTwo.",
            "user: I am {{ Ada }}.\n\nassistant: Hello Ada.",
        ),
        ([system(""), USER], None, ""),
        ([system(parts("Be ", "brief.")), USER], "Be brief.", ""),
        ([USER, {"role": "assistant", "content": None}, USER], None, "user: the question"),
        ([USER, {"role": "assistant"}, USER], None, "user: the question"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, USER], None, ""),
        ([{"role": "assistant", "content": ""}, USER], None, "assistant: "),
        ([{"role": "user", "content": parts("the ", "", "question")}], None, ""),
    ],
)
def test_reading_a_conversation(messages: list[dict[str, Any]], system_prompt: str | None, history: str) -> None:
    assert read_messages(messages) == (system_prompt, history, "the question")


def test_a_conversation_reaches_the_model_as_one_prompt(chat: Chat, upstream: Upstream) -> None:
    chat.post([*ADA, {"role": "system", "content": "{{ rhyme }}"}, USER])
    prompt = "user: I am {{ Ada }}.\n\nassistant: Hello Ada.\n\nuser: the question"
    assert upstream.received[0].body["messages"] == [
        {"role": "system", "content": "{{ rhyme }}"},
        {"role": "user", "content": prompt},
    ]


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
DROPPED = {"chat_id": "1", "session_id": "2", "features": {}, "background_tasks": {}, "n": 1, "tools": [], "user": "me"}


def test_parameters_reach_the_upstream_and_nothing_else(chat: Chat, upstream: Upstream) -> None:
    assert chat.post("{{ 7*7 }}", **SENT, **DROPPED, stream=True).status_code == 200
    message = {"role": "user", "content": "{{ 7*7 }}"}
    assert upstream.received[0].body == {**SENT, "messages": [message], "model": "gpt-5-mini", "stream": True}
    assert upstream.received[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}])
def test_a_parameter_is_forwarded_unless_it_is_null(value: Any) -> None:
    forwarded = {} if value is None else dict.fromkeys(PARAMETERS, value)
    assert read_parameters({**dict.fromkeys(PARAMETERS, value), "stream": True}) == forwarded


ASKED = {"include_usage": True}
UNASKED: list[Any] = [
    None,
    {},
    [],
    "include_usage",
    5,
    *({"include_usage": value} for value in (False, None, "true", 1)),
]


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, True),
        ({"stream": None}, True),
        ({"stream": False}, True),
        ({"stream": True, "stream_options": ASKED}, True),
        ({"stream": True}, False),
        *(({"stream": True, "stream_options": options}, False) for options in UNASKED),
    ],
)
def test_the_upstream_is_asked_for_usage_when_it_is_needed(body: dict[str, Any], asked: bool) -> None:
    assert read_parameters(body) == ({"stream_options": ASKED} if asked else {})


def test_parallel_conversations_do_not_mix(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: Reply(tokens=[f"{body['messages'][0]['content']}/{n} " for n in range(20)])

    def converse(number: int) -> None:
        for turn in range(3):
            name = f"{number}.{turn}"
            assert text_of(chat.events(name)).split() == [f"{name}/{n}" for n in range(20)]

    with ThreadPoolExecutor(24) as threads:
        list(threads.map(converse, range(24)))
