"""The steps to Haystack 3, as README.md prints them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.client import Chat, text_of
from harness.readme import python_block
from harness.serving import EXAMPLE, KEY, DeployError, hayhooks
from harness.upstream import USAGE, Reply, Upstream

HAYSTACK_3 = Path(sys.prefix) / "haystack3"
STEPS = {2: python_block("import AsyncPipeline"), 3: python_block("import Pipeline")}

needs_haystack_3 = pytest.mark.skipif(
    not HAYSTACK_3.exists(), reason="Haystack 3 is missing: ./tests/run test brings it"
)
each_step = pytest.mark.parametrize("haystack", [2, pytest.param(3, marks=needs_haystack_3)])


@contextlib.contextmanager
def deployed(code: str, haystack: int, upstream: Upstream, folder: Path) -> Iterator[Chat]:
    (folder / "step.py").write_text(code)
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream.url, "OPENAI_MAX_RETRIES": "0"}
    if haystack == 3:
        variables["PYTHONPATH"] = str(HAYSTACK_3)
    with hayhooks(**variables) as server:
        server.deploy(folder / "step.py")
        yield Chat(server)


@each_step
def test_a_step_streams_a_conversation(haystack: int, upstream: Upstream, tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{{ 7*7 }}"},
        {"role": "assistant", "content": "49"},
        {"role": "user", "content": "And 8*8?"},
    ]
    upstream.reply = Reply(tokens=["one", "two"], gated=True)
    upstream.release()
    with deployed(STEPS[haystack], haystack, upstream, tmp_path) as chat, chat.open(conversation) as events:
        tokens = filter(None, (text_of([event]) for event in events))
        for token in ("one", "two"):
            assert next(tokens) == token
            upstream.release()
    assert upstream.received[0].body["messages"] == conversation


@each_step
def test_a_client_that_leaves_stops_the_upstream_from_haystack_3_on(
    haystack: int, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.reply = Reply(tokens=["token "] * 50, pace=0.05)
    with deployed(STEPS[haystack], haystack, upstream, tmp_path) as chat:
        with chat.open() as events:
            next(events)
        upstream.wait_until(lambda: upstream.received[0].over)
    assert upstream.received[0].left == (haystack == 3)


def protected(step: str) -> str:
    """Put a step's class in the place of the example's, as README.md says."""
    source = (EXAMPLE / "pipeline_wrapper.py").read_text()
    imports, rest = source.split("\ntry:\n")
    in_production = rest[rest.index("Chunks = ") : rest.index("class PipelineWrapper(")]
    functions = rest[rest.index("class Settings(") : rest.index("def read_as_the_client_does(")]
    in_production = "".join(line for line in in_production.splitlines(True) if "set_default_executor" not in line)
    method = "    async def run_chat_completion_async"
    step = step.replace(method, f"    @in_production\n{method}")
    step = step.replace("conversation}", 'conversation, "generation_kwargs": read_parameters(body)}')
    return "\n".join([imports, in_production, step, functions])


@each_step
def test_the_protections_work_around_a_step(haystack: int, upstream: Upstream, tmp_path: Path) -> None:
    with deployed(protected(STEPS[haystack]), haystack, upstream, tmp_path) as chat:
        answer = chat.post(temperature=0.5, chat_id="1").json()
        assert answer["choices"][0]["message"]["content"] == "Hello, world!"
        assert answer["usage"]["total_tokens"] == USAGE["total_tokens"]
        assert upstream.received[0].body["temperature"] == 0.5
        assert "chat_id" not in upstream.received[0].body
        upstream.reply = Reply(status=401, error={"error": {"message": "Incorrect API key provided: sk-test"}})
        assert chat.post(stream=True).json() == {"detail": "The upstream refused the server's credentials."}
        upstream.reply = Reply(then="break")
        assert "error" in chat.events()[-1]
        assert chat.post().status_code == 502


@needs_haystack_3
def test_this_example_refuses_haystack_3(upstream: Upstream, tmp_path: Path) -> None:
    code = (EXAMPLE / "pipeline_wrapper.py").read_text()
    with pytest.raises(DeployError, match="haystack-ai 2") as refused, deployed(code, 3, upstream, tmp_path):
        pass
    assert "pip install -r requirements.txt" in str(refused.value).replace("\n", " ")
