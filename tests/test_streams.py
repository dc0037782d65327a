"""What is closed of all that a component has in its local variables when its client leaves."""

import contextlib
import io
import sqlite3
import sys
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


Hostile: Any = type("Hostile", (), {"__getattribute__": lambda *_: sys.exit()})
FEED, FEEDS = Stream(), {"news": Stream()}


def delegated(stream: Any = None) -> Iterator[str]:
    yield from stream or (word for word in Stream())


def guarded() -> Iterator[str]:
    with contextlib.closing(Stream("unknown")) as stream:
        for word in stream:  # noqa: UP028
            yield word


def leave() -> None:
    raise GeneratorExit


def read(open_stream: Callable[[], Any]) -> None:
    stream = open_stream()
    for _ in stream:
        leave()


def read_twice_and_fail(open_stream: Callable[[], Any]) -> None:
    odd, stream = Hostile(), open_stream()  # noqa: F841
    next(iter(stream))
    try:
        read(open_stream)
    except GeneratorExit:
        raise ValueError from None


def closed_by(component: Callable[..., Any], *inputs: Any) -> list[bool]:
    """Run a component whose client leaves, and return which of the opened streams are closed."""
    try:
        component(*inputs)
    except BaseException as error:
        close_streams(error)
    return [stream.is_closed for stream in Stream.opened]


GENERATORS: list[Any] = [delegated, guarded, lambda: (word for word in (word for word in Stream()))]
STREAMS = [partial(Stream, name) for name in ("response", "iter_content", "iter_bytes", "_raw_stream")]


@pytest.mark.parametrize("open_stream", [*GENERATORS, *STREAMS])
def test_streams_in_local_variables_are_closed(open_stream: Callable[[], Any]) -> None:
    Stream.opened.clear()
    assert closed_by(read_twice_and_fail, open_stream) == [True, True]


def test_what_answers_share_and_what_is_no_stream_stays_open() -> None:
    Stream.opened[:] = [FEED, FEEDS["news"]]
    words = (word for word in Stream())
    captured, shared = Stream(), SimpleNamespace(feed=Stream(), feeds={"news": Stream()}, words=words)
    file, database = io.StringIO("text"), sqlite3.connect(":memory:")

    def run(self: Any, file: Any, database: Any, streams: list[Stream]) -> None:
        mine, news, words, helper = self.feed, self.feeds["news"], self.words, delegated(self.feed)  # noqa: F841
        common, more = FEED, FEEDS["news"]  # noqa: F841
        next(words), next(helper), next(iter(captured))
        raise GeneratorExit

    for _ in range(2):
        assert closed_by(run, shared, file, database, [Stream()]) == [False] * len(Stream.opened)
        assert all((file.read(1), database.execute("SELECT 1"), next(words)))
