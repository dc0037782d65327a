"""A deploy that cannot work is refused, with the cure in the message and without the value."""

import re
from typing import Any

import pytest
from harness.client import Chat, text_of
from harness.serving import EXAMPLE, KEY, WRAPPER, DeployError, deployed, hayhooks
from harness.upstream import Upstream

VARIABLES = (
    "OPENAI_API_KEY",
    "OPENAI_MODEL",
    "OPENAI_BASE_URL",
    "OPENAI_TIMEOUT",
    "OPENAI_MAX_RETRIES",
    "MAX_CONCURRENT_STREAMS",
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("OPENAI_API_KEY", value)
            for value in (
                "",
                "  ",
                "sk-“quoted”",
                "sk-two words",
                "sk-two\nlines",
                "sk-no\u00a0break",
                "sk-ümlaut",
                "sk\x7f",
            )
        ),
        *(
            ("OPENAI_BASE_URL", value)
            for value in (
                "localhost:1234/v1",
                "ftp://host/v1",
                "https:// ",
                "http://:80/v1",
                "http://two words/v1",
                "v1",
                "http://host:port/v1",
                "http://[::1/v1",
            )
        ),
        ("OPENAI_MODEL", " "),
        *(("OPENAI_TIMEOUT", value) for value in ("soon", "0", "-1", "1e300", "inf", "nan", "30s")),
        *(("OPENAI_MAX_RETRIES", value) for value in ("-1", "11", "1.5", "some")),
        *(("MAX_CONCURRENT_STREAMS", value) for value in ("0", "-3", "1001", "many", "2.5")),
    ],
)
def test_a_wrong_variable_is_named_without_its_value(
    wrapper_class: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as refused:
        wrapper_class().setup()
    assert KEY not in str(refused.value)
    assert len(value) < 4 or value not in str(refused.value)


def test_a_missing_key_is_named(wrapper_class: Any) -> None:
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        wrapper_class().setup()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_API_KEY", "ollama"),
        ("OPENAI_API_KEY", f" {KEY}\n"),
        *((name, "") for name in VARIABLES[1:]),
        ("OPENAI_BASE_URL", "http://localhost:11434/v1"),
        ("OPENAI_BASE_URL", "http://[::1]:8080/v1"),
        ("OPENAI_BASE_URL", "HTTPS://user:password@my-host.example.com"),
        ("OPENAI_TIMEOUT", "0.5"),
        ("OPENAI_MAX_RETRIES", "3"),
        ("MAX_CONCURRENT_STREAMS", "1000"),
    ],
)
def test_a_right_or_empty_variable_is_accepted(
    wrapper_class: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(name, value)
    wrapper_class().setup()


def test_the_defaults(wrapper_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    wrapper = wrapper_class()
    wrapper.setup()
    llm = wrapper.pipeline.get_component("llm")
    assert (llm.client.api_key, llm.model) == (KEY, "gpt-5-mini")
    assert str(llm.client.base_url).rstrip("/") == "https://api.openai.com/v1"
    assert (llm.client.timeout, llm.client.max_retries) == (120, 0)


BAD_KEY = "sk-0123456789“abcdef”"


def test_the_deploy_without_a_key_is_refused() -> None:
    with hayhooks() as server, pytest.raises(DeployError, match="OPENAI_API_KEY"):
        server.deploy()


def test_a_key_that_no_header_can_carry_is_named_and_not_shown() -> None:
    with hayhooks(wrapper=WRAPPER, OPENAI_API_KEY=BAD_KEY, OPENAI_BASE_URL="localhost:1/v1") as server:
        assert "OPENAI_API_KEY" in server.log  # from the start
        with pytest.raises(DeployError, match="OPENAI_BASE_URL") as refused:
            server.deploy()
        for text in (str(refused.value), server.log):
            assert "OPENAI_API_KEY" in text
            assert BAD_KEY not in text
            assert "localhost:1/v1" not in text


@pytest.fixture
def filled_in() -> dict[str, str]:
    lines = re.findall(r"^(\w+)=(.*)$", (EXAMPLE / ".env.example").read_text(), re.MULTILINE)
    return {name: value for name, value in lines if name in VARIABLES} | {"OPENAI_API_KEY": KEY}


def test_the_example_environment_works_with_only_the_key_filled_in(
    upstream: Upstream, filled_in: dict[str, str]
) -> None:
    with deployed(**{**filled_in, "OPENAI_BASE_URL": upstream.url}) as server:
        assert text_of(Chat(server).events()) == "Hello, world!"
    assert upstream.received[0].body["model"] == filled_in["OPENAI_MODEL"]
