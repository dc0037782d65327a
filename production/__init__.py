"""What a chat needs in production, whatever its pipeline. Copy this package, and import from it; do not edit it.

    openai_response   decorates a `run_chat_completion_async` that returns `async_streaming_generator(...)`
    parse_messages    returns `.prompt`, all turns of the conversation without the system prompt; `.question`, the
                      user's last text; and `.system_prompt`, which can be None
    parse_parameters  returns the temperature and the like, by OpenAI's names
    stoppable         takes any component whose `run` has a `streaming_callback`, as in `stoppable(MyGenerator())`
    Settings          reads the environment variables of an OpenAIGenerator; other pipelines do not need it
    tolerant          lets an OpenAIGenerator handle what upstreams refuse and send; other components do not need it

So the inputs of a pipeline with a retriever and a default system prompt can be

    conversation = parse_messages(messages)
    {
        "retriever": {"query": conversation.question},
        "prompt": {"conversation": conversation.prompt},
        "llm": {"system_prompt": conversation.system_prompt or "Be brief."},
    }

If your component has no `system_prompt`, put it into the prompt. A chat generator takes it as "messages":
[ChatMessage.from_system(...), ChatMessage.from_user(conversation.prompt)].

The modules, each of which imports only from those before it:

    settings          environment variables
    request           from a request to a prompt and parameters
    streams           closes what a component was reading when its client left
    lockstep          keeps the components of an answer in step with its client
    component         `stoppable`
    upstream          `tolerant`; the only one that imports `openai`
    failure           from an SDK's exception to a status and a sentence for the client
    openai_format     from chunks to events, or to one completion
    response          `openai_response`, the entry point

They rely on how Hayhooks, Haystack and the SDKs work inside. The tests check that with old and new releases.
"""

from .component import stoppable
from .request import parse_messages, parse_parameters
from .response import openai_response
from .settings import Settings
from .upstream import tolerant

__all__ = ["Settings", "openai_response", "parse_messages", "parse_parameters", "stoppable", "tolerant"]
