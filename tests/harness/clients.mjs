// Asks a server through clients that others wrote, and prints as JSON what each of them made of the answer.
// Usage: node clients.mjs BASE_URL MODEL SCENARIO...; the question names client and scenario for the upstream.

import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { ChatOpenAI } from '@langchain/openai'
import { streamText } from 'ai'
import { EventSourcePlus } from 'event-source-plus'
import OpenAI from 'openai'

const [baseURL, model, ...scenarios] = process.argv.slice(2)
const request = (question) => ({ model, messages: [{ role: 'user', content: question }] })
const withUsage = { stream: true, stream_options: { include_usage: true } }
const clock = {
  type: 'function',
  function: { name: 'clock', parse: JSON.parse, function: () => '12:00', parameters: { type: 'object', properties: {} } },
}

function completionsOf(retries) {
  return new OpenAI({ baseURL, apiKey: 'unused', ...retries }).chat.completions
}

async function vercel(languageModel, question, retries) {
  let failure
  const onError = ({ error }) => (failure = error)
  const result = streamText({ model: languageModel, prompt: question, onError, ...retries })
  let text = ''
  for await (const part of result.textStream) text += part
  if (failure) throw failure
  return { text, finish: await result.finishReason, tokens: (await result.usage).totalTokens }
}

// Each takes the question, and how often to try again: `retries` is empty for as often as the client likes.
const clients = {
  async 'openai create'(question, retries) {
    let text = '', finish, usage
    for await (const chunk of await completionsOf(retries).create({ ...request(question), ...withUsage })) {
      text += chunk.choices[0]?.delta?.content ?? ''
      finish = chunk.choices[0]?.finish_reason ?? finish
      usage = chunk.usage ?? usage
    }
    return { text, finish, tokens: usage?.total_tokens }
  },
  async 'openai whole'(question, retries) {
    const { choices, usage } = await completionsOf(retries).create(request(question))
    return { text: choices[0].message.content, finish: choices[0].finish_reason, tokens: usage.total_tokens }
  },
  async 'openai stream'(question, retries) {
    const stream = completionsOf(retries).stream({ ...request(question), ...withUsage })
    const { choices, usage } = await stream.finalChatCompletion()
    return { text: choices[0].message.content, finish: choices[0].finish_reason, tokens: usage?.total_tokens }
  },
  async 'openai runTools'(question, retries) {
    const runner = completionsOf(retries).runTools({ ...request(question), ...withUsage, tools: [clock] })
    const { choices } = await runner.finalChatCompletion()
    const tokens = (await runner.totalUsage()).total_tokens
    return { text: await runner.finalContent(), finish: choices[0].finish_reason, tokens }
  },
  'ai-sdk openai': (question, retries) =>
    vercel(createOpenAI({ baseURL, apiKey: 'unused' }).chat(model), question, retries),
  'ai-sdk openai-compatible': (question, retries) =>
    vercel(createOpenAICompatible({ name: 'x', baseURL, includeUsage: true }).chatModel(model), question, retries),
  async langchain(question, retries) {
    const chat = new ChatOpenAI({ model, apiKey: 'unused', configuration: { baseURL }, ...retries })
    let whole
    for await (const chunk of await chat.stream(question)) whole = whole ? whole.concat(chunk) : chunk
    return {
      text: whole.content,
      finish: whole.response_metadata.finish_reason,
      tokens: whole.usage_metadata?.total_tokens,
    }
  },
  // It reconnects whenever a stream ends, so its users stop it at [DONE].
  'event-source-plus': (question) =>
    new Promise((resolve, reject) => {
      let text = '', finish, tokens, failure
      const source = new EventSourcePlus(`${baseURL}/chat/completions`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ ...request(question), ...withUsage }),
      })
      const controller = source.listen({
        onMessage({ data }) {
          if (data === '[DONE]') {
            controller.abort()
            return failure ? reject(new Error(failure)) : resolve({ text, finish, tokens })
          }
          const event = JSON.parse(data)
          failure = event.error?.message
          text += event.choices?.[0]?.delta?.content ?? ''
          finish = event.choices?.[0]?.finish_reason ?? finish
          tokens = event.usage?.total_tokens ?? tokens
        },
        onResponseError({ response }) {
          controller.abort()
          reject(new Error(`status ${response.status}`))
        },
      })
    }),
}

const made = {}
for (const [name, ask] of Object.entries(clients)) {
  for (const scenario of scenarios) {
    const question = `${name}: ${scenario}`
    const retries = scenario === 'refused' ? {} : { maxRetries: 0 }
    const patience = new Promise((_, reject) => setTimeout(reject, 20_000, new Error('it does not end')))
    const answer = Promise.race([ask(question, retries), patience])
    made[question] = await answer.catch((error) => ({ error: String(error.message ?? error) }))
  }
}
console.log(JSON.stringify(made))
process.exit()
