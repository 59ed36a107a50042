// Line charts as SVG, and maps of positions and loops on a canvas.

const WIDTH = 460, HEIGHT = 120, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 18;
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function label(value) {
  return value !== 0 && (value < 0.01 || value >= 1000) ? value.toExponential(0) : String(Number(value.toPrecision(2)));
}

// A figure of values by loop (null where there is none); `threshold` is drawn as a line.
export function lineChart(title, values, { log = false, threshold = null } = {}) {
  const shown = values.map((value, index) => [index + 1, value]).filter(([, value]) => value !== null && (!log || value > 1e-12));
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  const image = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  figure.append(caption, image);
  if (!shown.length) return figure;
  const scale = log ? Math.log10 : (value) => value;
  const every = shown.map(([, value]) => scale(value));
  if (threshold !== null) every.push(scale(threshold));
  let low = log ? Math.floor(Math.min(...every)) : 0;
  let high = log ? Math.ceil(Math.max(...every)) : Math.max(...every);
  if (high <= low) high = low + 1;
  const x = (loop) => LEFT + ((loop - 1) / Math.max(values.length - 1, 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - scale(value)) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const unscale = (value) => (log ? 10 ** value : value);
  for (const value of [low, (low + high) / 2, high].map(unscale)) {
    image.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    image.append(svg("text", { x: LEFT - 5, y: y(value) + 3, "text-anchor": "end" }, label(value)));
  }
  for (const loop of new Set([1, Math.ceil(values.length / 2), values.length])) {
    image.append(svg("text", { x: x(loop), y: HEIGHT - 4, "text-anchor": loop === 1 ? "start" : loop === values.length ? "end" : "middle" }, loop === 1 ? "loop 1" : loop));
  }
  if (threshold !== null) {
    image.append(svg("line", { class: "threshold", x1: LEFT, x2: WIDTH - RIGHT, y1: y(threshold), y2: y(threshold) }));
  }
  image.append(svg("path", { class: "curve", d: shown.map(([loop, value], i) => `${i ? "L" : "M"}${x(loop).toFixed(1)} ${y(value).toFixed(1)}`).join("") }));
  if (shown.length < 40) {
    for (const [loop, value] of shown) image.append(svg("circle", { class: "dot", r: 2, cx: x(loop), cy: y(value) }));
  }
  return figure;
}

function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// Draws shares [column][row] between 0 and 1; row 0 is at the top. `line` and `cursor` are optional.
export function drawMap(canvas, shares, { name = "--accent", line = null, cursor = null } = {}) {
  const columns = shares.length, rows = Math.max(...shares.map((column) => column.length));
  const width = canvas.clientWidth || 300;
  const height = Math.min(Math.max(rows * 6, 60), 260);
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const [w, h] = [width / columns, height / rows];
  context.fillStyle = colour(name);
  shares.forEach((column, i) => column.forEach((share, j) => {
    context.globalAlpha = Math.max(0, Math.min(1, share));
    context.fillRect(i * w, j * h, Math.max(w - (w > 5 ? 1 : 0), 0.5), Math.max(h - (h > 5 ? 1 : 0), 0.5));
  }));
  context.globalAlpha = 1;
  context.strokeStyle = colour("--ink");
  context.lineWidth = 1.5;
  if (line !== null) {
    context.beginPath();
    context.moveTo(0, line * h);
    context.lineTo(width, line * h);
    context.stroke();
  }
  if (cursor !== null) context.strokeRect(cursor * w + 0.75, 0.75, Math.max(w - 1.5, 1), height - 1.5);
}

// The column and row at a mouse event.
export function cellAt(canvas, event, columns, rows) {
  const box = canvas.getBoundingClientRect();
  const place = (value, size, count) => Math.min(Math.max(Math.floor((value / size) * count), 0), count - 1);
  return [place(event.clientX - box.left, box.width, columns), place(event.clientY - box.top, box.height, rows)];
}
