// The conversation.

import { $, say, show } from "./dom.js";

export function startChat(session, { maxNewTokens }, onBusy) {
  let messages = [];

  function bubble(role, text) {
    $("empty")?.remove();
    const article = document.createElement("article");
    article.className = role;
    article.setAttribute("aria-label", role === "user" ? "You" : "Model");
    article.textContent = text;
    $("log").append(article);
    $("log").scrollTop = $("log").scrollHeight;
    return article;
  }

  async function send(text) {
    say("talk-problem", "");
    messages.push({ role: "user", content: text });
    bubble("user", text);
    const answer = bubble("assistant", "");
    busy(true);
    try {
      const request = { messages, maxNewTokens, sample: $("vary").checked };
      const result = await session.run("chat", request, ({ text: sofar, rate }) => {
        const log = $("log");
        const following = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        answer.textContent = sofar;
        if (following) log.scrollTop = log.scrollHeight;
        if (rate) $("rate").textContent = `${rate.toFixed(1)} tokens/s`;
      });
      answer.textContent = result.text || "(no answer)";
      answer.dataset.ids = result.ids.join(" ");
      messages.push({ role: "assistant", content: result.text });
      $("said").textContent = `Model: ${result.text}`;
      const speed = result.rate ? `, ${result.rate.toFixed(1)} tokens/s` : "";
      $("rate").textContent = `${result.ids.length} tokens${speed}, first after ${result.prefill.toFixed(1)} s`;
    } catch (error) {
      messages.pop();
      answer.remove();
      say("talk-problem", error.message);
    }
    busy(false);
  }

  function busy(now) {
    onBusy(now);
    show("stop", now);
    show("send", !now);
    $("log").setAttribute("aria-busy", now);
    $("clear").disabled = now || messages.length === 0;
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("message").value.trim();
    if (!text || session.busy) return;
    $("message").value = "";
    send(text);
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => {
    session.stop();
    $("message").focus();
  });
  $("clear").addEventListener("click", () => {
    messages = [];
    $("log").replaceChildren();
    $("rate").textContent = "";
    $("clear").disabled = true;
    $("message").focus();
  });
}
