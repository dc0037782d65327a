"""One upstream for all tests, two Hayhooks servers, and clients to talk to them."""

from collections.abc import Iterator
from typing import Any

import pytest
from harness.client import Chat
from harness.serving import KEY, TESTS_OTHER_WRAPPER, WRAPPER, Server, deployed, load_wrapper
from harness.upstream import Upstream

# What is said of this folder, and not of every wrapper that keeps the contract.
THIS_FOLDER = ["test_commands.py", "test_local_model.py", "test_readme.py", "test_shape.py"]
collect_ignore = THIS_FOLDER if TESTS_OTHER_WRAPPER else []


def pytest_report_header() -> list[str]:
    if not TESTS_OTHER_WRAPPER:
        return []
    return [f"wrapper: {WRAPPER}", f"left out, as they test this folder: {', '.join(THIS_FOLDER)}"]


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
    """A client of a server that waits one second for the upstream, and has eight slots."""
    return Chat(small_server)


@pytest.fixture(scope="session")
def wrapper_class() -> Any:
    return load_wrapper().PipelineWrapper


@pytest.fixture
def wrapper(wrapper_class: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class itself, for Python code that uses it without a server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    wrapper = wrapper_class()
    wrapper.setup()
    return wrapper
