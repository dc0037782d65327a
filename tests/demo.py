"""Serve the example and stream a first answer, with the model OPENAI_API_KEY names or else with a local one."""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import urllib.request

from dotenv import dotenv_values
from harness.local_model import MODEL, local_model
from harness.serving import EXAMPLE, NAME, DeployError, Server, free_port, hayhooks

QUESTION = "What is the sun? Answer in one sentence."


def port_to_use() -> str:
    """Return 1416, Hayhooks' own port, unless something listens there."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 1416)):
            return "1416"
    port = free_port()
    print(f"Port 1416 is taken, so this demo uses {port}.")
    return str(port)


def ask(server: Server, question: str) -> None:
    """Print the curl command for a question, then its answer token by token."""
    body = json.dumps({"model": NAME, "stream": True, "messages": [{"role": "user", "content": question}]})
    url = f"{server.url}/v1/chat/completions"
    header = "Content-Type: application/json"
    request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
    print(f"\n> {question}\n")
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    sys.exit(f"\n{chunk['error']['message']}")
                for choice in chunk["choices"]:
                    print(choice["delta"]["content"], end="", flush=True)
    print(f"\n\nAsk it yourself:\n\ncurl -N {url} -H {shlex.quote(header)} -d {shlex.quote(body)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="./tests/run demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the first answer")
    parser.add_argument("--chat", action="store_true", help="serve Hayhooks' own chat page too")
    options = parser.parse_args()

    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    known = {**dotenv_values(EXAMPLE / ".env"), **os.environ}
    names = ("OPENAI_", "MAX_CONCURRENT_STREAMS")
    settings = {name: value for name, value in known.items() if value and name.startswith(names)}
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as running:
        if "OPENAI_API_KEY" in settings:
            print("Using the upstream that OPENAI_API_KEY belongs to.")
        else:
            print(f"No OPENAI_API_KEY, so {MODEL} answers, on this machine.")
            url = running.enter_context(local_model())
            settings.update(OPENAI_API_KEY="local", OPENAI_BASE_URL=url, OPENAI_MODEL=MODEL)
        chat = ["--with-chainlit"] if options.chat else []
        server = running.enter_context(hayhooks(*chat, HAYHOOKS_PORT=port_to_use(), **settings))
        try:
            server.deploy(EXAMPLE / "pipeline_wrapper.py")
            ask(server, QUESTION)
        except DeployError as error:
            sys.exit(str(error))
        except urllib.request.HTTPError as error:
            sys.exit(f"{error.code}: {error.read().decode()}")
        if options.chat:
            print(f"Or chat in a browser: {server.url}/chat\n")
        if not options.once:
            print("Ctrl-C stops it.")
            server.process.wait()


if __name__ == "__main__":
    main()
