// The arithmetic of the check against numbers that runtime/reference.py and runtime/metrics.py gave.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { gzipSync } from "node:zlib";

import { meanAndError, Scores, spread, verdict } from "../src/metrics.js";
import { parseReference, windowOf } from "../src/reference.js";

// Written and compared anew by tests/examples/test_web_metrics.py.
const fixture = JSON.parse(readFileSync(new URL("./case.json", import.meta.url)));
const bytes = () => new TextEncoder().encode(JSON.stringify(fixture.reference));
const raw = Buffer.from(fixture.logits.base64, "base64");
const logits = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength));
const [windows, length, vocab] = fixture.logits.shape;

function score(reference, data, step) {
  const scores = new Scores();
  for (let b = 0; b < windows; b++) {
    for (let start = 0; start < length; start += step) {
      const stop = Math.min(start + step, length);
      const part = data.subarray((b * length + start) * vocab, (b * length + stop) * vocab);
      scores.add(windowOf(reference, b), start, part, vocab);
    }
  }
  return scores.summary();
}

test("the numbers are those of `optrot-edge eval`", async () => {
  const reference = await parseReference(bytes());
  for (const step of [length, 5]) {
    const got = score(reference, logits, step);
    for (const [name, wanted] of Object.entries(fixture.summary)) {
      assert.ok(Math.abs(got[name] - wanted) <= 1e-9 * Math.max(1, Math.abs(wanted)), `${name}: ${got[name]}, ${wanted}`);
    }
  }
});

test("a compressed reference file reads alike", async () => {
  const plain = await parseReference(bytes());
  const packed = await parseReference(new Uint8Array(gzipSync(bytes())));
  assert.deepEqual(packed, plain);
});

test("logits that are not finite fail the check", async () => {
  const broken = logits.slice();
  broken[3] = NaN;
  const got = score(await parseReference(bytes()), broken, length);
  assert.equal(got.nonfinite, 1);
  assert.equal(got.kl_estimate, null);
  assert.equal(verdict(got, 100).pass, false);
  assert.match(verdict(got, 100).reason, /1 of \d+ positions/);
});

test("the verdict is the estimate against the limit", () => {
  const summary = { nonfinite: 0, tokens: 10, kl_estimate: 0.05 };
  assert.equal(verdict(summary, 0.05).pass, true);
  assert.equal(verdict(summary, 0.049).pass, false);
  assert.equal(verdict({ ...summary, kl_estimate: NaN }, 1).pass, false);
});

test("damaged reference files are refused", async () => {
  const edits = [
    (d) => { d.format = "other"; },
    (d) => { d.version = 2; },
    (d) => { delete d.arrays.tail; },
    (d) => { d.arrays.tail.shape = [1, 2]; },
    (d) => { d.arrays.top_logp.dtype = "<f8"; },
    (d) => { d.vocab_size = 3; },
    (d) => { d.arrays.top_logp = { ...d.arrays.top_ids, dtype: "<f4" }; },
  ];
  for (const edit of edits) {
    const data = structuredClone(fixture.reference);
    edit(data);
    await assert.rejects(parseReference(new TextEncoder().encode(JSON.stringify(data))), /reference file|version/);
  }
  await assert.rejects(parseReference(bytes().slice(0, 100)), /damaged/);
});

test("windows are spread as `optrot-edge eval` spreads them", () => {
  assert.deepEqual(spread(32, 4), [0, 10, 20, 31]);
  assert.deepEqual(spread(3, 8), [0, 1, 2]);
  assert.deepEqual(spread(5, 1), [0]);
  assert.ok(Number.isNaN(meanAndError([1])[1]));
});
