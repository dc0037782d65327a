"""What a client gets from upstreams as they are: odd ones, those that fail, and those that refuse parameters."""

import contextlib
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.serving import KEY, NAME
from harness.upstream import Reply, Upstream
from hayhooks import log
from haystack.components.generators import OpenAIGenerator
from haystack.utils import Secret

from production.failure import BUSY, FAILED, NO_CREDENTIALS, REFUSED, TOO_LATE
from production.upstream import tolerant


def raw(*events: Any, then: Any = "end") -> Reply:
    """Return a reply of these events, of which a string is sent as it is."""
    texts = (event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events)
    return Reply(raw="".join(texts), then=then)


def choice(delta: Any, **more: Any) -> Any:
    return {"choices": [{"index": 0, "delta": delta, **more}]}


USAGE, FILTERED = {"prompt_tokens": 7, "completion_tokens": 2}, {"choices": list[Any](), "prompt_filter_results": 1}
A, B, HM = (choice(delta) for delta in ({"content": "Hello "}, {"content": "world"}, {"reasoning_content": "Hm."}))
STOP, HM_STOP = (choice(delta, finish_reason="stop") for delta in ({}, {"reasoning_content": "Hm."}))
A_STOP, B_STOP = ({**choice({"content": text}, finish_reason="stop"), "usage": USAGE} for text in ("Hello ", "world"))
DONE, NO_JSON, ERROR = "data: [DONE]\n\n", "data: {no\n\n", {"error": {"message": f"/opt/models refuses {KEY}"}}
PARTS, CALL = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Hello "}], {"id": "c1", "function": None}
ONLY_USAGE = {"choices": [], "usage": USAGE}
ODD: list[Any] = [
    *(": ping\n\n", {"id": "ping"}, ONLY_USAGE, ONLY_USAGE | {"choices": None}, FILTERED, HM),
    *({"choices": [{"index": 0}]}, choice(None), choice({"content": None}), choice({"tool_calls": [CALL]})),
]


@pytest.mark.parametrize(
    ("events", "then", "reason"),
    [
        *(([odd, A, odd, B, odd, STOP, odd, DONE], "end", "stop") for odd in ODD),
        *(([A, B, STOP], then, "stop") for then in ("end", "break", "stall")),
        *(([*events, DONE], "end", "stop") for events in ([A, B, STOP, ERROR], [A, B_STOP], [A_STOP, B_STOP])),
        ([A, STOP, B, DONE], "end", "stop"),
        *(([choice(delta), B, STOP, DONE], "end", "stop") for delta in ({"refusal": "Hello "}, {"content": PARTS})),
        *(([A, B, choice({}, finish_reason=reason), DONE], "end", reason) for reason in ("model_length", None)),
        ([A, B], "end", None),
    ],
)
def test_an_odd_answer_is_an_answer(small: Chat, upstream: Upstream, events: Any, then: Any, reason: Any) -> None:
    upstream.reply = raw(*events, then=then)
    usage = USAGE if "usage" in upstream.reply.raw else None
    received, whole = small.events(stream_options={"include_usage": True}), small.post().json()
    assert text_of(received) == whole["choices"][0]["message"]["content"] == "Hello world"
    assert finish_reasons(received) == ([reason] if reason else [])
    assert [event.get("usage") for event in received if not event.get("choices")] == ([usage] if usage else [])
    assert (whole["choices"][0]["finish_reason"], whole["usage"]) == (reason, usage)


BAD, LATE, HEADERS = (502, FAILED), (504, TOO_LATE), {"Retry-After": "17", "X-Internal": "secret"}
STATUSES = {401: (400, NO_CREDENTIALS), 404: (400, REFUSED), 429: (429, BUSY), 500: BAD, 408: LATE}
STATUSES[400] = (400, "/opt/models refuses [key]")
NO_ANSWER: list[Any] = [" ", "<html>", DONE, NO_JSON, ERROR, ["Hi"], {"object": "error"}, ONLY_USAGE, FILTERED]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        *((Reply(status=status, error=ERROR, headers=HEADERS), expected) for status, expected in STATUSES.items()),
        *((raw(event, DONE), BAD) for event in NO_ANSWER),
        *((Reply([], role=False, then="break"), BAD), (Reply([], role=False, then="stall"), LATE)),
    ],
)
def test_a_failure_at_the_start(small: Chat, upstream: Upstream, reply: Reply, expected: Any, stream: bool) -> None:
    upstream.reply, logged = reply, len(small.server.log)
    failed = small.post(stream=stream)
    assert (failed.status_code, failed.json()) == (expected[0], {"detail": expected[1]})
    retry = "17" if expected[0] == 429 else None, "false" if expected[1] in (NO_CREDENTIALS, REFUSED) else None, None
    assert tuple(map(failed.headers.get, ("retry-after", "x-should-retry", "x-internal"))) == retry
    assert " | ERROR " in small.server.log[logged:]
    assert len(upstream.received) == 1  # retries are the caller's


@pytest.mark.parametrize(
    ("events", "then", "expected"),
    [
        *(([A, B, event, DONE], "end", BAD) for event in (ERROR, NO_JSON)),
        *((events, "break", BAD) for events in ([A, B], [A, STOP, B], [A_STOP, B_STOP], [HM_STOP, A, B])),
        *(([A, B], "stall", LATE), ([A_STOP, B_STOP], "stall", LATE), ([A_STOP, B, ERROR, DONE], "end", BAD)),
    ],
)
def test_a_failure_later(small: Chat, upstream: Upstream, events: Any, then: Any, expected: Any) -> None:
    upstream.reply = raw(*events, then=then)
    *received, last = small.events(stream_options={"include_usage": True})
    assert (text_of(received), finish_reasons(received)) == ("Hello world", [])
    assert all(event["choices"] for event in received)
    assert last == {"error": {"message": expected[1], "type": "server_error"}}
    whole = small.post()
    assert (whole.status_code, whole.json()) == (expected[0], {"detail": expected[1]})
    upstream.wait_until(lambda: all(one.over for one in upstream.received))  # every connection is closed


PARAMETER, VALUE = CODES = "unsupported_parameter", "unsupported_value"
T, P, SEED, OLD, NEW = ({name: 7} for name in ("temperature", "top_p", "seed", "max_tokens", "max_completion_tokens"))
OTHERS = {"stop": ["x"], "response_format": {"type": "text"}, "logit_bias": {"1": 2}, **T, **OLD}
KEPT = ("stop", "response_format", "logit_bias", "top_p", "model", None, ["temperature"])
HIGH, NONE = ({"reasoning_effort": effort} for effort in ("high", "none"))


@pytest.fixture
def llm(upstream: Upstream) -> Any:
    """A component that remembers nothing yet."""
    return tolerant(OpenAIGenerator(Secret.from_token(KEY), api_base_url=upstream.url))


def refusal(name: Any, code: str = VALUE, status: int = 400) -> Reply:
    return Reply(status=status, error={"error": {"message": f"Unsupported: {name}", "param": name, "code": code}})


def parameters_in(upstream: Upstream) -> list[dict[str, Any]]:
    """Return which parameters each request to the upstream had."""
    rest = {"model", "messages", "stream", "stream_options"}
    return [{name: one.body[name] for name in one.body.keys() - rest} for one in upstream.received]


@pytest.mark.parametrize(
    ("refused", "requests", "sent"),
    [
        ({"temperature": VALUE}, [T, T, {"temperature": 1}], [T, {}, {}, {"temperature": 1}]),
        ({"top_p": VALUE}, [P, {"top_p": 8}], [P, {}, {"top_p": 8}, {}]),
        ({"top_p": PARAMETER}, [P, {"top_p": 8}], [P, {}, {}]),
        ({"temperature": VALUE, "top_p": PARAMETER}, [T | P | SEED] * 2, [T | P | SEED, P | SEED, SEED, SEED]),
        *(({"temperature": code}, [T | HIGH] * 2 + [T | NONE], [T | HIGH, HIGH, HIGH, T | NONE]) for code in CODES),
        ({"max_tokens": PARAMETER}, [OLD, OLD, OLD | NEW], [OLD, NEW, NEW, OLD | NEW, NEW]),
        ({"max_completion_tokens": PARAMETER}, [NEW, NEW], [NEW, OLD, OLD]),
        (dict.fromkeys(OLD | NEW, PARAMETER), [OLD, OLD], [OLD, NEW, NEW]),  # an answer never loses its limit
    ],
)
def test_a_refused_parameter_is_left_out_next_time(
    llm: Any, upstream: Upstream, refused: dict[str, str], requests: list[Any], sent: list[Any]
) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        """Refuse one parameter at a time, unless it is 1 or the model does not reason."""
        names = [name for name in refused if body.get(name, 1) != 1 and body.get("reasoning_effort") != "none"]
        return refusal(names[0], refused[names[0]]) if names else Reply()

    upstream.reply = reply
    for parameters in requests:
        with contextlib.suppress(openai.BadRequestError):
            llm.run("Hi", generation_kwargs=parameters)
    assert parameters_in(upstream) == sent


@pytest.mark.parametrize(
    "reply", [*map(refusal, KEPT), refusal("temperature", "invalid_value"), refusal("temperature", status=422)]
)
def test_any_other_refusal_is_the_clients(llm: Any, upstream: Upstream, reply: Reply) -> None:
    upstream.reply = reply
    with pytest.raises(openai.APIStatusError):
        llm.run("Hi", generation_kwargs=OTHERS)
    assert parameters_in(upstream) == [OTHERS]


def test_a_requests_limit_replaces_a_default_under_its_other_name(llm: Any, upstream: Upstream) -> None:
    for default, parameters in ((OLD, NEW), (NEW, OLD), (OLD, OLD), (NEW, SEED), ({}, OLD | NEW)):
        llm.generation_kwargs = default
        llm.run("Hi", generation_kwargs=dict.fromkeys(parameters, 8))
    new, old = (dict.fromkeys(names, 8) for names in (NEW, OLD))
    assert parameters_in(upstream) == [new, old, old, {**NEW, "seed": 8}, {**old, **new}]


def test_what_is_remembered_and_logged_of_refusals_is_bounded(llm: Any, upstream: Upstream) -> None:
    upstream.reply = lambda body: refusal("reasoning_effort") if "reasoning_effort" in body else Reply()
    logged: list[str] = []
    sink = log.add(logged.append)
    for number in (*range(300), 0):
        llm.run("Hi", generation_kwargs={"reasoning_effort": f"{number} " * 20_000})
    log.remove(sink)
    assert len(upstream.received) == 2 * 301  # the first is forgotten by then, and sent again
    assert [len(line) < 500 for line in logged] == [True]


def test_a_front_ends_default_request_is_answered(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: refusal("temperature") if "temperature" in body else Reply()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello {{ 7*7 }}"}]
    sent: dict[str, Any] = {"top_p": 1, "presence_penalty": 0, "response_format": {"type": "x" * 60_000}}
    dropped = {"tools": [CALL] * 36, "tool_choice": "auto", "chat_id": "9f0c", "features": {}, "user": "me", "stop": []}
    assert text_of(chat.events(messages, temperature=0.1, **sent, **dropped)) == "Hello, world!"
    rest = {"model": "gpt-5-mini", "stream": True, "stream_options": {"include_usage": True}}
    assert upstream.received[-1].body == {"messages": messages, **rest, **sent}
    assert upstream.received[-1].headers["authorization"] == f"Bearer {KEY}"
    upstream.forget()
    for stream in (True, False):
        assert chat.post([*messages, {"role": "user", "content": ""}], stream=stream).status_code == 400
    assert not upstream.received


def test_any_text_arrives_unharmed(chat: Chat, upstream: Upstream) -> None:
    text = 'héllo 日本語 👩‍👩‍👧 \n\r\n\n\ndata: [DONE]\n\ndata: {"error": 1}\n\n: ping\u2028\t\x00'
    upstream.reply = Reply([text, *text, "\ud83d", "\ude00", "\ud83d"])
    whole = chat.post().json()["choices"][0]["message"]["content"]
    assert text_of(chat.events()) == whole == f"{text}{text}\U0001f600\ufffd"


def test_a_large_request_holds_up_other_streams_no_longer_than_hayhooks_does(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = lambda body: Reply(["token "] * 10_000, pace=0.001) if len(body["messages"]) == 1 else Reply()
    turns = [{"role": role, "content": "x"} for role in ("system", *("user", "assistant") * 20_000, "user")]

    def longest_pause(model: str) -> float:
        """Return the longest time between two tokens of a stream while another client sends a large request."""
        request = chat.http.build_request("POST", "/v1/chat/completions", json=chat.request(turns, model=model))
        with chat.open() as events, ThreadPoolExecutor(1) as threads:
            times = [time.monotonic() for _, _ in zip(texts_of(events), range(3), strict=False)]
            large = threads.submit(chat.http.send, request)
            while not large.done():
                next(texts_of(events))
                times.append(time.monotonic())
            assert large.result().is_success == (model == NAME)
        return max(after - before for before, after in itertools.pairwise(times))

    assert longest_pause(NAME) < 10 * longest_pause("unknown")
