// Run GGUF files in llama.cpp. Arguments: a JSON file of jobs, and the JSON file of their results.
// A job: {path, rows: token IDs to predict after, texts: to tokenize, sentences: to embed, precise: keys and values in
// float32, and no flash attention}.
import fs from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.cwd()}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [jobsPath, resultsPath] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const results = [];
const float32 = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
for (const {path, rows = [], texts = [], sentences = [], precise = false} of JSON.parse(fs.readFileSync(jobsPath))) {
  const model = await llama.loadModel({modelPath: path});
  const tokens = texts.map((text) => model.tokenize(text));
  const probabilities = [], vectors = [];
  if (rows.length) {
    const context = await model.createContext({contextSize: 64, batchSize: 64, threads: 1, ...(precise ? float32 : {})});
    const generateNext = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};
    const sequence = context.getSequence();
    for (const row of rows) {
      const outputs = await sequence.controlledEvaluate(row.map((token) => [token, {generateNext}]));
      probabilities.push(outputs.map((output) => [...output.next.probabilities]));
      await sequence.clearHistory();
    }
    await context.dispose();
  }
  if (sentences.length) {
    const context = await model.createEmbeddingContext({contextSize: 64, threads: 1});
    for (const sentence of sentences) vectors.push([...(await context.getEmbeddingFor(sentence)).vector]);
    await context.dispose();
  }
  await model.dispose();
  results.push({tokens, probabilities, vectors});
}
fs.writeFileSync(resultsPath, JSON.stringify(results));
process.exit(0);
