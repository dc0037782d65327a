"""Reads the text of messages and chunks, which may also contain images, or end in half an emoji."""

import codecs
from typing import Any


def text_of(content: Any, separator: str = "") -> str:
    """Return the text of a message's or a chunk's content, which is a string, a list of parts or null."""
    if isinstance(content, list):
        content = separator.join(filter(None, map(text_of_part, content)))
    return content if isinstance(content, str) else ""


def text_of_part(part: Any) -> str | None:
    """Return the text of a part, or None if the part is something else, such as an image."""
    if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
        return None
    return part["text"] if isinstance(part.get("text"), str) else ""


class SurrogateDecoder:
    """Replaces unpaired surrogates, which UTF-8 cannot encode; JavaScript's `slice` makes them out of emojis.

    Surrogates belong to UTF-16: decoding it joins two halves of an emoji, even if they come in two pieces.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-16-le")("replace")

    def decode(self, piece: str, is_last: bool = False) -> str:
        """Return a piece without unpaired surrogates. Half an emoji at its end waits for the next piece."""
        return self._decoder.decode(piece.encode("utf-16-le", "surrogatepass"), is_last)


def whole(text: str) -> str:
    """Return a whole text without unpaired surrogates."""
    return text if text.isascii() else SurrogateDecoder().decode(text, is_last=True)
