"""What a chat needs in production, whatever its pipeline. Copy this folder beside your wrapper; do not edit it.

    openai_response   decorates a `run_chat_completion_async` that returns `async_streaming_generator(...)`
    parse_messages    returns `.prompt`, all turns of the conversation without the system prompt; `.question`, the
                      user's last text; and `.system_prompt`, which can be None
    parse_parameters  returns a dict of the temperature and the like, by OpenAI's names; rename them for a component
                      that calls them differently
    stoppable         takes any component whose `run` has a `streaming_callback`, as in `stoppable(MyGenerator())`
    tolerant          lets an OpenAIGenerator handle what upstreams refuse and send; other components do not need it
    Settings          reads the environment variables of an OpenAIGenerator; other pipelines do not need it

So the inputs of a pipeline with a retriever and a default system prompt can be

    conversation = parse_messages(messages)
    {
        "retriever": {"query": conversation.question},
        "prompt": {"conversation": conversation.prompt},
        "llm": {"system_prompt": conversation.system_prompt or "Be brief."},
    }

If your component has no `system_prompt`, put the system prompt into the prompt. A chat generator takes real turns as
"messages": [ChatMessage.from_openai_dict_format(message) for message in messages], after `parse_messages(messages)` has
refused what cannot be answered.

Each wrapper passes `streaming_components` and `allow_sync_streaming_callbacks` itself. A component's `run` is called in
many threads at once. If it holds a lock while it streams, others wait for its client. To update, replace this folder,
and run `./tests/run check` on your wrapper.

The modules, each of which imports only from those after it:

    response          `openai_response`, the entry point
    openai_format     from chunks to events, or to one completion
    failure           from an SDK's exception to a status and a sentence for the client
    upstream          `tolerant`; the only one that imports `openai`
    component         `stoppable`
    lockstep          keeps the components of an answer in step with its client
    growing_chunk     joins text while the client is behind
    streams           closes what a component was reading when its client left
    request           `parse_messages` and `parse_parameters`
    text              reads text from contents
    settings          environment variables

They rely on how Hayhooks, Haystack and the SDKs work inside. The tests check that with old and new releases.
"""

from .component import stoppable
from .request import parse_messages, parse_parameters
from .response import openai_response
from .settings import Settings
from .upstream import tolerant

__version__ = "5.0"
__all__ = ["Settings", "openai_response", "parse_messages", "parse_parameters", "stoppable", "tolerant"]
