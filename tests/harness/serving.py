"""Start Hayhooks and deploy a wrapper to it the way a user does: `hayhooks run`, then `deploy-files`."""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hayhooks.server.utils.module_loader import load_pipeline_module

EXAMPLE = Path(__file__).resolve().parents[2]
# The wrapper under test, a file or a folder: this folder, or the one that `./tests/run test --wrapper` names.
WRAPPER = Path(os.environ.get("WRAPPER") or EXAMPLE)
TESTS_OTHER_WRAPPER = "WRAPPER" in os.environ
NAME = "async_hybrid_streaming"
KEY = "sk-test-0123456789abcdef"
HAYHOOKS = f"{sysconfig.get_path('scripts')}/hayhooks"


class DeployError(Exception):
    """What the CLI printed when a deploy was refused."""


class Server:
    """A running `hayhooks run`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, environment: dict[str, str], folder: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.environment = environment
        self.folder = folder

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def deploy(self, wrapper: Path = WRAPPER, name: str = NAME) -> None:
        """Deploy a clean copy of the wrapper with the CLI; raise DeployError with its output when it is refused."""
        with tempfile.TemporaryDirectory() as clean:
            copy_wrapper(wrapper, Path(clean))
            command = [HAYHOOKS, "pipeline", "deploy-files", "--name", name, "--overwrite", clean]
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=self.folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise DeployError(done.stdout)


def copy_wrapper(wrapper: Path, folder: Path) -> None:
    """Copy a wrapper into a folder: a file, under the name that Hayhooks looks for, or a folder without its tests."""
    if wrapper.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(wrapper, folder / "pipeline_wrapper.py")
    else:
        left_out = shutil.ignore_patterns(".*", "__pycache__", "tests")
        shutil.copytree(wrapper, folder, ignore=left_out, dirs_exist_ok=True)


def load_wrapper() -> Any:
    """Return the module of the wrapper under test, for Python code that uses its class without a server."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    copy_wrapper(WRAPPER, folder)
    return load_pipeline_module(NAME, folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], url: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the block is left; yields once the URL answers. The options are Popen's."""
    process = subprocess.Popen(command, **options)
    try:
        wait_for(url, process)
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    """Block until the condition holds; raise TimeoutError, which says what was waited for, after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds:.0f} seconds for {what}")
        time.sleep(0.05)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Block until the URL answers; raise RuntimeError when the process ends first, or takes too long."""

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"the process ended before {url} answered")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return True
        return False

    try:
        wait_until(answers, url)
    except TimeoutError as error:
        raise RuntimeError(str(error)) from error


@contextlib.contextmanager
def hayhooks(*options: str, command: str = "run", wrapper: Path | str = "", **variables: str) -> Iterator[Server]:
    """Run `hayhooks run`, or another command that serves, with these variables and none of the caller's own.

    A wrapper, a file or a folder, lies in the pipelines directory at the start, under the example's name.
    """
    port = int(variables.get("HAYHOOKS_PORT") or free_port())
    with tempfile.TemporaryDirectory() as folder:
        if wrapper:
            copy_wrapper(Path(wrapper), Path(folder) / "pipelines" / NAME)
        ours = ("OPENAI_", "HAYHOOKS_", "MAX_CONCURRENT_STREAMS")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment = {
            **inherited,
            "HAYHOOKS_HOST": "127.0.0.1",
            "HAYHOOKS_PORT": str(port),
            "HAYHOOKS_PIPELINES_DIR": f"{folder}/pipelines",
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            **variables,
        }
        started = [HAYHOOKS, *command.split(), "--host", "127.0.0.1", "--port", str(port), *options]
        url = f"http://127.0.0.1:{port}/status"
        with open(f"{folder}/server.log", "wb") as log, contextlib.ExitStack() as stack:
            start = running(started, url, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                process = stack.enter_context(start)
            except RuntimeError as error:
                end = (Path(folder) / "server.log").read_text().splitlines()[-10:]
                raise RuntimeError("\n".join(["The server did not start.", *end])) from error
            yield Server(process, port, environment, Path(folder))


@contextlib.contextmanager
def deployed(*options: str, command: str = "run", wrapper: Path | str = WRAPPER, **variables: str) -> Iterator[Server]:
    """Serve a wrapper, the example's unless told otherwise, with a key."""
    with hayhooks(*options, command=command, wrapper=wrapper, **{"OPENAI_API_KEY": KEY, **variables}) as server:
        yield server
