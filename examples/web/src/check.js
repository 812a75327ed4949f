// The accuracy check: numbers against a reference file, and a verdict.

import { $, say, setBar, show } from "./dom.js";
import { explain, Problem } from "./messages.js";
import { verdict } from "./metrics.js";

export function startCheck(session, settings, device, onBusy) {
  $("limit").textContent = settings.kl_limit;
  $("check").addEventListener("click", async () => {
    say("check-problem", "");
    $("verdict").replaceChildren();
    $("verdict").className = "";
    show("numbers", false);
    busy(true);
    try {
      const bytes = await fetchReference(settings.reference);
      const result = await session.run("check", { bytes, count: settings.windows }, ({ done, total }) => {
        $("check-phase").textContent = `Scoring part ${done + 1} of ${total}`;
        setBar("check-bar", done / total);
      });
      if (result) report(result, settings.kl_limit, device);
    } catch (error) {
      say("check-problem", explain(error));
    }
    busy(false);
  });
  $("cancel").addEventListener("click", () => session.stop());

  function busy(now) {
    onBusy(now);
    show("checking", now);
    show("cancel", now);
    setBar("check-bar", 0);
    $("check-phase").textContent = "Preparing";
  }
}

/** A GPU's driver may be to blame; the CPU tells. */
function onCpu() {
  const link = document.createElement("a");
  const url = new URL(location.href);
  url.searchParams.set("device", "wasm");
  link.href = url.href;
  link.textContent = "Try the same on the CPU.";
  return link;
}

async function fetchReference(path) {
  const url = new URL(path, location.href);
  const answer = await fetch(url, { cache: "no-store" }).catch(() => null);
  if (!answer?.ok || (answer.headers.get("content-type") ?? "").startsWith("text/html")) {
    throw new Problem(`There is no reference file at ${url.pathname}. Write one with \`optrot-edge reference\`.`);
  }
  return new Uint8Array(await answer.arrayBuffer());
}

function report(result, limit, device) {
  const { pass, reason } = verdict(result, limit);
  const word = document.createElement("strong");
  word.textContent = pass ? "✓ Pass" : "✗ Fail";
  $("verdict").className = pass ? "pass" : "fail";
  $("verdict").replaceChildren(word, reason);
  if (!pass && device === "webgpu") $("verdict").append(" ", onCpu());
  const number = (value, digits) => (value === null || Number.isNaN(value) ? "–" : value.toFixed(digits));
  const withError = (value, error, digits) => `${number(value, digits)} ± ${number(error, digits)}`;
  const rows = [
    ["KL, estimate", withError(result.kl_estimate, result.kl_estimate_se, 4), "kl_estimate"],
    ["KL, lower bound", withError(result.kl_mean, result.kl_se, 4), "kl_mean"],
    ["Perplexity", withError(result.ppl, result.ppl_se, 2), "ppl"],
    ["Perplexity of the original", withError(result.ppl_reference, result.ppl_reference_se, 2), "ppl_reference"],
    ["Same first choice", result.top1 === null ? "–" : `${(100 * result.top1).toFixed(1)} %`, "top1"],
    ["Tokens scored", String(result.tokens), "tokens"],
    ["Time", `${result.seconds.toFixed(1)} s`, "seconds"],
  ];
  $("numbers").tBodies[0].replaceChildren(...rows.map(([name, text, key]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const cell = document.createElement("td");
    cell.textContent = text;
    cell.dataset.key = key;
    cell.dataset.value = result[key];
    row.append(head, cell);
    return row;
  }));
  show("numbers", true);
}
