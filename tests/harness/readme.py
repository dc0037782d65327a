"""The blocks of code in the two READMEs, so that what is printed there is what runs."""

import re
from typing import NamedTuple

from harness.serving import EXAMPLE

README, MANUAL = ((EXAMPLE / path).read_text() for path in ("README.md", "production/README.md"))


class Block(NamedTuple):
    """One fenced block; `name` is what comes after its language."""

    language: str
    name: str
    code: str


BLOCKS = [
    Block(*match) for match in re.findall(r"^```(\w+) *(.*)\n((?:.*\n)*?)^```$", README + MANUAL, flags=re.MULTILINE)
]


def block(language: str, name: str = "") -> str:
    """Return the one block in a language that has this name."""
    [code] = [block.code for block in BLOCKS if (block.language, block.name) == (language, name)]
    return code


def starting(text: str) -> list[str]:
    """Return the blocks that start with a text."""
    return [block.code for block in BLOCKS if block.code.startswith(text)]
