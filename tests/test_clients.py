"""Real answers read by clients that others wrote: they see what they would see of OpenAI."""

import fcntl
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
from harness.client import Chat
from harness.environments import CACHE, CALLERS
from harness.serving import NAME, Server
from harness.upstream import USAGE, Reply, Upstream
from pydantic import BaseModel

TEXT, TOKENS = "Hello, world!", USAGE["total_tokens"]
BUSY, BROKE_OFF = "The upstream is busy, or its quota is used up.", "The answer could not be completed."
SCENARIOS = {
    "whole": Reply(),
    "busy": Reply(status=429, error={"error": {"message": "Slow down."}}, headers={"Retry-After": "1"}),
    "cut": Reply(then="break"),
}


def scenario(body: dict[str, Any]) -> Reply:
    """Return the reply that the question names."""
    return SCENARIOS[str(body["messages"][-1]["content"]).split()[-1]]


# In Node

HARNESS = Path(__file__).with_name("harness")
INSTALL = "npm install --prefer-offline --fetch-retries 1 --no-package-lock --no-audit --no-fund --ignore-scripts"
CLIENTS = [
    "openai create",
    "openai whole",
    "openai stream",
    "openai runTools",
    "ai-sdk openai",
    "ai-sdk openai-compatible",
    "langchain",
    "event-source-plus",
]


@pytest.fixture(scope="module")
def packages() -> Path:
    """The folder with the packages of package.json, which are installed where that has not been done."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no Node, or no npm")
    folder = CACHE / "node"
    folder.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "node.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.copy(HARNESS / "package.json", folder)
        for _ in range(2):
            try:
                subprocess.run(INSTALL.split(), cwd=folder, env=CALLERS, capture_output=True, check=True, timeout=100)
                return folder
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                reason = f"npm cannot install the packages: {error.stderr or error!r}"
    pytest.skip(reason)


@pytest.fixture(scope="module")
def made(packages: Path, server: Server, shared_upstream: Upstream) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """What each client made of each scenario, and how often the upstream was asked for it."""
    shared_upstream.forget()
    shared_upstream.reply = scenario
    script = packages / "clients.mjs"  # Node looks for packages beside the script
    shutil.copy(HARNESS / script.name, script)
    command = ["node", str(script), f"{server.url}/v1", NAME, *SCENARIOS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    asked = Counter(one.body["messages"][-1]["content"] for one in shared_upstream.received)
    return json.loads(done.stdout), asked


@pytest.mark.parametrize("client", CLIENTS)
def test_a_whole_answer_with_usage(made: tuple[dict[str, dict[str, Any]], Counter[str]], client: str) -> None:
    assert made[0][f"{client}: whole"] == {"text": TEXT, "finish": "stop", "tokens": TOKENS}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_failure_before_the_first_chunk(made: tuple[dict[str, dict[str, Any]], Counter[str]], client: str) -> None:
    assert list(made[0][f"{client}: busy"]) == ["error"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_failure_in_the_middle(made: tuple[dict[str, dict[str, Any]], Counter[str]], client: str) -> None:
    assert list(made[0][f"{client}: cut"]) == ["error"]
    if client != "openai whole":
        assert BROKE_OFF in made[0][f"{client}: cut"]["error"]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_upstream_is_asked_once(made: tuple[dict[str, dict[str, Any]], Counter[str]], client: str) -> None:
    assert [made[1][f"{client}: {name}"] for name in SCENARIOS] == [1, 1, 1]


# In Python


def create(chat: Chat, question: str) -> tuple[str, str | None, int | None]:
    request = {**asking(question), "stream": True, "stream_options": {"include_usage": True}}
    chunks: list[Any] = list(chat.sdk.chat.completions.create(**request))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, chunks[-1].usage and chunks[-1].usage.total_tokens


def create_whole(chat: Chat, question: str) -> tuple[str, str | None, int | None]:
    return read(chat.sdk.chat.completions.create(**asking(question)))


def stream(chat: Chat, question: str) -> tuple[str, str | None, int | None]:
    with chat.sdk.chat.completions.stream(**asking(question), stream_options={"include_usage": True}) as events:
        return read(events.get_final_completion())


def asking(question: str) -> Any:
    return {"model": NAME, "messages": [{"role": "user", "content": question}]}


def read(completion: Any) -> tuple[str, str | None, int | None]:
    [choice] = completion.choices
    assert choice.message.role == "assistant"
    return choice.message.content, choice.finish_reason, completion.usage and completion.usage.total_tokens


@pytest.mark.parametrize("ask", [create, create_whole, stream])
def test_the_openai_sdk(chat: Chat, upstream: Upstream, ask: Any) -> None:
    upstream.reply = scenario
    assert ask(chat, "whole") == (TEXT, "stop", TOKENS)
    with pytest.raises(openai.RateLimitError) as busy:
        ask(chat, "busy")
    assert busy.value.body == {"detail": BUSY}
    with pytest.raises(openai.APIError) as cut:
        ask(chat, "cut")
    assert BROKE_OFF in (cut.value.message, *(cut.value.body if isinstance(cut.value.body, dict) else {}).values())
    assert len(upstream.received) == 3


class City(BaseModel):
    name: str


@pytest.mark.parametrize("streamed", [True, False])
def test_the_openai_sdk_parses_an_answer_with_a_schema(chat: Chat, upstream: Upstream, streamed: bool) -> None:
    upstream.reply = Reply(tokens=['{"name": ', '"Rome"}'])
    completions = chat.sdk.chat.completions
    if streamed:
        with completions.stream(**asking("Where?"), response_format=City) as events:
            completion: Any = events.get_final_completion()
    else:
        completion = completions.parse(**asking("Where?"), response_format=City)
    assert completion.choices[0].message.parsed == City(name="Rome")
    assert upstream.received[0].body["response_format"]["json_schema"]["name"] == "City"
