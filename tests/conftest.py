"""One upstream and one Hayhooks server for all tests, and a client to talk to it."""

import sys
from collections.abc import Iterator

import pytest
from harness.client import Chat
from harness.serving import EXAMPLE, Server, deployed
from harness.upstream import Upstream

sys.path.insert(0, str(EXAMPLE))  # for tests of a single function


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
