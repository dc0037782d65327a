"""Send some ten thousand mixed requests, and compare the server's threads, open files and memory before and after.

Prints a table, and fails when more is left than before.
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
from harness.client import Chat, text_of, texts_of
from harness.serving import NAME, deployed, wait_until
from harness.upstream import Reply, Upstream

SECONDS, CLIENTS, PLACES = 120, 24, 20
REPLIES = {
    "answered": Reply(tokens=["token "] * 20, pace=0.005),
    "reasoned": Reply(thoughts=20, tokens=["token "] * 20, pace=0.005),
    "temperature refused": Reply(tokens=["token "] * 20, pace=0.005),
    "left": Reply(tokens=["token "] * 10_000, pace=0.01),
    "left early": Reply(role=False, tokens=["token "] * 2, pace=0.2),
    "broken off": Reply(then="break"),
    "error event": Reply(then="error", error={"message": "No."}),
    "no chunk": Reply(role=False, tokens=[], then="break"),
    "rate limit": Reply(status=429, error={"error": {"message": "Slow down."}}, headers={"Retry-After": "1"}),
    "wrong key": Reply(status=401, error={"error": {"message": "No."}}),
    "stalled": Reply(then="stall"),
    "bad input": Reply(),
}
NO_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support this value with this model.",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": "unsupported_value",
}


def reply_for(body: dict[str, Any]) -> Reply:
    kind = body["messages"][0]["content"]
    if kind == "temperature refused" and "temperature" in body:
        return Reply(status=400, error={"error": NO_TEMPERATURE})
    return REPLIES[kind]


def one_request(chat: Chat, kind: str) -> str:
    """Send one request of a kind; return that kind, or what happened in its place."""
    stream = random.random() < 0.7
    # A value that was refused once is not sent again, so there are many of them.
    parameters = {"temperature": round(random.uniform(0, 2), 2)} if kind == "temperature refused" else {}
    with contextlib.suppress(httpx.ReadTimeout):
        match kind:
            case "answered" | "reasoned" | "temperature refused" if stream:
                return kind if text_of(chat.events(kind, **parameters)) == "token " * 20 else "cut short"
            case "left":
                with chat.open(kind) as events:
                    next(texts_of(events))
            case "left early":
                chat.http.post("/v1/chat/completions", json=chat.request(kind, stream=stream), timeout=0.1)
            case "bad input":
                return kind if chat.post([], stream=stream).status_code == 400 else "wrong status"
            case _:
                response = chat.post(kind, stream=stream, **parameters)
                if response.status_code == 503:
                    response.raise_for_status()
    return kind


def measure(process: psutil.Process) -> dict[str, int]:
    return {
        "threads": process.num_threads(),
        "open files": process.num_fds(),
        "memory in MiB": process.memory_info().rss // 2**20,
    }


def main() -> None:
    with Upstream() as upstream:
        upstream.reply = reply_for
        variables = {"OPENAI_TIMEOUT": "1", "MAX_CONCURRENT_STREAMS": str(PLACES), "HAYHOOKS_LOG_LEVEL": "critical"}
        with deployed(OPENAI_BASE_URL=upstream.url, **variables) as server:
            chat, process, counts = Chat(server), psutil.Process(server.process.pid), Counter[str]()

            def client(until: float) -> None:
                while time.monotonic() < until:
                    kind = random.choice(list(REPLIES))
                    try:
                        counts[one_request(chat, kind)] += 1
                    except httpx.HTTPStatusError as refused:
                        counts[f"status {refused.response.status_code}"] += 1
                        time.sleep(0.1)  # or most requests would be refused

            def run(seconds: float) -> dict[str, int]:
                with ThreadPoolExecutor(CLIENTS) as threads:
                    for finished in [threads.submit(client, time.monotonic() + seconds) for _ in range(CLIENTS)]:
                        finished.result()
                wait_until(lambda: all(one.over for one in upstream.received), "the upstream's answers to end")
                with contextlib.ExitStack() as streams:  # every place has returned
                    for events in [streams.enter_context(chat.open_patiently("answered")) for _ in range(PLACES)]:
                        assert text_of(events) == "token " * 20
                upstream.received.clear()
                return measure(process)

            before = run(SECONDS / 6)  # what the first requests load and open stays
            counts.clear()
            after = run(SECONDS)
            [listed] = chat.http.get("/v1/models").json()["data"]
            assert listed["id"] == NAME

    print(f"{sum(counts.values())} requests of {CLIENTS} clients on {PLACES} places:")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) + "\n")
    print("| | before | after |\n| --- | --: | --: |")
    for name, value in before.items():
        print(f"| {name} | {value} | {after[name]} |")
    grown = [
        *(name for name in ("threads", "open files") if after[name] > before[name] + 5),
        *(name for name in ("memory in MiB",) if after[name] > before[name] * 1.3),
        *(kind for kind in ("cut short", "wrong status") if counts[kind]),
    ]
    if grown:
        sys.exit(f"\nThere is more of this than before: {', '.join(grown)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
