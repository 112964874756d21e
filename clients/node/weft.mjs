// Weft from Node: one file to copy, with the .proto files beside it.
//
//   import { WeftClient } from "./weft.mjs";
//   const client = new WeftClient("127.0.0.1:50052");
//   for await (const delta of client.generate({ text: "Once upon a time", sampling: { max_tokens: 60 } })) {
//     process.stdout.write(delta.text);
//   }
//
// A stream that ends early with a resume token is taken up again by itself; so is one whose connection is lost when
// the request says `resumable: true` and has a request_id. What was given out is not given out again.

import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const RETRIED = new Set([grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED]);

function load(protos) {
  const definition = protoLoader.loadSync("weft/v1/gateway_service.proto", {
    includeDirs: [protos],
    keepCase: true,
    longs: String, // 64-bit numbers do not fit into a Number
    enums: String,
    defaults: true,
    oneofs: true,
  });
  return grpc.loadPackageDefinition(definition).weft.v1;
}

export class WeftClient {
  // target is HOST:PORT. options: apiKey, credentials (TLS), protos (where the .proto files are), maxAttempts.
  constructor(target, { apiKey, credentials, protos = PROTOS, maxAttempts = 5 } = {}) {
    const { GatewayService } = load(protos);
    this.stub = new GatewayService(target, credentials ?? grpc.credentials.createInsecure(), {
      "grpc.keepalive_time_ms": 60_000,
      "grpc.keepalive_timeout_ms": 10_000,
      "grpc.enable_retries": 0, // the one layer of retries is below: it knows what was delivered
      "grpc.max_reconnect_backoff_ms": 2_000,
    });
    this.maxAttempts = maxAttempts;
    this.apiKey = apiKey;
  }

  // Streams the deltas of a GenerateRequest: {text, token_ids, sample_index, next_offset, ...}. Leaving the loop
  // cancels the request. `onEvent` sees every event, `started` and `finish` too. Throws what the call ended with:
  // an Error with `code`, `details` and, when there is one, `resumeToken`.
  async *generate(request, { timeoutMs, onEvent = () => {} } = {}) {
    const deadline = timeoutMs === undefined ? undefined : Date.now() + timeoutMs;
    const samples = Array.from({ length: request.sampling?.n || 1 }, () => new Sample());
    if (request.resumable && !request.request_id) request = { ...request, request_id: randomUUID() };
    let hasOutput = false;
    let token = "";
    for (let failures = 0; ; ) {
      for (const sample of samples) sample.begin(token);
      const call = this.stub.Generate(withResume(request, token, samples), this.#metadata(), { deadline });
      try {
        for await (const event of call) {
          onEvent(event);
          if (!event.delta) continue;
          failures = 0;
          const delta = samples[event.delta.sample_index].take(event.delta);
          if (!delta) continue;
          hasOutput = true;
          token = ""; // it leads to a place that lies behind this
          yield delta;
        }
        return;
      } catch (error) {
        error.resumeToken = String(error.metadata?.get("x-resume-token")[0] ?? "");
        failures += 1;
        const isRetried = RETRIED.has(error.code);
        const goesOn = error.resumeToken
          ? isRetried || error.code === grpc.status.ABORTED
          : isRetried && (request.resumable || !hasOutput);
        const waitMs = pushbackMs(error) ?? Math.min(5_000, 100 * 2 ** (failures - 1)) * (0.5 + Math.random() / 2);
        const isLate = deadline !== undefined && Date.now() + waitMs >= deadline;
        if (!goesOn || isLate || failures >= this.maxAttempts) throw error;
        token = error.resumeToken || token;
        await new Promise((resolve) => setTimeout(resolve, waitMs));
      } finally {
        call.on("error", () => {}); // of the cancel below
        call.cancel();
      }
    }
  }

  // Any other method: await client.call("ListModels", {}).
  call(method, request, { timeoutMs = 30_000 } = {}) {
    return new Promise((resolve, reject) => {
      this.stub[method](request, this.#metadata(), { deadline: Date.now() + timeoutMs }, (error, response) =>
        error ? reject(error) : resolve(response),
      );
    });
  }

  close() {
    this.stub.close();
  }

  #metadata() {
    const metadata = new grpc.Metadata();
    if (this.apiKey) metadata.set("authorization", `Bearer ${this.apiKey}`);
    return metadata;
  }
}

// What of one sample was given out. A resume by offset brings those tokens again that had no text after them.
class Sample {
  offset = 0;
  #tokens = 0;
  #tokensAtOffset = 0;
  #doubles = 0;

  begin(token) {
    this.#doubles = token ? 0 : this.#tokens - this.#tokensAtOffset;
  }

  // The delta without what was given out before; undefined when nothing is left of it.
  take(delta) {
    const known = Math.min(this.#doubles, delta.token_ids.length);
    this.#doubles -= known;
    const token_ids = delta.token_ids.slice(known);
    if (!token_ids.length && !delta.text) return undefined;
    this.#tokens += token_ids.length;
    if (Number(delta.next_offset) > this.offset) {
      this.offset = Number(delta.next_offset);
      this.#tokensAtOffset = this.#tokens;
    }
    return known ? { ...delta, token_ids, logprobs: delta.logprobs.slice(known) } : delta;
  }
}

function withResume(request, token, samples) {
  const offsets = samples.map((sample) => sample.offset);
  if (token) {
    const { request_id, resumable, ...rest } = request; // the token stands for them
    return { ...rest, resume_token: token };
  }
  if (!offsets.some(Boolean)) return request;
  return offsets.length === 1
    ? { ...request, resume_offset: offsets[0] }
    : { ...request, resume_offsets: offsets };
}

// When the server says to come back, in milliseconds.
function pushbackMs(error) {
  const [value] = error.metadata?.get("grpc-retry-pushback-ms") ?? [];
  const milliseconds = Number(value);
  return value === undefined || Number.isNaN(milliseconds) || milliseconds < 0 ? undefined : milliseconds;
}
