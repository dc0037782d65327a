"""What a text chat needs in production. Copy this folder beside your wrapper; do not edit it.

    openai_response   decorates a `run_chat_completion_async` that returns `async_streaming_generator(...)`
    parse_messages    returns `.prompt`, all turns of the conversation without the system prompt; `.question`, the
                      user's last text; `.system_prompt`, which can be None; and `.turns`, for chat generators
    parse_parameters  returns a dict of `temperature` and other parameters, by OpenAI's names; rename them for a
                      component that calls them differently, or leave them out
    stoppable         wraps each component that streams: any whose `run` has a parameter `streaming_callback`, which it
                      calls with each StreamingChunk
    tolerant          lets an OpenAIGenerator, and no other component, work with upstreams that refuse some parameters
    Settings          reads the environment variables of an OpenAI generator

So a pipeline of your own, with a retriever and a default system prompt, can have

    pipeline.add_component("llm", stoppable(MyGenerator()))
    conversation = parse_messages(messages)
    pipeline_run_args = {
        "retriever": {"query": conversation.question},
        "prompt": {"conversation": conversation.prompt},
        "llm": {
            "system_prompt": conversation.system_prompt or "Be brief.",
            "generation_kwargs": parse_parameters(body),
        },
    }

If your component has no `system_prompt`, put the system prompt into the prompt. A chat generator takes
"messages": [ChatMessage.from_openai_dict_format(turn) for turn in conversation.turns], after the system prompt's.

Each wrapper passes `streaming_components` and `allow_sync_streaming_callbacks` itself. MAX_CONCURRENT_STREAMS (500)
limits the clients of each pipeline in each worker. Many threads call a component's `run` at once: if it holds a lock
while it streams, all other answers wait for one client. To update, replace this folder, and run `./tests/run check`
from a checkout of the example on your wrapper. README.md is the manual.

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

They rely on how Hayhooks, Haystack and the SDKs work inside, so the tests run with old and new releases of each.
"""

from .component import stoppable
from .request import parse_messages, parse_parameters
from .response import openai_response
from .settings import Settings
from .upstream import tolerant

__version__ = "5.0"
__all__ = ["Settings", "openai_response", "parse_messages", "parse_parameters", "stoppable", "tolerant"]
