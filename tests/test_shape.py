"""What a reader comes for, what lies in the folder, and what each module of `production` may import."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from harness.serving import EXAMPLE

import production

WRAPPER = EXAMPLE / "pipeline_wrapper.py"
PACKAGE = EXAMPLE / "production"
# As the package's docstring lists them: each imports only from those after it.
MODULES = (
    *("response", "openai_format", "failure", "upstream", "component", "lockstep", "growing_chunk", "streams"),
    *("request", "text", "settings"),
)


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def imports_of(module: str) -> set[str]:
    """Return the packages that a module imports, and with a dot its neighbours."""
    nodes = list(ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    of_names = ["." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    return {re.sub(r"(?<=\w)\..*", "", name) for name in plain + of_names}


def test_the_top_of_the_folder_has_five_visible_entries() -> None:
    visible = {path.name for path in EXAMPLE.iterdir() if path.name != "__pycache__" and path.name[0] != "."}
    assert visible == {"pipeline_wrapper.py", "production", "README.md", "requirements.txt", "tests"}


def test_the_requirements_are_the_three_libraries_with_both_ends_of_a_range() -> None:
    lines = (EXAMPLE / "requirements.txt").read_text().splitlines()
    assert [re.sub("(?<=[a-z])>=[0-9.]+,<[0-9]+$", "", line) for line in lines] == ["hayhooks", "haystack-ai", "openai"]


def test_the_wrapper_is_the_class_and_little_else() -> None:
    body = ast.parse(WRAPPER.read_text()).body
    [wrapper] = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign)]
    assert isinstance(wrapper, ast.ClassDef)
    methods = {node.name: node for node in wrapper.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert list(methods) == ["setup", "run_chat_completion_async", "run_api_async"]
    assert lines_of(WRAPPER) <= 60

    last = ast.unparse(methods["run_chat_completion_async"].body[-1])
    assert re.fullmatch(
        r"return async_streaming_generator\(pipeline=self\.pipeline, pipeline_run_args=.+, "
        r"streaming_components=\['llm'\], allow_sync_streaming_callbacks=True\)",
        last,
    )


def test_the_pipeline_is_a_prompt_builder_and_an_openai_generator(wrapper: Any) -> None:
    assert type(wrapper.pipeline).__name__ == "AsyncPipeline"
    components = {name: type(component).__name__ for name, component in wrapper.pipeline.walk()}
    assert components == {"prompt": "PromptBuilder", "llm": "OpenAIGenerator"}


def test_the_package_has_a_version_and_a_map_of_its_modules() -> None:
    assert re.fullmatch(r"\d+\.\d+", production.__version__)
    named = re.findall(r"^    (\w+)  ", production.__doc__ or "", re.MULTILINE)
    assert tuple(named[-len(MODULES) :]) == MODULES
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_and_knows_no_more_than_it_must(module: str) -> None:
    file, imports = PACKAGE / f"{module}.py", imports_of(module)
    assert lines_of(file) <= 160
    later = {f".{name}" for name in MODULES[MODULES.index(module) + 1 :]}
    assert {name for name in imports if name.startswith(".")} <= later
    assert ("openai" in imports) == (module == "upstream")
    assert not re.search(r"[\"'](llm|prompt)[\"']", file.read_text())
