"""Generators of other providers behind `stoppable`, each against a scripted server of its own wire format."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from harness import wire_formats
from harness.client import Chat, finish_reasons, text_of
from harness.other_environments import MESSAGES, ONE_RUN_IS_ENOUGH, PROMPT, served_from, wrapper_of
from harness.serving import KEY, Server
from harness.upstream import USAGE, Reply, Script, Upstream, openai

pytestmark = ONE_RUN_IS_ENOUGH


@dataclass
class Generator:
    """A generator, and how its provider and its SDK tell what has happened."""

    name: str
    component: str
    arguments: str  # UPSTREAM stands for the URL of the scripted server
    wire_format: Callable[[dict[str, Any], Reply], Script] = openai
    inputs: str = PROMPT
    environment: str = "third_party"
    error: Callable[[str], Any] = lambda text: {"error": {"message": text}}
    raises_status: bool = True  # in an attribute that says so
    raises_headers: bool = True
    usage: Any = None  # as OpenAI names it

    @property
    def model(self) -> str:
        return f"with_{self.name}"  # a pipeline that is named like a package hides it

    def reply(self, tokens: Any = ("Hello", ", ", "world", "!"), **fields: Any) -> Reply:
        return Reply(tokens, wire_format=self.wire_format, **fields)


GENERATORS_OF_HAYSTACK = "haystack.components.generators"
INTEGRATIONS = "haystack_integrations.components.generators"
USAGE_TOO = 'generation_kwargs={"stream_options": {"include_usage": True}}'
OPENAI = f'api_key=Secret.from_token("{KEY}"), max_retries=0, {USAGE_TOO}'
OPENAI_CHAT = f'api_base_url="UPSTREAM/v1", {OPENAI}'
ANTHROPIC = f'Secret.from_token("{KEY}"), max_retries=0'
GENERATORS = [
    Generator("azure", f"{GENERATORS_OF_HAYSTACK}.AzureOpenAIGenerator", f'"UPSTREAM", {OPENAI}', usage=USAGE),
    Generator(
        "openai_async",
        f"{GENERATORS_OF_HAYSTACK}.chat.OpenAIChatGenerator",
        OPENAI_CHAT,
        inputs=MESSAGES,
        usage=USAGE,
    ),
    Generator(
        "openai_on_haystack_3",
        f"{GENERATORS_OF_HAYSTACK}.chat.OpenAIChatGenerator",
        OPENAI_CHAT,
        inputs=MESSAGES,
        environment="haystack_3",
        usage=USAGE,
    ),
    Generator(
        "hugging_face",
        f"{GENERATORS_OF_HAYSTACK}.HuggingFaceAPIGenerator",
        '"text_generation_inference", {"url": "UPSTREAM"}',
        wire_formats.hugging_face,
        error=lambda text: {"error": text},
    ),
    Generator(
        "ollama",
        f"{INTEGRATIONS}.ollama.OllamaGenerator",
        'url="UPSTREAM"',
        wire_formats.ollama,
        error=lambda text: {"error": text},
        raises_headers=False,
    ),
    Generator(
        "ollama_async",
        f"{INTEGRATIONS}.ollama.OllamaChatGenerator",
        'url="UPSTREAM"',
        wire_formats.ollama,
        inputs=MESSAGES,
        error=lambda text: {"error": text},
        raises_headers=False,
    ),
    Generator("anthropic", f"{INTEGRATIONS}.anthropic.AnthropicGenerator", ANTHROPIC, wire_formats.anthropic),
    Generator(
        "anthropic_in_a_cycle",
        f"{INTEGRATIONS}.anthropic.AnthropicGenerator",
        ANTHROPIC,
        wire_formats.anthropic,
        environment="older_anthropic",
    ),
    Generator(
        "bedrock",
        f"{INTEGRATIONS}.amazon_bedrock.AmazonBedrockGenerator",
        '"anthropic.claude-3-haiku-20240307-v1:0", boto3_config={"retries": {"max_attempts": 0}}',
        wire_formats.bedrock,
        error=lambda text: {"message": text},
        raises_status=False,
    ),
]


def server_from(environment: str) -> Any:
    """Return a fixture, a server of all generators that are in one environment."""

    @pytest.fixture(scope="module", name=environment)
    def server(shared_upstream: Upstream) -> Iterator[Server]:
        url = shared_upstream.url.removesuffix("/v1")
        pipelines = {
            one.model: {
                "pipeline_wrapper.py": wrapper_of(one.component, one.arguments.replace("UPSTREAM", url), one.inputs)
            }
            for one in GENERATORS
            if one.environment == environment
        }
        variables = {
            "ANTHROPIC_BASE_URL": url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": url,
            "AWS_SECRET_ACCESS_KEY": KEY,
        }
        with served_from(environment, pipelines, **variables) as server:
            yield server

    return server


third_party, older_anthropic, haystack_3 = map(server_from, ("third_party", "older_anthropic", "haystack_3"))


@pytest.fixture(params=GENERATORS, ids=lambda one: one.name)
def generator(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def chat(request: pytest.FixtureRequest, generator: Generator, upstream: Upstream) -> Chat:
    return Chat(request.getfixturevalue(generator.environment))


def test_it_streams(chat: Chat, upstream: Upstream, generator: Generator) -> None:
    upstream.reply = generator.reply()
    events = chat.events(model=generator.model, stream_options={"include_usage": True})
    assert text_of(events) == "Hello, world!"
    assert finish_reasons(events) == ["stop"]
    usages = [event["usage"] for event in events if "usage" in event]
    assert usages == ([generator.usage] if generator.usage else [])


def test_it_stops_when_the_client_has_left(chat: Chat, upstream: Upstream, generator: Generator) -> None:
    before = len(chat.server.log)

    def release() -> None:
        upstream.release()
        upstream.wait_until(lambda: upstream.open == 0 or upstream.received[0].sent == upstream.released)

    upstream.reply = generator.reply([f"{number} " for number in range(60)], gated=True)
    upstream.release()
    with chat.open(model=generator.model):
        for _ in range(4):
            release()
    for _ in range(2):
        release()
    upstream.wait_until(lambda: upstream.open == 0)
    assert upstream.received[0].left
    upstream.reply = generator.reply()
    assert text_of(chat.events(model=generator.model)) == "Hello, world!"
    assert not [word for word in ("Traceback", " | ERROR ") if word in chat.server.log[before:]]


@pytest.mark.parametrize(("status", "expected"), [(400, 400), (401, 424), (429, 429), (500, 502)])
def test_it_fails_with_the_status_of_its_upstream(
    chat: Chat, upstream: Upstream, generator: Generator, status: int, expected: int
) -> None:
    headers = {"Retry-After": "7"} if status == 429 else {}
    upstream.reply = generator.reply(status=status, error=generator.error("top_p is too high"), headers=headers)
    response = chat.post(model=generator.model, stream=True)
    assert response.status_code == (expected if generator.raises_status else 502)
    assert ("top_p is too high" in response.text) == (response.status_code == 400)
    assert response.headers.get("x-should-retry") == ("false" if response.status_code == 424 else None)
    passes_on = response.status_code == 429 and generator.raises_headers
    assert response.headers.get("Retry-After") == ("7" if passes_on else None)
