"""`./tests/run check` tells what the clients of a wrapper would notice, and ends with 1 only if something is broken."""

import re
import subprocess
import sys
from pathlib import Path

from harness.readme import block
from harness.serving import EXAMPLE, copy_wrapper

PLAIN = EXAMPLE / "tests" / "harness" / "plain_wrapper.py"
MISSING = "import nowhere_to_be_found\n"


def check(wrapper: Path) -> tuple[int, str, dict[str, list[str]]]:
    """Return the exit status, all that is printed, and the promises by what is said of them."""
    command = [sys.executable, str(EXAMPLE / "tests" / "check.py"), str(wrapper)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said: dict[str, list[str]] = {"holds": [], "does not": [], "not seen here": []}
    for promise, verdict in re.findall(r"^(.*?) +(holds|does not|not seen here)\b", done.stdout, re.MULTILINE):
        said[verdict].append(promise)
    return done.returncode, done.stdout + done.stderr, said


def test_the_example_keeps_every_promise_and_the_table_fits_a_screen() -> None:
    status, printed, said = check(EXAMPLE)
    assert (status, said["does not"], said["not seen here"]) == (0, [], []), printed
    assert len(said["holds"]) > 20
    assert len(printed.splitlines()) <= 24
    assert max(map(len, printed.splitlines())) <= 100


def test_the_plain_version_is_told_what_it_lacks() -> None:
    status, printed, said = check(PLAIN)
    assert status == 1
    lacking = {"Stop ends the model's answer", "a wrong key: 400, and no retry", "earlier turns reach the model"}
    assert lacking <= set(said["does not"]), printed
    assert "a stream comes token by token" in said["holds"]


def test_what_the_scripted_upstream_is_not_asked_for_is_not_seen(tmp_path: Path) -> None:
    copy_wrapper(EXAMPLE / "production", tmp_path / "production")
    (tmp_path / "pipeline_wrapper.py").write_text(block("python", "recipe any_component"))
    status, printed, said = check(tmp_path)
    assert (status, said["does not"]) == (0, []), printed
    assert "Stop ends the model's answer" in said["not seen here"]
    assert "a stream ends with [DONE]" in said["holds"]
    assert "did not ask OPENAI_BASE_URL" in printed


def test_the_first_error_is_told(tmp_path: Path) -> None:
    copy_wrapper(EXAMPLE, tmp_path)
    (wrapper := tmp_path / "pipeline_wrapper.py").write_text(
        wrapper.read_text().replace('"conversation": con', '"other": con')
    )
    status, printed, _ = check(tmp_path)
    assert status == 1
    assert re.search(r"^Of \"Server error '502.*\nERROR .*Input 'other' not found", printed, re.MULTILINE), printed


def test_a_missing_package_is_told_how_to_add(tmp_path: Path) -> None:
    (tmp_path / "pipeline_wrapper.py").write_text(MISSING + PLAIN.read_text())
    status, printed, _ = check(tmp_path)
    assert status == 1
    assert f"`{sys.executable} -m pip install nowhere_to_be_found` adds it" in printed
