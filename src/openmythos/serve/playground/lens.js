// One position, loop by loop: likely tokens, and how much each loop changed.

import { byId, element, percent, visible } from "./page.js";
import { lineChart } from "./charts.js";

// `position` is one of the positions of /v1/loops; `rule` the exit rule in use.
export function showLens(position, about, rule = null) {
  const last = position.loops.at(-1).top[0];
  byId("lens").hidden = false;
  byId("lens-about").textContent = about;
  const best = position.loops[0].top.length;
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "loop"),
    ...Array.from({ length: best }, (_, i) => element("th", { scope: "col" }, i ? `${i + 1}.` : "best token"))));
  const body = element("tbody");
  for (const row of position.loops) {
    const cells = row.top.map(({ id, token, prob }) => element("td", { className: id === last.id ? "same" : "" },
      visible(token), " ", element("small", {}, percent(prob))));
    body.append(element("tr", { data: { loop: row.loop, best: row.top[0].id } }, element("th", { scope: "row" }, String(row.loop)), ...cells));
  }
  byId("lens-table").replaceChildren(head, body);
  const line = (name) => (rule?.kind === name || (rule?.kind === "kl_entropy" && name === "kl") ? rule.threshold : null);
  byId("lens-charts").replaceChildren(
    lineChart("State change |h\u2032 \u2212 h| / |h\u2032| (log axis)", position.loops.map((row) => row.change), { log: true, threshold: line("state_change") }),
    lineChart("KL to the loop before, nats (log axis)", position.loops.map((row) => row.kl), { log: true, threshold: line("kl") }),
    lineChart("Entropy, nats", position.loops.map((row) => row.entropy)),
  );
}
