"""What is closed of all that a component has in its local variables when its client leaves."""

import contextlib
import io
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from production.streams import close_streams


class Stream:
    """An SDK's: it keeps the HTTP response that it reads, and is in a reference cycle."""

    opened: ClassVar[list["Stream"]] = []

    def __init__(self, attribute: str = "response") -> None:
        setattr(self, attribute, self)
        self.is_closed = False
        self.opened.append(self)

    def __iter__(self) -> Iterator[str]:
        while not self.is_closed:
            yield "word"

    def close(self) -> None:
        self.is_closed = True


class Hostile:
    def __getattribute__(self, name: str) -> Any:
        raise SystemExit


FEED, FEEDS = Stream(), {"news": Stream()}


def words_of(stream: Any) -> Iterator[str]:
    for word in stream:  # noqa: UP028
        yield word


def delegated() -> Iterator[str]:
    yield from words_of(Stream())


def guarded() -> Iterator[str]:
    with contextlib.closing(Stream("unknown")) as stream:
        for word in stream:  # noqa: UP028
            yield word


def read(open_stream: Callable[[], Any]) -> None:
    stream = open_stream()
    for _ in stream:
        raise GeneratorExit


def read_and_fail(open_stream: Callable[[], Any]) -> None:
    try:
        read(open_stream)
    except GeneratorExit:
        raise ValueError from None


def read_beside_hostile(open_stream: Callable[[], Any]) -> None:
    odd = self = Hostile()  # noqa: F841
    read(open_stream)


def closed_by(component: Callable[..., Any], *inputs: Any) -> list[bool]:
    """Run a component whose client leaves, and return which of the opened streams are closed."""
    try:
        component(*inputs)
    except BaseException as error:
        close_streams(error)
    return [stream.is_closed for stream in Stream.opened]


OPEN: list[Any] = [delegated, guarded, lambda: words_of(Stream()), Stream]
OPEN += [partial(Stream, name) for name in ("iter_content", "iter_bytes", "_raw_stream")]


@pytest.mark.parametrize("component", [read, read_and_fail, read_beside_hostile])
@pytest.mark.parametrize("open_stream", OPEN)
def test_a_stream_in_a_local_variable_is_closed(component: Any, open_stream: Any) -> None:
    Stream.opened.clear()
    assert closed_by(component, open_stream) == [True]


def test_what_answers_share_and_what_is_no_stream_stays_open() -> None:
    Stream.opened[:] = [FEED, FEEDS["news"]]
    captured, shared = Stream(), SimpleNamespace(feed=Stream(), feeds={"news": Stream()}, words=words_of(Stream()))
    file, database = io.StringIO("text"), sqlite3.connect(":memory:")

    def run(self: Any, file: Any, database: Any, streams: list[Stream]) -> None:
        mine, news, words, helper = self.feed, self.feeds["news"], self.words, words_of(self.feed)  # noqa: F841
        common, more = FEED, FEEDS["news"]  # noqa: F841
        next(words), next(helper), next(iter(captured))
        raise GeneratorExit

    for _ in range(2):
        assert closed_by(run, shared, file, database, [Stream()]) == [False] * len(Stream.opened)
        assert all((file.read(1), database.execute("SELECT 1"), next(shared.words)))
