"""One upstream for all tests, two Hayhooks servers, and clients to talk to them."""

import os
import sys

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when Haystack is imported, here and in what the tests start

from collections.abc import Iterator
from typing import Any

import pytest
from harness.client import Chat
from harness.environments import CACHE
from harness.serving import EXAMPLE, KEY, Server, deployed, load_wrapper
from harness.upstream import Upstream

sys.path.insert(0, str(EXAMPLE))  # for the unit tests of `production`
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))
# What tests the commands says nothing of old releases.
collect_ignore = ["test_check.py", "test_commands.py", "test_local_model.py"] if os.environ.get("LOWEST") else []


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
def wrapper_module() -> Any:
    return load_wrapper()


@pytest.fixture(scope="session")
def wrapper_class(wrapper_module: Any) -> Any:
    return wrapper_module.PipelineWrapper


@pytest.fixture
def wrapper(wrapper_class: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class itself, for Python code that uses it without a server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    wrapper = wrapper_class()
    wrapper.setup()
    return wrapper
