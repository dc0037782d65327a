"""Measure this example against its upstream, the plain version, the async way and LiteLLM's proxy, all in one run.

Prints Markdown tables. A full run also writes them to `benchmark.md` beside this file, and draws `benchmark.svg`.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from harness.costs import ASYNC, DIRECT, IN_STEP, LITELLM, OURS, PLAIN, Plan, Results, draw, promises, summary, tables
from harness.environments import InstallError, install
from harness.load import Variant, measure
from harness.serving import EXAMPLE, KEY, NAME, copy_wrapper, free_port, running
from rich.progress import track

TESTS = Path(__file__).parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
WRAPPERS = {
    PLAIN: TESTS / "harness/plain_wrapper.py",
    OURS: EXAMPLE,
    IN_STEP: EXAMPLE,
    ASYNC: TESTS / "harness/async_way.py",
}
PACE = 0.02  # seconds from one token to the next
FAILURES = (RuntimeError, OSError, psutil.Error)  # of a server
LEVELS = (1, 10, 50, 100, 300)
OLDEST = Plan(
    {1: 1, 10: 1, 50: 3, 100: 3, 300: 3},
    {DIRECT: LEVELS, PLAIN: LEVELS, IN_STEP: LEVELS, LITELLM: (10, 50, 100)},
)
NEWEST = Plan({50: 3, 100: 3, 300: 3}, {DIRECT: LEVELS, PLAIN: (100, 300), IN_STEP: (100, 300)})
QUICK = Plan({1: 1, 50: 1, 100: 1}, {PLAIN: (1,), IN_STEP: (100,)})


class Environment:
    """A folder of scripts, and what is installed there: `software` is "Python 3.10.13 with" packages and versions."""

    def __init__(self, scripts: Path, *packages: str) -> None:
        code = "import importlib.metadata, platform, sys; print(platform.python_version())\n"
        code += "for name in sys.argv[1:]: print(name, importlib.metadata.version(name))"
        command = [str(scripts / "python"), "-c", code, *packages]
        version, *installed = subprocess.check_output(command, text=True).splitlines()
        self.scripts, self.python = scripts, f"Python {version}"
        self.software = f"{self.python} with {', '.join(installed)}"

    @classmethod
    def of_example(cls, scripts: Path) -> "Environment":
        return cls(scripts, "hayhooks", "haystack-ai", "openai")


def pythons() -> list[str]:
    """Return the paths of the oldest and the newest Python that uv or pyenv has; raises InstallError without uv."""
    folders = (Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions").glob("*/bin")
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])  # uv knows only pyenv's shims
    uv = [f"{SCRIPTS}/uv", "python", "find", "--system", "--no-project", "--no-python-downloads"]
    found = []
    for minor in range(10, 15):
        try:
            command = [*uv, f"3.{minor}"]
            asked = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        except FileNotFoundError:
            raise InstallError("there is no uv in this environment") from None
        found += asked.stdout.split("\n")[:1] if asked.returncode == 0 else []
    return found if len(found) < 2 else [found[0], found[-1]]


def install_all(notes: list[str]) -> tuple[list[Environment], Environment | None]:
    """Install the example's requirements on each Python, and LiteLLM on the first; notes say what is left out."""
    environments, litellm = [], None
    try:
        for python in pythons():
            requirements = ("-r", str(EXAMPLE / "requirements.txt"), "--compile-bytecode")
            scripts = install(f"bench-{Path(python).name}", *requirements, python=python)
            environments.append(Environment.of_example(scripts))
    except InstallError as error:
        notes.append(f"Python: {error}.")
    environments = environments or [Environment.of_example(SCRIPTS)]
    try:
        python = str((environments[0].scripts / "python").resolve())
        litellm = Environment(install("litellm", "litellm[proxy]", "--compile-bytecode", python=python), "litellm")
    except InstallError as error:
        notes.append(f"{LITELLM}: {error}.")
    return environments, litellm


@contextlib.contextmanager
def serving(name: str, command: list[str], path: str, folder: str, **variables: str) -> Iterator[Variant]:
    """Run a server in a folder with these variables alone; raises RuntimeError with the end of its log."""
    port, log = free_port(), Path(folder) / "server.log"
    options: dict[str, Any] = {"cwd": folder, "stdout": log.open("wb"), "stderr": subprocess.STDOUT}
    options["env"] = {"PATH": os.environ["PATH"], "HOME": str(Path.home()), **variables}
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with options["stdout"], contextlib.ExitStack() as stack:
        try:
            process = stack.enter_context(running(command, f"http://127.0.0.1:{port}{path}", **options))
            variant = Variant(name, port, psutil.Process(process.pid))
            if not asyncio.run(measure(variant, 1, 5, 0)).complete:
                raise RuntimeError("its answer is not complete")
        except (RuntimeError, OSError) as error:
            end = log.read_text(errors="replace").splitlines()[-10:]
            raise RuntimeError("\n".join([f"{name}: {error}", *end])) from error
        yield variant


@contextlib.contextmanager
def hayhooks(name: str, scripts: Path, upstream: str) -> Iterator[Variant]:
    """Serve a wrapper that asks the upstream at this URL."""
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "pipelines" / NAME
        copy_wrapper(WRAPPERS[name], wrapper)
        if name == IN_STEP:  # it never joins a chunk to another
            chunk = wrapper / "production" / "growing_chunk.py"
            chunk.write_text(chunk.read_text().replace("MAX_JOINED = 8", "MAX_JOINED = 1"))
        (Path(folder) / ".env").touch()  # Hayhooks would look for the user's in the folders above
        variables = {
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": upstream,
            "HAYHOOKS_PIPELINES_DIR": f"{folder}/pipelines",
            "HAYHOOKS_LOG_LEVEL": "error",
            "HAYSTACK_TELEMETRY_ENABLED": "False",
            "MAX_CONCURRENT_STREAMS": "500",
        }
        with serving(name, [f"{scripts}/hayhooks", "run"], "/status", folder, **variables) as variant:
            yield variant


@contextlib.contextmanager
def litellm_proxy(scripts: Path, upstream: str) -> Iterator[Variant]:
    """Run LiteLLM's proxy in front of the upstream at this URL."""
    model = {"model": "openai/gpt-5-mini", "api_base": upstream, "api_key": KEY}
    config = {
        "model_list": [{"model_name": NAME, "litellm_params": model}],
        "litellm_settings": {"telemetry": False},
        "general_settings": {"master_key": KEY},  # it does not start without one
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, too
        command = [f"{scripts}/litellm", "--config", "config.yaml", "--telemetry", "False"]
        local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with serving(LITELLM, command, "/health/liveliness", folder, **local) as variant:
            yield variant


def measure_all(variants: list[Variant], results: Results) -> None:
    """Measure the variants in turn, so that whatever else the machine does meets all of them alike."""
    plan = results.plan
    for variant in variants:  # the first requests pay for imports and connections
        asyncio.run(measure(variant, 10, 5, 0))
    jobs = [
        (level, variant)
        for level, rounds in plan.rounds.items()
        for number in range(rounds)
        for variant in variants
        if variant.name not in plan.once or (number == 0 and level in plan.once[variant.name])
    ]
    for level, variant in track(jobs, description=f"Measuring on {results.python}"):
        results.rounds[variant.name, level].append(asyncio.run(measure(variant, level, plan.tokens, PACE)))
    fast = [[asyncio.run(measure(variant, 1, plan.fast_tokens, 0)) for variant in variants] for _ in range(3)]
    for variant, *rounds in zip(variants, *fast, strict=True):
        results.fast_cpu[variant.name] = statistics.median(one.cpu_per_token() for one in rounds)


def run(environment: Environment, plan: Plan, litellm: Environment | None, notes: list[str]) -> Results:
    """Start every variant in a process of its own, and measure it; raises RuntimeError if one does not start.

    LiteLLM comes after the others, alone, as it works without requests, too; a note says why it is left out.
    """
    results, port = Results(environment.python, plan), free_port()
    upstream, url = [sys.executable, str(TESTS / "harness/upstream.py"), str(port)], f"http://127.0.0.1:{port}"
    with running(upstream, url):
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(hayhooks(name, environment.scripts, f"{url}/v1")) for name in WRAPPERS]
            measure_all([Variant(DIRECT, port), *servers], results)
        try:
            if litellm and LITELLM in plan.once:
                with litellm_proxy(litellm.scripts, f"{url}/v1") as proxy:
                    measure_all([proxy], results)
        except FAILURES as error:
            notes.append(str(error))
    return results


def report(all_results: list[Results], environments: list[Environment], notes: list[str]) -> str:
    software = "; ".join(environment.software for environment in environments)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    left_out = "".join(f"\nLeft out: {note}\n" for note in notes)
    sections = "\n".join(f"## {results.python}\n\n{results.plan}\n\n{tables(results)}" for results in all_results)
    return f"""\
# What the example costs

Written by `./tests/run bench` on {datetime.date.today()}: {software}; {machine}.

Tokens come {PACE * 1000:.0f} ms apart, {1 / PACE:.0f} a second. Each variant has a process of its own. The client, the
server and the upstream run on the same machine: the first variant, "{DIRECT}", shows what client and upstream
can do here. The tokens per second of each stream are those between its first and its last token, of the median stream.
The CPU time is that of the server's process, and so are the peaks of threads and of memory, beyond what it had before.
"{IN_STEP}" is this example without joining: its threads wait after each chunk. "-" was not measured.
{left_out}
## In short

{summary(all_results)}
## What it should cost

{promises(all_results)}
{sections}"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="./tests/run bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of fewer streams, and nothing is written")
    options = parser.parse_args()
    notes: list[str] = []
    if options.quick:
        environments, litellm, plans = [Environment.of_example(SCRIPTS)], None, [QUICK]
    else:
        environments, litellm = install_all(notes)
        plans = [OLDEST, NEWEST]
    results = []
    for environment, plan in zip(environments, plans, strict=False):
        try:
            results.append(run(environment, plan, litellm, notes))
        except FAILURES as error:
            notes.append(str(error))
    if not results:
        sys.exit("\n".join(notes))
    text = report(results, [*environments, *([litellm] if litellm else [])], notes)
    print(f"\n{text}")
    if not options.quick:
        (TESTS / "benchmark.md").write_text(text)
        draw(results[0], TESTS / "benchmark.svg")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
