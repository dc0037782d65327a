"""Serve the example and stream a first answer, with the model OPENAI_API_KEY names or else with a local one."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import fcntl
import http.client
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from types import FrameType

from dotenv import dotenv_values
from harness.local_model import MODEL, local_model
from harness.serving import EXAMPLE, NAME, DeployError, Server, free_port, serving

# What a model of this size answers well; bare arithmetic, for one, is beyond it.
QUESTIONS = [
    "What is the sun? Answer in one sentence.",
    "What is photosynthesis? Answer in one sentence.",
    "What is water made of? Answer in one sentence.",
    "What is the capital of Italy? Answer in one sentence.",
]
HEADER = "Content-Type: application/json"
# Any python3 can run it, and it reads each line as soon as it comes.
AS_TEXT = (
    'import json, sys; [print(choice["delta"].get("content", ""), end="") for line in sys.stdin '
    'if line.startswith("data: {") for choice in json.loads(line[6:])["choices"]]; print()'
)
STOPPED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def port_to_use() -> Iterator[str]:
    """Yield 1416, Hayhooks' own port, unless something listens there or another demo is about to."""
    with open(sys.executable, "rb") as interpreter, socket.socket() as probe:
        port = 1416 if probe.connect_ex(("127.0.0.1", 1416)) else free_port()
        try:
            fcntl.flock(interpreter, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the demo ends
        except BlockingIOError:
            port = free_port()
        except OSError:  # a network drive without locks
            pass
        if port != 1416:
            print(f"Port 1416 is taken, so this demo uses {port}.", flush=True)
        yield str(port)


def tell_of_waiting(over: threading.Event) -> None:
    """Say every five seconds that there is no answer yet, until the event is set."""
    for seconds in itertools.count(5, 5):
        if over.wait(5):
            return
        print(f"No answer from the upstream yet, after {seconds} seconds ...", flush=True)


def ask(server: Server, question: str) -> None:
    """Print a question, then its answer token by token; exit with the reason when there is none."""
    url = f"{server.url}/v1/chat/completions"
    request = urllib.request.Request(url, body_of(question).encode(), dict([HEADER.split(": ")]))
    print(f"\n> {question}\n", flush=True)
    answered = threading.Event()
    threading.Thread(target=tell_of_waiting, args=[answered], daemon=True).start()
    try:
        with urllib.request.urlopen(request) as response:
            for chunk in (json.loads(line[6:]) for line in response if line.startswith(b"data: {")):
                if "error" in chunk:
                    sys.exit(reason(server, chunk["error"]["message"]))
                if text := "".join(choice["delta"].get("content", "") for choice in chunk["choices"]):
                    answered.set()
                    print(text, end="", flush=True)
    except urllib.request.HTTPError as error:
        sys.exit(reason(server, error.read().decode()))
    except (OSError, http.client.HTTPException) as error:
        sys.exit(reason(server, f"The server broke off: {error}"))
    finally:
        answered.set()
    print()


def reason(server: Server, answer: str) -> str:
    """Return what the client got, which says little on purpose, and the server log's own words."""
    with contextlib.suppress(ValueError, KeyError):
        answer = json.loads(answer)["detail"]
    logged = re.findall("^Error: (.*)", server.log, re.MULTILINE)  # what the component raised
    return "\n".join([answer, *(f"The server's log says: {line}" for line in logged[-1:])])


def body_of(question: str) -> str:
    return json.dumps({"model": NAME, "stream": True, "messages": [{"role": "user", "content": question}]})


def print_commands(server: Server, chat: bool, local: bool) -> None:
    """Print what to do with the running server."""
    url = f"{server.url}/v1/chat/completions -H {shlex.quote(HEADER)}"
    raw, as_text = (f"{url} -d {shlex.quote(body_of(question))}" for question in QUESTIONS[:2])
    print(f"\nAsk it yourself:\n\ncurl -N {raw}\n")
    print(f"Or read the answer as text:\n\ncurl -sSfN {as_text} | python3 -uc {shlex.quote(AS_TEXT)}\n")
    if local:
        print("\n".join(["Questions that this small model answers well:", *QUESTIONS]), end="\n\n")
    if chat:
        print(f"Or chat in a browser: {server.url}/chat\n")
    print("Ctrl-C stops it.", flush=True)


def refusal(output: str) -> str:
    """Return why the CLI did not deploy, without its decoration."""
    found = re.search(r"Error: (.*?)(?=\n[^\n]*Deploying pipeline|\n\n|\Z)", output, re.DOTALL)
    return "The deploy was refused: " + " ".join((found[1] if found else output).split())


def end_soon(server: subprocess.Popen[bytes]) -> None:
    """End a server, also one whose threads still wait for an upstream."""
    server.terminate()
    try:
        server.wait(3)
    except subprocess.TimeoutExpired:
        server.kill()


def serve(options: argparse.Namespace, running: contextlib.ExitStack) -> None:
    """Start everything, and stay until the server ends; what was started ends with the stack."""
    known = {**dotenv_values(EXAMPLE / ".env"), **os.environ}
    names = ("OPENAI_", "MAX_CONCURRENT_STREAMS")
    settings = {name: value for name, value in known.items() if value and name.startswith(names)}
    others = {name: value for name, value in os.environ.items() if not name.startswith((*names, "HAYHOOKS_"))}
    local = "OPENAI_API_KEY" not in settings
    if local:
        print(f"No OPENAI_API_KEY, so {MODEL} answers, on this machine.", flush=True)
        url = running.enter_context(local_model())
        settings.update(OPENAI_API_KEY="local", OPENAI_BASE_URL=url, OPENAI_MODEL=MODEL)
    else:
        print("Using the upstream that OPENAI_API_KEY belongs to.", flush=True)
    settings["HAYHOOKS_PORT"] = running.enter_context(port_to_use())
    print("Starting Hayhooks, and deploying the example to it ...", flush=True)
    settings["HAYHOOKS_GRACEFUL_SHUTDOWN_TIMEOUT"] = "1"  # or open streams would hold it for five seconds
    server = running.enter_context(serving({**others, **settings}, *["--with-chainlit"] * options.chat, command="run"))
    running.callback(end_soon, server.process)
    server.deploy(EXAMPLE)
    ask(server, QUESTIONS[0])
    if not options.once:
        print_commands(server, options.chat, local)
        server.process.wait()


def ignore_signals() -> None:
    for number in STOPPED_BY:
        signal.signal(number, lambda number, frame: None)  # for SIG_IGN, Python complains about one under way


def stop(number: int, frame: FrameType | None) -> None:
    ignore_signals()  # a second one would leave behind what the first one ends
    raise KeyboardInterrupt(128 + number)  # the status that a shell gives a command which a signal has ended


def main() -> None:
    parser = argparse.ArgumentParser(prog="./tests/run demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the first answer")
    parser.add_argument("--chat", action="store_true", help="serve Hayhooks' own chat page too")
    options = parser.parse_args()
    for number in STOPPED_BY:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    with contextlib.ExitStack() as running:
        try:
            serve(options, running)
        except KeyboardInterrupt as stopped:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\nStopping ...", flush=True)
            sys.exit(*stopped.args)
        except (DeployError, RuntimeError) as error:
            sys.exit(refusal(str(error)) if isinstance(error, DeployError) else str(error))
        finally:
            ignore_signals()


if __name__ == "__main__":
    main()
