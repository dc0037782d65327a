"""A deploy that cannot work is refused, with the cure in the message and without the value."""

import re

import pytest
from harness.client import Chat, text_of
from harness.serving import EXAMPLE, KEY, WRAPPER, DeployError, deployed, hayhooks
from harness.upstream import Upstream

from pipeline_wrapper import Settings, read_settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
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
        ("OPENAI_MODEL", "  "),
        *(
            ("OPENAI_BASE_URL", value)
            for value in (
                "localhost:1234/v1",
                "ftp://host/v1",
                "https://",
                "http:///v1",
                "https:/host",
                "http://:80/v1",
            )
        ),
        *(("OPENAI_BASE_URL", value) for value in ("http://two words/v1", "http://host:99999/v1", "http://[::1", "v1")),
        *(("OPENAI_TIMEOUT", value) for value in ("soon", "0", "-1", "1e300", "inf", "nan", "30s", "3601", "1e-9")),
        *(("OPENAI_MAX_RETRIES", value) for value in ("-1", "11", "1.5", "some")),
        *(("MAX_CONCURRENT_STREAMS", value) for value in ("0", "-3", "1001", "many", "2.5")),
    ],
)
def test_a_wrong_variable_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as refused:
        read_settings()
    expected = f"{name} must be {Settings.model_fields[name].description}, set where `hayhooks run` starts"
    assert str(refused.value) == f"{expected} or in the .env there."
    assert refused.value.__suppress_context__  # the context quotes the value


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="OPENAI_API_KEY must be"):
        read_settings()


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("OPENAI_API_KEY", "ollama", "ollama"),
        ("OPENAI_API_KEY", f" {KEY}\n", KEY),
        ("OPENAI_MODEL", "", "gpt-5-mini"),
        ("OPENAI_BASE_URL", "", "https://api.openai.com/v1"),
        ("OPENAI_BASE_URL", "http://localhost:11434/v1", "http://localhost:11434/v1"),
        ("OPENAI_BASE_URL", "http://[::1]:8080/v1", "http://[::1]:8080/v1"),
        ("OPENAI_TIMEOUT", "", 30),
        ("OPENAI_TIMEOUT", "0.5", 0.5),
        ("OPENAI_MAX_RETRIES", "", 0),
        ("MAX_CONCURRENT_STREAMS", "", 500),
        ("MAX_CONCURRENT_STREAMS", "1000", 1000),
    ],
)
def test_a_right_or_empty_variable_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: object
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(name, value)
    assert getattr(read_settings(), name) == read


BAD_KEY = "sk-0123456789“abcdef”"


@pytest.mark.parametrize(
    ("variables", "cure"),
    [
        ({}, "OPENAI_API_KEY must be a key in ASCII"),
        ({"OPENAI_API_KEY": BAD_KEY}, "OPENAI_API_KEY must be a key in ASCII"),
        ({"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "localhost:1/v1"}, "OPENAI_BASE_URL must be a URL"),
    ],
    ids=["no key", "a key that no header can carry", "no URL"],
)
def test_the_deploy_is_refused(variables: dict[str, str], cure: str) -> None:
    with hayhooks(**variables) as server:
        with pytest.raises(DeployError) as refused:
            server.deploy()
        assert cure in " ".join(str(refused.value).split())
        for text in (str(refused.value), server.log):
            assert BAD_KEY not in text
            assert KEY not in text
            assert "localhost:1/v1" not in text


def test_a_key_that_no_header_can_carry_is_not_logged_at_the_start() -> None:
    with hayhooks(wrapper=WRAPPER, OPENAI_API_KEY=BAD_KEY) as server:
        assert "OPENAI_API_KEY must be a key in ASCII" in server.log
        assert BAD_KEY not in server.log


@pytest.fixture
def filled_in() -> dict[str, str]:
    lines = re.findall(r"^(\w+)=(.*)$", (EXAMPLE / ".env.example").read_text(), re.MULTILINE)
    return {name: value for name, value in lines if name in Settings.model_fields} | {"OPENAI_API_KEY": KEY}


def test_the_example_environment_works_with_only_the_key_filled_in(
    upstream: Upstream, filled_in: dict[str, str]
) -> None:
    with deployed(**{**filled_in, "OPENAI_BASE_URL": upstream.url}) as server:
        assert text_of(Chat(server).events()) == "Hello, world!"
    assert upstream.received[0].body["model"] == filled_in["OPENAI_MODEL"]
