"""A chunk on its way to the client, to which the text of the next chunks is added until somebody reads it.

While the server keeps up, each chunk is read before the next one comes, and nothing is joined. When it is behind,
several chunks share one trip through Hayhooks and FastAPI, where most of the time goes.
"""

import dataclasses
import threading
from typing import Any

from haystack.dataclasses import StreamingChunk

MAX_JOINED = 8  # chunks
FIELDS = {field.name for field in dataclasses.fields(StreamingChunk)}
# Getting one of these attributes counts as reading a chunk. `__reduce_ex__` copies and pickles it. Hayhooks reads the
# `reasoning` of each chunk that it passes on, a field that Haystack 2.15 does not have.
READING = FIELDS | {"reasoning", "__reduce_ex__"}


class GrowingChunk(StreamingChunk):
    """A copy of a component's chunk. Reading it makes it an ordinary chunk, of the component's own class.

    So later reads cost nothing, and chat methods find the class that they expect. It grows in the component's thread,
    and is read in another: the condition guards it, and is notified when it is read.
    """

    _condition: threading.Condition
    _own_class: type[StreamingChunk]
    _joined: int

    @classmethod
    def copy_of(cls, chunk: StreamingChunk, condition: threading.Condition) -> "GrowingChunk":
        """Return a copy for the client; the component builds its reply from the original."""
        growing = cls.__new__(cls)
        vars(growing).update(vars(chunk), _condition=condition, _own_class=type(chunk), _joined=1)
        return growing

    def __getattribute__(self, name: str) -> Any:
        if name in READING and (condition := vars(self).get("_condition")):
            with condition:
                if is_growing(self):  # no other thread has read it meanwhile
                    self._become_ordinary()
                    condition.notify_all()
        return object.__getattribute__(self, name)

    def _become_ordinary(self) -> None:
        own_class = self._own_class
        del self._condition, self._own_class, self._joined
        self.__class__ = own_class  # type: ignore[assignment]

    def try_join(self, chunk: Any) -> bool:
        """Add the text of the next chunk if nothing else would be lost. Called with the condition held."""
        if type(chunk) is not self._own_class or self._joined == MAX_JOINED or not are_same_except_text(chunk, self):
            return False
        texts = [vars(self)["content"], chunk.content]
        if not all(text and isinstance(text, str) for text in texts):  # equal tool calls, for one, are two
            return False
        vars(self)["content"] = "".join(texts)
        self._joined += 1
        return True


def is_growing(chunk: Any) -> bool:
    return type(chunk) is GrowingChunk


def are_same_except_text(*chunks: StreamingChunk) -> bool:
    """Compare two chunks, ignoring text and time of receipt. Does not count as reading them."""
    one, other = map(vars, chunks)
    metas = [{**fields["meta"], "received_at": None} for fields in (one, other)]
    return metas[0] == metas[1] and all(one[name] == other[name] for name in FIELDS - {"content", "meta"})
