"""Real answers read by clients that others wrote: they see what they would see of OpenAI."""

import fcntl
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from harness.client import Chat
from harness.environments import CACHE, unavailable
from harness.serving import NAME, Server
from harness.upstream import USAGE, Reply, Upstream
from pydantic import BaseModel

BROKE_OFF = "The answer could not be completed."
REPLIES = {
    "whole": Reply(),
    "busy": Reply(status=429, error={}, headers={"Retry-After": "1"}),
    "refused": Reply(status=401, error={}),  # after which the clients may try again as often as they like
    "cut": Reply(then="break"),
}
FAILURES: dict[str, tuple[Any, str]] = {
    "busy": (openai.RateLimitError, "The upstream is busy, or its quota is used up."),
    "refused": (openai.BadRequestError, "The upstream refused the server's credentials."),
    "cut": (openai.APIError, BROKE_OFF),
}
IN_NODE = [
    *("openai create", "openai whole", "openai stream", "openai runTools", "ai-sdk openai"),
    *("ai-sdk openai-compatible", "langchain", "event-source-plus"),
]
INSTALL = "npm install --prefer-offline --fetch-retries 2 --no-package-lock --no-audit --no-fund --ignore-scripts"
WHOLE = {"text": "Hello, world!", "finish": "stop", "tokens": USAGE["total_tokens"]}


def reply_for(body: dict[str, Any]) -> Reply:
    """Return the reply that the question names."""
    return REPLIES[str(body["messages"][-1]["content"]).split()[-1]]


@pytest.fixture(scope="module")
def made(server: Server, shared_upstream: Upstream) -> dict[str, tuple[dict[str, Any], int]]:
    """What each client in Node made of each reply, and how often the upstream was asked for it, by the question."""
    folder, harness = CACHE / "node", Path(__file__).with_name("harness")
    folder.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "node.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("package.json", "clients.mjs"):  # Node looks for packages beside the script
            shutil.copy(harness / name, folder)
        try:
            subprocess.run(INSTALL.split(), cwd=folder, capture_output=True, check=True, timeout=200)
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"npm cannot install the packages: {getattr(error, 'stderr', None) or error!r}"
            unavailable(reason, comes_with_packages=bool(shutil.which("npm")))
    shared_upstream.forget()
    shared_upstream.reply = reply_for
    command = ["node", "clients.mjs", f"{server.url}/v1", NAME, *REPLIES]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    asked = Counter(one.body["messages"][-1]["content"] for one in shared_upstream.received)
    return {question: (answer, asked[question]) for question, answer in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("client", IN_NODE)
def test_a_client_in_node_asks_once_and_sees_the_answer_or_its_failure(
    made: dict[str, tuple[dict[str, Any], int]], client: str, name: str
) -> None:
    answer, asked = made[f"{client}: {name}"]
    assert asked == 1
    if name == "whole":
        assert answer == WHOLE
    else:
        assert list(answer) == ["error"]
        assert (BROKE_OFF in answer["error"]) == (name == "cut" and client != "openai whole")


def create(sdk: openai.OpenAI, request: Any) -> dict[str, Any]:
    chunks = list(sdk.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return {"text": text, "finish": choices[-1].finish_reason, "tokens": chunks[-1].usage.total_tokens}


def create_whole(sdk: openai.OpenAI, request: Any) -> dict[str, Any]:
    return read(sdk.chat.completions.create(**request))


def stream(sdk: openai.OpenAI, request: Any) -> dict[str, Any]:
    with sdk.chat.completions.stream(**request, stream_options={"include_usage": True}) as events:
        return read(events.get_final_completion())


def read(completion: Any) -> dict[str, Any]:
    [choice] = completion.choices
    assert choice.message.role == "assistant"
    return {"text": choice.message.content, "finish": choice.finish_reason, "tokens": completion.usage.total_tokens}


@pytest.mark.parametrize("ask", [create, create_whole, stream])
def test_the_openai_sdk(chat: Chat, upstream: Upstream, ask: Callable[[openai.OpenAI, Any], dict[str, Any]]) -> None:
    upstream.reply = reply_for
    assert ask(chat.sdk, asking("whole")) == WHOLE
    for name, (error, sentence) in FAILURES.items():
        retries = openai.DEFAULT_MAX_RETRIES if name == "refused" else 0
        with pytest.raises(error) as failed:
            ask(chat.sdk.with_options(max_retries=retries), asking(name))
        assert sentence in (failed.value.message, *(failed.value.body or {}).values())
    assert len(upstream.received) == len(REPLIES)


def asking(question: str) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": question}]}


class City(BaseModel):
    name: str


def test_the_openai_sdk_parses_an_answer_with_a_schema(chat: Chat, upstream: Upstream) -> None:
    upstream.reply = Reply(tokens=['{"name": ', '"Rome"}'])
    completions, request = chat.sdk.chat.completions, {**asking("Where?"), "response_format": City}
    with completions.stream(**request) as events:
        found: list[Any] = [events.get_final_completion(), completions.parse(**request)]
    assert [completion.choices[0].message.parsed for completion in found] == [City(name="Rome")] * 2
    assert upstream.received[0].body["response_format"]["json_schema"]["name"] == "City"
