// Perplexity and KL(reference ‖ package) against a reference file, as runtime/metrics.py and
// runtime/reference.py compute them. Everything is in nats and in doubles.

/**
 * One scored position. `logits`: the package's, a Float64Array that is overwritten. `i`: row of `w` (windowOf).
 * lower: KL with all tokens outside the reference's top k as one bucket, never above the true KL.
 * estimate: the same head, and the tail from the tokens the reference drew: unbiased.
 */
export function scorePosition(logits, w, i) {
  const { topK, drawn } = w;
  let best = 0;
  for (let t = 1; t < logits.length; t++) if (logits[t] > logits[best]) best = t;
  const norm = logSumExp(logits, logits[best]);
  let head = 0;
  let sampled = 0;
  for (let j = i * topK; j < (i + 1) * topK; j++) {
    head += Math.exp(w.topLogp[j]) * (w.topLogp[j] - (logits[w.topIds[j]] - norm));
  }
  for (let j = i * drawn; j < (i + 1) * drawn; j++) sampled += w.tailLogp[j] - (logits[w.tailIds[j]] - norm);
  const nll = norm - logits[w.tokens[i + 1]];
  const agree = best === w.topIds[i * topK];
  const tail = w.tail[i];
  let lower = head;
  if (tail > 0 && topK < logits.length) {
    for (let j = i * topK; j < (i + 1) * topK; j++) logits[w.topIds[j]] = -Infinity;
    lower += tail * (Math.log(tail) - (logSumExp(logits, logits.reduce((a, b) => Math.max(a, b))) - norm));
  }
  return { lower, estimate: head + (tail * sampled) / drawn, nll, agree };
}

function logSumExp(values, largest) {
  let sum = 0;
  for (let t = 0; t < values.length; t++) sum += Math.exp(values[t] - largest);
  return largest + Math.log(sum);
}

export class Scores {
  constructor() {
    this.lower = [];
    this.estimate = [];
    this.nll = [];
    this.nllReference = [];
    this.agree = [];
    this.nonfinite = 0;
  }

  /** Rows `start`.. of window `w`; data: Float32Array [rows, vocab]. The window's last row has no target. */
  add(w, start, data, vocab) {
    const scored = Math.min(data.length / vocab, w.nll.length - start);
    const row = new Float64Array(vocab);
    for (let r = 0; r < scored; r++) {
      row.set(data.subarray(r * vocab, (r + 1) * vocab));
      this.nllReference.push(w.nll[start + r]);
      if (!row.every(Number.isFinite)) {
        this.nonfinite += 1;
        continue;
      }
      const one = scorePosition(row, w, start + r);
      this.lower.push(one.lower);
      this.estimate.push(one.estimate);
      this.nll.push(one.nll);
      this.agree.push(one.agree ? 1 : 0);
    }
  }

  /** The numbers under the names of `optrot-edge eval`'s report; null for what broken logits leave undefined. */
  summary() {
    const [pplReference, pplReferenceSe] = perplexity(this.nllReference);
    const result = { tokens: this.nllReference.length, nonfinite: this.nonfinite,
                     ppl_reference: pplReference, ppl_reference_se: pplReferenceSe };
    const broken = this.nonfinite > 0 || this.nll.length === 0;
    const put = (name, [value, error]) => {
      result[name] = broken ? null : value;
      result[`${name.replace("_mean", "")}_se`] = broken ? null : error;
    };
    put("kl_mean", meanAndError(this.lower));
    put("kl_estimate", meanAndError(this.estimate));
    put("ppl", perplexity(this.nll));
    put("top1", [meanAndError(this.agree)[0], null]);
    if (!broken) result.top1_se = Math.sqrt((result.top1 * (1 - result.top1)) / this.agree.length);
    return result;
  }
}

/** Mean and std / √n (n − 1 in the variance). */
export function meanAndError(values) {
  const n = values.length;
  const mean = values.reduce((a, b) => a + b, 0) / n;
  const squares = values.reduce((a, b) => a + (b - mean) ** 2, 0);
  return [mean, n > 1 ? Math.sqrt(squares / (n - 1) / n) : NaN];
}

/** exp(mean NLL) and its standard error by the delta method. */
export function perplexity(nll) {
  const [mean, error] = meanAndError(nll);
  return [Math.exp(mean), Math.exp(mean) * error];
}

/** The rule of the check: finite logits everywhere, and an estimated mean KL of at most `limit` nats per token. */
export function verdict(summary, limit) {
  if (summary.nonfinite > 0) {
    return { pass: false, reason: `${summary.nonfinite} of ${summary.tokens} positions gave logits that are not finite.` };
  }
  const pass = summary.kl_estimate !== null && summary.kl_estimate <= limit;
  const relation = pass ? "within" : "above";
  return { pass, reason: `The estimated KL, ${summary.kl_estimate?.toFixed(4)}, is ${relation} the limit of ${limit} nats per token.` };
}

/** `count` window numbers spread evenly over `total`, first and last included, as `optrot-edge eval` picks them. */
export function spread(total, count) {
  const n = Math.min(Math.max(count, 1), total);
  return Array.from({ length: n }, (_, i) => (n === 1 ? 0 : Math.floor((i * (total - 1)) / (n - 1))));
}
