"""The blocks of code in README.md, so that what is printed there is what runs."""

import ast
import re
from dataclasses import dataclass

from harness.serving import EXAMPLE, WRAPPER


@dataclass
class Block:
    """One fenced block; `name` is what stands behind its language."""

    language: str
    name: str
    code: str


def blocks() -> list[Block]:
    text = (EXAMPLE / "README.md").read_text()
    return [Block(*match) for match in re.findall(r"^```(\w+) *(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)]


def block(language: str, *words: str, name: str = "") -> str:
    """Return the one block in a language that holds all these words and, if it is given, has this name."""
    [code] = [
        block.code
        for block in blocks()
        if block.language == language and all(word in block.code for word in words) and name in (block.name, "")
    ]
    return code


def python_block(*words: str) -> str:
    return block("python", *words)


def example_with(code: str) -> str:
    """Return the example with a block's methods in place of its own, and what else the block has before the class."""
    tree, new = ast.parse(WRAPPER.read_text()), ast.parse(code)
    [wrapper], [changed] = (
        [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "PipelineWrapper"]
        for module in (tree, new)
    )
    methods = {node.name: node for node in changed.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    wrapper.body = [methods.get(getattr(node, "name", ""), node) for node in wrapper.body]
    place = tree.body.index(wrapper)
    tree.body[place:place] = [node for node in new.body if node is not changed]
    return ast.unparse(tree)
