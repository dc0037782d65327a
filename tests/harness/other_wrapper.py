"""What `./tests/run test --wrapper` adds, as a pytest plugin: a first look, limits, and a summary by kind.

A wrapper may put instructions or documents around each question. The first look finds out what stays the same of
them, and the tests see what the model receives without it.
"""

import _thread
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import httpx
import pytest
from demo import refusal

from harness.serving import KEY, NAME, PATIENCE, WRAPPER, DeployError, bare_environment, hayhooks
from harness.upstream import Upstream

SECONDS_FOR_EACH_TEST, SECONDS_UNTIL_THE_LAST_BEGINS, SECONDS_FOR_ALL = 20, 180, 255
QUESTIONS = ["Hi 8f3a", "the question 51c2", "hello 77d0", "What is it? 9ab4"]
CLIENT, CODE, PROMPT = (
    "What a user's client would notice",
    "What an operator or Python code would notice",
    "Only the exact prompt differs",
)


class Frame(NamedTuple):
    """What a wrapper puts around each question: messages before it, and texts right before and behind it."""

    messages: Sequence[dict[str, Any]] = ()
    lead: str = ""
    trail: str = ""

    def remove_from(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        number = len(self.messages)
        rest = messages[number:] if messages[:number] == list(self.messages) else messages
        if not rest or not isinstance(text := rest[-1].get("content"), str):
            return rest
        text = behind(self.lead, text)
        text = behind(self.trail[::-1], text[::-1])[::-1]
        return [*rest[:-1], {**rest[-1], "content": text}]


def behind(lead: str, text: str) -> str:
    """Return what is behind a lead, or behind its last line, as documents before that may differ."""
    last_line = lead[max(lead.rstrip().rfind("\n"), 0) :]
    for start in (lead, last_line):
        if start and start in text:
            return text.partition(start)[2]
    return text


def frame_around(questions: list[str], received: list[list[dict[str, Any]]]) -> Frame:
    """Return what stays the same around different questions."""
    texts = [str(messages[-1].get("content")) for messages in received]
    parts = [text.rpartition(question) for text, question in zip(texts, questions, strict=True)]
    same = all(messages[:-1] == received[0][:-1] for messages in received)
    lead = common_start([before[::-1] for before, _, _ in parts])[::-1]
    return Frame(received[0][:-1] if same else [], lead, common_start([after for _, _, after in parts]))


def common_start(texts: list[str]) -> str:
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in columns)


class UnframedUpstream(Upstream):
    """An upstream that leaves the frame out of what it shows to the tests."""

    frame = Frame()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content, message = b"", {}
        while (message := await receive())["type"] == "http.request":
            content += message["body"]
            if not message["more_body"]:
                break
        if content:
            body = json.loads(content)
            content = json.dumps({**body, "messages": self.frame.remove_from(body["messages"])}).encode()
        messages = [{**message, "body": content}]

        async def receive_unframed() -> Any:
            return messages.pop() if messages else await receive()

        await super().__call__(scope, receive_unframed, send)

    def break_off(self) -> None:
        """Close every connection, so that no thread of the wrapper waits for an answer that nobody wants."""

        def close() -> None:
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(close)


def forget_callers_environment() -> None:
    """Let tests that load the wrapper into their own process have no more than its servers."""
    ours = ("PYTEST_", "HYPOTHESIS_", "WRAPPER", "LOWEST")
    kept = {name: value for name, value in os.environ.items() if name.startswith(ours)}
    bare = bare_environment()
    os.environ.clear()
    os.environ.update({**bare, **kept, "HOME": tempfile.gettempdir(), "HAYSTACK_TELEMETRY_ENABLED": "False"})


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    options.session_timeout = options.session_timeout or SECONDS_UNTIL_THE_LAST_BEGINS
    if options.tbstyle == "auto":  # where most tests fail, nobody would find the summary
        options.tbstyle, options.reportchars, options.disable_warnings = "no", "", True
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        forget_callers_environment()
    if "WRAPPER_FRAME" in os.environ:
        UnframedUpstream.frame = Frame(*json.loads(os.environ["WRAPPER_FRAME"]))
    else:
        guard = threading.Timer(SECONDS_FOR_ALL, _thread.interrupt_main)
        guard.daemon = True
        guard.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # what a fixture waits for has its own limit
        item.add_marker(pytest.mark.timeout(SECONDS_FOR_EACH_TEST, func_only=True))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Say whether the wrapper asks the scripted upstream, and end the run if it does not."""
    if "WRAPPER_FRAME" in os.environ:
        return
    terminal: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    terminal.write_line(f"A first look at {WRAPPER} ...")
    try:
        frame = look()
    except (DeployError, RuntimeError) as error:
        terminal.write_line(refusal(str(error))[:600] if isinstance(error, DeployError) else str(error))
        pytest.exit("no test was run", returncode=1)
    os.environ["WRAPPER_FRAME"] = json.dumps(frame)  # for the processes that run tests
    UnframedUpstream.frame = frame
    around = " It puts more around each question, which the tests leave out." if any(frame) else ""
    terminal.write_line(f"It asks the scripted upstream.{around}")


def look() -> Frame:
    """Deploy the wrapper and ask it; returns what it puts around a question.

    Raises DeployError if it cannot be deployed, and RuntimeError if it does not ask the scripted upstream.
    """
    with Upstream() as upstream, hayhooks(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=upstream.url) as server:
        server.deploy()
        for question in QUESTIONS:
            body = {"model": NAME, "stream": True, "messages": [{"role": "user", "content": question}]}
            before = len(upstream.received)
            try:
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE)
                said = f"answered with status {answer.status_code}: {answer.text[:300]}"
            except httpx.HTTPError as error:
                said = f"did not answer: {error}"
            if len(upstream.received) == before:
                raise RuntimeError(
                    "The wrapper does not ask the scripted upstream, whose address is in OPENAI_BASE_URL, so there is "
                    f"nothing to test. Asked a question, it {said}"
                )
        received = [one.body.get("messages") or [{}] for one in upstream.received]
    return frame_around(QUESTIONS, received) if len(received) == len(QUESTIONS) else Frame()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo:
        report.user_properties.append(("kind", kind_of(item, call.excinfo)))
    return report


def kind_of(item: pytest.Item, error: pytest.ExceptionInfo[BaseException]) -> str:
    """Return the kind of a failure: by the assertion that failed, or else by what is tested."""
    failed = [entry for entry in error.traceback if entry.path == item.path]
    if failed and error.errisinstance(AssertionError) and '["messages"]' in str(failed[-1].statement):
        return PROMPT
    in_process = {"wrapper", "wrapper_class"} & set(getattr(item, "fixturenames", []))
    return CODE if in_process or item.path.name == "test_deploying.py" else CLIENT


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the tests that failed, by kind, each with the reason of its first failure."""
    stats = terminalreporter.stats
    failed = [report for name in ("failed", "error") for report in stats.get(name, [])]
    for kind in (CLIENT, CODE, PROMPT):
        reports: dict[str, list[pytest.TestReport]] = {}
        for report in failed:
            if dict(report.user_properties).get("kind") == kind:
                reports.setdefault(report.nodeid.partition("[")[0], []).append(report)
        terminalreporter.section(f"{kind}: {sum(map(len, reports.values()))} failed")
        for name, (first, *others) in reports.items():
            reason = getattr(getattr(first.longrepr, "reprcrash", None), "message", "").partition("\n")[0]
            terminalreporter.write_line(f"{name} ({1 + len(others)}): {reason[:100]}")
    run = sum(len(stats.get(name, [])) for name in ("passed", "failed", "error", "skipped"))
    if left := terminalreporter._session.testscollected - run:
        terminalreporter.write_line(f"{left} tests were left out, as the time was up.")
