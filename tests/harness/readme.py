"""The blocks of code in README.md, so that what is printed there is what runs."""

import re
from dataclasses import dataclass

from harness.serving import EXAMPLE


@dataclass
class Block:
    """One fenced block; `flags` is what stands behind its language."""

    language: str
    flags: str
    code: str


def blocks() -> list[Block]:
    text = (EXAMPLE / "README.md").read_text()
    return [Block(*match) for match in re.findall(r"^```(\w+) *(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)]


def python_block(*words: str) -> str:
    """Return the one Python block that holds all these words."""
    [code] = [
        block.code for block in blocks() if block.language == "python" and all(word in block.code for word in words)
    ]
    return code
