"""Send some ten thousand mixed requests, and compare the server's threads, open files and memory before and after.

Prints a table, and fails when more is left than before, or an answer was not the right one. Takes the seconds.
"""

import contextlib
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
from harness.client import Chat, events_of, text_of, texts_of
from harness.serving import deployed, wait_until
from harness.upstream import Reply, Upstream

SECONDS, CLIENTS, SLOTS = float(sys.argv[1]) if sys.argv[1:] else 120.0, 24, 20
TEXT = "token " * 20
TOKENS = Reply(tokens=["token "] * 20, pace=0.005)
NO_TEMPERATURE = Reply(status=400, error={"error": {"param": "temperature", "code": "unsupported_value"}})
# Each kind with what the upstream replies, and the status that the client gets, or 0 where it does not wait for it.
KINDS = {
    "answered": (TOKENS, 200),
    "reasoned": (Reply(thoughts=20, tokens=TOKENS.tokens, pace=0.005), 200),
    "temperature refused": (TOKENS, 200),
    "left": (Reply(tokens=["token "] * 10_000, pace=0.01), 0),
    "left early": (Reply(role=False, tokens=["token "] * 2, pace=0.2), 0),
    "broken off": (Reply(then="break"), 502),
    "error event": (Reply(then="error", error={"message": "No."}), 502),
    "no chunk": (Reply(role=False, tokens=[], then="break"), 502),
    "stalled": (Reply(then="stall"), 504),
    "rate limit": (Reply(status=429, error={}, headers={"Retry-After": "1"}), 429),
    "overloaded": (Reply(status=503, error={}), 429),
    "wrong key": (Reply(status=401, error={}), 400),
    "bad input": (Reply(), 400),
}
LATE = ("broken off", "error event", "stalled")  # after the first chunk: a stream has status 200 by then


def reply_for(body: dict[str, Any]) -> Reply:
    kind = body["messages"][0]["content"]
    return NO_TEMPERATURE if "temperature" in body else KINDS[kind][0]


def one_request(chat: Chat, kind: str) -> str:
    """Send one request of a kind; return that kind, or what happened in its place."""
    stream, (_, expected) = random.random() < 0.7, KINDS[kind]
    # A value that was refused once is not sent again, so there are many of them.
    parameters = {"temperature": round(random.uniform(0, 2), 2)} if kind == "temperature refused" else {}
    if kind == "left":
        with chat.open_patiently(kind) as events:
            next(texts_of(events))
    if kind == "left early":
        with contextlib.suppress(httpx.ReadTimeout):
            chat.http.post("/v1/chat/completions", json=chat.request(kind, stream=stream), timeout=0.1)
    if kind in ("left", "left early"):
        return kind
    response = chat.post([] if kind == "bad input" else kind, stream=stream, **parameters)
    late = stream and kind in LATE
    if response.status_code != (200 if late else expected):
        return "no slot" if response.status_code == 503 else f"{kind}: status {response.status_code}"
    right = response.is_error or TEXT in response.text
    if response.is_success and stream:
        read = list(events_of(iter([response.content])))
        right = "error" in read[-1] if late else text_of(read) == TEXT
    return kind if right else f"{kind}: another text"


def main() -> None:
    variables = {"OPENAI_TIMEOUT": "1", "MAX_CONCURRENT_STREAMS": str(SLOTS), "HAYHOOKS_LOG_LEVEL": "critical"}
    with Upstream() as upstream, deployed(OPENAI_BASE_URL=upstream.url, **variables) as server:
        upstream.reply = reply_for
        chat, process, counts = Chat(server), psutil.Process(server.process.pid), Counter[str]()

        def client(until: float) -> None:
            while time.monotonic() < until:
                happened = one_request(chat, random.choice(list(KINDS)))
                counts[happened] += 1
                if happened == "no slot":
                    time.sleep(0.1)  # or most requests would be refused

        def run(seconds: float) -> dict[str, int]:
            with ThreadPoolExecutor(CLIENTS) as threads:
                list(threads.map(client, [time.monotonic() + seconds] * CLIENTS))
            wait_until(lambda: all(one.over for one in upstream.received), "the upstream's answers to end")
            with contextlib.ExitStack() as streams:  # every slot has returned
                for events in [streams.enter_context(chat.open_patiently("answered")) for _ in range(SLOTS)]:
                    assert text_of(events) == TEXT
            upstream.received.clear()
            memory = process.memory_info().rss // 2**20
            return {"threads": process.num_threads(), "open files": process.num_fds(), "memory in MiB": memory}

        before = run(SECONDS / 6)  # what the first requests load and open stays
        counts.clear()
        after = run(SECONDS)

    print(f"{sum(counts.values())} requests of {CLIENTS} clients on {SLOTS} slots:")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) + "\n")
    print("| | before | after |\n| --- | --: | --: |")
    for name, value in before.items():
        print(f"| {name} | {value} | {after[name]} |")
    most = {name: value * 1.3 if name.startswith("memory") else value + 5 for name, value in before.items()}
    wrong = [f"more {name}" for name in most if after[name] > most[name]] + [*counts.keys() - {*KINDS, "no slot"}]
    if wrong:
        sys.exit(f"\nThis is wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
