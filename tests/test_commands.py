"""`./tests/run` says what is missing or failed, survives an interruption, and installs once; so does the demo speak."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.serving import EXAMPLE, free_port
from harness.upstream import Reply, Upstream

RUN = str(EXAMPLE / "tests" / "run")
OLD = 'case "$*" in -V) echo Python 3.9.18 ;; *) exit 1 ;; esac'
WITHOUT_VENV = 'case "$*" in *ensurepip*) exit 1 ;; esac'

# An interpreter whose environments hold a stub uv: with $GATE, a named pipe, it says there that it runs, and waits.
UV = """#!/bin/sh
[ ! -p "$GATE" ] || { echo "runs" >"$GATE" && : >"$GATE.open"; }
"""
IN_ENVIRONMENT = """#!/bin/sh
case "$*" in
    *" install "*uv) cp "$STUBS/uv" "$(dirname "$0")/uv" ;;
    *demo.py*) echo "the demo runs" ;;
esac
"""
PYTHON = f"""#!/bin/sh
case "$*" in
    "-m venv "*)
        for folder in "$@"; do :; done
        mkdir -p "$folder/bin"
        cp "$STUBS/in_environment" "$folder/bin/python" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("interpreter", "sentence"), [(OLD, "Python 3.10 or newer is needed"), (WITHOUT_VENV, "no venv")]
)
def test_an_unfit_interpreter_is_named(tmp_path: Path, interpreter: str, sentence: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{interpreter}\n")
    python.chmod(0o755)
    assert sentence in refusal({"PYTHON": str(python)}, "demo")


def test_a_missing_interpreter_is_named() -> None:
    assert "/nowhere/python was not found" in refusal({"PYTHON": "/nowhere/python"}, "demo")


@pytest.mark.parametrize("arguments", [[], ["deploy"]])
def test_an_unknown_command_gets_the_usage(arguments: list[str]) -> None:
    assert "usage: ./tests/run demo" in refusal({}, *arguments)


def test_without_an_index_the_packages_could_not_be_fetched(tmp_path: Path) -> None:
    unreachable = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    said = refusal({"XDG_CACHE_HOME": str(tmp_path), "PYTHON": sys.executable, **unreachable}, "demo")
    assert "The packages could not be fetched" in said.splitlines()[-1]


def test_an_interrupted_installation_is_made_again(stubs: dict[str, str]) -> None:
    make_gate(stubs)
    with started(RUN, "demo", **stubs) as first:
        assert Path(stubs["GATE"]).read_text() == "runs\n"
        os.killpg(first.pid, signal.SIGINT)
        assert rest_of(first).splitlines()[-1] == "Stopped."
    assert first.returncode == 130
    os.unlink(stubs["GATE"])
    with started(RUN, "demo", **stubs) as second:
        assert "Installing into" in read_until(second, "the demo runs")
    with started(RUN, "demo", **stubs) as third:
        assert rest_of(third) == "the demo runs\n"


def test_two_starts_at_once_install_once(stubs: dict[str, str]) -> None:
    make_gate(stubs)
    with started(RUN, "demo", **stubs) as first:
        assert Path(stubs["GATE"]).read_text() == "runs\n"
        with started(RUN, "demo", **stubs) as second:
            read_until(second, "Another start is installing")
            os.unlink(stubs["GATE"])
            Path(stubs["GATE"] + ".open").read_bytes()
            assert rest_of(second) == "the demo runs\n"
        read_until(first, "the demo runs")


def test_a_taken_port_is_left_alone(upstream: Upstream, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # something else listens there already
            stack.enter_context(socket.create_server(("127.0.0.1", 1416)))
        with demo("--once", TMPDIR=str(tmp_path), OPENAI_API_KEY="k", OPENAI_BASE_URL=upstream.url) as started:
            said = rest_of(started)
    assert re.search(r"Port 1416 is taken, so this demo uses \d+\.", said)
    assert "Hello, world!" in said


def test_once_promises_no_server(upstream: Upstream) -> None:
    with demo("--once", OPENAI_API_KEY="k", OPENAI_BASE_URL=upstream.url) as started:
        said = rest_of(started)
    assert started.returncode == 0
    assert "Hello, world!" in said
    assert "http" not in said


def test_a_dead_upstream_is_named_in_the_words_of_the_log() -> None:
    with demo("--once", OPENAI_API_KEY="k", OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}/v1") as started:
        last = rest_of(started).splitlines()[-1]
    assert started.returncode == 1
    assert last == "The server's log says: Connection error."


def test_an_unknown_model_is_named_in_the_words_of_the_upstream(upstream: Upstream) -> None:
    upstream.reply = Reply(status=404, error={"error": {"message": "The model gpt-0 does not exist"}})
    with demo("--once", OPENAI_API_KEY="k", OPENAI_BASE_URL=upstream.url) as started:
        assert "The model gpt-0 does not exist" in rest_of(started).splitlines()[-1]
    assert started.returncode == 1


def test_a_refused_deploy_gives_its_reason_in_a_line() -> None:
    with demo("--once", OPENAI_API_KEY="a key") as started:
        last = rest_of(started).splitlines()[-1]
    assert started.returncode == 1
    assert "deploy was refused" in last
    assert "OPENAI_API_KEY" in last


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ImportError('no uvicorn here')")
    with demo("--once", OPENAI_API_KEY="k", PYTHONPATH=str(tmp_path)) as started:
        assert "no uvicorn here" in rest_of(started).splitlines()[-1]
    assert started.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_silent_upstream_is_waited_for_audibly_until_a_signal(
    upstream: Upstream, tmp_path: Path, number: signal.Signals
) -> None:
    upstream.reply = Reply(gated=True)
    variables = {"TMPDIR": str(tmp_path), "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": upstream.url}
    with demo(**variables) as started:
        read_until(started, "No answer from the upstream yet")
        os.killpg(started.pid, number)
        assert rest_of(started) == "\nStopping ...\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """Return variables with which `./tests/run` installs nothing but stubs."""
    for name, script in (("python", PYTHON), ("in_environment", IN_ENVIRONMENT), ("uv", UV)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    cache = tmp_path / "Käche mit Blank"
    folders = {"STUBS": tmp_path, "GATE": tmp_path / "gate", "XDG_CACHE_HOME": cache, "PYTHON": tmp_path / "python"}
    return {name: str(path) for name, path in folders.items()}


def make_gate(stubs: dict[str, str]) -> None:
    for name in (stubs["GATE"], stubs["GATE"] + ".open"):
        os.mkfifo(name)


def demo(*options: str, **variables: str) -> contextlib.AbstractContextManager["subprocess.Popen[str]"]:
    """Run the demo in the environment of the tests."""
    return started(sys.executable, "-B", str(EXAMPLE / "tests" / "demo.py"), *options, **variables)


def hear_signals() -> None:
    """Undo that a test run in the background ignores SIGINT, and one under nohup SIGHUP, and so would all it starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def started(*command: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a command in a session of its own, as a terminal does; nothing of it outlives the block."""
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=hear_signals,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Return what a process prints up to the line that holds the text."""
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was never printed:\n{said}")


def rest_of(process: "subprocess.Popen[str]") -> str:
    """Return all that a process still prints, once it has ended."""
    return process.communicate()[0]


def refusal(variables: dict[str, str], *arguments: str) -> str:
    command = [RUN, *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr
