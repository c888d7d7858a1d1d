// Next-token losses of GGUF files in llama.cpp. Arguments: a JSON file of jobs, and the JSON file of their results.
// A job: {path, rows: token IDs}. A result: the mean negative log-probability of the tokens after the first.
import fs from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.cwd()}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [jobsPath, resultsPath] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const losses = [];
for (const {path, rows} of JSON.parse(fs.readFileSync(jobsPath))) {
  const model = await llama.loadModel({modelPath: path});
  const context = await model.createContext({contextSize: 256, batchSize: 256, threads: 1});
  const sequence = context.getSequence();
  const generateNext = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};
  let sum = 0, count = 0;
  for (const row of rows) {
    const outputs = await sequence.controlledEvaluate(row.slice(0, -1).map((token) => [token, {generateNext}]));
    outputs.forEach((output, at) => {
      sum -= Math.log(Math.max(output.next.probabilities.get(row[at + 1]) ?? 0, 1e-30));
      count += 1;
    });
    await sequence.clearHistory();
  }
  await context.dispose();
  await model.dispose();
  losses.push(sum / count);
}
fs.writeFileSync(resultsPath, JSON.stringify(losses));
process.exit(0);
