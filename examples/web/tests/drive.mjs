// Drives the page in Chromium: node drive.mjs '{"profile": DIR, "steps": [...]}' prints one JSON value per step.
// Steps: {goto: url}, {adapter: true} (has this browser WebGPU?), {load: true}, {chat: text}, {stop: text}, {check: true}, {shot: path, size, scheme},
// {press: [keys]}. `gpu`: with WebGPU, computed in software.

import { chromium } from "playwright-core";

const { profile, chrome, gpu, steps } = JSON.parse(process.argv[2]);
const SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--ignore-gpu-blocklist"];
const results = [];
const console_ = [];
const context = await chromium.launchPersistentContext(profile, {
  executablePath: chrome, headless: true, viewport: { width: 1280, height: 800 },
  args: ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         ...(gpu ? SOFTWARE_GPU : ["--disable-gpu"])],
});
const page = context.pages()[0] ?? (await context.newPage());
page.setDefaultTimeout(180_000);
const foreign = [];
context.on("request", (request) => {
  if (!/^(http:\/\/(localhost|127\.0\.0\.1):|blob:|data:)/.test(request.url())) foreign.push(request.url());
});
page.on("console", (message) => console_.push(`${message.type()}: ${message.text()}`));
page.on("pageerror", (error) => console_.push(`pageerror: ${error.message}`));

const shown = (ids) => page.waitForFunction((list) => list.some((id) => {
  const element = document.getElementById(id);
  return element && !element.hidden && element.textContent.trim();
}), ids);

/** Send a message; resolves once the answer is whole. `click`: press "Stop" as soon as it is there. */
async function ask(text, click) {
  await page.evaluate((click) => {
    const stop = document.getElementById("stop");
    window.answering = false; // seen by an observer: a short answer is over before the driver would look
    new MutationObserver((_, observer) => {
      if (stop.hidden) return;
      observer.disconnect();
      window.answering = true;
      if (click) stop.click();
    }).observe(stop, { attributes: true });
  }, click);
  await page.fill("#message", text);
  await page.press("#message", "Enter");
  await page.waitForFunction(() => window.answering && document.getElementById("stop").hidden);
}

const actions = {
  async goto(url) {
    await page.goto(url);
    await shown(["load", "problem"]);
    return page.evaluate(() => ({ status: document.getElementById("status").textContent,
                                  about: document.getElementById("about").textContent,
                                  problem: document.getElementById("problem").textContent,
                                  warning: document.getElementById("warning").textContent,
                                  isolated: crossOriginIsolated }));
  },
  async adapter() {
    return page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter()));
  },
  async load() {
    const started = Date.now();
    await page.click("#load");
    await shown(["talk", "problem"]);
    return { seconds: (Date.now() - started) / 1000, status: await page.textContent("#status"),
             problem: await page.textContent("#problem") };
  },
  async chat(text) {
    await ask(text, false);
    return page.evaluate(() => {
      const answer = [...document.querySelectorAll("#log article.assistant")].at(-1);
      return { text: answer?.textContent, ids: answer?.dataset.ids?.split(" ").map(Number),
               rate: document.getElementById("rate").textContent,
               problem: document.getElementById("talk-problem").textContent };
    });
  },
  async stop(text) {
    await ask(text, true);
    return page.evaluate(() => [...document.querySelectorAll("#log article.assistant")].at(-1).dataset.ids.split(" ").length);
  },
  async check() {
    await page.click("#check");
    await page.waitForFunction(() => !document.getElementById("check").disabled
      && (document.getElementById("verdict").textContent || document.getElementById("check-problem").textContent));
    return page.evaluate(() => ({
      verdict: document.getElementById("verdict").textContent, kind: document.getElementById("verdict").className,
      problem: document.getElementById("check-problem").textContent,
      numbers: Object.fromEntries([...document.querySelectorAll("#numbers td")].map((td) => [td.dataset.key, Number(td.dataset.value)])),
    }));
  },
  async shot(path, { size, scheme, full }) {
    await page.setViewportSize({ width: size[0], height: size[1] });
    await page.emulateMedia({ colorScheme: scheme ?? "light" });
    await page.waitForTimeout(200);
    await page.screenshot({ path, fullPage: full ?? false });
    return path;
  },
  async press(keys) {
    const seen = [];
    for (const key of keys) {
      await page.keyboard.press(key);
      seen.push(await page.evaluate(() => document.activeElement?.id || document.activeElement?.tagName));
    }
    return seen;
  },
};

let failure = null;
try {
  for (const step of steps) {
    const name = Object.keys(step).find((key) => key in actions);
    results.push((await actions[name](step[name], step)) ?? null);
  }
} catch (error) {
  failure = String(error);
  await page.screenshot({ path: `${profile}/failed.png` }).catch(() => {});
}
await context.close();
console.log(JSON.stringify({ results, foreign, failure, console: console_ }));
