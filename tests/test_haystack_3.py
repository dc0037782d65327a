"""`production` as it is on Haystack 3, with components of one's own. test_third_party.py has OpenAI's there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.elsewhere import ONE_RUN_IS_ENOUGH, served_from, wrapper_of
from harness.serving import Server, wait_until

pytestmark = ONE_RUN_IS_ENOUGH

WORDS = """
import asyncio
import os
from pathlib import Path

from haystack import component
from haystack.dataclasses import StreamingChunk


def words_of(prompt):
    number = 0
    try:
        for number, word in enumerate(prompt.split()):
            if word == "fail":
                raise RuntimeError("a failure of its own")
            yield f"{word} "
    finally:
        Path(os.environ["LEFT_BEHIND"]).write_text(f"ended at {number}")


@component
class Words:
    @component.output_types(replies=list[str])
    def run(self, prompt: str, streaming_callback: object = None):
        for word in words_of(prompt):
            streaming_callback(StreamingChunk(word))
        return {"replies": [prompt]}


@component
class AsyncWords:
    @component.output_types(replies=list[str])
    def run(self, prompt: str, streaming_callback: object = None):
        raise NotImplementedError

    @component.output_types(replies=list[str])
    async def run_async(self, prompt: str, streaming_callback: object = None):
        for word in words_of(prompt):
            await streaming_callback(StreamingChunk(word))
            await asyncio.sleep(0.001)  # its client does not pace it
        return {"replies": [prompt]}
"""


LONG = "word " * 20_000


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a component leaves behind when it ends."""
    return tmp_path_factory.mktemp("words") / "left_behind"


@pytest.fixture(scope="module")
def server(left_behind: Path) -> Iterator[Server]:
    pipelines = {
        name: {"words.py": WORDS, "pipeline_wrapper.py": wrapper_of(f".words.{name}")}
        for name in ("Words", "AsyncWords")
    }
    with served_from("haystack_3", pipelines, LEFT_BEHIND=str(left_behind), MAX_CONCURRENT_STREAMS="2") as server:
        yield server


@pytest.fixture
def chat(server: Server) -> Chat:
    return Chat(server)


@pytest.fixture(params=["Words", "AsyncWords"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_streams(chat: Chat, model: str) -> None:
    events = chat.events("one two three", model=model)
    assert list(texts_of(events)) == ["one ", "two ", "three "]
    assert finish_reasons(events) == ["stop"]


def test_it_stops_when_the_client_has_left(chat: Chat, model: str, left_behind: Path) -> None:
    before = len(chat.server.log)
    left_behind.unlink(missing_ok=True)
    with chat.open(LONG, model=model) as events:
        assert next(texts_of(events)) == "word "
        assert not left_behind.exists()
    wait_until(lambda: left_behind.exists() and left_behind.read_text(), "the end of the component")
    assert left_behind.read_text() != "ended at 19999"
    assert not [word for word in ("Traceback", " | ERROR ") if word in chat.server.log[before:]]


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_chunk_is_a_502(chat: Chat, model: str, stream: bool) -> None:
    response = chat.post("fail", model=model, stream=stream)
    assert response.status_code == 502
    assert "of its own" not in response.text


def test_a_failure_after_it_is_an_event(chat: Chat, model: str) -> None:
    events = chat.events("one fail", model=model)
    assert text_of(events) == "one "
    assert events[-1]["error"]["type"] == "server_error"
    assert finish_reasons(events) == []


def test_one_too_many_is_refused(chat: Chat, model: str) -> None:
    def status() -> int:
        return chat.post("one", model=model).status_code

    with chat.open(LONG, model=model), chat.open(LONG, model=model):
        assert status() == 503
    wait_until(lambda: status() == 200, "a slot")
