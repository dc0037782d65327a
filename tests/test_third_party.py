"""Generators of other providers behind `stoppable`, each against a scripted server of its own wire format."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from harness.client import Chat, finish_reasons, text_of
from harness.other_environments import MESSAGES, ONE_RUN_IS_ENOUGH, PROMPT, served_from, wrapper_of
from harness.serving import KEY, Server
from harness.stopping import assert_stops
from harness.upstream import USAGE, Reply, Script, Upstream, openai
from harness.wire_formats import anthropic, bedrock, hugging_face, ollama

pytestmark = ONE_RUN_IS_ENOUGH


class Generator(NamedTuple):
    """A generator, how its provider writes, and what its chunks and errors keep of that."""

    model: str
    component: str
    arguments: str  # UPSTREAM stands for the URL of the scripted server
    wire_format: Callable[[dict[str, Any], Reply], Script] = openai
    inputs: str = PROMPT
    environment: str = "third_party"
    error: Any = {"error": {"message": "top_p is too high"}}  # noqa: RUF012
    usage: tuple[Any, ...] = ()  # as OpenAI names it
    keeps_reason: bool = True
    keeps_headers: bool = True


HAYSTACK, OTHERS = "haystack.components.generators", "haystack_integrations.components.generators"
USAGE_TOO = 'generation_kwargs={"stream_options": {"include_usage": True}}'
OPENAI = f'api_key=Secret.from_token("{KEY}"), max_retries=0, {USAGE_TOO}'
CHAT = (f"{HAYSTACK}.chat.OpenAIChatGenerator", f'api_base_url="UPSTREAM/v1", {OPENAI}', openai, MESSAGES)
TGI = (f"{HAYSTACK}.HuggingFaceAPIGenerator", '"text_generation_inference", {"url": "UPSTREAM"}', hugging_face)
OLLAMA, PLAIN = f"{OTHERS}.ollama.Ollama", {"error": "top_p is too high"}
ANTHROPIC = (f"{OTHERS}.anthropic.AnthropicGenerator", f'Secret.from_token("{KEY}"), max_retries=0', anthropic, PROMPT)
CLAUDE = '"anthropic.claude-3-haiku-20240307-v1:0", boto3_config={"retries": {"max_attempts": 0}}'
BEDROCK = (f"{OTHERS}.amazon_bedrock.AmazonBedrockGenerator", CLAUDE, bedrock)
GENERATORS = [  # a pipeline that is named like a package hides it
    Generator("with_azure", f"{HAYSTACK}.AzureOpenAIGenerator", f'"UPSTREAM", {OPENAI}', usage=(USAGE,)),
    Generator("with_openai_async", *CHAT, usage=(USAGE,)),
    Generator("with_openai_on_haystack_3", *CHAT, "haystack_3", usage=(USAGE,)),
    Generator("with_hugging_face", *TGI, error=PLAIN),
    Generator("with_ollama", f"{OLLAMA}Generator", 'url="UPSTREAM"', ollama, error=PLAIN),
    Generator("with_ollama_async", f"{OLLAMA}ChatGenerator", 'url="UPSTREAM"', ollama, MESSAGES, error=PLAIN),
    Generator("with_anthropic", *ANTHROPIC, keeps_reason=False),
    Generator("with_anthropic_in_a_cycle", *ANTHROPIC, "older_anthropic", keeps_reason=False),
    Generator("with_bedrock", *BEDROCK, error={"message": "top_p is too high"}, keeps_headers=False),
]


@pytest.fixture(scope="module")
def server_from(shared_upstream: Upstream) -> Iterator[Callable[[str], Server]]:
    """Return a function that serves all generators of an environment."""
    url = shared_upstream.url.removesuffix("/v1")
    variables = {"ANTHROPIC_BASE_URL": url, "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": url, "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY, "MAX_CONCURRENT_STREAMS": "1"}

    def serve(environment: str) -> Server:
        pipelines = {}
        for one in GENERATORS:
            if one.environment == environment:
                source = wrapper_of(one.component, one.arguments.replace("UPSTREAM", url), one.inputs)
                pipelines[one.model] = {"pipeline_wrapper.py": source}
        return stack.enter_context(served_from(environment, pipelines, **variables))

    with contextlib.ExitStack() as stack:
        yield functools.cache(serve)


@pytest.fixture(params=GENERATORS, ids=lambda one: one.model)
def generator(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def chat(server_from: Callable[[str], Server], generator: Generator, upstream: Upstream) -> Chat:
    return Chat(server_from(generator.environment))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_it_streams(chat: Chat, upstream: Upstream, generator: Generator, reason: str) -> None:
    upstream.reply = Reply(finish_reason=reason, wire_format=generator.wire_format)
    events = chat.events(model=generator.model, stream_options={"include_usage": True})
    assert text_of(events) == "Hello, world!"
    assert finish_reasons(events) == [reason if generator.keeps_reason else "stop"]
    assert [event["usage"] for event in events if "usage" in event] == [*generator.usage]


def test_it_stops_when_the_client_has_left(chat: Chat, upstream: Upstream, generator: Generator) -> None:
    reply = Reply([f"{number} " for number in range(60)], wire_format=generator.wire_format)
    assert_stops(chat, upstream, reply, model=generator.model)


@pytest.mark.parametrize(("status", "expected"), [(400, 400), (401, 400), (429, 429), (500, 502)])
def test_it_fails_with_the_status_of_its_upstream(
    chat: Chat, upstream: Upstream, generator: Generator, status: int, expected: int
) -> None:
    headers = {"Retry-After": "7"} if status == 429 else {}
    upstream.reply = Reply(status=status, error=generator.error, headers=headers, wire_format=generator.wire_format)
    failed = chat.post(model=generator.model, stream=True)
    assert failed.status_code == expected
    assert ("top_p is too high" in failed.text) == (status == 400)
    assert failed.headers.get("x-should-retry") == ("false" if status == 401 else None)
    assert failed.headers.get("Retry-After") == ("7" if headers and generator.keeps_headers else None)
