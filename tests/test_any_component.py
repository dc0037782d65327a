"""`stoppable` and `openai_response` work for any component, without OpenAI and without its knowledge."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.elsewhere import ONE_RUN_IS_ENOUGH, let_clients_pause, served_from
from harness.serving import EXAMPLE, NAME, hayhooks, wait_until
from hayhooks import async_streaming_generator
from haystack import AsyncPipeline, Pipeline, component
from haystack.dataclasses import StreamingChunk
from packaging.version import Version

BROKE_OFF = "The answer could not be completed."
HARNESS = Path(__file__).with_name("harness")


def own(folder: Path, patience: int = 60) -> Path:
    """Return a folder with a pipeline of one's own and the package; a client may pause for `patience` seconds."""
    shutil.copytree(EXAMPLE / "production", folder / "production")
    shutil.copy(HARNESS / "own_wrapper.py", folder / "pipeline_wrapper.py")
    let_clients_pause(folder, patience)
    return folder


class Own(Chat):
    """A client of a pipeline of one's own, which runs one answer at a time."""

    marks: Path

    def runs(self) -> int:
        return len(list(self.marks.iterdir()))

    def wait_until_ended(self) -> None:
        wait_until(lambda: not self.runs(), "every run to end")


ON_HAYSTACK_3 = [pytest.param((speaker, "haystack_3"), marks=ONE_RUN_IS_ENOUGH) for speaker in ("sync", "async")]


@pytest.fixture(scope="module", params=[("sync", ""), ("async", ""), *ON_HAYSTACK_3])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    speaker, environment = request.param
    wrapper, marks = own(tmp_path_factory.mktemp("own")), tmp_path_factory.mktemp("marks")
    variables = {"SPEAKER": speaker, "MARKS": str(marks), "MAX_CONCURRENT_STREAMS": "1"}  # and none of OpenAI's
    files = {NAME: {"pipeline_wrapper.py": (wrapper / "pipeline_wrapper.py").read_text()}}
    serving = served_from(environment, files, **variables) if environment else hayhooks(wrapper=wrapper, **variables)
    with serving as server:
        chat = Own(server)
        chat.marks = marks
        yield chat


def test_it_streams(chat: Own) -> None:
    events = chat.events("say one two three", stream_options={"include_usage": True})
    assert list(texts_of(events)) == ["one ", "two ", "three "]
    assert finish_reasons(events) == finish_reasons(events[-1:]) == ["stop"]
    assert not any("usage" in event for event in events)
    [choice] = chat.post("say one two").json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one two ", "stop")


def test_its_own_finish_reason_counts(chat: Own) -> None:
    assert finish_reasons(chat.events("finish tool_calls length")) == ["length"]


def test_usage_in_other_words_or_no_json_is_left_out(chat: Own) -> None:
    events = chat.events("usage", stream_options={"include_usage": True})
    assert text_of(events) == "Hi"
    assert not any("usage" in event for event in events)
    assert chat.post("usage").json()["usage"] is None


@pytest.mark.parametrize(
    ("how", "text"), [("reuse one two three", "onetwothree"), ("odd", "half \ufffdtext")], ids=["one object", "odd"]
)
def test_odd_chunks_are_read(chat: Own, how: str, text: str) -> None:
    events = chat.events(how)
    assert text_of(events) == text
    assert not any("error" in event for event in events)
    assert chat.post(how).json()["choices"][0]["message"]["content"] == text


def test_what_cannot_be_answered_is_not_logged_as_an_error(chat: Own) -> None:
    before = len(chat.server.log)
    assert chat.post(" ").status_code == 400
    assert " | ERROR " not in chat.server.log[before:]


@pytest.mark.parametrize("how", ["endless", "stubborn", "bitter"])
def test_it_ends_when_the_client_has_left(chat: Own, how: str) -> None:
    before = len(chat.server.log)
    for _ in range(10):
        with chat.open_patiently(how) as events:
            for _ in range(3):
                assert next(texts_of(events)) == "word "
        chat.wait_until_ended()
    assert text_of(chat.events("say hello")) == "hello "
    assert "Traceback" not in chat.server.log[before:]
    assert " | ERROR " not in chat.server.log[before:]


@pytest.mark.parametrize("how", ["status", "deep"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "answered"),
    [(400, 400), (401, 424), (404, 424), (429, 429), (503, 503), (500, 502), (504, 504), (-1, 502)],
)
def test_a_failure_with_a_status_goes_by_the_table(
    chat: Own, how: str, stream: bool, status: int, answered: int
) -> None:
    if how == "deep" and Version(version("haystack-ai")) < Version("2.18"):
        pytest.skip("this Haystack does not wrap what a component raises, and the context of that is lost")
    failed = chat.post(f"{how} {status}", stream=stream)
    assert failed.status_code == answered
    assert failed.headers.get("retry-after") == ("7" if status in (429, 503) else None)
    assert "/opt" not in failed.text


@pytest.mark.parametrize("how", ["broken", "circle", "next", "unstarted", "unfed", "text"])
@pytest.mark.parametrize("stream", [True, False])
def test_any_other_failure_is_a_bad_gateway_and_in_the_log(chat: Own, how: str, stream: bool) -> None:
    before = len(chat.server.log)
    failed = chat.post(how, stream=stream)
    assert (failed.status_code, failed.json()) == (502, {"detail": BROKE_OFF})
    logged = {"unfed": "Missing", "next": "StopIteration", "text": "must return"}.get(how, "my secret")
    assert logged in chat.server.log[before:]


def test_a_failure_after_the_first_chunk_is_an_error_event(chat: Own) -> None:
    events = chat.events("cut one two")
    assert list(texts_of(events)) == ["one ", "two "]
    assert events[-1] == {"error": {"message": BROKE_OFF, "type": "server_error"}}
    assert not finish_reasons(events)


@pytest.mark.parametrize("stream", [True, False])
def test_an_http_exception_of_its_own_goes_through(chat: Own, stream: bool) -> None:
    failed = chat.post("http", stream=stream)
    assert (failed.status_code, failed.json()) == (418, {"detail": "short and stout"})
    assert failed.headers["x-tea"] == "yes"


@pytest.mark.parametrize("how", ["silent", "misnamed one two"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_pipeline_that_does_not_stream_is_a_bad_gateway(chat: Own, how: str, stream: bool) -> None:
    before = len(chat.server.log)
    failed = chat.post(how, stream=stream)
    assert (failed.status_code, failed.json()) == (502, {"detail": BROKE_OFF})
    assert "streaming_components" in chat.server.log[before:]


def test_what_hayhooks_callbacks_add_arrives(chat: Own) -> None:
    events = chat.events("tool one two")
    assert [event["event"] for event in events if "event" in event] == [{"type": "status", "data": {"tool": "clock"}}]
    assert text_of(events) == "[clock] one two (end)"
    assert finish_reasons(events) == ["stop"]
    assert chat.post("tool one two").json()["choices"][0]["message"]["content"] == "[clock] one two (end)"


def test_a_method_gets_the_headers_of_the_request(chat: Own) -> None:
    answer = chat.http.post("/v1/chat/completions", json=chat.request("headers"), headers={"x-name": "Ada"})
    assert answer.json()["choices"][0]["message"]["content"] == "Ada "


def test_a_client_beyond_the_slots_is_refused(chat: Own) -> None:
    with chat.open_patiently("endless") as events:
        next(texts_of(events))
        assert chat.post("say hello").status_code == 503
    chat.wait_until_ended()


@pytest.mark.parametrize("speaker", ["sync", "async"])
def test_a_client_that_reads_no_more_ends_it_even_if_it_catches_exceptions(tmp_path: Path, speaker: str) -> None:
    (marks := tmp_path / "marks").mkdir()
    variables = {"SPEAKER": speaker, "MARKS": str(marks)}
    with (
        hayhooks(wrapper=own(tmp_path / "own", patience=1), **variables) as server,
        Own(server).open("stubborn flood") as events,
    ):
        next(texts_of(events))
        wait_until(lambda: not any(marks.iterdir()), "the run to end")
        rest = list(events)
        assert rest[-1] == {"error": {"message": BROKE_OFF, "type": "server_error"}}
        assert not finish_reasons(rest)


# The component itself


@component
class Words:
    def __init__(self) -> None:
        self.runs = 0

    @component.output_types(words=list[str])
    def run(self, words: list[str], streaming_callback: Any = None) -> dict[str, Any]:
        self.runs += 1
        for word in words:
            if streaming_callback:
                streaming_callback(StreamingChunk(word))
        return {"words": words}


@component
class Mute:
    @component.output_types(words=list[str])
    def run(self, words: list[str]) -> dict[str, Any]:
        return {"words": words}


@pytest.fixture
def stoppable(wrapper_module: Any) -> Any:
    return wrapper_module.stoppable


@pytest.mark.parametrize("mute", [Mute(), object()])
def test_what_cannot_stream_is_refused_by_name(stoppable: Any, mute: object) -> None:
    with pytest.raises(TypeError, match=type(mute).__name__):
        stoppable(mute)


@pytest.mark.parametrize("times", [1, 2])
def test_outside_of_an_answer_nothing_changes(stoppable: Any, times: int) -> None:
    words = Words()
    for _ in range(times):
        assert stoppable(words) is words
    pipeline, heard = AsyncPipeline(), []
    pipeline.add_component("words", words)
    inputs = {"words": ["one", "two"], "streaming_callback": lambda chunk: heard.append(chunk.content)}
    assert asyncio.run(pipeline.run_async({"words": inputs})) == {"words": {"words": ["one", "two"]}}
    assert heard == ["one", "two"]
    assert words.run(["one"]) == words.run(words=["one"]) == {"words": ["one"]}


@pytest.mark.parametrize("owner", [Words, None], ids=["class", "component"])
def test_what_replaces_run_is_called(stoppable: Any, monkeypatch: pytest.MonkeyPatch, owner: Any) -> None:
    """Tracers replace it in the class, whenever they start; others replace it on a component before it is wrapped."""
    words, run, seen = Words(), Words.run, []

    def traced(*args: Any, **inputs: Any) -> Any:
        seen.append(inputs)
        return run(words, *args[owner is Words :], **inputs)

    if owner is None:
        monkeypatch.setattr(words, "run", traced)
    stoppable(words)
    if owner is Words:
        monkeypatch.setattr(Words, "run", traced)
    words.run(words=["one"])
    assert seen == [{"words": ["one"]}]


class Closable:
    """What a component may have in a local variable; a stream is closed when the client leaves, and nothing else is."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Stream(Closable):
    def __iter__(self) -> Iterator[str]:
        yield from ["word"] * 1000


class Log(Stream):
    def write(self, text: str) -> None:
        pass


class Cache(Stream):
    def __len__(self) -> int:
        return 1000


class SdkStream(Stream):
    """One in a reference cycle, as some SDKs make them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = self.read()

    def read(self) -> Iterator[str]:
        while not self.is_closed:
            yield "word"

    def __iter__(self) -> Iterator[str]:
        yield from self.words


CURSOR = Stream()  # which others use, too


@component
class Reader:
    """Reads a stream, and has other things in its local variables."""

    def __init__(self, how: str = "variable") -> None:
        self.how = how
        self.others = Closable(), Log(), Cache()
        self.cursor = Stream()
        self.streams: list[Any] = []

    def open(self) -> Stream:
        self.streams.append(stream := SdkStream())
        return stream

    def helper(self) -> Iterator[str]:
        for word in self.open():  # noqa: UP028
            yield word

    def read(self, callback: Any) -> None:
        match self.how:
            case "loop":
                for word in self.open():
                    callback(StreamingChunk(word))
            case "generator in a loop":
                for word in self.helper():
                    callback(StreamingChunk(word))
            case "generator in a variable":
                words = self.helper()
                for word in words:
                    callback(StreamingChunk(word))
            case _:
                stream = self.open()
                for word in stream:
                    callback(StreamingChunk(word))

    @component.output_types(words=list[str])
    def run(self, streaming_callback: Any = None) -> dict[str, Any]:
        connection, log, cache = self.others  # noqa: RUF059
        mine, common = self.cursor, CURSOR  # noqa: F841
        try:
            self.read(streaming_callback)
        except BaseException:
            if self.how != "swallowed":
                raise
        return {"words": []}


@component
class Shouter:
    """Changes the chunks of another component."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @component.output_types(words=list[str])
    def run(self, streaming_callback: Any = None) -> dict[str, Any]:
        def shout(chunk: StreamingChunk) -> None:
            streaming_callback(StreamingChunk(chunk.content.upper()))

        return self.inner.run(words=["one", "two"], streaming_callback=shout)


@component
class Gate:
    """Comes before a component that streams, and takes its time."""

    def __init__(self) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    @component.output_types(words=list[str])
    def run(self, words: list[str]) -> dict[str, Any]:
        self.is_reached.set()
        self.is_open.wait()
        return {"words": words}


async def answer_of(wrapper_module: Any, component: Any) -> Any:
    """Return the chunks of a pipeline with this component alone, as Python code gets them."""
    pipeline = AsyncPipeline()
    pipeline.add_component("one", wrapper_module.stoppable(component))
    return await chunks_of(wrapper_module, pipeline, {"one": {}})


async def chunks_of(wrapper_module: Any, pipeline: Any, inputs: dict[str, Any], streaming: Any = None) -> Any:
    @wrapper_module.openai_response  # type: ignore[untyped-decorator]
    async def chat(self: Any, model: str, messages: Any, body: dict[str, Any]) -> Any:
        return async_streaming_generator(
            pipeline=pipeline,
            pipeline_run_args=inputs,
            streaming_components=streaming,
            allow_sync_streaming_callbacks=True,
        )

    return await chat(None, "", [], {})


async def ask_and_leave(wrapper_module: Any, component: Any) -> None:
    chunks = await answer_of(wrapper_module, component)
    await anext(chunks)
    await chunks.aclose()
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


@pytest.mark.parametrize("how", ["variable", "loop", "generator in a loop", "generator in a variable", "swallowed"])
def test_streams_are_closed_and_nothing_else(wrapper_module: Any, how: str) -> None:
    reader = Reader(how)
    asyncio.run(ask_and_leave(wrapper_module, reader))
    assert [stream.is_closed for stream in reader.streams] == [True]
    assert not any(other.is_closed for other in (*reader.others, reader.cursor, CURSOR))


def test_a_callback_that_does_not_lead_to_the_client_is_not_waited_for(wrapper_module: Any) -> None:
    pipeline, heard = AsyncPipeline(), []
    for name in ("aside", "words"):
        pipeline.add_component(name, wrapper_module.stoppable(Words()))
    aside = {"words": ["one", "two"], "streaming_callback": lambda chunk: heard.append(chunk.content)}

    async def ask() -> list[str]:
        inputs = {"aside": aside, "words": {"words": ["three"]}}
        return [chunk.content async for chunk in await chunks_of(wrapper_module, pipeline, inputs, ["words"])]

    assert asyncio.run(ask()) == ["three", ""]
    assert heard == ["one", "two"]


def test_a_component_within_a_component_waits_once(wrapper_module: Any) -> None:
    async def ask() -> list[str]:
        return [
            chunk.content async for chunk in await answer_of(wrapper_module, Shouter(wrapper_module.stoppable(Words())))
        ]

    assert asyncio.run(ask()) == ["ONE", "TWO", ""]


def test_a_component_does_not_start_after_the_client_has_left(wrapper_module: Any) -> None:
    """A sync pipeline runs on in its thread."""
    gate, words, pipeline = Gate(), Words(), Pipeline()
    pipeline.add_component("gate", gate)
    pipeline.add_component("words", wrapper_module.stoppable(words))
    pipeline.connect("gate.words", "words.words")

    async def ask_and_leave() -> None:
        chunks = await chunks_of(wrapper_module, pipeline, {"gate": {"words": ["one"]}})
        reading = asyncio.create_task(anext(chunks))
        await asyncio.to_thread(gate.is_reached.wait)
        reading.cancel()
        await asyncio.wait([reading])
        gate.is_open.set()

    asyncio.run(ask_and_leave())  # until the threads have ended
    assert not words.runs


@pytest.mark.parametrize(("dropped", "expected"), [("", ["ONE", "TWO", ""]), ("one", ["TWO", ""])])
def test_a_method_may_change_or_drop_chunks(wrapper_module: Any, dropped: str, expected: list[str]) -> None:
    pipeline = AsyncPipeline()
    pipeline.add_component("one", wrapper_module.stoppable(Words()))

    @wrapper_module.openai_response  # type: ignore[untyped-decorator]
    async def chat(self: Any, model: str, messages: Any, body: dict[str, Any]) -> Any:
        chunks = async_streaming_generator(
            pipeline=pipeline,
            pipeline_run_args={"one": {"words": ["one", "two"]}},
            allow_sync_streaming_callbacks=True,
        )
        return (StreamingChunk(chunk.content.upper()) async for chunk in chunks if chunk.content != dropped)

    async def ask() -> list[str]:
        return [chunk.content async for chunk in await chat(None, "", [], {})]

    assert asyncio.run(ask()) == expected
