"""What a client gets when all goes well."""

import pytest
from harness.client import Chat, finish_reasons, text_of
from harness.serving import NAME
from harness.upstream import USAGE, Reply, Upstream

TRICKY = [
    "héllo ",
    "日本語 ",
    "👩‍👩‍👧 ",
    "\n",
    "\r\n",
    "\n\n",
    "data: [DONE]\n\n",
    'data: {"error": 1}\n\n',
    ": ping",
    "\u2028",
    "\t\x00 ",
]


def test_each_token_arrives_before_the_next_one_exists(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=["one", "two", "three"], gated=True)
    upstream.release()
    with chat.open() as events:
        for token in ("one", "two", "three"):
            assert next(events)["choices"][0]["delta"]["content"] == token
            upstream.release()
        assert finish_reasons(list(events)) == ["stop"]


def test_a_stream_has_the_form_of_openais(chat: Chat) -> None:
    events = chat.events()
    assert text_of(events) == "Hello, world!"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["model"] for event in events} == {NAME}
    assert len({event["id"] for event in events}) == 1
    assert not any(event["usage"] for event in events)


def test_a_whole_answer_has_the_form_of_openais(chat: Chat) -> None:
    answer = chat.post().json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "Hello, world!"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert {name: answer["usage"][name] for name in USAGE} == USAGE


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "a_new_reason"])
def test_the_finish_reason_is_the_upstreams(chat: Chat, upstream: Upstream, reason: str) -> None:
    upstream.reply = Reply(finish_reason=reason)
    assert finish_reasons(chat.events()) == [reason]
    assert chat.post().json()["choices"][0]["finish_reason"] == reason


def test_an_empty_answer_is_an_answer(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=[], finish_reason="content_filter")
    assert finish_reasons(chat.events()) == ["content_filter"]
    assert chat.post().json()["choices"][0]["message"]["content"] == ""


def test_usage_comes_once_when_asked_for(chat: Chat) -> None:
    events = chat.events(stream_options={"include_usage": True})
    with_usage = [event for event in events if event["usage"]]
    assert [event["choices"] for event in with_usage] == [[]]
    assert with_usage[0] is events[-1]
    assert {name: with_usage[0]["usage"][name] for name in USAGE} == USAGE


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}, [], "include_usage"])
def test_usage_does_not_come_unasked(chat: Chat, upstream: Upstream, options: object) -> None:
    upstream.reply = Reply(usage_unasked=True)
    assert not any(event["usage"] for event in chat.events(stream_options=options))
    assert "stream_options" not in upstream.received[0].body


def test_any_text_arrives_unharmed(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=TRICKY)
    assert [event["choices"][0]["delta"]["content"] for event in chat.events()][:-1] == TRICKY
    assert chat.post().json()["choices"][0]["message"]["content"] == "".join(TRICKY)


def test_the_openai_sdk_streams(chat: Chat) -> None:
    stream = chat.sdk.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, world!"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == USAGE["total_tokens"]


def test_the_openai_sdk_gets_a_whole_answer(chat: Chat) -> None:
    answer = chat.sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.usage is not None
    assert answer.usage.total_tokens == USAGE["total_tokens"]


def test_run_answers_a_question(chat: Chat, upstream: Upstream) -> None:
    response = chat.http.post(f"/{NAME}/run", json={"question": "What is {{ 7*7 }}?"})
    assert response.json() == {"result": "Hello, world!"}
    assert upstream.received[0].body["messages"] == [{"role": "user", "content": "What is {{ 7*7 }}?"}]


def test_the_model_is_listed(chat: Chat) -> None:
    assert [model["id"] for model in chat.http.get("/v1/models").json()["data"]] == [NAME]
