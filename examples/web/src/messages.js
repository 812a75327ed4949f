// What goes wrong on devices, in words for the page.

/** An error whose message is written for the reader. */
export class Problem extends Error {}

const MEMORY = /bad_alloc|out of memory|\boom\b|allocation failed|rangeerror|invalid (typed )?array length|memory access out of bounds|could not allocate|failed to allocate|cannot enlarge memory|device (was |is )?lost/i;
const NETWORK = /failed to fetch|networkerror|load failed|err_internet|network error/i;

/** A sentence or two for any error that loading or running a package can give. */
export function explain(error) {
  const text = error instanceof Error ? `${error.name}: ${error.message}` : String(error?.message ?? error);
  if (error instanceof Problem) return error.message;
  if (MEMORY.test(text)) {
    return "Not enough memory for this package. Close other tabs and apps, or take a smaller package "
         + "(fewer bits, or a smaller model).";
  }
  if (NETWORK.test(text)) {
    return "A file could not be fetched. Check the connection and press the button again: what has been downloaded is kept.";
  }
  if (/aborted\(/i.test(text)) {
    return "The runtime stopped, which is most often for want of memory. Close other tabs and reload the page.";
  }
  if (/unsupported model type|model type/i.test(text)) {
    return `The runtime in this page does not know this kind of model. (${text})`;
  }
  if (/protobuf|deserialize|external data|no such file|initializer/i.test(text)) {
    return `The package is damaged or its files do not belong together; export it again. (${text})`;
  }
  return `That did not work: ${text}`;
}

/** 98_123_456 -> "98.1 MB". */
export function megabytes(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

const HEAP = 4 * 1024 ** 3; // wasm32 addresses
const COPIES = 2; // the download's buffer, and the runtime's copy while a session is made

/**
 * Whether `bytes` of package fit: "ok", "tight" (ask first) or "impossible".
 * deviceMemory: GiB as browsers say it, rounded and capped at 8 by some, undefined in Safari and Firefox.
 */
export function memoryVerdict(bytes, deviceMemory, device) {
  if (device === "wasm" && bytes > HEAP * 0.9) {
    return { level: "impossible", text: `${megabytes(bytes)} do not fit: a browser gives WebAssembly 4 GB at most.` };
  }
  if (deviceMemory && COPIES * bytes > (deviceMemory * 1024 ** 3) / 2) {
    return { level: "tight", text: `This device reports ${deviceMemory} GB of memory; loading takes about `
                                  + `${megabytes(COPIES * bytes)}. The browser may close the page.` };
  }
  return { level: "ok", text: "" };
}
