import { byId, showError } from "./page.js";
import { get, useKey } from "./api.js";
import { startChain } from "./chain.js";
import { startText } from "./text.js";
import { watchEngine } from "./engine.js";

async function start() {
  let model;
  try {
    model = (await get("/v1/models")).data[0];
  } catch (error) {
    byId("key-form").hidden = error.status !== 401;
    byId("model").textContent = "";
    showError(error);
    return;
  }
  byId("key-form").hidden = true;
  showError(null);
  const size = new Intl.NumberFormat("en").format(model.parameters);
  byId("model").textContent = `${model.id}: ${size} parameters, ${model.num_loops} loops by default, context of ${model.context} tokens`;
  if (model.task?.facts) startChain(model);
  startText(model);
  watchEngine();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  start();
});
start();
