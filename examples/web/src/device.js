// Where the model will run, and whether the page works offline.

/** {device: "webgpu" | "wasm", hasF16, threads, label}; `wanted` asks for one of the two. */
export async function pickDevice(wanted) {
  const adapter = wanted === "wasm" ? null : await requestAdapter();
  // A GPU computed in software is many times slower than WebAssembly.
  if (adapter && (wanted === "webgpu" || !isSoftware(adapter))) {
    const name = [adapter.info?.vendor, adapter.info?.architecture].filter(Boolean).join(" ");
    return { device: "webgpu", hasF16: adapter.features.has("shader-f16"), threads: 1,
             label: `WebGPU${name ? ` (${name})` : ""}` };
  }
  // Threads need shared memory, which browsers give only to pages with COOP and COEP headers.
  const threads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  return { device: "wasm", hasF16: false, threads,
           label: `CPU (WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"})` };
}

function isSoftware({ info }) {
  return Boolean(info?.isFallbackAdapter) || /swiftshader|llvmpipe|lavapipe|basic render/i.test(
    `${info?.architecture} ${info?.device} ${info?.description}`);
}

async function requestAdapter() {
  try {
    return (await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" })) ?? null;
  } catch {
    return null;
  }
}

/** Install the service worker and wait until it answers this page, so that all it loads is kept. */
export async function goOffline() {
  if (!import.meta.env.PROD || !("serviceWorker" in navigator)) return false;
  try {
    await navigator.serviceWorker.register("./sw.js");
    await navigator.serviceWorker.ready;
    if (!navigator.serviceWorker.controller) {
      await new Promise((resolve) => {
        navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
        setTimeout(resolve, 3000);
      });
    }
    return Boolean(navigator.serviceWorker.controller);
  } catch {
    return false;
  }
}

/** Ask the browser to keep what is stored. Returns whether `bytes` more fit; true where nobody knows. */
export async function makeRoom(bytes) {
  try {
    await navigator.storage?.persist?.();
    const { quota, usage } = await navigator.storage.estimate();
    return quota - usage > bytes;
  } catch {
    return true;
  }
}
