"""The example with a real model, as the demo serves it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from demo import QUESTIONS
from harness.client import Chat, finish_reasons, text_of
from harness.environments import unavailable
from harness.local_model import MODEL, MissingError, local_model
from harness.serving import EXAMPLE, deployed

WORDS = ["light", "glucose", "hydrogen", "Rome"]
OTHERS = ["What is the capital of France?", "Write a haiku about the sea.", "What is 2 + 2?"]  # may end at the limit


@pytest.fixture(scope="module")
def model() -> Iterator[Chat]:
    try:
        with local_model() as url, deployed(OPENAI_BASE_URL=url, OPENAI_MODEL=MODEL) as server:
            yield Chat(server)
    except MissingError as error:
        unavailable(str(error), comes_with_packages="pip" in str(error))


@pytest.mark.parametrize(("question", "word"), zip([*QUESTIONS, *OTHERS], [*WORDS, "", "", ""], strict=True))
def test_an_answer_ends_and_says_nothing_twice(model: Chat, question: str, word: str) -> None:
    events = model.events(question)
    assert word in text_of(events)
    assert finish_reasons(events) in (["stop"], ["stop" if word else "length"])
    sentences = re.findall(r"[^.!?\n]*[^.!?\s][^.!?\n]*", text_of(events))
    assert len(sentences) == len({sentence.strip() for sentence in sentences})


@pytest.mark.usefixtures("model")
def test_the_demo_prints_commands_that_work(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    environment.update(TMPDIR=str(tmp_path), PYTHONUNBUFFERED="1")
    command = [sys.executable, "-B", str(EXAMPLE / "tests" / "demo.py")]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as demo:
        try:
            assert demo.stdout
            said = list(takewhile(lambda line: line != "Ctrl-C stops it.\n", demo.stdout))
            assert f"{MODEL} answers" in said[0]
            raw, as_text = (line for line in said if line.startswith("curl "))
            assert "data: {" in output_of(raw)
            assert re.fullmatch("Photosynthesis is [^{}]+\n", output_of(as_text))
        finally:
            demo.send_signal(signal.SIGINT)
            assert demo.communicate()[0] == "\nStopping ...\n"
    assert list(tmp_path.iterdir()) == []


def output_of(command: str) -> str:
    if not shutil.which("curl"):
        unavailable("there is no curl", comes_with_packages=False)
    return subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.PIPE, text=True).stdout
