// The engine's rows as cells that move through loops: continuous batching made visible.

import { byId, element } from "./page.js";
import { events } from "./api.js";

const SHOWN = 32, AGAIN = 2000; // rows; milliseconds until a lost connection is tried again

function row(found) {
  const cells = Array.from({ length: found.num_loops }, (_, i) => {
    const now = found.phase === "loop" && i === found.loop;
    return element("i", { className: now ? "now" : i < found.loop || found.phase === "boundary" ? "run" : "" });
  });
  return element("div", { className: "row", data: { phase: found.phase } },
    element("span", {}, `#${found.request}.${found.sample} +${found.new_tokens}`),
    element("span", { className: "cells" }, ...cells),
    element("span", { className: "phase" }, { boundary: "head", loop: `${found.loop}/${found.num_loops}` }[found.phase] ?? found.phase));
}

export async function watchEngine() {
  for (;;) {
    try {
      for await (const view of events("/engine?stream=true", null)) {
        const waiting = view.rows_waiting ? `, ${view.rows_waiting} waiting` : "";
        const pages = view.pages_total ? `, ${view.pages_used} of ${view.pages_total} pages` : "";
        byId("engine-about").textContent = view.rows.length ? `${view.rows_running} rows in flight${waiting}${pages}; each row is at its own loop` : "idle";
        byId("engine-rows").replaceChildren(...view.rows.slice(0, SHOWN).map(row));
      }
    } catch {
      byId("engine-about").textContent = "no connection";
    }
    await new Promise((done) => setTimeout(done, AGAIN));
  }
}
