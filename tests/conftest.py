"""One upstream for all tests, two Hayhooks servers, and clients to talk to them."""

import sys
from collections.abc import Iterator

import pytest
from harness.client import Chat
from harness.serving import EXAMPLE, KEY, Server, deployed
from harness.upstream import Upstream

sys.path.insert(0, str(EXAMPLE))  # for tests of a single function

from pipeline_wrapper import PipelineWrapper


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    shared_upstream.forget()
    return shared_upstream


@pytest.fixture(scope="session")
def server(shared_upstream: Upstream) -> Iterator[Server]:
    with deployed(OPENAI_BASE_URL=shared_upstream.url) as server:
        yield server


@pytest.fixture
def chat(server: Server, upstream: Upstream) -> Chat:
    return Chat(server)


@pytest.fixture(scope="session")
def small_server(shared_upstream: Upstream) -> Iterator[Server]:
    with deployed(OPENAI_BASE_URL=shared_upstream.url, OPENAI_TIMEOUT="1", MAX_CONCURRENT_STREAMS="8") as server:
        yield server


@pytest.fixture
def small(small_server: Server, upstream: Upstream) -> Chat:
    """A client of a server that waits one second for the upstream, and has eight places."""
    return Chat(small_server)


@pytest.fixture
def wrapper(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> PipelineWrapper:
    """The class itself, for Python code that uses it without a server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    wrapper = PipelineWrapper()
    wrapper.setup()
    return wrapper
