"""What the upstream receives for what a client sends."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness.client import Chat, text_of
from harness.serving import KEY
from harness.upstream import Reply, Upstream

USER = {"role": "user", "content": "the question"}


def sent(upstream: Upstream) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = upstream.received[-1].body["messages"]
    return messages


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "Hi",
        "  two\n\n lines \n",
        "{{ 7*7 }}",
        "{% raw %}",
        "{# no comment #}",
        "{{ history }}",
        "ünï 日本 👩‍👩‍👧",
        "None",
        "<b>&amp;",
    ],
)
def test_one_message_arrives_as_it_is(chat: Chat, upstream: Upstream, text: str, stream: bool) -> None:
    assert chat.post(text, stream=stream).status_code == 200
    assert sent(upstream) == [{"role": "user", "content": text}]


def test_a_megabyte_arrives_as_it_is(chat: Chat, upstream: Upstream) -> None:
    text = "0123456789abcde\n" * 65536
    assert text_of(chat.events(text)) == "Hello, world!"
    assert sent(upstream) == [{"role": "user", "content": text}]


def test_instructions_become_the_system_prompt(chat: Chat, upstream: Upstream) -> None:
    chat.post([{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "{{ rhyme }}"}, USER])
    assert sent(upstream) == [{"role": "system", "content": "Be brief.\n{{ rhyme }}"}, USER]


def test_earlier_turns_stand_before_the_question(chat: Chat, upstream: Upstream) -> None:
    chat.post(
        [
            {"role": "user", "content": "My name is {{ Ada }}."},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "Ada."}]},
            {"role": "system", "content": "Be brief."},
            USER,
        ]
    )
    prompt = "user: My name is {{ Ada }}.\n\nassistant: Hello Ada.\n\nuser: the question"
    assert sent(upstream) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]


@pytest.mark.parametrize("turn", [{"content": None}, {}, {"content": None, "tool_calls": [{"id": "1"}]}])
def test_an_assistant_turn_without_content_is_left_out(chat: Chat, upstream: Upstream, turn: dict[str, Any]) -> None:
    assert chat.post([{"role": "assistant", **turn}, USER]).status_code == 200
    assert sent(upstream) == [USER]


def test_text_parts_are_joined(chat: Chat, upstream: Upstream) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": ""}, {"type": "text", "text": "question"}]
    chat.post([{"role": "user", "content": parts}])
    assert sent(upstream) == [USER]


def test_parameters_are_forwarded(chat: Chat, upstream: Upstream) -> None:
    parameters = {
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
    chat.post(**parameters, stream=True)
    received = upstream.received[0].body
    assert received == {
        **parameters,
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "gpt-5-mini",
        "stream": True,
    }


def test_everything_else_is_dropped(chat: Chat, upstream: Upstream) -> None:
    extra = {
        "chat_id": "1",
        "session_id": "2",
        "features": {},
        "background_tasks": {},
        "n": 1,
        "tools": [],
        "user": "me",
    }
    nulls = dict.fromkeys(["temperature", "top_p", "max_tokens", "stop", "seed", "tools", "functions"])
    assert chat.post(**{**nulls, **extra}, stream=True).status_code == 200
    assert set(upstream.received[0].body) == {"messages", "model", "stream"}


def test_the_key_of_the_server_is_used(chat: Chat, upstream: Upstream) -> None:
    chat.http.headers["Authorization"] = "Bearer the-clients"
    chat.post()
    assert upstream.received[0].headers["authorization"] == f"Bearer {KEY}"


def test_parallel_conversations_do_not_mix(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: Reply(
        tokens=[f"{body['messages'][0]['content']}/{n} " for n in range(20)], pace=0.005
    )

    def converse(number: int) -> None:
        for turn in range(3):
            name = f"{number}.{turn}"
            assert text_of(chat.events(name)).split() == [f"{name}/{n}" for n in range(20)]

    with ThreadPoolExecutor(24) as threads:
        list(threads.map(converse, range(24)))
