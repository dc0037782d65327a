"""What a benchmark measured, and how it is shown: tables, promises and a plot."""

import math
import operator
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from harness.load import Round
from harness.serving import NAME

DIRECT, PLAIN, OURS = "upstream directly", "the plain version", "this example"
IN_STEP, ASYNC, LITELLM = "one chunk in step", "the async way", "LiteLLM's proxy"
GREY = "#808080"  # readable on white and on black
COLOURS = {
    DIRECT: GREY,
    PLAIN: "#e0524d",
    OURS: "#2f9e6e",
    IN_STEP: "#8fc9a9",
    ASYNC: "#4a86e8",
    LITELLM: "#b07d2b",
}


@dataclass(frozen=True)
class Plan:
    """How many rounds there are at each number of streams. The variants in `once` have one, at some of them."""

    rounds: dict[int, int]
    once: dict[str, tuple[int, ...]]
    tokens: int = 200
    fast_tokens: int = 5000

    def __str__(self) -> str:
        rounds = ", ".join(f"{number} with {level}" for level, number in self.rounds.items())
        once = f"; one of {', '.join(self.once)}" if self.once else ""
        return f"Answers of {self.tokens} tokens. Medians of so many rounds, with so many streams: {rounds}{once}."


@dataclass
class Results:
    """What was measured on one Python; `fast_cpu` is in microseconds for a token, of one stream as fast as it goes."""

    python: str
    plan: Plan
    rounds: dict[tuple[str, int], list[Round]] = field(default_factory=lambda: defaultdict(list))
    fast_cpu: dict[str, float] = field(default_factory=dict)

    def median(self, name: str, level: int, value: Callable[[Round], float]) -> float:
        """Return nan for what was not measured."""
        values = [value(one) for one in self.rounds.get((name, level), [])]
        return statistics.median(values) if values else math.nan


def fast_cpu(results: Results, name: str, level: int) -> float:
    return results.fast_cpu.get(name, math.nan)


def measured(value: Callable[[Round], float]) -> Callable[[Results, str, int], float]:
    return lambda results, name, level: results.median(name, level, value)


class Promise(NamedTuple):
    """This example's value at so many streams, compared with another variant's: their ratio, or how much later it is.

    The limits are those on the oldest and on the newest Python; where one is None, the figure is only published.
    """

    what: str
    other: str
    streams: int
    value: Callable[[Results, str, int], float]
    limits: tuple[float | None, float | None]
    compare: Callable[[float, float], float] = operator.truediv
    at_least: bool = False

    def row(self, results: Results, is_newest: bool) -> list[str]:
        ours, other = (self.value(results, name, self.streams) for name in (OURS, self.other))
        value, limit = round(self.compare(ours, other), 2), self.limits[is_newest]
        if limit is None:
            bound, verdict = "", "published"
        else:
            bound = f"at {'least' if self.at_least else 'most'} {limit:g}"
            verdict = "met" if (value >= limit if self.at_least else value <= limit) else "NOT met"
        return [f"{self.what} {self.other}", results.python, str(self.streams), figure(value, 2), bound, verdict]


LATE = measured(partial(Round.first_token, percent=95))
TOGETHER, EACH, CPU = measured(Round.together), measured(Round.each_stream), measured(Round.cpu_per_token)
PROMISES = [
    *(
        Promise("tokens per second of all streams, to", ASYNC, n, TOGETHER, (0.9, 0.9), at_least=True)
        for n in (50, 100)
    ),
    Promise("tokens per second of all streams, to", ASYNC, 300, TOGETHER, (0.75, 0.75), at_least=True),
    Promise("tokens per second of each stream, to", ASYNC, 100, EACH, (0.9, 0.9), at_least=True),
    Promise("first token p95, seconds later than", ASYNC, 100, LATE, (0.5, 0.5), operator.sub),
    Promise("first token p95, seconds later than", ASYNC, 300, LATE, (0, None), operator.sub),
    *(Promise("first token p95, to", PLAIN, n, LATE, (0.1, 0.1)) for n in (100, 300)),
    Promise("CPU time per token, to", ASYNC, 100, CPU, (1.4, 1.2)),
    Promise("CPU time per token, one stream as fast as it goes, to", PLAIN, 1, fast_cpu, (2.2, 2.2)),
]


def promises(all_results: list[Results]) -> str:
    """Return a table of the promises, as far as both sides were measured; later results are of newer Pythons."""
    rows = [
        promise.row(results, is_newest=number > 0)
        for number, results in enumerate(all_results)
        for promise in PROMISES
        if not any(math.isnan(promise.value(results, name, promise.streams)) for name in (OURS, promise.other))
    ]
    return table(["this example", "on", "streams", "is", "should be", ""], rows)


def summary(all_results: list[Results]) -> str:
    """Return the table that the README shows: the oldest Python's figures (and the newest's)."""
    names = [PLAIN, OURS, ASYNC, LITELLM]
    late_answer, memory = partial(Round.whole_answer, percent=95), measured(Round.memory_per_stream)
    rows: list[Any] = [
        ("tokens per second per stream, {} streams", 50, EACH, 0, ""),
        *(("total tokens per second, {} streams", n, TOGETHER, 0, "") for n in (100, 300)),
        *(("first token, p95, {} streams", n, LATE, 1, " s") for n in (100, 300)),
        ("whole answer, p95, {} streams", 100, measured(late_answer), 1, " s"),
        ("CPU time per token, {} streams", 100, CPU, 0, " µs"),
        ("memory per stream, {} streams", 100, memory, 0, " KiB"),
    ]

    def cell(name: str, level: int, value: Callable[[Results, str, int], float], digits: int, unit: str) -> str:
        values = [value(results, name, level) for results in all_results]
        shown = [figure(one, digits) + unit for one in values if not math.isnan(one)]
        return " ".join([*shown[:1], *(f"({one})" for one in shown[1:])]) or "-"

    heads = [one.python.rpartition(".")[0] for one in all_results]
    head = " ".join([*heads[:1], *(f"({one.removeprefix('Python ')})" for one in heads[1:])])
    return table([head, *names], [[what.format(n), *(cell(name, n, *how) for name in names)] for what, n, *how in rows])


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

    def percentiles(value: Callable[[Round, int], float], digits: int) -> str:
        both = (lambda one: value(one, 50)), (lambda one: value(one, 95))
        return per_level(
            lambda name, level: " / ".join(figure(results.median(name, level, one), digits) for one in both)
        )

    def complete(name: str, level: int) -> str:
        rounds = results.rounds.get((name, level), [])
        asked, answered = sum(len(one.answers) for one in rounds), sum(len(one.complete) for one in rounds)
        return f"{answered} of {asked}" if rounds else "-"

    fast = ["CPU time per token in µs, as fast as it goes", *(figure(results.fast_cpu[name]) for name in names)]
    shown = {
        "First token, p50 / p95 in s": percentiles(Round.first_token, 2),
        "Tokens per second of each stream": medians(Round.each_stream),
        "Tokens per second of all streams": medians(Round.together),
        "Whole answer, p50 / p95 in s": percentiles(Round.whole_answer, 1),
        "Complete answers": per_level(complete),
        "CPU time per token in µs": medians(Round.cpu_per_token),
        "Memory for each stream in KiB": medians(Round.memory_per_stream),
        "One stream": table(["", *names], [fast]),
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
            speed.plot(levels, [EACH(results, name, level) for level in levels], "o-", color=COLOURS[name], label=name)
            first.plot(levels, [LATE(results, name, level) for level in levels], "o-", color=COLOURS[name])
        for axes, title in ((speed, "tokens per second of each stream"), (first, "time to first token, p95")):
            axes.set(xscale="log", xlabel="streams at once", title=title)
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
