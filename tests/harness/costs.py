"""What a benchmark measured, and how it is shown: tables, ratios and a plot."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from harness.load import Round
from harness.serving import NAME

DIRECT, PLAIN, OURS, ASYNC, LITELLM = (
    "upstream directly",
    "the plain version",
    "this example",
    "the async way",
    "LiteLLM's proxy",
)
GREY = "#808080"  # readable on white and on black
COLOURS = {DIRECT: GREY, PLAIN: "#e0524d", OURS: "#2f9e6e", ASYNC: "#4a86e8", LITELLM: "#b07d2b"}


@dataclass(frozen=True)
class Plan:
    """How many rounds there are at each number of streams. The variants in `once` have one, at some of them."""

    rounds: dict[int, int]
    once: dict[str, tuple[int, ...]]
    tokens: int = 200
    fast_tokens: int = 5000

    def __str__(self) -> str:
        levels, rounds = (", ".join(map(str, values)) for values in (self.rounds, self.rounds.values()))
        once = f"; one round of {', '.join(self.once)}" if self.once else ""
        return f"Answers of {self.tokens} tokens. With {levels} streams: medians of {rounds} rounds{once}."


@dataclass
class Results:
    """What was measured on one Python; `fast_cpu` is in microseconds for a chunk, `left` in tokens."""

    python: str
    plan: Plan
    rounds: dict[tuple[str, int], list[Round]] = field(default_factory=lambda: defaultdict(list))
    fast_cpu: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)

    def median(self, name: str, level: int, value: Callable[[Round], float]) -> float:
        """Return nan for what was not measured."""
        values = [value(one) for one in self.rounds.get((name, level), [])]
        return statistics.median(values) if values else math.nan


@dataclass
class Ratio:
    """What the example promises: its value at so many streams, divided by that of another variant."""

    what: str
    other: str
    streams: int
    value: Callable[[Results, str], float]
    limit: float
    limit_of_newest: float
    at_least: bool = False

    def row(self, results: Results, is_newest: bool) -> list[str]:
        other = self.value(results, self.other)
        ratio = round(self.value(results, OURS) / other, 2) if other else math.nan  # as it is shown
        limit = self.limit_of_newest if is_newest else self.limit
        is_met = ratio >= limit if self.at_least else ratio <= limit
        bound = f"at {'least' if self.at_least else 'most'} {limit:g}"
        verdict = "met" if is_met else "NOT met"
        return [f"{self.what}, to {self.other}", results.python, str(self.streams), figure(ratio, 2), bound, verdict]


def promises() -> list[Ratio]:
    def at(level: int, value: Callable[[Round], float]) -> Callable[[Results, str], float]:
        return lambda results, name: results.median(name, level, value)

    late = partial(Round.first_token, percent=95)
    return [
        *(Ratio("first token p95", PLAIN, level, at(level, late), 0.1, 0.1) for level in (100, 300)),
        *(Ratio("first token p95", ASYNC, level, at(level, late), 1, 1.4) for level in (100, 300)),
        *(
            Ratio("tokens per second", ASYNC, level, at(level, Round.together), 0.65, 0.65, at_least=True)
            for level in (50, 100, 300)
        ),
        Ratio("CPU time per chunk", PLAIN, 1, lambda results, name: results.fast_cpu[name], 1.5, 1.5),
        Ratio("CPU time per chunk", PLAIN, 100, at(100, Round.cpu_per_chunk), 1.5, 1.5),
    ]


def ratios(all_results: list[Results]) -> str:
    """Return a table of the promises, as far as both sides were measured; later results are of newer Pythons."""
    rows = [  # one stream as fast as it goes is always measured
        promise.row(results, is_newest=number > 0)
        for number, results in enumerate(all_results)
        for promise in promises()
        if {(OURS, promise.streams), (promise.other, promise.streams)} <= results.rounds.keys() or promise.streams == 1
    ]
    return table(["ratio of this example", "on", "streams", "is", "should be", ""], rows)


def figure(value: float, digits: int = 0) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = (head, ["---", *["--:"] * (len(head) - 1)], *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(results: Results) -> str:
    """Return the tables of one Python, each below a heading that is the same in every run."""
    names = list(results.fast_cpu)

    def per_level(cell: Callable[[str, int], str]) -> str:
        rows = [[str(level), *(cell(name, level) for name in names)] for level in results.plan.rounds]
        return table(["streams", *names], rows)

    def medians(value: Callable[[Round], float], digits: int = 0) -> str:
        return per_level(lambda name, level: figure(results.median(name, level, value), digits))

    def percentiles(value: Callable[..., float], digits: int = 0) -> str:
        def cell(name: str, level: int) -> str:
            values = (results.median(name, level, partial(value, percent=percent)) for percent in (50, 95))
            return " / ".join(figure(value, digits) for value in values)

        return per_level(cell)

    def complete(name: str, level: int) -> str:
        answers = [answer.complete for one in results.rounds.get((name, level), []) for answer in one.answers]
        return f"{sum(answers):,} of {len(answers):,}" if answers else "-"

    fast, left = ([figure(values[name]) for name in names] for values in (results.fast_cpu, results.left))
    shown = {
        "First token, p50 / p95 in ms": percentiles(lambda one, percent: one.first_token(percent) * 1000),
        "Tokens per second of each stream": medians(Round.each_stream, 1),
        "Tokens per second of all streams": medians(Round.together),
        "Whole answer, p50 / p95 in s": percentiles(Round.whole_answer, 1),
        "Complete answers": per_level(complete),
        "CPU time per chunk in µs": medians(Round.cpu_per_chunk),
        "Memory in MiB": medians(lambda one: one.memory / 2**20 or math.nan),
        "Threads": medians(lambda one: one.threads or math.nan),
        "One stream": table(
            ["", *names],
            [["CPU time per chunk in µs, as fast as it goes", *fast], ["tokens after the client left", *left]],
        ),
    }
    return "\n".join(f"### {heading}\n\n{content}" for heading, content in shown.items())


def draw(results: Results, path: Path) -> None:
    """Plot the tokens per second of each stream, and the p95 of the first token, against the number of streams."""
    levels = list(results.plan.rounds)
    colour_of = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {**dict.fromkeys(colour_of, GREY), "svg.fonttype": "none", "svg.hashsalt": NAME}
    with mpl.rc_context(style):
        plot = Figure(figsize=(10, 4), layout="constrained")
        speed, first = plot.subplots(1, 2)
        for name in results.fast_cpu:
            speeds = [results.median(name, level, Round.each_stream) for level in levels]
            seconds = [results.median(name, level, partial(Round.first_token, percent=95)) for level in levels]
            speed.plot(levels, speeds, "o-", color=COLOURS[name], label=name)
            first.plot(levels, seconds, "o-", color=COLOURS[name])
        for axes, title in ((speed, "tokens per second of each stream"), (first, "time to first token, p95")):
            axes.set(xscale="log", xlabel="streams at a time", title=title)
            axes.set_xticks(levels, [str(level) for level in levels])
            axes.grid(color=GREY, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        speed.set_ylim(bottom=0)
        first.set_yscale("log")
        ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
        first.set_yticks(ticks, [f"{tick:g} s" for tick in ticks])
        for axes in (speed, first):
            axes.minorticks_off()
        speed.legend(frameon=False)
        plot.savefig(path, transparent=True, metadata={"Date": None})
