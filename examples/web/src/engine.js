// transformers.js and onnxruntime-web behind three verbs: load, chat, check.

import { AutoModelForCausalLM, AutoTokenizer, DynamicCache, Tensor, env } from "@huggingface/transformers";
import plainFactory from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import plainBinary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import gpuFactory from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuBinary from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";

import { Problem } from "./messages.js";
import { Scores, spread } from "./metrics.js";
import { CACHE } from "./package.js";
import { parseReference, windowOf } from "./reference.js";

const BURST = 8; // tokens per generate(): between bursts the worker hears a "stop"
const LOGITS = 64e6; // bytes of logits per forward pass of the check
const breathe = () => new Promise((resolve) => setTimeout(resolve));

export class Engine {
  /** base: the package's absolute URL with a slash at the end. */
  static async load({ base, device, dtype, threads }, progress) {
    const { protocol, host, pathname } = new URL(base);
    env.allowLocalModels = false; // its "remote" road asks for sizes without fetching whole files
    env.remoteHost = `${protocol}//${host}/`;
    env.remotePathTemplate = pathname.slice(1) || ".";
    env.cacheKey = CACHE;
    env.fetch = (url, init) => fetch(url, { ...init, cache: "no-store" }); // or the browser keeps a second copy
    env.useWasmCache = false; // the service worker keeps the runtime
    const { wasm } = env.backends.onnx;
    wasm.numThreads = threads;
    // The build with WebGPU is twice the size of the one without.
    const [mjs, binary] = device === "webgpu" ? [gpuFactory, gpuBinary] : [plainFactory, plainBinary];
    wasm.wasmPaths = { mjs: new URL(mjs, location.href).href, wasm: new URL(binary, location.href).href };
    const tokenizer = await AutoTokenizer.from_pretrained("package");
    const template = tokenizer.chat_template ? null : await readTemplate(base);
    const model = await AutoModelForCausalLM.from_pretrained("package", {
      device, dtype,
      progress_callback: ({ status, file, loaded }) => {
        if (status === "progress") progress({ file, loaded });
      },
    });
    return new Engine(tokenizer, template, model);
  }

  constructor(tokenizer, template, model) {
    Object.assign(this, { tokenizer, template, model });
    this.kept = { ids: [], cache: null }; // what the last answer left in the key-value cache
    const ends = model.generation_config?.eos_token_id ?? model.config.eos_token_id ?? [];
    this.ends = new Set([ends].flat());
  }

  facts() {
    return { chat: Boolean(this.template ?? this.tokenizer.chat_template), vocab: this.model.config.vocab_size };
  }

  /** Answer `messages`; without a chat template the last message is continued. Greedy unless `sample`. */
  async chat({ messages, maxNewTokens, sample }, stopped, emit) {
    const limit = this.model.config.max_position_embeddings ?? Infinity;
    let prompt = this.encode(messages);
    while (prompt.length + maxNewTokens > limit && messages.length > 2) {
      messages = messages.slice(2); // forget the oldest question and answer
      prompt = this.encode(messages);
    }
    const room = Math.min(maxNewTokens, limit - prompt.length);
    if (room < 1) throw new Problem("The message is longer than this model can read.");
    let { ids, cache } = await this.resume(prompt);
    const started = performance.now();
    let first = 0;
    let last = started;
    let prompts = true;
    const reply = [];
    const streamer = {
      put: ([tokens]) => {
        if (prompts) {
          prompts = false; // each generate() begins with what it was given
          return;
        }
        last = performance.now();
        first ||= last;
        reply.push(...tokens.map(Number));
        emit({ text: this.text(reply), rate: rate(reply.length, first, last) });
      },
      end: () => { prompts = true; },
    };
    while (reply.length < room && !stopped() && !this.ends.has(reply.at(-1))) {
      const { past_key_values, sequences } = await this.model.generate({
        input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)), past_key_values: cache, streamer,
        max_new_tokens: Math.min(BURST, room - reply.length), do_sample: sample, return_dict_in_generate: true,
      });
      cache = past_key_values;
      ids = Array.from(sequences.data, Number);
      this.kept = { ids: ids.slice(0, -1), cache };
      await breathe();
    }
    return { text: this.text(reply), ids: reply, prompt: prompt.length, prefill: (first - started) / 1000,
             rate: rate(reply.length, first, last) };
  }

  encode(messages) {
    if (!this.template && !this.tokenizer.chat_template) return this.tokenizer.encode(messages.at(-1).content);
    return Array.from(this.tokenizer.apply_chat_template(messages, {
      chat_template: this.template, add_generation_prompt: true, return_tensor: false, return_dict: false,
    }), Number);
  }

  text(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true }).replace(/\uFFFD+$/, "");
  }

  /** The cache of the last answer if it begins this prompt, else an empty one. */
  async resume(prompt) {
    const { ids, cache } = this.kept;
    this.kept = { ids: [], cache: null };
    if (cache && ids.length < prompt.length && ids.every((id, i) => id === prompt[i])) return { ids: prompt, cache };
    await cache?.dispose();
    return { ids: prompt, cache: null };
  }

  /** Score the package on `count` windows of a reference file; returns the numbers and the seconds taken. */
  async check({ bytes, count }, stopped, emit) {
    const reference = await parseReference(bytes);
    if (reference.vocabSize !== this.model.config.vocab_size) {
      throw new Problem(`The reference file has ${reference.vocabSize} tokens, this package `
                        + `${this.model.config.vocab_size}: it belongs to another model.`);
    }
    if (reference.probe && !this.splitsLike(reference.probe)) {
      throw new Problem("The package's tokenizer splits text otherwise than the reference's: they do not belong together.");
    }
    const scores = new Scores();
    const picks = spread(reference.windows, count);
    const started = performance.now();
    for (const [done, index] of picks.entries()) {
      if (stopped()) return null;
      emit({ done, total: picks.length });
      await this.score(windowOf(reference, index), scores);
      await breathe();
    }
    return { ...scores.summary(), windows: picks.length, reference: reference.model,
             seconds: (performance.now() - started) / 1000 };
  }

  /**
   * Whether this tokenizer gives the reference's ids, which hold no BOS. A reference reads "<|" marks as plain
   * text, which transformers.js cannot be told to do: the comparison ends before the first of them.
   */
  splitsLike({ text, ids }) {
    const end = text.search(/\s*<\|/);
    const own = this.tokenizer.encode(end < 0 ? text : text.slice(0, end), { add_special_tokens: false });
    const same = own.length - (end < 0 ? 0 : 1); // the last may be another where the text goes on
    return (end >= 0 || own.length === ids.length) && own.slice(0, same).every((id, i) => id === ids[i]);
  }

  async score(window, scores) {
    const ids = Array.from(window.tokens);
    const step = Math.max(16, Math.floor(LOGITS / (4 * this.model.config.vocab_size)));
    let cache = null;
    for (let start = 0; start < ids.length - 1; start += step) {
      const part = ids.slice(start, start + step);
      const output = await this.model({
        input_ids: int64(part), attention_mask: int64(ids.slice(0, start + part.length).map(() => 1)),
        past_key_values: cache,
      });
      const logits = output.logits.to("float32");
      scores.add(window, start, logits.data, logits.dims.at(-1));
      const present = Object.entries(output).filter(([name]) => name.startsWith("present"));
      const entries = Object.fromEntries(present.map(([name, x]) => [name.replace("present", "past_key_values"), x]));
      if (cache) cache.update(entries);
      else cache = new DynamicCache(entries);
    }
    await cache?.dispose();
  }
}

/** Tokens per second after the first; null for fewer than two. */
function rate(count, first, last) {
  return count > 1 && last > first ? ((count - 1) * 1000) / (last - first) : null;
}

function int64(values) {
  return new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

/** chat_template.jinja, which transformers.js 4.3 does not read for text models. */
async function readTemplate(base) {
  const url = `${base}chat_template.jinja`;
  const cache = "caches" in globalThis ? await caches.open(CACHE) : null;
  const stored = await cache?.match(url);
  if (stored) return stored.text();
  const answer = await fetch(url).catch(() => null);
  if (!answer?.ok || (answer.headers.get("content-type") ?? "").startsWith("text/html")) return null;
  await cache?.put(url, answer.clone());
  return answer.text();
}
