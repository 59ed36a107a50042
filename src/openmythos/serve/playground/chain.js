// Chains of lookups: the answer turns right when the loops suffice.

import { byId, element, percent, showError, slider } from "./page.js";
import { post } from "./api.js";
import { cellAt, drawMap } from "./charts.js";
import { showLens } from "./lens.js";

const DELAY = 120; // milliseconds between the last move of a slider and the question

export function startChain(model) {
  const { facts, max_hops: trained, config } = model.task;
  const entities = config.num_entities, relations = config.num_relations;
  let chain = null; // { start, tables, truth, words }
  let table = null; // positions of /v1/loops for this chain
  let asked = 0; // the newest question; answers to older ones are dropped
  let timer = 0;

  byId("chain").hidden = false;
  byId("chain-relations").textContent = relations;
  byId("chain-entities").textContent = entities;
  const most = Math.min(model.max_loops, 64);
  const loops = slider("chain-loops", () => { show(); later(ask); });
  const hops = slider("hops", () => later(build));
  byId("hops").max = Math.min(60, model.context - 1);
  loops.range(most);
  loops.mark("chain-mark", model.num_loops, `the model\u2019s own: ${model.num_loops}`);
  hops.mark("hops-mark", trained, `longest in training: ${trained}`);
  byId("strip-end").textContent = `${most} loops`;
  byId("strip").replaceChildren(...Array.from({ length: most }, (_, i) =>
    element("button", { type: "button", onclick: () => loops.set(i + 1), "aria-label": `${i + 1} loops` })));
  byId("new-chain").addEventListener("click", build);
  const map = byId("chain-map");
  map.addEventListener("click", (event) => {
    if (table) lens(cellAt(map, event, table.length, most)[0]);
  });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && table) lens(table.length - 1);
  });
  window.addEventListener("resize", draw);

  function later(work) {
    clearTimeout(timer);
    timer = setTimeout(work, DELAY);
  }

  async function build() {
    const draw_ = (count) => Math.floor(Math.random() * count);
    const start = draw_(entities);
    const tables = Array.from({ length: hops.value }, () => draw_(relations));
    const truth = [];
    tables.reduce((entity, relation) => { truth.push(facts[relation][entity]); return truth.at(-1); }, start);
    chain = { start, tables, truth, words: [`e${start}`, ...tables.map((r) => `r${r}`)].join(" ") };
    table = null;
    show();
    try {
      const mine = chain;
      const found = await post("/v1/loops", { prompt: chain.words, num_loops: most, top: 1 });
      if (mine !== chain) return;
      table = found.positions.slice(1);
      showError(null);
      show();
      await ask();
    } catch (error) { showError(error); }
  }

  // The headline is an answer of the API at exactly this number of loops.
  async function ask() {
    if (!chain) return;
    const mine = ++asked, count = loops.value, end = chain.truth.at(-1);
    try {
      const answer = await post("/v1/completions", { prompt: chain.words, num_loops: count, max_tokens: 1, temperature: 0, logprobs: 1 });
      if (mine !== asked) return;
      const { text, logprobs } = answer.choices[0];
      const said = text.trim(), right = said === `e${end}`;
      const verdict = byId("verdict");
      verdict.className = `verdict ${right ? "right" : "wrong"}`;
      Object.assign(verdict.dataset, { answer: said, right, loops: count });
      verdict.replaceChildren(`${chain.tables.length} lookups, ${count} ${count === 1 ? "loop" : "loops"}: the model says `,
        element("span", { className: "says" }, said), ` (${percent(Math.exp(logprobs.token_logprobs[0]))} sure). `,
        right ? "That is right." : `The chain ends at e${end}.`);
      showError(null);
    } catch (error) { showError(error); }
  }

  const says = (place, count) => table[place].loops[Math.min(count, table[place].loops.length) - 1].top[0];

  function show() {
    if (!chain) return;
    const count = loops.value, end = chain.truth.at(-1);
    byId("steps").replaceChildren(
      element("li", {}, element("span", { className: "table" }, "start"), `e${chain.start}`),
      ...chain.tables.map((relation, place) => {
        const found = table && says(place, count);
        const right = found && found.id === chain.truth[place];
        return element("li", { className: found ? (right ? "right" : "wrong") : "", title: `true: e${chain.truth[place]}` },
          element("span", { className: "table" }, `r${relation}`), found ? found.token.trim() : "\u2026");
      }));
    [...byId("strip").children].forEach((cell, index) => {
      const found = table && says(table.length - 1, index + 1);
      cell.className = found && found.id === end ? "right" : "";
      cell.title = found ? `${index + 1} loops: ${found.token.trim()}, ${percent(found.prob)} sure` : "";
      cell.setAttribute("aria-pressed", String(index + 1 === count));
    });
    draw();
  }

  function draw() {
    if (!table) return;
    const sure = table.map((position, place) => position.loops.map(({ top }) => (top[0].id === chain.truth[place] ? top[0].prob : 0)));
    drawMap(map, sure, { name: "--right", line: loops.value });
    map.setAttribute("aria-label", `${table.length} lookups across, ${most} loops down`);
  }

  async function lens(place) {
    try {
      const words = chain.words.split(" ").slice(0, place + 2).join(" ");
      const found = await post("/v1/loops", { prompt: words, num_loops: most, top: 5, last_only: true });
      showLens(found.positions[0], `After ${place + 1} lookups; the right entity is e${chain.truth[place]}.`);
      byId("lens").scrollIntoView({ block: "nearest" });
    } catch (error) { showError(error); }
  }

  hops.set(12);
  loops.set(4);
  build();
}
