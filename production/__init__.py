"""What a chat needs in production, whatever its pipeline. A pipeline_wrapper.py imports from here, and edits nothing:

    openai_response   decorates a `run_chat_completion_async` that returns `async_streaming_generator(...)`
    parse_messages    returns the conversation: all of it is `.prompt`; the last text from the user, for a retriever,
                      is `.question`; `.system_prompt` can be None, so a default is `.system_prompt or "Be brief."`
    parse_parameters  returns the parameters of a request, such as the temperature, for an OpenAI model
    stoppable         takes any component whose `run` has a `streaming_callback`, as in `stoppable(MyGenerator())`
    Settings          the environment variables of an OpenAIGenerator; a pipeline without one needs none of them
    tolerant          lets an OpenAIGenerator cope with what upstreams refuse and send; no other component needs it

The modules in the order in which an answer is made, each of which only imports earlier ones:

    settings          environment variables
    request           from a request to a prompt and parameters
    lockstep          keeps components in step with the client, and ends them
    component         `stoppable`
    upstream          `tolerant`; the only module that knows `openai`
    failure           from the exception of any SDK to a status and a sentence
    response          slots, and from chunks to what the client expects

`lockstep`, `component` and `response` rely on how Hayhooks and Haystack work together, which tests/test_client_leaves.py,
tests/test_any_component.py and tests/test_who_calls.py check.
"""

from .component import stoppable
from .request import parse_messages, parse_parameters
from .response import openai_response
from .settings import Settings
from .upstream import tolerant

__all__ = ["Settings", "openai_response", "parse_messages", "parse_parameters", "stoppable", "tolerant"]
