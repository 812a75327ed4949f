// Service worker: the page's own files. The package is kept by transformers.js in a cache of its own.
// The build puts the list of files and a version in place of the two constants below.

const SHELL = self.__SHELL__;
const VERSION = self.__VERSION__;
const KEPT = `optrot-page-${VERSION}`;
const DATA = "optrot-data";

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(KEPT).then((cache) => cache.addAll(SHELL)));
});

self.addEventListener("activate", (event) => {
  event.waitUntil((async () => {
    for (const name of await caches.keys()) {
      if (name.startsWith("optrot-page-") && name !== KEPT) await caches.delete(name);
    }
    await self.clients.claim();
  })());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== location.origin) return;
  const path = url.pathname.slice(new URL(self.registration.scope).pathname.length);
  if (request.mode === "navigate") {
    if (path === "" || path === "index.html") event.respondWith(fromCache("./", request));
  } else if (path.startsWith("assets/") || SHELL.includes(`./${path}`)) {
    event.respondWith(fromCache(url.href, request));
  } else if (/settings\.json$|\.json\.gz$|reference[^/]*\.json$/.test(path)) {
    event.respondWith(fromNetwork(request));
  }
});

/** Named by their content's hash, so what is stored is right; onnxruntime's files are stored when first asked for. */
async function fromCache(key, request) {
  const cache = await caches.open(KEPT);
  const stored = await cache.match(key);
  if (stored) return isolated(stored);
  const answer = await fetch(request);
  if (answer.ok) await cache.put(key, answer.clone());
  return isolated(answer);
}

async function fromNetwork(request) {
  const cache = await caches.open(DATA);
  try {
    const answer = await fetch(request);
    if (answer.ok) await cache.put(request, answer.clone());
    return answer;
  } catch (error) {
    const stored = await cache.match(request);
    if (stored) return stored;
    throw error;
  }
}

/** Shared memory, and so threads, also from hosts that cannot send these headers. */
function isolated(answer) {
  const headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(answer.body, { status: answer.status, statusText: answer.statusText, headers });
}
