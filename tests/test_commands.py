"""`./tests/run` says what is missing, instead of failing somewhere later."""

import os
import subprocess
from pathlib import Path

import pytest
from harness.serving import EXAMPLE

OLD = 'case "$*" in -V) echo Python 3.9.18 ;; *) exit 1 ;; esac'
WITHOUT_VENV = 'case "$*" in *ensurepip*) exit 1 ;; esac'


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


def refusal(variables: dict[str, str], *arguments: str) -> str:
    command = [str(EXAMPLE / "tests" / "run"), *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr
