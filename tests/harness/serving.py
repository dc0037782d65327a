"""Start Hayhooks and deploy a wrapper to it the way a user does: `hayhooks run`, then `deploy-files`."""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
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
NAME = "async_hybrid_streaming"
KEY = "sk-test-0123456789abcdef"
HAYHOOKS = f"{sysconfig.get_path('scripts')}/hayhooks"
PATIENCE = 60  # seconds to wait for anything that should have come long ago

# What a process needs of the caller's environment. All else stays out of the servers: keys, for one.
NEEDED = (
    *("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"),
)


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

    def deploy(self, wrapper: Path = EXAMPLE, name: str = NAME) -> None:
        """Deploy a clean copy of the wrapper with the CLI; raise DeployError with its output when it is refused."""
        with tempfile.TemporaryDirectory() as clean:
            copy_wrapper(wrapper, Path(clean))
            command = [HAYHOOKS, "pipeline", "deploy-files", "--name", name, "--overwrite", clean]
            try:
                done = subprocess.run(
                    command,
                    env=self.environment,
                    cwd=self.folder,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=60,
                )
            except subprocess.TimeoutExpired as error:
                raise DeployError("Error: it takes longer than a minute") from error
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
    """Return the example's module, for Python code that uses its class without a server."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    copy_wrapper(EXAMPLE, folder)
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
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
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
        wait_until(answers, url, 60)
    except TimeoutError as error:
        raise RuntimeError(str(error)) from error


def bare_environment() -> dict[str, str]:
    """Return what a process needs of the caller's environment, in which clients reach nothing but this machine."""
    nowhere = "http://127.0.0.1:9"  # the port of the discard service, which nobody runs
    proxies = {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "ALL_PROXY": nowhere, "NO_PROXY": "127.0.0.1,localhost"}
    inherited = {name: os.environ[name] for name in NEEDED if name in os.environ}
    return {**inherited, **proxies, **{name.lower(): value for name, value in proxies.items()}}


@contextlib.contextmanager
def serving(environment: dict[str, str], *options: str, command: str, wrapper: Path | str = "") -> Iterator[Server]:
    """Run `hayhooks run`, or another command that serves, in an environment.

    A wrapper, a file or a folder, lies in the pipelines directory at the start, under the example's name.
    """
    port = int(environment.get("HAYHOOKS_PORT") or free_port())
    with tempfile.TemporaryDirectory() as folder:
        if wrapper:
            copy_wrapper(Path(wrapper), Path(folder) / "pipelines" / NAME)
        (Path(folder) / ".env").touch()  # Hayhooks would look for the user's in the folders above
        environment = {
            "HOME": folder,
            "HAYHOOKS_PIPELINES_DIR": f"{folder}/pipelines",
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            **environment,
            "HAYHOOKS_HOST": "127.0.0.1",
            "HAYHOOKS_PORT": str(port),
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


def hayhooks(
    *options: str, command: str = "run", wrapper: Path | str = "", **variables: str
) -> contextlib.AbstractContextManager[Server]:
    """Run `hayhooks run`, or another command that serves, with these variables and nothing else of the caller's."""
    return serving({**bare_environment(), **variables}, *options, command=command, wrapper=wrapper)


@contextlib.contextmanager
def deployed(*options: str, command: str = "run", wrapper: Path | str = EXAMPLE, **variables: str) -> Iterator[Server]:
    """Serve a wrapper, the example's unless told otherwise, with a key."""
    with hayhooks(*options, command=command, wrapper=wrapper, **{"OPENAI_API_KEY": KEY, **variables}) as server:
        yield server
