// One request at a time to the worker.

import { explain, Problem } from "./messages.js";

export class Session {
  constructor() {
    this.worker = null;
    this.pending = null;
  }

  /** Run `action`; onEvent hears progress. Rejects with a Problem. */
  run(action, request, onEvent = () => {}) {
    if (this.pending) return Promise.reject(new Problem("The model is still at work."));
    this.worker ??= this.start();
    return new Promise((resolve, reject) => {
      this.pending = { resolve, reject, onEvent };
      this.worker.postMessage({ ...request, action });
    });
  }

  get busy() {
    return this.pending !== null;
  }

  stop() {
    this.worker?.postMessage({ action: "stop" });
  }

  /** Throw the worker away, and with it all memory the runtime took. */
  end() {
    this.worker?.terminate();
    this.worker = null;
    this.pending = null;
  }

  start() {
    const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    const settle = (name, value) => {
      const { pending } = this;
      this.pending = null;
      pending?.[name](value);
    };
    worker.addEventListener("message", ({ data }) => {
      if (data.type === "done") settle("resolve", data.result);
      else if (data.type === "error") settle("reject", new Problem(data.message));
      else this.pending?.onEvent(data);
    });
    worker.addEventListener("error", (event) => {
      event.preventDefault();
      settle("reject", new Problem(explain(event.message ?? "the model's process could not be started")));
    });
    return worker;
  }
}
