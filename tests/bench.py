"""Measure this example against its upstream, the plain version and the async way, all in one run.

Prints Markdown tables. A full run also writes them to `benchmark.md` beside this file, and draws `benchmark.svg`.
"""

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness.client import content_of
from harness.readme import python_block
from harness.serving import EXAMPLE, NAME, deployed, free_port, running
from rich.progress import track

TESTS = Path(__file__).parent
DIRECT, PLAIN, OURS, ASYNC = "upstream directly", "the plain version", "this example", "the async way"
TOKENS, PACE = 50, 0.02


@dataclass
class Variant:
    """One way to the same upstream; `process` is the server's, None for the upstream itself."""

    name: str
    port: int
    process: psutil.Process | None = None


@dataclass
class Round:
    """What one round measured: times to first token and the whole round in seconds, answers that came complete."""

    first_tokens: list[float]
    seconds: float
    chunks: int
    complete: int
    memory: int = 0
    threads: int = 0


@contextlib.contextmanager
def variants() -> Iterator[tuple[int, list[Variant]]]:
    """Start every variant in a process of its own; yields the upstream's port too."""
    with contextlib.ExitStack() as stack:
        port = free_port()
        upstream = [sys.executable, str(TESTS / "harness" / "upstream.py"), str(port)]
        stack.enter_context(running(upstream, f"http://127.0.0.1:{port}/"))
        started = [Variant(DIRECT, port)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "async_way.py").write_text(python_block("OpenAIChatGenerator"))
        wrappers = {
            PLAIN: TESTS / "harness" / "plain_wrapper.py",
            OURS: EXAMPLE / "pipeline_wrapper.py",
            ASYNC: folder / "async_way.py",
        }
        for name, wrapper in wrappers.items():
            url = f"http://127.0.0.1:{port}/v1"
            server = stack.enter_context(deployed(wrapper=wrapper, OPENAI_BASE_URL=url, HAYHOOKS_LOG_LEVEL="error"))
            started.append(Variant(name, server.port, psutil.Process(server.process.pid)))
        yield port, started


async def ask(port: int, tokens: int, pace: float, leave_after: int | None = None) -> tuple[float, str]:
    """Stream one answer; returns the seconds to its first token, and its text."""
    prompt = json.dumps({"tokens": tokens, "pace": pace})
    body = json.dumps({"model": NAME, "stream": True, "messages": [{"role": "user", "content": prompt}]})
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close"
    )
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    first_token, text, seen = 0.0, [], 0
    async for line in reader:
        if line.startswith(b"data: {") and (content := content_of(json.loads(line[6:]))):
            first_token = first_token or time.perf_counter() - start
            text.append(content)
            seen += 1
            if seen == leave_after:
                break
    writer.close()
    return first_token, "".join(text)


async def measure(variant: Variant, streams: int, tokens: int, pace: float) -> Round:
    """Open so many streams at once, and wait for all of them."""
    memory = threads = 0

    async def watch(process: psutil.Process) -> None:
        nonlocal memory, threads
        while True:
            memory, threads = max(memory, process.memory_info().rss), max(threads, process.num_threads())
            await asyncio.sleep(0.1)

    watching = asyncio.ensure_future(watch(variant.process)) if variant.process else None
    start = time.perf_counter()
    answers = await asyncio.gather(*(ask(variant.port, tokens, pace) for _ in range(streams)))
    seconds = time.perf_counter() - start
    if watching:
        watching.cancel()
    whole = "".join(f"{number} " for number in range(tokens))
    complete = sum(text == whole for _, text in answers)
    return Round([first for first, _ in answers], seconds, streams * tokens, complete, memory, threads)


def tokens_after_leaving(upstream: int, variant: Variant) -> int:
    """Return how many tokens the upstream still sent after the client left at token 5 of 200."""
    asyncio.run(ask(variant.port, 200, PACE, leave_after=5))
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{upstream}/") as response:
            received = json.load(response)
        if received["over"]:
            return int(received["sent"]) - 5
        time.sleep(PACE)


def cpu_per_chunk(variant: Variant, tokens: int = 3000) -> float:
    """Return the server's CPU time in microseconds for a chunk of one stream as fast as it goes."""
    assert variant.process
    before = variant.process.cpu_times()
    asyncio.run(ask(variant.port, tokens, 0))
    after = variant.process.cpu_times()
    return (after.user + after.system - before.user - before.system) / tokens * 1e6


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = (head, ["---", *["--:"] * (len(head) - 1)], *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(levels: list[int], p95: dict[tuple[str, int], float]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    grey = "#808080"  # readable on white and on black
    colours = {DIRECT: grey, PLAIN: "#e0524d", OURS: "#2f9e6e", ASYNC: "#4a86e8"}
    colour_of = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {**dict.fromkeys(colour_of, grey), "svg.fonttype": "none", "svg.hashsalt": NAME}
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
        for name, colour in colours.items():
            axes.plot(levels, [p95[name, level] for level in levels], "o-", color=colour, label=name)
        axes.set(xscale="log", yscale="log", xlabel="streams at a time", ylabel="time to first token, p95")
        axes.set_xticks(levels, [str(level) for level in levels])
        seconds = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
        axes.set_yticks(seconds, [f"{second:g} s" for second in seconds])
        axes.minorticks_off()
        axes.grid(color=grey, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(TESTS / "benchmark.svg", transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="./tests/run bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round and fewer streams, and nothing is written")
    options = parser.parse_args()
    levels, rounds = ([1, 10, 50], 1) if options.quick else ([1, 10, 50, 100, 300], 5)
    plain_rounds = min(rounds, 2)  # one takes the plain version a minute, and always the same

    results: dict[tuple[str, int], list[Round]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    with variants() as (upstream, started):
        servers = [variant for variant in started if variant.process]
        for variant in started:  # the first requests pay for imports and connections
            asyncio.run(measure(variant, 10, 5, 0))
        jobs = [
            (level, variant)
            for number in range(rounds)
            for level in levels
            for variant in started
            if variant.name != PLAIN or number < plain_rounds
        ]
        for level, variant in track(jobs, description="Measuring"):
            for _ in range(10 if level == 1 else 1):
                results[variant.name, level].append(
                    asyncio.run(measure(variant, level, TOKENS if level > 1 else 5, PACE))
                )
        for _ in range(rounds):
            for variant in servers:
                cpu[variant.name].append(cpu_per_chunk(variant))
        left = {variant.name: tokens_after_leaving(upstream, variant) for variant in started}

    def median(name: str, level: int, percent: int) -> float:
        return statistics.median(percentile(one.first_tokens, percent) for one in results[name, level])

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("hayhooks", "haystack-ai", "openai"))
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    names = [variant.name for variant in started]

    def per_level(cell: Callable[[str, int], str]) -> str:
        return table(["streams", *names], [[str(level), *(cell(name, level) for name in names)] for level in levels])

    def first_tokens(name: str, level: int) -> str:
        return " / ".join(f"{median(name, level, percent) * 1000:,.0f}" for percent in (50, 95)) + " ms"

    def per_second(name: str, level: int) -> str:
        return f"{statistics.median(one.chunks / one.seconds for one in results[name, level]):,.0f}"

    most = levels[-1]
    sent = "tokens sent after the client left"
    head = ["", f"complete at {most}", sent, "CPU per chunk", f"memory at {most}", f"threads at {most}"]
    rows = [
        [
            name,
            f"{min(one.complete for one in results[name, most])} of {most}",
            str(left[name]),
            f"{statistics.median(cpu[name]):.0f} µs",
            f"{max(one.memory for one in results[name, most]) / 2**20:.0f} MiB",
            str(max(one.threads for one in results[name, most])),
        ]
        for name in names[1:]
    ]

    def ratios(level: int) -> str:
        ours, plain, theirs = (median(name, level, 95) for name in (OURS, PLAIN, ASYNC))
        return f"{ours / plain:.2f} times the plain version's and {ours / theirs:.2f} times the async way's"

    later = (median(OURS, 1, 50) - median(DIRECT, 1, 50)) * 1000
    report = f"""\
# What the example costs

Written by `./tests/run bench` on {datetime.date.today()}: {versions}, {python}.
Answers of {TOKENS} tokens, {PACE * 1000:.0f} ms apart; medians of {rounds} rounds
({plain_rounds} of the plain version). Each variant has a process of its own; the client and the upstream run on the
same machine.

Time to first token, p50 / p95:

{per_level(first_tokens)}
At 95 % the first token of this example takes {ratios(min(100, most))} with {min(100, most)} streams, and
{ratios(most)} with {most}. One stream alone starts {later:.0f} ms later than from the upstream directly.

Chunks per second:

{per_level(per_second)}
Per server; the CPU time is that of one stream as fast as it goes:

{table(head, rows)}"""
    print(f"\n{report}")
    if not options.quick:
        (TESTS / "benchmark.md").write_text(report)
        draw(levels, {(name, level): median(name, level, 95) for name in names for level in levels})


if __name__ == "__main__":
    main()
