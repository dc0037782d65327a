"""A parameter that the model does not support is left out, once the model has said so, and remembered."""

from collections.abc import Iterator
from typing import Any

import pytest
from harness.client import Chat, text_of
from harness.serving import NAME, Server, deployed
from harness.upstream import Reply, Upstream

PARAMETER, VALUE = "unsupported_parameter", "unsupported_value"


@pytest.fixture(scope="module")
def forgetful_server(shared_upstream: Upstream) -> Iterator[Server]:
    with deployed(OPENAI_BASE_URL=shared_upstream.url) as server:
        yield server


@pytest.fixture
def forgetful(forgetful_server: Server, upstream: Upstream) -> Chat:
    """A client of a component that remembers nothing yet. The CLI would need seconds to deploy it again."""
    chat = Chat(forgetful_server)
    deployed_files = forgetful_server.folder / "pipelines" / NAME
    files = {str(path.relative_to(deployed_files)): path.read_text() for path in deployed_files.rglob("*.py")}
    chat.http.post("/deploy_files", json={"name": NAME, "files": files, "overwrite": True}).raise_for_status()
    return chat


def refusal(parameter: Any, code: str, status: int = 400) -> Reply:
    error = {"message": f"Unsupported: {parameter}", "type": "invalid_request_error", "param": parameter, "code": code}
    return Reply(status=status, error={"error": error})


def refusing(supported: dict[str, Any], **codes: str) -> Any:
    """Return a model that refuses these parameters, one at a time, unless they have a supported value."""

    def reply(body: dict[str, Any]) -> Reply:
        for parameter, code in codes.items():
            if parameter in body and body[parameter] != supported.get(parameter):
                return refusal(parameter, code)
        return Reply()

    return reply


def sent(upstream: Upstream, *names: str) -> list[dict[str, Any]]:
    """Return which of these parameters each request to the upstream had."""
    return [{name: one.body[name] for name in names if name in one.body} for one in upstream.received]


@pytest.mark.parametrize("stream", [True, False])
def test_a_refused_value_is_left_out_and_remembered(forgetful: Chat, upstream: Upstream, stream: bool) -> None:
    upstream.reply = refusing({"temperature": 1}, temperature=VALUE)
    before = len(forgetful.server.log)
    for _ in range(2):
        assert forgetful.post(temperature=0.1, stream=stream).status_code == 200
    assert sent(upstream, "temperature") == [{"temperature": 0.1}, {}, {}]
    logged = forgetful.server.log[before:]
    assert logged.count(" | WARNING ") == logged.count("temperature=0.1") == 1
    upstream.forget()
    assert (
        text_of(forgetful.events(temperature=1)) == "Hello, world!"
    )  # one client's value takes nothing from the others
    assert sent(upstream, "temperature") == [{"temperature": 1}]


def test_a_refused_name_is_left_out_with_any_value(forgetful: Chat, upstream: Upstream) -> None:
    upstream.reply = refusing({}, top_p=PARAMETER)
    for value in (0.1, 0.2):
        assert forgetful.post(top_p=value).status_code == 200
    assert sent(upstream, "top_p") == [{"top_p": 0.1}, {}, {}]


def test_two_can_be_refused_one_after_the_other(forgetful: Chat, upstream: Upstream) -> None:
    upstream.reply = refusing({}, temperature=VALUE, frequency_penalty=PARAMETER)
    assert forgetful.post(temperature=0.1, frequency_penalty=0.5, seed=7).status_code == 200
    assert sent(upstream, "temperature", "frequency_penalty", "seed") == [
        {"temperature": 0.1, "frequency_penalty": 0.5, "seed": 7},
        {"frequency_penalty": 0.5, "seed": 7},
        {"seed": 7},
    ]


LIMITS = ("max_tokens", "max_completion_tokens")


@pytest.mark.parametrize(
    ("body", "codes", "expected"),
    [
        ({"max_tokens": 7}, {}, [{"max_tokens": 7}]),
        ({"max_tokens": 7}, {"max_tokens": PARAMETER}, [{"max_tokens": 7}, {"max_completion_tokens": 7}]),
        (
            {"max_tokens": 7, "max_completion_tokens": 8},
            {"max_tokens": PARAMETER},
            [{"max_tokens": 7, "max_completion_tokens": 8}, {"max_completion_tokens": 8}],
        ),
        (
            {"max_tokens": 7},
            {"max_tokens": PARAMETER, "max_completion_tokens": VALUE},
            [{"max_tokens": 7}, {"max_completion_tokens": 7}, {}],
        ),
        (
            {"max_tokens": 7},
            {"max_tokens": PARAMETER, "max_completion_tokens": PARAMETER},
            [{"max_tokens": 7}, {"max_completion_tokens": 7}, {}],
        ),
    ],
)
def test_the_limit_of_an_answer_has_a_newer_name(
    forgetful: Chat, upstream: Upstream, body: dict[str, int], codes: dict[str, str], expected: list[dict[str, int]]
) -> None:
    upstream.reply = refusing({}, **codes)
    for _ in range(2):
        assert forgetful.post(**body).status_code == 200
    assert sent(upstream, *LIMITS) == [*expected, expected[-1]]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("parameter", "code", "status"),
    [
        ("stop", VALUE, 400),  # without it, the answer would be a different one
        ("response_format", PARAMETER, 400),
        ("logit_bias", PARAMETER, 400),
        ("top_p", PARAMETER, 400),  # which was not sent
        ("model", VALUE, 400),
        (None, PARAMETER, 400),
        (["temperature"], PARAMETER, 400),
        ("temperature", "invalid_value", 400),
        ("temperature", VALUE, 422),
    ],
)
def test_any_other_refusal_is_the_clients(
    chat: Chat, upstream: Upstream, parameter: Any, code: str, status: int, stream: bool
) -> None:
    upstream.reply = refusal(parameter, code, status)
    body = {"stop": ["x"], "response_format": {"type": "text"}, "logit_bias": {"1": 2}, "temperature": 0.1}
    refused = chat.post(**body, stream=stream)
    assert (refused.status_code, refused.json()) == (status, {"detail": f"Unsupported: {parameter}"})
    assert len(upstream.received) == 1
