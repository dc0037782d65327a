"""Servers of small wrappers that import from `production`, here or in environments of their own."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import serving
from harness.environments import InstallError, install, unavailable

# What is installed beside the tests plays no part.
ONE_RUN_IS_ENOUGH = pytest.mark.skipif(bool(os.environ.get("LOWEST")), reason="brings releases of its own")

HAYSTACK_2 = ["hayhooks>=2,<3", "haystack-ai>=2,<3"]
# Haystack 2 calls huggingface_hub 2 with an argument that it no longer has, and anthropic 2 as if it were older.
OTHERS = ["amazon-bedrock-haystack", "anthropic-haystack", "anthropic>=1.10,<2", "huggingface_hub<2", "ollama-haystack"]
ENVIRONMENTS = {
    "third_party": [*HAYSTACK_2, *OTHERS],
    "older_anthropic": [*HAYSTACK_2, "anthropic-haystack", "anthropic<1.10"],  # its streams are in reference cycles
    "haystack_3": ["hayhooks>=2,<3", "haystack-ai>=3,<4"],
}

# AsyncPipeline is Hayhooks', as Haystack 3 has none.
WRAPPER = """
from hayhooks import AsyncPipeline, BasePipelineWrapper, async_streaming_generator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret

from .production import openai_response, parse_messages, stoppable
from {module} import {name}


class PipelineWrapper(BasePipelineWrapper):
    def setup(self):
        self.pipeline = AsyncPipeline()
        self.pipeline.add_component("llm", stoppable({name}({arguments})))

    @openai_response
    async def run_chat_completion_async(self, model, messages, body):
        prompt = parse_messages(messages).prompt
        return async_streaming_generator(
            pipeline=self.pipeline,
            pipeline_run_args={{"llm": {inputs}}},
            streaming_components=["llm"],
            allow_sync_streaming_callbacks=True,
        )
"""
PROMPT = '{"prompt": prompt}'
MESSAGES = '{"messages": [ChatMessage.from_user(prompt)]}'


def wrapper_of(component: str, arguments: str = "", inputs: str = PROMPT) -> str:
    """Return the source of a wrapper for a component, given as in `package.module.Class`."""
    module, name = component.rsplit(".", 1)
    return WRAPPER.format(module=module, name=name, arguments=arguments, inputs=inputs)


SPEAKING = Path(__file__).with_name("speaking.py").read_text()
SPEAKERS = {
    model: {"pipeline_wrapper.py": wrapper_of(f".speaking.{name}"), "speaking.py": SPEAKING}
    for model, name in (("sync_speaker", "SyncSpeaker"), ("async_speaker", "AsyncSpeaker"))
}


def write_pipelines(folder: Path, pipelines: dict[str, dict[str, str]], patience: int = 60) -> None:
    """Write the files of pipelines, each into a folder of its name beside a copy of `production`.

    `patience` is how many seconds a client may stop reading.
    """
    for name, files in pipelines.items():
        serving.copy_wrapper(serving.EXAMPLE / "production", folder / name / "production")
        lockstep = folder / name / "production" / "lockstep.py"
        code = lockstep.read_text()
        assert code.count("PATIENCE = 60") == 1
        lockstep.write_text(code.replace("PATIENCE = 60", f"PATIENCE = {patience}"))
        for file, source in files.items():
            (folder / name / file).write_text(source)


@contextlib.contextmanager
def served_from(
    environment: str | None, pipelines: dict[str, dict[str, str]], *, patience: Any = 60, **variables: str
) -> Iterator[serving.Server]:
    """Serve pipelines, the files of each by its name, from an environment, or from that of the tests if it is None.

    Without the environment, the test is skipped, or fails in CI.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_pipelines(Path(folder), pipelines, patience)
        # Two that import the same package in parallel can fail.
        here = {"HAYHOOKS_PIPELINES_DIR": folder, "HAYHOOKS_STARTUP_DEPLOY_STRATEGY": "sequential"}
        with pytest.MonkeyPatch.context() as patch:
            if environment:
                try:
                    scripts = install(environment, *ENVIRONMENTS[environment])
                except InstallError as error:
                    unavailable(f"{environment} cannot be installed: {error}")
                patch.setattr(serving, "HAYHOOKS", str(scripts / "hayhooks"))
            server = stack.enter_context(serving.hayhooks(**here, **variables))
        assert "Skipping pipeline" not in server.log, server.log
        yield server
        assert "never retrieved" not in server.log  # what asyncio says of a task whose failure nobody has seen
