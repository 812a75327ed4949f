// Wires the page: pick a device, look at the package, load it, then chat and check.

import "./style.css";
import { startChat } from "./chat.js";
import { startCheck } from "./check.js";
import { goOffline, makeRoom, pickDevice } from "./device.js";
import { $, say, setBar, show } from "./dom.js";
import { explain, megabytes, memoryVerdict } from "./messages.js";
import { describePackage, filesOf } from "./package.js";
import { Session } from "./session.js";

const DEFAULTS = { model: "./model/", reference: "./reference.json.gz", kl_limit: 0.1, windows: 4, max_new_tokens: 256 };
const asked = new URLSearchParams(location.search);
const session = new Session();

async function main() {
  const [offline, place] = await Promise.all([goOffline(), pickDevice(asked.get("device"))]);
  const settings = await readSettings(); // only now: the service worker is to see it
  $("status").textContent = place.label;
  const folder = asked.get("model") ?? settings.model;
  $("folder").value = folder;
  const base = new URL(folder.endsWith("/") ? folder : `${folder}/`, location.href).href;
  let found;
  try {
    found = await describePackage(base, { ...place, ...(await filesOf(base)) });
  } catch (error) {
    say("about", "");
    say("problem", explain(error));
    return;
  }
  announce(found, place);
  $("load").addEventListener("click", () => load(found, place, settings, offline));
}

async function readSettings() {
  const answer = await fetch("./settings.json", { cache: "no-store" }).catch(() => null);
  return { ...DEFAULTS, ...(answer?.ok ? await answer.json().catch(() => ({})) : {}) };
}

/** "model: llama, q4, 98 MB to download" */
function describe(found, where) {
  const name = decodeURIComponent(new URL(found.base).pathname.split("/").filter(Boolean).at(-1) ?? "");
  say("about", `${name}: ${found.config.model_type}, ${found.dtype}, ${megabytes(found.bytes)} ${where}`);
}

function announce(found, place) {
  describe(found, found.stored ? "stored on this device" : "to download");
  const { level, text } = memoryVerdict(found.bytes, navigator.deviceMemory, place.device);
  say("warning", text);
  $("load").textContent = level === "tight" ? "Load anyway" : "Load";
  show("load", level !== "impossible");
}

async function load(found, place, settings, offline) {
  const loaded = new Map();
  show("load", false);
  say("problem", "");
  show("loading", true);
  try {
    const fits = found.stored || (await makeRoom(found.bytes));
    await session.run("load", { base: found.base, device: place.device, dtype: found.dtype, threads: place.threads },
      ({ file, loaded: bytes }) => {
        loaded.set(file, bytes);
        const sum = [...loaded.values()].reduce((a, b) => a + b, 0);
        const done = sum >= found.bytes * 0.995;
        $("phase").textContent = done ? "Preparing the model" : `${found.stored ? "Reading" : "Downloading"}: `
          + `${megabytes(sum)} of ${megabytes(found.bytes)}`;
        setBar("bar", done ? null : sum / found.bytes);
      });
    $("status").textContent = `${place.label} · ${offline && fits ? "works offline" : "needs the network"}`;
    const onBusy = (now) => ["send", "check", "clear"].forEach((id) => { $(id).disabled = now; });
    startChat(session, { maxNewTokens: settings.max_new_tokens }, onBusy);
    startCheck(session, settings, place.device, onBusy);
    describe(found, "loaded");
    say("warning", "");
    show("talk", true);
    show("accuracy", true);
    $("message").focus();
  } catch (error) {
    session.end();
    say("problem", error.message);
    $("load").textContent = "Try again";
    show("load", true);
  }
  show("loading", false);
}

main();
