// What programs do with the npm package `openai`, against the server that OPENAI_BASE_URL names.
//
// The model's words do not matter here: they may be those of random weights.

import assert from 'node:assert/strict'

import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'

const client = new OpenAI({ maxRetries: 0 })
const model = (await client.models.list()).data[0].id
const HELLO = [{ role: 'user', content: 'Hello' }]
const asked = { model, messages: HELLO, temperature: 0 }
const ENDS = ['stop', 'length']

async function chat() {
  const answer = await client.chat.completions.create({ ...asked, max_tokens: 8, n: 2 })
  const [first, second] = answer.choices
  assert.equal(first.message.role, 'assistant')
  assert.ok(first.message.content.length > 0)
  assert.equal(first.message.content, second.message.content)
  assert.ok(ENDS.includes(first.finish_reason))
  const { prompt_tokens, completion_tokens, total_tokens } = answer.usage
  assert.equal(total_tokens, prompt_tokens + completion_tokens)
  assert.ok(answer._request_id)
  const more = await client.chat.completions.create({
    ...asked,
    messages: [...HELLO, first.message, { role: 'user', content: 'And?' }],
    max_tokens: 2,
  })
  assert.ok(more.usage.prompt_tokens > prompt_tokens)
}

async function stream() {
  const whole = (await client.chat.completions.create({ ...asked, max_tokens: 8 })).choices[0]
  const chunks = await client.chat.completions.create({
    ...asked,
    max_completion_tokens: 8,
    stream: true,
    stream_options: { include_usage: true },
  })
  let text = ''
  let reason = null
  let usage = null
  for await (const chunk of chunks) {
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? ''
      reason = choice.finish_reason ?? reason
    }
    usage = chunk.usage ?? usage
  }
  assert.equal(text, whole.message.content)
  assert.equal(reason, whole.finish_reason)
  assert.ok(usage.completion_tokens > 0 && usage.completion_tokens <= 8)
  // The helper puts the pieces together itself.
  const final = await client.chat.completions.stream({ ...asked, max_tokens: 8 }).finalContent()
  assert.equal(final, text)
  // One that is left after its first piece.
  const left = await client.chat.completions.create({ ...asked, max_tokens: 500, stream: true })
  for await (const chunk of left) {
    assert.equal(chunk.object, 'chat.completion.chunk')
    break
  }
}

const CITY = {
  type: 'object',
  properties: { city: { type: 'string', enum: ['Paris', 'Rome'] } },
  required: ['city'],
  additionalProperties: false,
}
const WEATHER = { name: 'get_weather', description: 'The weather of a city', parameters: CITY }
const FORCED = { tool_choice: 'required', parallel_tool_calls: false }

async function tools() {
  const tools = [{ type: 'function', function: WEATHER }]
  const call = { ...asked, ...FORCED, tools, max_tokens: 300 }
  const { message, finish_reason } = (await client.chat.completions.create(call)).choices[0]
  assert.equal(finish_reason, 'tool_calls')
  assert.equal(message.tool_calls.length, 1)
  const [{ id, function: called }] = message.tool_calls
  assert.equal(called.name, 'get_weather')
  assert.ok(['Paris', 'Rome'].includes(JSON.parse(called.arguments).city))
  const streamed = await client.chat.completions.stream(call).finalMessage()
  assert.deepEqual(streamed.tool_calls[0].function.arguments, called.arguments)
  assert.equal(streamed.tool_calls[0].id, id)
  const answered = await client.chat.completions.create({
    ...asked,
    messages: [...HELLO, message, { role: 'tool', tool_call_id: id, content: 'Sunny' }],
    tools,
    tool_choice: 'none',
    max_tokens: 8,
  })
  assert.equal(answered.choices[0].message.tool_calls, undefined)
}

// The helper calls the function, and sends what it returned.
async function runner() {
  const ran = []
  const weather = {
    ...WEATHER,
    parse: JSON.parse,
    function: ({ city }) => {
      ran.push(city)
      return `Sunny in ${city}`
    },
  }
  const run = client.chat.completions.runTools({
    ...asked,
    tools: [{ type: 'function', function: weather }],
    tool_choice: { type: 'function', function: { name: 'get_weather' } },
    parallel_tool_calls: false,
    max_tokens: 300,
  })
  await run.done()
  assert.equal(ran.length, 1)
  const result = run.messages.find((message) => message.role === 'tool')
  assert.equal(result.content, `Sunny in ${ran[0]}`)
}

const Box = z.object({ colour: z.enum(['red', 'blue']), holds: z.number().int().min(0).max(99) })

async function schema() {
  const answer = await client.chat.completions.parse({
    ...asked,
    max_tokens: 200,
    response_format: zodResponseFormat(Box, 'box'),
  })
  const { parsed, content } = answer.choices[0].message
  assert.deepEqual(Box.parse(JSON.parse(content)), parsed)
}

async function responses() {
  const asked = { model, input: 'Hello', temperature: 0, max_output_tokens: 8 }
  const first = await client.responses.create(asked)
  assert.ok(['completed', 'incomplete'].includes(first.status))
  assert.ok(first.output_text.length > 0)
  const streamed = client.responses.stream(asked)
  let text = ''
  streamed.on('response.output_text.delta', ({ delta }) => (text += delta))
  assert.equal((await streamed.finalResponse()).output_text, first.output_text)
  assert.equal(text, first.output_text)
  const next = { model, temperature: 0, max_output_tokens: 2 }
  const second = await client.responses.create({ ...next, previous_response_id: first.id, input: 'And?' })
  const stateless = await client.responses.create({
    ...next,
    input: [...HELLO, ...first.output, { role: 'user', content: 'And?' }],
    store: false,
  })
  assert.equal(second.usage.input_tokens, stateless.usage.input_tokens)
  assert.equal(second.output_text, stateless.output_text)
  assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text)
  await client.responses.delete(first.id)
  const box = await client.responses.parse({ ...asked, max_output_tokens: 200, text: { format: zodTextFormat(Box, 'box') } })
  assert.deepEqual(Box.parse(JSON.parse(box.output_text)), box.output_parsed)
}

async function functions() {
  const tools = [{ type: 'function', strict: true, ...WEATHER }]
  const asked = { model, input: 'Hello', temperature: 0, max_output_tokens: 300, tools, ...FORCED }
  const answer = await client.responses.create(asked)
  assert.equal(answer.output.length, 1)
  const [call] = answer.output
  assert.equal(call.type, 'function_call')
  assert.ok(['Paris', 'Rome'].includes(JSON.parse(call.arguments).city))
  const streamed = await client.responses.stream(asked).finalResponse()
  assert.equal(streamed.output[0].arguments, call.arguments)
  const answered = await client.responses.create({
    model,
    previous_response_id: answer.id,
    input: [{ type: 'function_call_output', call_id: call.call_id, output: 'Sunny' }],
    tools,
    tool_choice: 'none',
    max_output_tokens: 8,
  })
  assert.ok(answered.output.every((item) => item.type === 'message'))
}

async function errors() {
  const other = new OpenAI({ apiKey: 'wrong', maxRetries: 0 })
  for (const [wrong, kind] of [
    [() => client.embeddings.create({ model, input: 'text' }), OpenAI.BadRequestError],
    [() => client.chat.completions.create({ ...asked, model: 'nobody' }), OpenAI.NotFoundError],
    [() => client.chat.completions.create({ ...asked, temperature: 3 }), OpenAI.BadRequestError],
    [() => client.responses.retrieve('resp_0'), OpenAI.NotFoundError],
    [() => other.models.list(), OpenAI.AuthenticationError],
  ]) {
    await assert.rejects(wrong(), (error) => error instanceof kind && error.error.message.length > 0)
  }
}

for (const part of [chat, stream, tools, runner, schema, responses, functions, errors]) {
  await part()
  console.log(`${part.name} ok`)
}
