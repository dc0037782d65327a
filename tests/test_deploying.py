"""A deploy that cannot work is refused, with the cure in the message."""

import pytest
from harness.client import Chat, text_of
from harness.serving import EXAMPLE, KEY, DeployError, hayhooks
from harness.upstream import Upstream

WRAPPER = EXAMPLE / "pipeline_wrapper.py"


@pytest.mark.parametrize("variables", [{}, {"OPENAI_API_KEY": ""}, {"OPENAI_API_KEY": "  "}])
def test_a_deploy_without_a_key_names_the_variable(variables: dict[str, str]) -> None:
    with hayhooks(**variables) as server, pytest.raises(DeployError, match="OPENAI_API_KEY"):
        server.deploy(WRAPPER)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_CONCURRENT_STREAMS", "0"),
        ("MAX_CONCURRENT_STREAMS", "-3"),
        ("MAX_CONCURRENT_STREAMS", "many"),
        ("OPENAI_TIMEOUT", "soon"),
        ("OPENAI_MAX_RETRIES", "-1"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with hayhooks(OPENAI_API_KEY=KEY, **{name: value}) as server, pytest.raises(DeployError, match=name) as refused:
        server.deploy(WRAPPER)
    assert KEY not in str(refused.value)


def test_empty_variables_count_as_unset(upstream: Upstream) -> None:
    names = ("OPENAI_MODEL", "OPENAI_TIMEOUT", "OPENAI_MAX_RETRIES", "MAX_CONCURRENT_STREAMS")
    with hayhooks(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=upstream.url, **dict.fromkeys(names, "")) as server:
        server.deploy(WRAPPER)
        assert text_of(Chat(server).events()) == "Hello, world!"
    assert upstream.received[0].body["model"] == "gpt-5-mini"
