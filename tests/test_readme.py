"""What README.md says is what happens: its commands run, its table of variables is the code's."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness.client import Chat
from harness.readme import blocks
from harness.serving import EXAMPLE, KEY, NAME, free_port, running
from harness.upstream import Upstream

SHELL = [block for block in blocks() if block.language == "bash"]
CURL = [block.code for block in SHELL if block.code.startswith("curl")]
[DEPLOY] = [block.code for block in SHELL if block.flags == "deploy"]
[WORKERS] = [block.code for block in SHELL if block.flags == "workers"]
[CLIENT] = [
    block.code for block in blocks() if block.language == "python" and "from openai import OpenAI" in block.code
]


@dataclass
class Checkout:
    """A user's checkout, with all that must not be uploaded, and an empty home."""

    folder: Path
    environment: dict[str, str]
    port: int

    def here(self, code: str) -> str:
        return code.replace("localhost:1416", f"127.0.0.1:{self.port}")

    def run(self, code: str) -> str:
        """Run a block as it stands, but for the port."""
        done = subprocess.run(
            ["sh", "-euc", self.here(code)],
            cwd=self.folder,
            env=self.environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    @contextlib.contextmanager
    def serve(self, code: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a block that ends in `hayhooks run` until this block is left."""
        command = ["sh", "-euc", code.replace("hayhooks run", "exec hayhooks run")]
        url = f"http://127.0.0.1:{self.port}/status"
        options = {"cwd": self.folder, "env": self.environment, "stderr": subprocess.STDOUT}
        with (
            (self.folder.parent / "server.log").open("wb") as log,
            running(command, url, stdout=log, **options) as server,
        ):
            yield server


@pytest.fixture
def checkout(tmp_path: Path, upstream: Upstream) -> Checkout:
    folder, home, port = tmp_path / "checkout", tmp_path / "home", free_port()
    for path in ("pipeline_wrapper.py", "requirements.txt", "README.md", ".env.example"):
        folder.mkdir(exist_ok=True)
        shutil.copy(EXAMPLE / path, folder)
    for secret in (".git/config", ".venv/lib/secret.py", "tests/secret.py"):
        (folder / secret).parent.mkdir(parents=True)
        (folder / secret).write_text("SECRET = 1")
    filled_in = (folder / ".env.example").read_text().replace("OPENAI_API_KEY=", f"OPENAI_API_KEY={KEY}")
    (folder / ".env").write_text(filled_in)
    home.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        "HAYHOOKS_HOST": "127.0.0.1",
        "HAYHOOKS_PORT": str(port),
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "OPENAI_BASE_URL": upstream.url,
    }
    return Checkout(folder, environment, port)


@pytest.fixture
def deployed(checkout: Checkout) -> Iterator[Checkout]:
    with checkout.serve("hayhooks run"):
        checkout.run(DEPLOY)
        yield checkout


def test_the_deploy_block_uploads_the_wrapper_alone(deployed: Checkout, upstream: Upstream) -> None:
    pipelines = Path(deployed.environment["HOME"]) / ".cache" / "async_hybrid_streaming" / "pipelines"
    arrived = [path.relative_to(pipelines) for path in pipelines.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert arrived == [Path(NAME) / "pipeline_wrapper.py"]
    assert not (deployed.folder / "pipelines").exists()
    if shutil.which("curl"):
        assert len(CURL) == 2
        stream, run = (deployed.run(code) for code in CURL)
        assert stream.count("data: {") == 5
        assert run == '{"result":"Hello, world!"}'
    answer = subprocess.run(
        [sys.executable, "-c", deployed.here(CLIENT)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert answer == "Hello, world!"
    assert {received.headers["authorization"] for received in upstream.received} == {f"Bearer {KEY}"}
    deployed.run(DEPLOY)


def test_the_workers_block_serves_from_every_worker(checkout: Checkout, upstream: Upstream) -> None:
    log = checkout.folder.parent / "server.log"
    with checkout.serve(WORKERS) as process:
        while log.read_text().count("Application startup complete") < 2:
            assert process.poll() is None
        url = f"http://127.0.0.1:{checkout.port}/v1/chat/completions"
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
        assert {httpx.post(url, json=body, timeout=60).status_code for _ in range(20)} == {200}
        assert len(set(re.findall(r"Started server process \[\x1b\[36m(\d+)", log.read_text()))) == 2


def test_the_commands_of_the_script_are_its_own() -> None:
    named = {command for block in SHELL for command in re.findall(r"\./tests/run (\w+)", block.code)}
    usage = subprocess.run([EXAMPLE / "tests" / "run", "--help"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert named == set(re.findall(r"\./tests/run (\w+)", usage))


def variables(text: str, pattern: str) -> dict[str, str]:
    return dict(re.findall(pattern, text, re.MULTILINE))


def test_the_variables_are_those_of_the_code(chat: Chat) -> None:
    spec = util.spec_from_file_location("pipeline_wrapper", EXAMPLE / "pipeline_wrapper.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fields: dict[str, Any] = module.Settings.model_fields
    table = variables((EXAMPLE / "README.md").read_text(), r"^\| `([A-Z_]+)` \| (.+?) \|")
    example = variables((EXAMPLE / ".env.example").read_text(), r"^(\w+)=(.*)$")
    assert set(table) == set(fields) == set(example) - {"HAYHOOKS_PIPELINES_DIR"}
    assert table.pop("OPENAI_API_KEY") == "none, required"
    assert example["OPENAI_API_KEY"] == ""
    for name, default in table.items():
        assert type(fields[name].default)(default.strip("`")) == fields[name].default
        assert default.strip("`") == example[name]


def test_the_last_line_is_the_licence() -> None:
    assert (EXAMPLE / "README.md").read_text().endswith("\nApache-2.0, as Hayhooks.\n")
