"""The blocks of code in README.md, so that what is printed there is what runs."""

import re
from dataclasses import dataclass

from harness.serving import EXAMPLE


@dataclass
class Block:
    """One fenced block; `name` is what comes after its language."""

    language: str
    name: str
    code: str


def blocks() -> list[Block]:
    text = (EXAMPLE / "README.md").read_text()
    return [Block(*match) for match in re.findall(r"^```(\w+) *(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)]


def block(language: str, name: str = "") -> str:
    """Return the one block in a language that has this name."""
    [code] = [block.code for block in blocks() if (block.language, block.name) == (language, name)]
    return code
