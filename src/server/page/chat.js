// A chat over the server's own API: what is said is kept in this page alone, and gone when it is closed.
const find = (id) => document.getElementById(id);
const [chat, form, question, send, stop] = ["chat", "form", "question", "send", "stop"].map(find);
let messages = [];
let running = null;

const headers = () => {
  const key = find("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

// The message of an error that the API answers with, or what HTTP says.
async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function show(role, text) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.dataset.role = role;
  write(element, text);
  chat.append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

// Text, with fenced code in blocks of its own. Nothing of an answer is ever read as HTML.
function write(element, text) {
  element.replaceChildren(
    ...text.split(/^```.*\n?/m).map((part, at) => {
      if (at % 2 === 0) return document.createTextNode(part);
      const code = document.createElement("pre");
      code.textContent = part;
      return code;
    }),
  );
}

// The data of each server-sent event, as it comes.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

async function answer() {
  const system = find("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(find("temperature").value),
    max_tokens: Number(find("max_tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  const element = show("assistant", "");
  let text = "", tokens = 0, first = 0;
  running = new AbortController();
  const rate = (count) => {
    const seconds = (performance.now() - first) / 1000;
    find("speed").textContent = seconds > 0 && count > 1 ? `${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
  };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta?.content;
      if (piece) {
        if (first === 0) first = performance.now();
        text += piece;
        tokens += 1;
        write(element, text);
        element.scrollIntoView({ block: "end" });
        rate(tokens);
      }
      if (event.usage) {
        rate(event.usage.completion_tokens);
        find("speed").title = `${event.usage.prompt_tokens} prompt tokens, ${event.usage.completion_tokens} generated`;
      }
      if (event.choices[0]?.finish_reason === "length") show("note", "The answer reached its limit of tokens.");
    }
  } catch (error) {
    if (error.name === "AbortError") show("note", "Stopped.");
    else show("error", error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message);
  }
  running = null;
  if (text) messages.push({ role: "assistant", content: text });
  else {
    // A question without an answer can be asked again.
    element.remove();
    messages.pop();
  }
  document.body.dataset.state = "idle";
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  question.value = "";
  document.body.dataset.state = "answering";
  send.hidden = true;
  stop.hidden = false;
  await answer();
  send.hidden = false;
  stop.hidden = true;
  question.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (text && !running) ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
find("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  chat.replaceChildren();
  find("speed").textContent = "";
  question.focus();
});

// The model's name; while it is being loaded the page asks again.
async function name() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.ok) {
      const model = (await response.json()).data[0].id;
      find("model").textContent = document.title = model;
      return;
    }
    find("speed").textContent = response.status === 503 ? "loading the model" : await refusal(response);
    if (response.status === 503) setTimeout(name, 1000);
    else find("settings").open = true;
  } catch {
    find("speed").textContent = "no answer from the server";
  }
}
find("key").addEventListener("change", name);
document.body.dataset.state = "idle";
await name();
// `?ask=TEXT` asks at once: a link to a question.
const asked = new URLSearchParams(location.search).get("ask");
if (asked) await ask(asked);
