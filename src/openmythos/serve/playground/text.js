// Continue a text at one or two depths; every token shows its loops and opens the lens.

import { byId, element, showError, slider, visible } from "./page.js";
import { events, post } from "./api.js";
import { cellAt, drawMap } from "./charts.js";
import { showLens } from "./lens.js";

const THRESHOLDS = { state_change: 0.03, kl: 0.0005, kl_entropy: 0.001 };

export function startText(model) {
  const loops = slider("loops"), second = slider("second");
  for (const [control, mark] of [[loops, "loops-mark"], [second, "second-mark"]]) {
    control.range(model.max_loops);
    control.mark(mark, model.num_loops, `the model\u2019s own: ${model.num_loops}`);
  }
  loops.set(Math.min(model.num_loops, model.max_loops));
  second.set(Math.max(1, Math.round(model.num_loops / 4)));
  byId("prompt").value = model.task ? "e3 r0 r2 r1" : "The ";
  if (model.task) byId("tokens").value = 1;
  let running = null; // the AbortController of what is streaming
  let most = 1; // loops that any token used
  let looked = null; // what the prompt map shows

  byId("rule").addEventListener("change", () => {
    const kind = byId("rule").value;
    byId("threshold-label").hidden = !(kind in THRESHOLDS);
    byId("threshold").value = THRESHOLDS[kind] ?? "";
  });
  byId("compare").addEventListener("change", () => {
    byId("second-label").hidden = !byId("compare").checked;
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("look").addEventListener("click", look);
  byId("text-form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });

  function rule() {
    const kind = byId("rule").value;
    return kind in THRESHOLDS ? { kind, threshold: Number(byId("threshold").value) } : { kind };
  }

  async function generate() {
    running?.abort();
    const mine = running = new AbortController();
    showError(null);
    byId("stop").disabled = false;
    byId("lens").hidden = true;
    const depths = byId("compare").checked ? [loops.value, second.value] : [loops.value];
    const outputs = depths.map((depth) => output(depth));
    most = 1;
    byId("outputs").className = depths.length > 1 ? "outputs two" : "outputs";
    byId("outputs").replaceChildren(...outputs.map(({ place }) => place));
    try {
      const { tokens } = await post("/tokenize", { prompt: byId("prompt").value }, mine.signal);
      await Promise.all(outputs.map((one) => stream(one, tokens, mine.signal)));
    } catch (error) {
      if (error.name !== "AbortError") showError(error);
    } finally {
      if (running === mine) {
        byId("stop").disabled = true;
        running = null;
      }
    }
  }

  function output(depth) {
    const tokens = element("p", { className: "tokens", role: "group", "aria-label": `Text at ${depth} loops; arrow keys move between tokens` });
    const bars = element("div", { className: "bars", role: "img", "aria-label": "Loops of each token" });
    const totals = element("p", { className: "totals" });
    const place = element("div", { className: "output", data: { depth } }, element("h3", {}, `${depth} ${depth === 1 ? "loop" : "loops"}`), tokens, bars, totals);
    tokens.addEventListener("keydown", (event) => move(tokens, event));
    return { depth, tokens, bars, totals, place, ids: [], used: [], began: performance.now() };
  }

  async function stream(one, prompt, signal) {
    const body = {
      prompt: prompt.length ? prompt : "", num_loops: one.depth, exit_rule: rule(), return_loops: true, logprobs: 1, stream: true,
      max_tokens: Number(byId("tokens").value), temperature: Number(byId("temperature").value), seed: Number(byId("seed").value),
    };
    one.rule = body.exit_rule;
    one.prompt = prompt;
    for await (const { choices } of events("/v1/completions", body, signal)) {
      for (const choice of choices) {
        choice.token_ids.forEach((id, index) => add(one, id, choice.logprobs.tokens[index], choice.loops[index]));
        if (choice.finish_reason) one.place.dataset.finish = choice.finish_reason;
      }
      total(one);
    }
  }

  function add(one, id, text, used) {
    const index = one.ids.length;
    const token = element("span", { className: "token", role: "button", tabIndex: index ? -1 : 0, title: `${used} loops`, "aria-pressed": "false",
      data: { loops: used, id }, onclick: () => open(one, index) });
    token.textContent = text.startsWith("bytes:") ? "\ufffd" : text === "" ? "\u2205" : text;
    if (used > most) {
      most = used;
      document.querySelectorAll(".token").forEach(paint);
    }
    paint(token);
    one.tokens.append(token);
    const bar = element("i", { title: `${visible(text)}: ${used} loops` });
    bar.style.height = `${Math.max(4, (100 * used) / one.depth)}%`;
    one.bars.append(bar);
    one.ids.push(id);
    one.used.push(used);
  }

  // The most loops that any token of this answer used have the strongest colour.
  function paint(token) {
    const share = 6 + 50 * (token.dataset.loops / most);
    token.style.background = `color-mix(in oklab, var(--accent) ${share.toFixed(0)}%, var(--panel))`;
  }

  function total(one) {
    const count = one.used.length, sum = one.used.reduce((a, b) => a + b, 0);
    if (!count) return;
    const seconds = (performance.now() - one.began) / 1000;
    const saved = 1 - sum / (count * one.depth);
    one.totals.textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${sum} loops, ${(sum / count).toFixed(1)} loops per token, ` +
      `${(count / seconds).toFixed(0)} tokens/s, ${(100 * saved).toFixed(0)}% of the loops saved`;
  }

  function move(tokens, event) {
    const all = [...tokens.children], at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") document.activeElement.click();
    else if (all[to]) {
      all[at].tabIndex = -1;
      all[to].tabIndex = 0;
      all[to].focus();
    } else return;
    event.preventDefault();
  }

  // What the model said when it wrote this token: one pass over all tokens before it.
  async function open(one, index) {
    for (const pressed of document.querySelectorAll('.token[aria-pressed="true"]')) pressed.setAttribute("aria-pressed", "false");
    one.tokens.children[index].setAttribute("aria-pressed", "true");
    const prompt = [...one.prompt, ...one.ids.slice(0, index)];
    try {
      const found = await post("/v1/loops", { prompt: prompt.length ? prompt : "", num_loops: one.depth, exit_rule: one.rule, top: 5, last_only: true });
      const text = visible(one.tokens.children[index].textContent);
      showLens(found.positions[0], `Token ${index + 1}, \u201c${text}\u201d: what the model would have said after each of its ${found.positions[0].loops_used} loops.`, one.rule);
      byId("lens").scrollIntoView({ block: "nearest" });
    } catch (error) { showError(error); }
  }

  async function look() {
    showError(null);
    try {
      const found = await post("/v1/loops", { prompt: byId("prompt").value, num_loops: loops.value, exit_rule: rule(), top: 5 });
      looked = { positions: found.positions, rule: rule(), cursor: found.positions.length - 1 };
      byId("prompt-view").hidden = false;
      draw();
      inspect();
    } catch (error) { showError(error); }
  }

  const map = byId("prompt-map");
  function draw() {
    if (!looked) return;
    // 1e-6 nats and less are white, 10 and more black.
    const shares = looked.positions.map(({ loops: rows }) => rows.map(({ kl_last }) => (Math.log10(Math.max(kl_last, 1e-6)) + 6) / 7));
    drawMap(map, shares, { cursor: looked.cursor });
    map.setAttribute("aria-label", `${shares.length} tokens across, ${shares[0].length} loops down; token ${looked.cursor + 1} is chosen`);
  }
  function inspect() {
    const position = looked.positions[looked.cursor];
    showLens(position, `Token ${looked.cursor + 1} of the prompt, \u201c${visible(position.token)}\u201d: what the model says should follow.`, looked.rule);
  }
  map.addEventListener("click", (event) => {
    if (!looked) return;
    looked.cursor = cellAt(map, event, looked.positions.length, 1)[0];
    draw();
    inspect();
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!looked || (!step && event.key !== "Enter")) return;
    looked.cursor = Math.min(Math.max(looked.cursor + (step ?? 0), 0), looked.positions.length - 1);
    draw();
    inspect();
    event.preventDefault();
  });
  window.addEventListener("resize", draw);
}
