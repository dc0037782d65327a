"""What a reader comes for, and what lies in the folder."""

import ast
import subprocess

from harness.serving import EXAMPLE, WRAPPER

from pipeline_wrapper import PipelineWrapper

TREE = ast.parse(WRAPPER.read_text())
[CLASS] = [node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "PipelineWrapper"]
METHODS = {node.name: node for node in CLASS.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_the_top_of_the_folder_has_five_visible_entries() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=EXAMPLE, check=True, capture_output=True, text=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    dotfiles = {".ci", ".gitattributes", ".gitignore", ".ruff.toml"}
    assert top - dotfiles == {"pipeline_wrapper.py", "README.md", "requirements.txt", "tests", ".env.example"}


def test_the_requirements_are_the_three_libraries() -> None:
    lines = (EXAMPLE / "requirements.txt").read_text().splitlines()
    assert [line.split(">=")[0] for line in lines] == ["hayhooks", "haystack-ai", "openai"]
    assert all("<" in line for line in lines)


def test_the_chat_method_ends_in_the_line_that_is_the_example() -> None:
    last = METHODS["run_chat_completion_async"].body[-1]
    assert isinstance(last, ast.Return)
    assert isinstance(last.value, ast.Call)
    assert ast.unparse(last.value.func) == "async_streaming_generator"
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in last.value.keywords}
    assert list(keywords) == [
        "pipeline",
        "pipeline_run_args",
        "streaming_components",
        "allow_sync_streaming_callbacks",
    ]
    assert keywords["streaming_components"] == "['llm']"
    assert keywords["allow_sync_streaming_callbacks"] == "True"


def test_the_pipeline_is_a_prompt_builder_and_an_openai_generator(wrapper: PipelineWrapper) -> None:
    assert type(wrapper.pipeline).__name__ == "AsyncPipeline"
    components = {name: type(component).__name__ for name, component in wrapper.pipeline.walk()}
    assert components == {"prompt": "PromptBuilder", "llm": "OpenAIGenerator"}


def test_the_class_fits_on_a_screen() -> None:
    assert CLASS.end_lineno is not None
    assert CLASS.end_lineno - CLASS.lineno < 50
