"""A deploy that cannot work is refused, with the variable's name in the message and without its value."""

import re
from typing import Any

import pytest
from harness.client import Chat, text_of
from harness.serving import EXAMPLE, KEY, DeployError, deployed, hayhooks, load_wrapper
from harness.upstream import Upstream
from hayhooks.server.exceptions import PipelineModuleLoadError

WRONG = {
    "OPENAI_API_KEY": ["", "  ", "sk-“quoted”", "sk-two words", "sk-two\nlines", "sk-no\u00a0break", "sk-ü", "sk\x7f"],
    "OPENAI_MODEL": [" "],
    "OPENAI_BASE_URL": [
        *("localhost:1234/v1", "ftp://host/v1", "https:// ", "http://:80/v1", "http://two words/v1", "v1"),
        *("http://host:port/v1", "http://[::1/v1"),
    ],
    "OPENAI_TIMEOUT": ["soon", "0", "-1", "1e300", "inf", "nan", "30s"],
    "OPENAI_MAX_RETRIES": ["-1", "11", "1.5", "some"],
    "MAX_CONCURRENT_STREAMS": ["0", "-3", "1001", "many", "2.5"],
}
CLIENT = {"api_key": KEY, "base_url": "https://api.openai.com/v1/", "timeout": 120, "max_retries": 0}


@pytest.fixture(autouse=True)
def no_variable_but_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WRONG:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_variable_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, PipelineModuleLoadError), match=name) as refused:
        load_wrapper().PipelineWrapper().setup()
    assert KEY not in str(refused.value)
    assert len(value) < 4 or value not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        *((name, "", {}) for name in WRONG if name != "OPENAI_API_KEY"),
        ("OPENAI_API_KEY", f" {KEY}\n", {}),
        ("OPENAI_API_KEY", "ollama", {"api_key": "ollama"}),
        ("OPENAI_BASE_URL", "http://[::1]:8080/v1", {"base_url": "http://[::1]:8080/v1/"}),
        ("OPENAI_BASE_URL", "HTTPS://user:pass@my-host.eu", {"base_url": "https://user:pass@my-host.eu/"}),
        ("OPENAI_TIMEOUT", "0.5", {"timeout": 0.5}),
        ("OPENAI_MAX_RETRIES", "3", {"max_retries": 3}),
        ("MAX_CONCURRENT_STREAMS", "1000", {}),
    ],
)
def test_a_right_variable_counts_and_an_empty_one_does_not(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, changed: dict[str, Any]
) -> None:
    monkeypatch.setenv(name, value)
    wrapper = load_wrapper().PipelineWrapper()
    wrapper.setup()
    llm = wrapper.pipeline.get_component("llm")
    assert llm.model == "gpt-5-mini"
    assert {field: getattr(llm.client, field) for field in CLIENT} == {**CLIENT, **changed}


def test_start_and_deploy_name_the_variables_and_not_their_values() -> None:
    key, url = "sk-0123456789“abcdef”", "localhost:1/v1"
    with hayhooks(wrapper=EXAMPLE, OPENAI_API_KEY=key, OPENAI_BASE_URL=url) as server:
        assert "OPENAI_API_KEY" in server.log
        with pytest.raises(DeployError, match=r"OPENAI_API_KEY[\s\S]*OPENAI_BASE_URL") as refused:
            server.deploy()
        assert not [text for text in (str(refused.value), server.log) if key in text or url in text]


def test_the_example_environment_works_with_only_the_key_filled_in(upstream: Upstream) -> None:
    lines = dict(re.findall(r"^(\w+)=(.*)$", (EXAMPLE / ".env.example").read_text(), re.MULTILINE))
    filled_in = {name: lines[name] for name in WRONG} | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url}
    with deployed(**filled_in) as server:
        assert text_of(Chat(server).events()) == "Hello, world!"
    assert upstream.received[0].body["model"] == lines["OPENAI_MODEL"]
