// What the page says of folders, sizes and errors.

import assert from "node:assert/strict";
import test from "node:test";

import { explain, megabytes, memoryVerdict, Problem } from "../src/messages.js";
import { dataFiles, describePackage } from "../src/package.js";

const BASE = "http://localhost/model/";
const CONFIG = { model_type: "llama", "transformers.js_config": { use_external_data_format: { "model_q4.onnx": 2 } } };
const FILES = { "config.json": 1, "tokenizer.json": 2, "tokenizer_config.json": 3, "onnx/model_q4.onnx": 10,
                "onnx/model_q4.onnx_data": 100, "onnx/model_q4.onnx_data_1": 1000 };

function describe(files = FILES, config = CONFIG, place = { device: "wasm", hasF16: false }, base = BASE) {
  return describePackage(base, {
    ...place,
    look: async (name) => (name in files ? { bytes: files[name], stored: true } : null),
    readConfig: async () => (config === null || typeof config === "string" ? config : JSON.stringify(config)),
  });
}

const without = (name) => Object.fromEntries(Object.entries(FILES).filter(([key]) => key !== name));

test("sizes and weight files", async () => {
  const found = await describe();
  assert.equal(found.dtype, "q4");
  assert.equal(found.bytes, 1116);
  assert.equal(found.stored, true);
});

test("half precision only where the GPU has it", async () => {
  const files = { ...FILES, "onnx/model_q4f16.onnx": 5 };
  assert.equal((await describe(files, CONFIG, { device: "webgpu", hasF16: true })).dtype, "q4f16");
  assert.equal((await describe(files, CONFIG, { device: "webgpu", hasF16: false })).dtype, "q4");
  assert.equal((await describe(files)).dtype, "q4");
  const half = { ...without("onnx/model_q4.onnx"), "onnx/model_q4f16.onnx": 5 };
  assert.equal((await describe(half)).dtype, "q4f16");
  await assert.rejects(describe(half, CONFIG, { device: "webgpu", hasF16: false }), /device=wasm/);
  const eight = { ...without("onnx/model_q4.onnx"), "onnx/model_quantized.onnx": 5 };
  assert.equal((await describe(eight)).dtype, "q8");
});

test("what is missing is named", async () => {
  await assert.rejects(describe(FILES, null), /no package at .*config\.json is missing/);
  await assert.rejects(describe(FILES, "<!doctype html>"), /not JSON/);
  await assert.rejects(describe(without("tokenizer.json")), /lacks tokenizer\.json/);
  await assert.rejects(describe(without("onnx/model_q4.onnx_data_1")), /lacks onnx\/model_q4\.onnx_data_1/);
  await assert.rejects(describe(without("onnx/model_q4.onnx")), /no onnx\/model_q4\.onnx/);
});

test("packages of other formats", async () => {
  const mlx = { model_type: "llama", quantization: { group_size: 64, bits: 4 } };
  await assert.rejects(describe(FILES, mlx), /MLX package/);
  await assert.rejects(describe(FILES, CONFIG, undefined, "http://localhost/model.gguf/"), /GGUF/);
  await assert.rejects(describe(FILES, { hello: 1 }), /no model's configuration/);
});

test("external data files, in each way of saying how many", () => {
  const count = (value) => dataFiles({ "transformers.js_config": { use_external_data_format: value } }, "model_q4.onnx");
  assert.deepEqual(count(true), ["model_q4.onnx_data"]);
  assert.deepEqual(count(2), ["model_q4.onnx_data", "model_q4.onnx_data_1"]);
  assert.deepEqual(count({ model: 1 }), ["model_q4.onnx_data"]);
  assert.deepEqual(count(false), []);
  assert.deepEqual(dataFiles({}, "model_q4.onnx"), []);
});

test("memory", () => {
  assert.equal(memoryVerdict(100e6, 8, "wasm").level, "ok");
  assert.equal(memoryVerdict(100e6, undefined, "wasm").level, "ok");
  assert.equal(memoryVerdict(700e6, 2, "wasm").level, "tight");
  assert.equal(memoryVerdict(4e9, 32, "wasm").level, "impossible");
  assert.notEqual(memoryVerdict(4e9, 32, "webgpu").level, "impossible");
  assert.equal(megabytes(98_123_456), "98 MB");
  assert.equal(megabytes(1.234e9), "1.23 GB");
});

test("errors in words", () => {
  const memory = /^Not enough memory/;
  assert.match(explain(new RangeError("Array buffer allocation failed")), memory);
  assert.match(explain(new Error("Can't create a session. ERROR_CODE: 6, ERROR_MESSAGE: std::bad_alloc")), memory);
  assert.match(explain(new RangeError("Invalid typed array length: 99999999999")), memory);
  assert.match(explain("RuntimeError: memory access out of bounds"), memory);
  assert.match(explain(new Error("Aborted(). Build with -sASSERTIONS for more info.")), /want of memory/);
  assert.match(explain(new Error("Aborted(OOM). Build with -sASSERTIONS")), memory);
  assert.match(explain(new TypeError("Failed to fetch")), /could not be fetched/);
  assert.match(explain(new Error("Protobuf parsing failed.")), /damaged/);
  assert.equal(explain(new Problem("Plainly.")), "Plainly.");
  assert.match(explain(new Error("else")), /else/);
});
