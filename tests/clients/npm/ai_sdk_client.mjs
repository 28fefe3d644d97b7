// What programs do with the AI SDK (`ai` with `@ai-sdk/openai`), against the server that OPENAI_BASE_URL names. The provider speaks
// the responses protocol unless its `chat` is asked for; each part runs through both.
//
// The model's words do not matter here: they may be those of random weights.

import assert from 'node:assert/strict'

import { createOpenAI } from '@ai-sdk/openai'
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from 'ai'
import { z } from 'zod'

// Warnings about options that a model of this name may not have.
globalThis.AI_SDK_LOG_WARNINGS = false

const base = process.env.OPENAI_BASE_URL
const headers = { authorization: `Bearer ${process.env.OPENAI_API_KEY}`, 'content-type': 'application/json' }
const name = (await (await fetch(`${base}/models`, { headers })).json()).data[0].id
const provider = createOpenAI()
const asked = { prompt: 'Hello', temperature: 0, maxRetries: 0 }

// What the server says without the package.
async function plain(messages, max_tokens) {
  const body = JSON.stringify({ model: name, messages, temperature: 0, max_tokens })
  const answer = await (await fetch(`${base}/chat/completions`, { method: 'POST', headers, body })).json()
  return answer.choices[0].message.content
}

async function generate(model) {
  const answer = await generateText({ ...asked, model, maxOutputTokens: 8 })
  assert.equal(answer.text, await plain([{ role: 'user', content: 'Hello' }], 8))
  assert.ok(answer.text.length > 0)
  assert.ok(['stop', 'length'].includes(answer.finishReason))
  assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens)
  const messages = [
    { role: 'system', content: 'Be brief.' },
    { role: 'user', content: 'Hello' },
    { role: 'assistant', content: answer.text },
    { role: 'user', content: 'And?' },
  ]
  const more = await generateText({ ...asked, model, prompt: undefined, messages, allowSystemInMessages: true, maxOutputTokens: 8 })
  assert.equal(more.text, await plain(messages, 8))
}

async function stream(model) {
  const answer = streamText({ ...asked, model, maxOutputTokens: 8 })
  let text = ''
  let pieces = 0
  for await (const piece of answer.textStream) {
    text += piece
    pieces += 1
  }
  assert.equal(text, await plain([{ role: 'user', content: 'Hello' }], 8))
  assert.ok(pieces > 1, 'the text comes in pieces')
  assert.ok(['stop', 'length'].includes(await answer.finishReason))
  assert.ok((await answer.usage).outputTokens > 0)
}

// One step that must call the tool, and one that answers with what it returned.
async function tools(model) {
  const ran = []
  const weather = tool({
    description: 'The weather of a city',
    inputSchema: z.object({ city: z.enum(['Paris', 'Rome']) }),
    execute: async ({ city }) => {
      ran.push(city)
      return `Sunny in ${city}`
    },
  })
  const steps = {
    ...asked,
    model,
    tools: { weather },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }),
    maxOutputTokens: 300,
    providerOptions: { openai: { parallelToolCalls: false } },
  }
  const answer = await generateText(steps)
  assert.equal(answer.steps.length, 2)
  assert.equal(answer.steps[0].finishReason, 'tool-calls')
  const [call] = answer.steps[0].toolCalls
  assert.equal(call.toolName, 'weather')
  assert.deepEqual(ran, [call.input.city])
  assert.equal(answer.steps[0].toolResults[0].output, `Sunny in ${call.input.city}`)
  assert.equal(answer.steps[1].toolCalls.length, 0)
  const streamed = streamText(steps)
  const calls = []
  for await (const part of streamed.fullStream) {
    assert.notEqual(part.type, 'error', String(part.error))
    if (part.type === 'tool-call') calls.push(part.input)
  }
  assert.deepEqual(calls, [call.input])
  assert.deepEqual(ran, [call.input.city, call.input.city])
}

const Box = z.object({ colour: z.enum(['red', 'blue']), holds: z.number().int().min(0).max(99) })

async function structured(model) {
  const boxed = { ...asked, model, maxOutputTokens: 200, output: Output.object({ schema: Box }) }
  const { output } = await generateText(boxed)
  assert.deepEqual(Box.parse(output), output)
  const streamed = streamText(boxed)
  let last
  for await (const partial of streamed.partialOutputStream) last = partial
  assert.deepEqual(last, output)
  assert.deepEqual(await streamed.output, output)
}

async function errors(model, wrong) {
  await assert.rejects(generateText({ ...asked, model: wrong }), (error) => APICallError.isInstance(error) && error.statusCode === 404)
  await assert.rejects(generateText({ ...asked, model, temperature: 3 }), (error) => {
    return APICallError.isInstance(error) && error.statusCode === 400 && error.message.includes('temperature')
  })
}

for (const part of [generate, stream, tools, structured, errors]) {
  await part(provider.responses(name), provider.responses('nobody'))
  await part(provider.chat(name), provider.chat('nobody'))
  console.log(`${part.name} ok`)
}
