import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { defaultClientConditions, defineConfig } from "vite";

const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
const PUBLIC = ["./manifest.webmanifest", "./icon.svg", "./icon-180.png", "./icon-192.png", "./icon-512.png"];

/** Write sw.js with the list of this build's files; onnxruntime's large ones are left to be stored on use. */
function serviceWorker() {
  return {
    name: "service-worker",
    apply: "build",
    generateBundle: {
      order: "post",
      handler(_, bundle) {
        const names = Object.keys(bundle).filter((name) => /\.(js|css)$/.test(name)).sort();
        const shell = JSON.stringify(["./", ...PUBLIC, ...names.map((name) => `./${name}`)]);
        const source = readFileSync(new URL("./src/sw.js", import.meta.url), "utf8");
        const version = createHash("sha256").update(shell).update(source)
          .update(readFileSync(new URL("./index.html", import.meta.url))).digest("hex").slice(0, 12);
        this.emitFile({ type: "asset", fileName: "sw.js",
                        source: source.replace("self.__SHELL__", shell).replace("self.__VERSION__", `"${version}"`) });
      },
    },
  };
}

export default defineConfig({
  base: "./",
  appType: "mpa", // a missing file is a 404, not the start page
  plugins: [serviceWorker()],
  resolve: {
    // The build of onnxruntime-web that takes its wasm files from where it is told.
    conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions],
  },
  worker: { format: "es" },
  optimizeDeps: { exclude: ["@huggingface/transformers", "onnxruntime-web"] },
  build: { target: "es2022", chunkSizeWarningLimit: 2000, assetsInlineLimit: 0 },
  server: { headers: ISOLATED },
  preview: { headers: ISOLATED },
});
