"""Deploy a wrapper, and tell which promises of the README its clients find kept, whatever its prompts and names."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo import refusal
from harness.client import Chat, finish_reasons, text_of, texts_of
from harness.serving import KEY, NAME, DeployError, Server, bare_environment, hayhooks
from harness.upstream import Reply, Upstream, openai

SECONDS_FOR_EACH, SECONDS_UNTIL_THE_LAST = 8, 75
KEYS = [f"{provider}_API_KEY" for provider in ("OPENAI", "AZURE_OPENAI", "ANTHROPIC", "COHERE", "MISTRAL")]
NOT_ASKED = "It did not ask OPENAI_BASE_URL. Without a URL in its code or its YAML, more can be seen."
BROKEN, NOT_SEEN = "does not: ", "not seen here: "
UNREACHABLE = re.compile("connection (error|refused)|connection attempts failed|proxyerror", re.IGNORECASE)
# These words are found wherever a prompt puts them.
QUESTION, ANSWER, SYSTEM, BRACES = "question-8f3a", "answer-77d0", "system-51c2", "{{ 7*7 }} {% raw %} 9ab4"
PIXEL, WHY = "data:image/png;base64,iVBORw0KGgo=", "This model is too small for that."
PHOTO = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": PIXEL}}]
RULES, FIRST, IMAGE = ({"role": r, "content": c} for r, c in (("system", SYSTEM), ("user", QUESTION), ("user", PHOTO)))
REST = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": BRACES}]
FRONT_END = {"tools": [{"type": "function", "function": {"name": "clock"}}], "tool_choice": "auto", "chat_id": "9f0c"}
LIMITS, SENT = {"temperature": 0.25, "max_tokens": 37}, ('"temperature": 0.25', '_tokens": 37')
CHUNK = {"id", "object", "created", "model", "choices"}
FIELDS = CHUNK | {"index", "delta", "finish_reason", "role", "content", "usage", "system_fingerprint", "service_tier"}


class Client(Chat):
    """A client of a wrapper. Its methods return or raise what is wrong."""

    def __init__(self, server: Server, upstream: Upstream) -> None:
        super().__init__(server, done=False)
        self.strict, self.upstream, self.asks, self.reason = Chat(server), upstream, False, ""

    def lost(self, *words: str, messages: Any = QUESTION, **body: Any) -> str:
        """Return which words of a request do not reach the upstream."""
        self.post(messages, **body)
        received = json.dumps([one.body for one in self.upstream.received])
        return ", ".join(word for word in words if word not in received)

    def expect(self, status: int, messages: Any = QUESTION, told: str = " ", **headers: str) -> None:
        """Ask for an answer that fails, streamed and not, with a sentence and without the server's key."""
        for stream in (True, False):
            answer = self.post(messages, stream=stream)
            found = {name: answer.headers.get(name.replace("_", "-")) for name in headers}
            assert answer.status_code == status, f"status {answer.status_code}"
            assert found == headers, f"its headers are {found}"
            assert told in answer.json()["detail"], f"it says {answer.text}"
            assert KEY not in answer.text, "it tells the server's key"

    def expect_refused_image(self) -> None:
        if self.lost(PIXEL, messages=[IMAGE]):  # a model that sees it may answer
            self.expect(400, [IMAGE])

    def expect_tokens(self) -> None:
        with self.open() as events:
            for _ in range(5):
                self.upstream.release()
                assert next(texts_of(events), ""), "it ends early"
                assert self.upstream.open, "it comes when the model has ended"
            self.upstream.release()
            list(events)

    def odd_fields(self) -> str:
        odd = set[str]()
        for event in self.events(stream_options={"include_usage": True}):
            parts = [event, *event["choices"], *(choice["delta"] for choice in event["choices"])]
            odd |= {name for part in parts for name in part if name not in FIELDS or part[name] is None}
            odd |= CHUNK - set(event)
        return ", ".join(sorted(odd - {"finish_reason"}))

    def expect_usage(self) -> None:
        for asked in (False, True):
            events = self.events(stream_options={"include_usage": asked})
            assert sum(bool(event.get("usage")) for event in events) == asked, f"not with include_usage {asked}"

    def missing_fields(self) -> str:
        whole = self.post(stream=False).raise_for_status().json()
        found = {**whole, **whole["choices"][0], **whole["choices"][0]["message"]}
        wanted = ("content", "finish_reason", *["usage"] * bool(self.upstream.received))
        return ", ".join(name for name in wanted if not found.get(name))

    def expect_run(self) -> None:
        inputs = dict.fromkeys(("question", "query", "prompt", "text", "message", "input"), QUESTION)
        response = self.http.post(f"/{NAME}/run", json=inputs)
        if response.status_code in (404, 422):
            raise NotImplementedError("no /run" if response.status_code == 404 else "/run has other inputs")
        response.raise_for_status()

    def expect_error_event(self) -> None:
        events = self.strict.events()
        assert [*finish_reasons(events), *events[-1]] == ["error"], "it looks complete"

    def expect_stop(self) -> None:
        with self.open() as events:
            list(zip(range(5), texts_of(events), strict=False))
        self.upstream.wait_until(lambda: not self.upstream.open)
        assert any(one.left for one in self.upstream.received), "the model writes all of it"

    def expect_places(self) -> None:
        with contextlib.ExitStack() as streams:
            opened = [streams.enter_context(self.open()) for _ in range(20)]
            assert all(next(texts_of(events), "") for events in opened), "one ends early"

    def verdict(self, find: Callable[["Client"], Any], reply: Any) -> str:
        if reply and not self.asks:
            return f"{NOT_SEEN}the scripted upstream was not asked"
        self.upstream.forget()
        self.upstream.reply, logged = reply or Reply(), len(self.server.log)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_FOR_EACH)
        try:
            fault = find(self)
        except NotImplementedError as reason:
            return f"{NOT_SEEN}{reason}"
        except Exception as error:
            fault = re.split(" for url| without ", str(error))[0] or type(error).__name__
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.asks = self.asks or bool(self.upstream.received)
        if fault and not self.asks and UNREACHABLE.search(self.server.log):
            return f"{NOT_SEEN}it asks another machine"
        if fault and (entry := re.search(r"ERROR .*(\n(?!\d{4}-).+){0,4}", self.server.log[logged:])):
            self.reason = self.reason or f'Of "{fault}", the server says:\n{entry[0]}'
        return " ".join(f"{BROKEN}{fault}".split()) if fault else "holds"


def run_out(*_: object) -> None:
    raise TimeoutError(f"it takes longer than {SECONDS_FOR_EACH} seconds")


def failing(status: int, message: str = KEY, having: str = "messages", code: str = "") -> Callable[[Any], Reply]:
    error = {"error": {"message": message, "param": having, "code": code}}
    return lambda body: Reply(status=status, error=error, headers={"retry-after": "1"}) if having in body else Reply()


PICKY, LIMITED = failing(400, having="temperature", code="unsupported_value"), Reply(finish_reason="length")
CUT = Reply(role=False, tokens=[], then="break", wire_format=lambda body, reply: openai(body, reply))  # whole ones, too
LONG, GATED, SLOW = Reply(["word "] * 200, pace=0.02), Reply("12345", gated=True), Reply(["word "] * 99, pace=0.1)
# What is promised, what finds that it does not hold, and the upstream's reply, if it must have been asked for that.
PROMISES: list[tuple[str, Callable[[Client], Any], Any]] = [
    ("a stream ends with [DONE]", lambda on: not on.strict.events(), None),
    ("a stream has OpenAI's fields, and no nulls", Client.odd_fields, None),
    ("a whole answer has text, usage, finish_reason", Client.missing_fields, None),
    ("front-ends' default requests are answered", lambda on: not text_of(on.events([IMAGE, *REST], **FRONT_END)), None),
    ("an image that the model cannot see is a 400", Client.expect_refused_image, None),
    ("a blank message is a 400", lambda on: on.expect(400, " "), None),
    ("/run answers", Client.expect_run, None),
    ("a stream comes token by token", Client.expect_tokens, GATED),
    ("one finish_reason, the model's", lambda on: finish_reasons(on.events()) != ["length"], LIMITED),
    ("usage in one chunk, if stream_options asks", Client.expect_usage, Reply()),
    ("earlier turns reach the model", lambda on: on.lost(QUESTION, ANSWER, messages=[FIRST, *REST]), Reply()),
    ("the system prompt reaches the model", lambda on: on.lost(SYSTEM, messages=[RULES, FIRST]), Reply()),
    ("{{ 7*7 }} reaches the model unchanged", lambda on: on.lost(BRACES, messages=BRACES), Reply()),
    ("temperature and a limit reach the model", lambda on: on.lost(*SENT, **LIMITS), Reply()),
    ("a parameter that it refuses costs no answer", lambda on: not text_of(on.events(temperature=0.1)), PICKY),
    ("a request that it refuses: 400 and why", lambda on: on.expect(400, told=WHY), failing(400, WHY)),
    ("a wrong key: 400, and no retry", lambda on: on.expect(400, x_should_retry="false"), failing(401)),
    ("a busy model: 429 with its Retry-After", lambda on: on.expect(429, retry_after="1"), failing(429)),
    ("a failing model: 502, before any 200", lambda on: on.expect(502), failing(500)),
    ("a model cut before its first token: 502", lambda on: on.expect(502), CUT),
    ("a model cut later: an error event, then [DONE]", Client.expect_error_event, Reply(then="break")),
    ("Stop ends the model's answer", Client.expect_stop, LONG),
    ("20 streams at once: each has a first token", Client.expect_places, SLOW),
]


def main() -> None:
    until = time.monotonic() + SECONDS_UNTIL_THE_LAST
    signal.signal(signal.SIGALRM, run_out)
    signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped."))
    os.environ.update(bare_environment())  # its own clients heed proxies, too
    print("Starting Hayhooks, and deploying the wrapper to it ...", flush=True)
    variables, verdicts = {**dict.fromkeys(KEYS, KEY), "OPENAI_MAX_RETRIES": "0"}, []
    with Upstream() as upstream, hayhooks(OPENAI_BASE_URL=upstream.url, **variables) as server:
        client = Client(server, upstream)
        try:
            server.deploy(Path(sys.argv[1]))
            for promise, find, reply in PROMISES:
                in_time = time.monotonic() < until
                verdicts.append(client.verdict(find, reply) if in_time else f"{NOT_SEEN}the time is up")
                print(f"{promise:<48}{verdicts[-1]}"[:100], flush=True)
            if hint := client.reason or ("" if client.asks else NOT_ASKED):
                print(hint)
        except DeployError as error:
            verdicts.append(BROKEN)
            print(refusal(str(error)))
        finally:
            server.process.kill()  # whatever it still waits for
        if missing := re.search(rf"No module named '(?!{NAME})(\w+)", server.log):
            print(f"The wrapper imports {missing[1]}, which is not installed here: ", end="")
            print(f"`{sys.executable} -m pip install {missing[1]}` adds it, if its package has that name.")
    sys.exit(any(verdict.startswith(BROKEN) for verdict in verdicts))


if __name__ == "__main__":
    main()
