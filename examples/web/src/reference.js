// Reads a file written by `optrot-edge reference` (format: runtime/reference.py).

const KINDS = { "<i4": Int32Array, "<f4": Float32Array, "<f8": Float64Array };
const DTYPES = {
  tokens: "<i4", top_ids: "<i4", top_logp: "<f4", tail: "<f8", tail_ids: "<i4", tail_logp: "<f4", nll: "<f4",
};

/** Bytes of a reference file, gzip-compressed or not, to its arrays. Throws Error with a sentence for the reader. */
export async function parseReference(bytes) {
  let data;
  try {
    data = JSON.parse(new TextDecoder().decode(await inflate(bytes)));
  } catch {
    throw new Error("The reference file cannot be read: it is damaged, or not a reference file.");
  }
  if (data?.format !== "optrot-reference") {
    throw new Error("This is not a reference file. Write one with `optrot-edge reference`.");
  }
  if (data.version !== 1) throw new Error(`The reference file has version ${data.version}; this page reads 1.`);
  const reference = { vocabSize: data.vocab_size, model: data.model, probe: data.probe ?? null };
  try {
    for (const [name, dtype] of Object.entries(DTYPES)) reference[name] = unpack(data.arrays[name], dtype);
    validate(reference);
  } catch (error) {
    throw new Error(`The reference file is damaged (${error.message}). Write it again.`);
  }
  const [windows, length] = reference.tokens.shape;
  return { ...reference, windows, length, topK: reference.top_ids.shape[2], drawn: reference.tail_ids.shape[2] };
}

/** One window: plain typed arrays, views into the file's. */
export function windowOf(reference, index) {
  const rows = reference.length - 1;
  const part = (name, width) => {
    const { values } = reference[name];
    return values.subarray(index * rows * width, (index + 1) * rows * width);
  };
  const { topK, drawn, length } = reference;
  return {
    topK, drawn,
    tokens: reference.tokens.values.subarray(index * length, (index + 1) * length),
    topIds: part("top_ids", topK), topLogp: part("top_logp", topK), tail: part("tail", 1),
    tailIds: part("tail_ids", drawn), tailLogp: part("tail_logp", drawn), nll: part("nll", 1),
  };
}

async function inflate(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function unpack(entry, dtype) {
  if (entry.dtype !== dtype) throw new Error(`dtype ${entry.dtype}, expected ${dtype}`);
  const raw = Uint8Array.from(atob(entry.base64), (c) => c.charCodeAt(0));
  const values = new KINDS[dtype](raw.buffer);
  if (values.length !== entry.shape.reduce((a, b) => a * b, 1)) throw new Error("an array does not fit its shape");
  return { values, shape: entry.shape };
}

function validate(r) {
  const same = (a, b) => a.length === b.length && a.every((x, i) => x === b[i]);
  const [windows, length] = r.tokens.shape;
  const rows = [windows, length - 1];
  const k = r.top_ids.shape[2];
  const drawn = r.tail_ids.shape[2];
  if (!(windows > 0 && length > 1 && k > 0 && drawn > 0)
      || !same(r.top_ids.shape, [...rows, k]) || !same(r.top_logp.shape, [...rows, k])
      || !same(r.tail.shape, rows) || !same(r.nll.shape, rows)
      || !same(r.tail_ids.shape, [...rows, drawn]) || !same(r.tail_logp.shape, [...rows, drawn])) {
    throw new Error("the arrays do not fit each other");
  }
  for (const name of ["tokens", "top_ids", "tail_ids"]) {
    if (r[name].values.some((id) => id < 0 || id >= r.vocabSize)) throw new Error("token ids outside the vocabulary");
  }
  for (let row = 0; row < windows * (length - 1); row++) {
    let mass = r.tail.values[row];
    for (let i = row * k; i < (row + 1) * k; i++) mass += Math.exp(r.top_logp.values[i]);
    if (!(Math.abs(mass - 1) < 1e-4 && r.tail.values[row] >= 0 && r.nll.values[row] >= 0)) {
      throw new Error("the probabilities do not sum to one");
    }
  }
}
