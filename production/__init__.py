"""What a chat needs in production, whatever its pipeline. Copy this package, and import from it; do not edit it.

    openai_response   decorates a `run_chat_completion_async` that returns `async_streaming_generator(...)`
    parse_messages    returns `.prompt`, all turns of the conversation without the system prompt; `.question`, the
                      user's last text, for a retriever; and `.system_prompt`, which can be None: for a default, use
                      `.system_prompt or "Be brief."`, and put it into the prompt if your component has no such input
    parse_parameters  returns the temperature and the like, by OpenAI's names
    stoppable         takes any component whose `run` has a `streaming_callback`, as in `stoppable(MyGenerator())`
    Settings          reads the environment variables of an OpenAIGenerator: leave it out of a pipeline without one
    tolerant          lets an OpenAIGenerator cope with what upstreams refuse and send: leave it out likewise

The modules, each of which imports only from those before it:

    settings          environment variables
    request           from a request to a prompt and parameters
    streams           closes what a component was reading when its client left
    lockstep          keeps the components of an answer in step with its client
    component         `stoppable`
    upstream          `tolerant`; the only one that imports `openai`
    failure           from an SDK's exception to a status and a sentence
    openai_format     from chunks to events, or to one completion
    response          `openai_response`, which calls most of the others

They rely on how Hayhooks, Haystack and SDKs work together, which the tests check with old and new releases.
"""

from .component import stoppable
from .request import parse_messages, parse_parameters
from .response import openai_response
from .settings import Settings
from .upstream import tolerant

__all__ = ["Settings", "openai_response", "parse_messages", "parse_parameters", "stoppable", "tolerant"]
