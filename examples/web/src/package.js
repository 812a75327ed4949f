// Looks at a package folder before anything large is fetched: its format, its files, their sizes.
// Layout: config.json, tokenizer.json, tokenizer_config.json, onnx/model_q4.onnx, onnx/model_q4.onnx_data, ...

import { Problem } from "./messages.js";

export const CACHE = "transformers-cache"; // where transformers.js keeps what it has fetched
const SUFFIX = { q4f16: "_q4f16", q4: "_q4", q8: "_quantized", fp16: "_fp16", fp32: "" };
const SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json"];
const OPTIONAL = ["generation_config.json", "chat_template.jinja"];

/** Which weight files to look for, best first. Half-precision activations only where the GPU has them. */
export function dtypeOrder(device, hasF16) {
  if (device === "webgpu") return hasF16 ? ["q4f16", "q4", "q8", "fp16", "fp32"] : ["q4", "q8", "fp32"];
  return ["q4", "q8", "q4f16", "fp32"];
}

/** Number of external data files of `name`, by transformers.js_config.use_external_data_format. */
export function dataFiles(config, name) {
  const setting = config["transformers.js_config"]?.use_external_data_format ?? 0;
  const count = typeof setting === "object" ? (setting[name] ?? setting.model ?? 0) : setting;
  return Array.from({ length: Number(count) }, (_, i) => `${name}_data${i ? `_${i}` : ""}`);
}

/** Refuse, with the reason, a folder that is no ONNX package of a causal language model. */
export function checkConfig(config, base) {
  if (config === null || typeof config !== "object" || typeof config.model_type !== "string") {
    throw new Problem(`${base}config.json is no model's configuration.`);
  }
  const mlx = config.quantization && typeof config.quantization === "object" && "group_size" in config.quantization;
  if (mlx && !config["transformers.js_config"]) {
    throw new Problem("This is an MLX package, which runs on Apple's MLX only. Export with --format onnx for a browser.");
  }
}

/**
 * Everything the page needs to know of the package at `base` (an absolute URL ending in /).
 * look(name): {bytes, stored, stamp} of a file or null; readConfig(): config.json's text or null.
 */
export async function describePackage(base, { device, hasF16, look, readConfig }) {
  if (/\.gguf\/?$/i.test(base)) {
    throw new Problem("GGUF files run in llama.cpp, not in this page. Export with --format onnx.");
  }
  const text = await readConfig();
  if (text === null) throw new Problem(`There is no package at ${base}: config.json is missing.`);
  let config;
  try {
    config = JSON.parse(text);
  } catch {
    throw new Problem(`${base}config.json is not JSON.`);
  }
  checkConfig(config, base);
  const found = await Promise.all([...SMALL, ...OPTIONAL].map(async (name) => ({ name, ...(await look(name)) })));
  const files = found.filter((file) => file.bytes !== undefined);
  const missing = SMALL.filter((name) => !files.some((file) => file.name === name));
  if (missing.length) throw new Problem(`The package lacks ${missing.join(" and ")}.`);
  for (const dtype of dtypeOrder(device, hasF16)) {
    const model = `model${SUFFIX[dtype]}.onnx`;
    const graph = await look(`onnx/${model}`);
    if (!graph) continue;
    files.push({ name: `onnx/${model}`, ...graph });
    for (const name of dataFiles(config, model)) {
      const data = await look(`onnx/${name}`);
      if (!data) throw new Problem(`The package lacks onnx/${name}, which holds the weights of onnx/${model}.`);
      files.push({ name: `onnx/${name}`, ...data });
    }
    const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
    return { base, config, dtype, files, bytes, stored: files.every((file) => file.stored) };
  }
  if (device === "webgpu" && !hasF16 && (await look("onnx/model_q4f16.onnx"))) {
    throw new Problem("This package has half-precision weights only, which this GPU cannot compute with. "
                      + "Add ?device=wasm to the address to run it on the CPU.");
  }
  throw new Problem("There is no onnx/model_q4.onnx in this folder, nor another weight file this page knows. "
                    + "Export with --format onnx.");
}

/** describePackage's `look` and `readConfig` on the network, or offline on what the browser has stored. */
export async function filesOf(base) {
  const cache = "caches" in globalThis ? await caches.open(CACHE) : null;
  const stampOf = ({ headers }) => headers.get("etag") ?? headers.get("last-modified") ?? headers.get("content-length");

  async function head(name) {
    try {
      return await fetch(base + name, { method: "HEAD", cache: "no-store" });
    } catch {
      return null; // offline
    }
  }

  async function look(name) {
    const stored = await cache?.match(base + name);
    const answer = await head(name);
    if (answer && (!answer.ok || isPage(answer, name))) return answer.status >= 500 ? kept(stored) : null;
    if (!answer) return kept(stored);
    if (stored && stampOf(stored) !== stampOf(answer)) {
      await cache.delete(base + name); // replaced on the server since
      return { bytes: Number(answer.headers.get("content-length") ?? 0), stored: false };
    }
    return { bytes: Number(answer.headers.get("content-length") ?? 0), stored: Boolean(stored) };
  }

  async function readConfig() {
    try {
      const answer = await fetch(`${base}config.json`, { cache: "no-store" });
      if (answer.ok && !isPage(answer, "config.json")) return await answer.text();
      if (answer.status < 500) return null;
    } catch {
      // offline
    }
    return (await cache?.match(`${base}config.json`))?.text() ?? null;
  }

  return { look, readConfig };
}

function kept(stored) {
  return stored ? { bytes: Number(stored.headers.get("content-length") ?? 0), stored: true } : null;
}

/** Some hosts answer a missing file with their start page. */
function isPage(answer, name) {
  return !name.endsWith(".html") && (answer.headers.get("content-type") ?? "").startsWith("text/html");
}
