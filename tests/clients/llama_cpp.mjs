// llama.cpp opens what `quantize` writes, and continues prompts with the same tokens: `node llama_cpp.mjs PROGRAM FOLDER`.
//
// The demo model in every preset. PROGRAM is `kimi-linear`; files are written into FOLDER. llama.cpp is the one in `node-llama-cpp`, which
// is imported from the working folder. Both compute on the CPU, greedily; their sums have other orders, so a preset passes if a token
// differs only where the two likeliest are that close: at most one of a preset's answers may differ from some token on.

import {execFileSync} from "node:child_process";
import {mkdirSync, rmSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import {fileURLToPath, pathToFileURL} from "node:url";

const [program, folder] = process.argv.slice(2);
const demo = fileURLToPath(new URL("../../assets/demo", import.meta.url));
const presets = ["q8", "q5", "q4", "q4-fast", "q4-small"];
const chats = [
  "The red box holds 7. Now the red box holds 3. What does the red box hold?",
  "The key is in the garden. The ball is in the kitchen. Where is the key?",
  "Copy: a b c d e",
  "Reverse: a b c d",
  "Hello!",
  "The blue box holds 5. The green box holds 9. Which box holds 9?",
];

const run = (...args) => execFileSync(program, args, {encoding: "utf8", stdio: ["ignore", "pipe", "ignore"]});

const prompt = text => {
  const messages = path.join(folder, "messages.json");
  writeFileSync(messages, JSON.stringify([{role: "user", content: text}]));
  const printed = run("tokenize", "--messages", messages);
  return [...printed.matchAll(/^ *(\d+) /gm)].map(match => Number(match[1]));
};

mkdirSync(folder, {recursive: true});
const found = createRequire(path.join(process.cwd(), "package.json")).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const prompts = chats.map(prompt);
let failed = 0;
for (const preset of presets) {
  const file = path.join(folder, `demo-${preset}.gguf`);
  rmSync(file, {force: true});
  run("quantize", "--preset", preset, demo, file);
  const model = await llama.loadModel({modelPath: file});
  const context = await model.createContext({contextSize: 512, threads: 2});
  const sequence = context.getSequence();
  let same = 0, tokens = 0;
  for (const ids of prompts) {
    await sequence.clearHistory();
    const theirs = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0})) {
      theirs.push(token);
      if (theirs.length === 24) break;
    }
    const args = ["generate", "--backend", "cpu", "-m", file, "--prompt-tokens", ids.join(","), "-n", "24", "--temperature", "0", "--json"];
    const ours = JSON.parse(run(...args)).tokens.filter(id => !model.isEogToken(id));
    tokens += ours.length;
    same += JSON.stringify(ours) === JSON.stringify(theirs);
    if (JSON.stringify(ours) !== JSON.stringify(theirs)) console.log(`${preset}: ${ours} here, ${theirs} there`);
  }
  await context.dispose();
  await model.dispose();
  const passed = same >= prompts.length - 1 && tokens > 20;
  failed += !passed;
  console.log(`${preset}: ${passed ? "passed" : "FAILED"}, ${same} of ${prompts.length} answers equal (${tokens} tokens)`);
}
process.exit(failed > 0 ? 1 : 0);
