"""One upstream for all tests, two Hayhooks servers, and clients to talk to them."""

import os

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when Haystack is imported, here and in what the tests start

from collections.abc import Iterator
from typing import Any

import pytest
from harness import other_wrapper
from harness.client import Chat
from harness.environments import CACHE
from harness.serving import KEY, TESTS_OTHER_WRAPPER, Server, deployed, load_wrapper
from harness.upstream import Upstream

# What is said of this folder, and not of every wrapper that keeps the contract.
THIS_FOLDER = [
    "test_any_component.py",
    "test_commands.py",
    "test_local_model.py",
    "test_readme.py",
    "test_shape.py",
    "test_third_party.py",
]
# What tests `run` and the demo says nothing of old releases.
NOT_OF_RELEASES = ["test_commands.py", "test_local_model.py"]

collect_ignore = THIS_FOLDER if TESTS_OTHER_WRAPPER else NOT_OF_RELEASES if os.environ.get("LOWEST") else []
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))


def pytest_configure(config: pytest.Config) -> None:
    if TESTS_OTHER_WRAPPER:
        config.pluginmanager.register(other_wrapper)


def pytest_report_header() -> list[str]:
    return [f"left out, as they test this folder: {', '.join(THIS_FOLDER)}"] if TESTS_OTHER_WRAPPER else []


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[Upstream]:
    with other_wrapper.UnframedUpstream() if TESTS_OTHER_WRAPPER else Upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    shared_upstream.forget()
    yield shared_upstream
    if isinstance(shared_upstream, other_wrapper.UnframedUpstream):
        shared_upstream.break_off()


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
