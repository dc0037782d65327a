"""What a reader comes for, what lies in the folder, and what each module may know."""

import ast
import re
import subprocess
from typing import Any

import pytest
from harness.serving import EXAMPLE

TREE = ast.parse((EXAMPLE / "pipeline_wrapper.py").read_text())
[CLASS] = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
METHODS = {node.name: node for node in CLASS.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
# The modules in the order in which the package's docstring names them, and what each may import.
MODULES = {
    "settings": {"pydantic", "pydantic_settings", "haystack"},
    "request": {"fastapi", "json"},
    "streams": set(),
    "lockstep": {"haystack", ".streams"},
    "component": {".lockstep"},
    "upstream": {"openai", "haystack", "hayhooks", ".request"},
    "failure": {"fastapi", "json", ".request"},
    "openai_format": {"fastapi", "fastapi_openai_compat", "hayhooks", "haystack", "json", ".request", ".failure"},
    "response": {"fastapi", "hayhooks", "haystack", ".settings", ".lockstep", ".failure", ".openai_format"},
}
LIBRARIES = {
    "fastapi",
    "fastapi_openai_compat",
    "hayhooks",
    "haystack",
    "httpx",
    "openai",
    "pydantic",
    "pydantic_settings",
}


def imports_of(module: str) -> set[str]:
    """Return the libraries, `json` and the neighbours that a module imports."""
    found = set()
    for node in ast.walk(ast.parse((EXAMPLE / "production" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "") if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
    return {name for name in found if name in LIBRARIES or name == "json" or name.startswith(".")}


def test_the_top_of_the_folder_has_six_visible_entries() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=EXAMPLE, check=True, capture_output=True, text=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    dotfiles = {".ci", ".gitattributes", ".gitignore", ".ruff.toml"}
    example = {"pipeline_wrapper.py", "production", "README.md", "requirements.txt", "tests", ".env.example"}
    assert top - dotfiles == example


def test_the_requirements_are_the_three_libraries() -> None:
    lines = (EXAMPLE / "requirements.txt").read_text().splitlines()
    assert [line.split(">=")[0] for line in lines] == ["hayhooks", "haystack-ai", "openai"]
    assert all("<" in line for line in lines)


def test_the_wrapper_is_the_class_and_little_else() -> None:
    others = [node for node in TREE.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign)]
    assert others == [CLASS]
    assert list(METHODS) == ["setup", "run_chat_completion_async", "run_api_async"]


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


def test_the_pipeline_is_a_prompt_builder_and_an_openai_generator(wrapper: Any) -> None:
    assert type(wrapper.pipeline).__name__ == "AsyncPipeline"
    components = {name: type(component).__name__ for name, component in wrapper.pipeline.walk()}
    assert components == {"prompt": "PromptBuilder", "llm": "OpenAIGenerator"}


def test_the_map_names_every_module_in_order() -> None:
    package = EXAMPLE / "production" / "__init__.py"
    names = re.findall(r"^    (\w+)  ", ast.get_docstring(ast.parse(package.read_text())) or "", re.MULTILINE)
    assert names[-len(MODULES) :] == list(MODULES)
    assert {path.stem for path in package.parent.glob("*.py")} == {"__init__", *MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_knows_no_more_than_it_must(module: str) -> None:
    assert imports_of(module) <= MODULES[module]
    earlier = list(MODULES)[: list(MODULES).index(module)]
    assert {name.lstrip(".") for name in imports_of(module) if name.startswith(".")} <= set(earlier)
    assert not re.search(r"[\"'](llm|prompt)[\"']", (EXAMPLE / "production" / f"{module}.py").read_text())
