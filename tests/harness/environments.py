"""Environments of their own, for what cannot be installed beside the libraries under test. uv makes them."""

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

import pytest

from harness.serving import NAME

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME


class InstallError(Exception):
    """Why an environment could not be installed."""


def unavailable(reason: str, comes_with_packages: bool = True) -> NoReturn:
    """Skip a test for which this machine lacks something; in CI, fail if pip or npm should have brought it."""
    (pytest.fail if os.environ.get("CI") == "true" and comes_with_packages else pytest.skip)(reason)


def install(name: str, *requirements: str, python: str = sys.executable) -> Path:
    """Install an environment, unless it is there already, and return its folder of scripts; raises InstallError.

    Requirements are those of `uv pip install`, options included; `python` is a version such as 3.13, or a path.
    """
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        uv("venv", "--allow-existing", "--python", python, str(folder))
        uv("pip", "install", "--python", str(folder / "bin" / "python"), *requirements)
    return folder / "bin"


def uv(*arguments: str) -> None:
    """Run uv; raises InstallError with the last line of what it said."""
    command = [f"{sysconfig.get_path('scripts')}/uv", "--quiet", *arguments]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise InstallError("there is no uv in this environment") from None
    except subprocess.CalledProcessError as error:
        raise InstallError((error.stderr.strip() or str(error)).splitlines()[-1]) from error
