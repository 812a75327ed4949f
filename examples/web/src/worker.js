// The model runs here, so that the page stays responsive and survives a runtime that aborts.

import { Engine } from "./engine.js";
import { explain } from "./messages.js";

let engine = null;
let stopped = false;

const actions = {
  async load(options) {
    engine = await Engine.load(options, (event) => postMessage({ type: "progress", ...event }));
    return engine.facts();
  },
  chat: (request) => engine.chat(request, () => stopped, (event) => postMessage({ type: "token", ...event })),
  check: (request) => engine.check(request, () => stopped, (event) => postMessage({ type: "window", ...event })),
};

addEventListener("message", async ({ data }) => {
  if (data.action === "stop") {
    stopped = true;
    return;
  }
  stopped = false;
  try {
    postMessage({ type: "done", result: await actions[data.action](data) });
  } catch (error) {
    fail(error);
  }
});

// transformers.js reads external data inside a promise it never rejects: want of memory there ends up here.
addEventListener("unhandledrejection", (event) => fail(event.reason));

function fail(error) {
  console.error(error);
  postMessage({ type: "error", message: explain(error) });
}
