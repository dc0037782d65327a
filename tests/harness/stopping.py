"""How a client leaves, and what the upstream and the server's log tell of it."""

from dataclasses import replace
from typing import Any

from harness.client import Chat
from harness.serving import wait_until
from harness.upstream import Reply, Upstream


def assert_stops(chat: Chat, upstream: Upstream, reply: Reply, **body: Any) -> None:
    """Leave the only slot of a pipeline; the upstream is closed within two chunks, and nothing is in the log."""
    logged = len(chat.server.log)

    def release() -> None:
        upstream.release()
        upstream.wait_until(lambda: not upstream.open or upstream.received[0].sent == upstream.released)

    upstream.reply = replace(reply, gated=True)
    upstream.release()
    with chat.open(**body):
        for _ in range(5):
            release()
    upstream.reply = Reply(wire_format=reply.wire_format)
    wait_until(lambda: chat.post(**body).is_success, "the slot, as the server learns a little later that a client left")
    for _ in range(2):
        release()
    upstream.wait_until(lambda: not upstream.open)
    assert upstream.received[0].left
    log = chat.server.log[logged:]
    assert not [word for word in ("Traceback", " | ERROR ", " | WARNING ") if word in log], log
