"""What a chat needs in production, whatever its pipeline. A pipeline_wrapper.py imports what it needs of it:

- `openai_response` decorates `run_chat_completion_async`, and handles events, failures and limits;
- `parse_messages` returns the `prompt`, the `system_prompt` and the last `question`; `parse_parameters` the parameters;
- `stoppable(component)` lets any component end when its client has left, if its `run` takes a `streaming_callback`;
- `Settings` and `tolerant(llm)` are for an OpenAIGenerator. A pipeline without one needs neither.

Read the modules in the order in which an answer is made: `settings`, `request`, `lockstep` (a component's thread and
its client), `upstream` (the only one that knows `openai`), `response`. None imports a later one. `lockstep` and
`response` rely on how Hayhooks and Haystack work together; tests/test_client_leaves.py and tests/test_who_calls.py
check that.
"""

from .lockstep import stoppable
from .request import parse_messages, parse_parameters
from .response import openai_response
from .settings import Settings
from .upstream import tolerant

__all__ = ["Settings", "openai_response", "parse_messages", "parse_parameters", "stoppable", "tolerant"]
