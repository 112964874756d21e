// node generate.mjs HOST:PORT "Once upon a time" [MAX_TOKENS]: streams a completion to the terminal.
import { WeftClient } from "./weft.mjs";

const [target = "127.0.0.1:50052", text = "Once upon a time", maxTokens = "60"] = process.argv.slice(2);
const client = new WeftClient(target, { apiKey: process.env.WEFT_API_KEY });
try {
  const request = { text, sampling: { max_tokens: Number(maxTokens), temperature: 0 } };
  for await (const delta of client.generate(request)) process.stdout.write(delta.text);
  process.stdout.write("\n");
} catch (error) {
  console.error(`${error.code}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
