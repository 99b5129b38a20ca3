"use strict";
// The script of the page. `data` is what jaxattn/viz/pages.py wrote; nothing else is read, and nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const made = (tag, text = "", name = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className: name });
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const shown = (x) =>
  (Number.isNaN(x)
    ? "not finite"
    : x === 0
      ? "0"
      : Math.abs(x) < 0.001 || Math.abs(x) >= 1e5
        ? x.toExponential(2)
        : String(+x.toPrecision(4))
  ).replaceAll("-", "−");

// ---- Numbers: rows of one byte per number, from the first to the last that is not zero; the first column apart.

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
const whole = (text) => new Uint16Array(bytes(text).buffer);

class Packed {
  constructor(given) {
    [this.rows, this.columns] = given.shape.slice(-2);
    this.count = given.shape.slice(0, -2).reduce((x, y) => x * y, 1);
    this.first = floats(given.first);
    this.high = floats(given.high);
    this.low = given.low ? floats(given.low) : new Float32Array(this.high.length);
    this.signed = Boolean(given.low) || this.first.some((x) => x < 0);
    this.kind = this.signed ? "signed" : "root";
    this.start = given.start && whole(given.start);
    this.index = given.index && whole(given.index);
    this.length = whole(given.length);
    this.codes = bytes(given.codes);
    this.offset = new Uint32Array(this.length.length + 1);
    this.length.forEach((length, row) => (this.offset[row + 1] = this.offset[row] + length));
  }
  // Calls visit(i, j, value) for what is not zero in one of the matrices. Code 255 stands for what is not finite.
  each(number, visit) {
    for (let i = 0; i < this.rows; i++) {
      const row = number * this.rows + i,
        low = this.low[row],
        step = (this.high[row] - low) / 254;
      if (this.first[row] !== 0) visit(i, 0, this.first[row]);
      for (let n = this.offset[row]; n < this.offset[row + 1]; n++) {
        const j = 1 + (this.index ? this.index[n] : this.start[row] + n - this.offset[row]);
        visit(i, j, this.codes[n] === 255 ? NaN : low + this.codes[n] * step);
      }
    }
  }
  dense(number) {
    const values = new Float32Array(this.rows * this.columns);
    this.each(number, (i, j, x) => (values[i * this.columns + j] = x));
    return values;
  }
}

for (const example of data.examples) {
  example.weights = new Packed(example.weights);
  example.key_tokens ??= example.tokens;
  if (example.queries) [example.queries, example.keys] = [floats(example.queries), floats(example.keys)];
  for (const matrix of example.matrices) matrix.values = new Packed(matrix.values);
}

// ---- What is shown

const state = {
  example: 0,
  layer: 0,
  head: 0,
  hide: false,
  scale: "all",
  chosen: new Set(),
  query: null,
  key: null,
  pair: null,
};
const now = () => data.examples[state.example];
const chosenHead = () => state.layer * now().heads.length + state.head;
const nameOfHead = () => `Layer ${now().layers[state.layer]}, head ${now().heads[state.head]}`;
const hidden = () =>
  !state.hide
    ? ""
    : now().weights.signed
      ? " · first key hidden, rows as they were (weights have both signs)"
      : " · first key hidden, rows renormalised";

// Calls visit(i, j, weight) as the page shows the weights: with the first key hidden, rows keep their former total.
function eachWeight(number, visit) {
  const weights = now().weights;
  if (!state.hide) return weights.each(number, visit);
  const total = new Float64Array(weights.rows),
    rest = new Float64Array(weights.rows);
  weights.each(number, (i, j, x) => {
    total[i] += x;
    if (j) rest[i] += x;
  });
  weights.each(number, (i, j, x) => {
    if (j) visit(i, j, weights.signed ? x : rest[i] > 0 ? x * (total[i] / rest[i]) : 0);
  });
}

function weightsNow() {
  const { rows, columns } = now().weights,
    values = new Float32Array(rows * columns);
  eachWeight(chosenHead(), (i, j, x) => (values[i * columns + j] = x));
  return values;
}

// ---- Colours: "root" of weights, by the square root, so that small ones show; "even" of other numbers from 0 on;
// "signed" by size, red below zero.

const RAMPS = {
  light: {
    plain: ["#fbfaf7", "#a9c3dc", "#2f5d8a", "#16324f"],
    signed: ["#8f2d1a", "#c8553d", "#f4f3ee", "#2f5d8a", "#16324f"],
    missing: [150, 150, 150],
  },
  dark: {
    plain: ["#16191e", "#264868", "#5b94c9", "#e2f0ff"],
    signed: ["#ffc2b0", "#d9694f", "#20242a", "#5b94c9", "#cfe5ff"],
    missing: [110, 110, 110],
  },
};

function ramp(stops) {
  const colours = stops.map((stop) => [1, 3, 5].map((place) => parseInt(stop.slice(place, place + 2), 16)));
  return Array.from({ length: 256 }, (_, n) => {
    const place = (n / 255) * (colours.length - 1),
      lower = Math.min(Math.floor(place), colours.length - 2);
    return colours[lower].map((x, channel) => Math.round(x + (colours[lower + 1][channel] - x) * (place - lower)));
  });
}

const dark = () =>
  (document.documentElement.dataset.theme ??
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
let ramps;
function chooseRamps() {
  const { plain, signed, missing } = RAMPS[dark() ? "dark" : "light"];
  ramps = { plain: ramp(plain), signed: ramp(signed), missing };
}

function colour(x, most, kind) {
  if (Number.isNaN(x)) return ramps.missing;
  const share = most > 0 ? clamp(x / most, -1, 1) : 0;
  if (kind === "signed") return ramps.signed[Math.round((share + 1) * 127.5)];
  return ramps.plain[Math.round((kind === "root" ? Math.sqrt(Math.max(share, 0)) : Math.max(share, 0)) * 255)];
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
const ink = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#16191e" : "#ffffff");
const blue = () => (dark() ? "#7db4e6" : "#2f5d8a");
const red = () => (dark() ? "#ff9a7f" : "#c8553d");

// A canvas of width x height CSS pixels, sharp on any screen; returns its context.
function prepared(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 8000 / Math.max(width, height));
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = "11px ui-monospace, monospace";
  context.fillStyle = getComputedStyle(canvas).color;
  context.imageSmoothingEnabled = false;
  return context;
}

// A copy of what is drawn, and back: marks are drawn over it.
function copied(canvas) {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}

function restored(canvas, copy) {
  const context = canvas.getContext("2d");
  context.save();
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(copy, 0, 0);
  context.restore();
  return context;
}

// Of several numbers that fall on one pixel the one of largest size is kept, so that thin stripes stay visible.
function larger(pixels, place, x) {
  if (Number.isNaN(x) || Math.abs(x) > Math.abs(pixels[place])) pixels[place] = x;
}

function picture(pixels, height, width, mostOf, kind) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d"),
    image = context.createImageData(width, height);
  for (let n = 0; n < pixels.length; n++) {
    image.data.set(colour(pixels[n], mostOf(Math.floor(n / width)), kind), 4 * n);
    image.data[4 * n + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const sizeOf = (values) => values.reduce((most, x) => (Math.abs(x) > most ? Math.abs(x) : most), 0);

// Text in as many pixels as there are, with an ellipsis where it is longer.
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  while (text.length > 1 && context.measureText(`${text}…`).width > width) text = text.slice(0, -1);
  return `${text}…`;
}

// ---- All heads

const grid = { cell: 0, left: 34, top: 18, hover: null };

function drawGrid() {
  const { layers, heads, weights } = now(),
    canvas = at("grid"),
    space = canvas.parentElement.clientWidth;
  grid.cell = clamp(Math.floor((space - grid.left - 2) / heads.length), 22, 112);
  const { cell, left, top } = grid,
    inner = cell - 3;
  const context = prepared(canvas, left + heads.length * cell, top + layers.length * cell);
  const sharp = Math.round(inner * (window.devicePixelRatio || 1));
  const height = Math.min(sharp, weights.rows),
    width = Math.min(sharp, weights.columns);
  const pooled = Array.from({ length: weights.count }, (_, number) => {
    const pixels = new Float32Array(height * width);
    eachWeight(number, (i, j, x) =>
      larger(pixels, Math.floor((i * height) / weights.rows) * width + Math.floor((j * width) / weights.columns), x),
    );
    return pixels;
  });
  const sizes = pooled.map(sizeOf),
    most = Math.max(...sizes);
  grid.most = most;
  pooled.forEach((pixels, number) => {
    const row = (i) => sizeOf(pixels.subarray(i * width, (i + 1) * width));
    const rows = state.scale === "row" ? Array.from({ length: height }, (_, i) => row(i)) : [];
    const mostOf = { all: () => most, head: () => sizes[number], row: (i) => rows[i] }[state.scale];
    const x = left + (number % heads.length) * cell,
      y = top + Math.floor(number / heads.length) * cell;
    context.drawImage(picture(pixels, height, width, mostOf, weights.kind), x, y, inner, inner);
  });
  context.textAlign = "center";
  const every = Math.ceil(24 / cell);
  heads.forEach((head, n) => n % every || context.fillText(head, left + n * cell + inner / 2, top - 5));
  context.textAlign = "right";
  layers.forEach((layer, n) => context.fillText(layer, left - 6, top + n * cell + inner / 2 + 4));
  grid.drawn = copied(canvas);
  markGrid();
}

function markGrid() {
  const canvas = at("grid"),
    context = restored(canvas, grid.drawn),
    { cell, left, top } = grid;
  const box = (layer, head, style, width) => {
    Object.assign(context, { strokeStyle: style, lineWidth: width });
    context.strokeRect(left + head * cell - 1, top + layer * cell - 1, cell - 1, cell - 1);
  };
  if (grid.hover) box(...grid.hover, blue(), 1);
  box(state.layer, state.head, red(), 2);
  canvas.setAttribute(
    "aria-label",
    `All heads, ${now().layers.length} layers of ${now().heads.length}: ${nameOfHead()} is shown. ` +
      "Arrow keys choose another.",
  );
}

// Scrolls to the head that is shown.
function reveal() {
  const box = at("grid").parentElement,
    { cell, left, top } = grid,
    y = top + state.layer * cell,
    x = left + state.head * cell;
  if (y < box.scrollTop || y + cell > box.scrollTop + box.clientHeight) box.scrollTop = y - top;
  if (x < box.scrollLeft || x + cell > box.scrollLeft + box.clientWidth) box.scrollLeft = x - left;
}

function headUnder(event) {
  const layer = Math.floor((event.offsetY - grid.top) / grid.cell),
    head = Math.floor((event.offsetX - grid.left) / grid.cell);
  return layer >= 0 && head >= 0 && layer < now().layers.length && head < now().heads.length ? [layer, head] : null;
}

// ---- A matrix with labels, a cursor and a read-out

class Matrix {
  constructor(parent, { label, moved = () => {}, kept = () => {}, cell = 44, tall = 560 }) {
    this.box = made("div", "", "matrix");
    this.canvas = made("canvas");
    Object.assign(this, { moved, kept, label, largest: cell, tall, cursor: null });
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.readout = made("p", "", "readout");
    this.readout.setAttribute("role", "status");
    this.legend = made("div", "", "legend");
    const scroll = made("div", "", "scroll");
    scroll.style.maxHeight = "none";
    scroll.append(this.canvas);
    this.box.append(scroll, this.legend, this.readout);
    parent.append(this.box);
    this.canvas.addEventListener("pointermove", (event) => this.move(this.under(event)));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("click", (event) => {
      const place = this.under(event);
      if (place) this.kept(...place);
    });
    this.canvas.addEventListener("keydown", (event) => this.pressed(event));
    this.canvas.addEventListener("blur", () => this.move(null));
  }
  // values [rows, columns]; read(i, j, value) is the text of the read-out; mostOf(i) the number of the darkest colour.
  show({ values, rows, columns, kind, read, mostOf, legend, space }) {
    Object.assign(this, { values, rows, columns, read });
    this.canvas.setAttribute(
      "aria-label",
      `${this.label()}: ${rows.length} rows, ${columns.length} columns. Arrow keys choose a cell.`,
    );
    const context = this.canvas.getContext("2d");
    context.font = "11px ui-monospace, monospace";
    const widest = (texts) => Math.min(Math.max(...texts.map((text) => context.measureText(text).width)), 84);
    const names = widest(columns),
      width = space ?? (this.box.parentElement.clientWidth || 320);
    this.left = widest(rows) + 8;
    const across = clamp((width - this.left - 2) / columns.length, 0.5, this.largest);
    const down = clamp(Math.min(across, this.tall / rows.length), 0.5, this.largest);
    Object.assign(this, { across: Math.min(across, down * 4), down });
    const upright = names + 6 > this.across;
    this.top = upright ? names + 8 : 16;
    const drawn = prepared(
      this.canvas,
      this.left + columns.length * this.across + 1,
      this.top + rows.length * this.down + 1,
    );
    const ratio = window.devicePixelRatio || 1;
    const height = Math.min(rows.length, Math.max(1, Math.round(rows.length * this.down * ratio)));
    const wide = Math.min(columns.length, Math.max(1, Math.round(columns.length * this.across * ratio)));
    const pixels = new Float32Array(height * wide),
      most = new Float64Array(height);
    for (let i = 0; i < rows.length; i++) {
      const line = Math.floor((i * height) / rows.length);
      most[line] = Math.max(most[line], mostOf(i));
      for (let j = 0; j < columns.length; j++)
        larger(pixels, line * wide + Math.floor((j * wide) / columns.length), values[i * columns.length + j]);
    }
    drawn.drawImage(
      picture(pixels, height, wide, (i) => most[i], kind),
      this.left,
      this.top,
      columns.length * this.across,
      rows.length * this.down,
    );
    drawn.textBaseline = "middle";
    drawn.textAlign = "right";
    const every = this.down < 11 ? Math.ceil(15 / this.down) : 1;
    const each = upright ? (this.across < 11 ? Math.ceil(15 / this.across) : 1) : Math.ceil((names + 6) / this.across);
    rows.forEach(
      (text, i) =>
        i % every || drawn.fillText(fitted(drawn, text, 84), this.left - 5, this.top + (i + 0.5) * this.down),
    );
    columns.forEach((text, j) => {
      if (j % each) return;
      drawn.save();
      drawn.translate(this.left + (j + 0.5) * this.across, this.top - 5);
      if (upright) drawn.rotate(-Math.PI / 2);
      drawn.textAlign = upright ? "left" : "center";
      drawn.fillText(fitted(drawn, text, 84), 0, upright ? 0 : -3);
      drawn.restore();
    });
    this.drawn = copied(this.canvas);
    this.legend.replaceChildren(...legend);
    if (this.cursor && (this.cursor[0] >= rows.length || this.cursor[1] >= columns.length)) this.cursor = null;
    this.mark();
  }
  mark() {
    const context = restored(this.canvas, this.drawn);
    if (!this.cursor) return void (this.readout.textContent = "\u00a0");
    const [i, j] = this.cursor,
      style = red();
    Object.assign(context, { strokeStyle: style, lineWidth: 1 });
    const x = this.left + j * this.across,
      y = this.top + i * this.down;
    context.globalAlpha = 0.5;
    context.strokeRect(this.left, y, this.columns.length * this.across, this.down);
    context.strokeRect(x, this.top, this.across, this.rows.length * this.down);
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.strokeRect(x, y, this.across, this.down);
    this.readout.textContent = this.read(i, j, this.values[i * this.columns.length + j]);
  }
  move(place) {
    if (String(place) === String(this.cursor)) return;
    this.cursor = place;
    this.mark();
    this.moved(place);
  }
  under(event) {
    const i = Math.floor((event.offsetY - this.top) / this.down),
      j = Math.floor((event.offsetX - this.left) / this.across);
    return i >= 0 && j >= 0 && i < this.rows.length && j < this.columns.length ? [i, j] : null;
  }
  pressed(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const [i, j] = this.cursor ?? [0, 0];
    if (step)
      this.move(
        this.cursor
          ? [clamp(i + step[0], 0, this.rows.length - 1), clamp(j + step[1], 0, this.columns.length - 1)]
          : [0, 0],
      );
    else if (event.key === "Enter" && this.cursor) this.kept(i, j);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

// What the colours of a matrix mean: those from −high or 0 to high.
function legendOf(high, kind) {
  const bar = made("canvas");
  const context = prepared(bar, 100, 10);
  for (let n = 0; n < 100; n++) {
    context.fillStyle = css(colour(kind === "signed" ? (n / 99) * 2 - 1 : n / 99, 1, kind));
    context.fillRect(n, 0, 1, 10);
  }
  bar.setAttribute("aria-hidden", "true");
  return [
    made("span", kind === "signed" ? `−${high}` : "0"),
    bar,
    made("span", high),
    made("span", kind === "root" ? "by the square root" : ""),
  ];
}

// ---- One head: the matrix, and the tokens with lines

const quoted = (token, place) => `${place} “${token}”`;
const numbered = (tokens) => tokens.map((token, n) => `${n} ${token}`);

const matrix = new Matrix(at("matrix"), {
  label: () => `Weights of ${nameOfHead()}`,
  moved: (place) => {
    point(place ? place[0] : null, place ? place[1] : null);
  },
  kept: (i, j) => {
    state.pair = [i, j];
    drawPair();
  },
});

function drawHead() {
  const { tokens, key_tokens, weights } = now(),
    values = weightsNow(),
    columns = key_tokens.length;
  state.values = values;
  at("one-title").textContent = nameOfHead() + hidden();
  at("columns-title").textContent = `${nameOfHead()}: tokens${hidden()}`;
  const sizes = tokens.map((_, i) => sizeOf(values.subarray(i * columns, (i + 1) * columns)));
  const size = Math.max(...sizes),
    most = state.scale === "all" ? grid.most : size;
  const high = state.scale === "row" ? "row maximum" : shown(most);
  matrix.show({
    values,
    rows: numbered(tokens),
    columns: numbered(key_tokens),
    kind: weights.kind,
    mostOf: state.scale === "row" ? (i) => sizes[i] : () => most,
    read: (i, j, x) =>
      `query ${quoted(tokens[i], i)} → key ${quoted(key_tokens[j], j)}: weight ${shown(x)}; ` +
      `largest of the row ${shown(sizes[i])}`,
    legend: legendOf(high, weights.kind),
  });
}

function fillTokens() {
  for (const [id, tokens] of [
    ["queries", now().tokens],
    ["keys", now().key_tokens],
  ]) {
    at(id).replaceChildren(
      ...tokens.map((token, n) => {
        const item = made("li", token),
          number = made("small", id === "keys" ? ` ${n}` : `${n} `);
        item.id = `${id}-${n}`;
        item.setAttribute("role", "option");
        item.setAttribute("aria-selected", "false");
        item.title = quoted(token, n);
        id === "keys" ? item.append(number) : item.prepend(number);
        return item;
      }),
    );
  }
}

// Shades the tokens and draws the lines of what is pointed at, or chosen, or of all.
function drawTokens() {
  const { tokens, key_tokens } = now(),
    columns = key_tokens.length,
    values = state.values,
    height = 20; // of a token, as in page.css
  const { query, key, chosen } = state,
    byKey = query === null && key !== null;
  const from = byKey
    ? tokens.map((_, i) => i)
    : query !== null
      ? [query]
      : chosen.size
        ? [...chosen].sort((a, b) => a - b)
        : tokens.map((_, i) => i);
  const all = query === null && key === null && !chosen.size;
  const received = new Float64Array(columns);
  for (const i of from) for (let j = 0; j < columns; j++) received[j] += values[i * columns + j];
  const most = sizeOf(values) || 1,
    top = sizeOf(received) || 1;
  const tint = (x) => `color-mix(in srgb, ${x < 0 ? red() : blue()} ${55 * Math.min(Math.abs(x), 1)}%, transparent)`;
  [...at("keys").children].forEach((item, j) => {
    item.style.background = all || byKey ? "" : tint(received[j] / top);
    item.classList.toggle("here", j === key);
  });
  [...at("queries").children].forEach((item, i) => {
    item.style.background = byKey ? tint(values[i * columns + key] / most) : "";
    item.classList.toggle("here", i === query);
    item.setAttribute("aria-selected", chosen.has(i));
  });
  const canvas = at("lines"),
    tall = Math.max(tokens.length, columns) * height;
  canvas.style.width = "0";
  const width = Math.max(at("tokens").clientWidth - at("queries").offsetWidth - at("keys").offsetWidth - 2, 60);
  const context = prepared(canvas, width, tall);
  context.lineWidth = 1.5;
  for (const i of from)
    for (let j = 0; j < columns; j++) {
      const x = values[i * columns + j],
        share = Math.abs(x) / most;
      if (!(share > 0.01) || (byKey && j !== key)) continue;
      context.globalAlpha = all ? 0.6 * share : Math.sqrt(share);
      context.strokeStyle = x < 0 ? red() : blue();
      context.beginPath();
      context.moveTo(2, (i + 0.5) * height);
      context.lineTo(width - 2, (j + 0.5) * height);
      context.stroke();
    }
  const best = [...received.keys()]
    .sort((a, b) => received[b] - received[a])
    .slice(0, 5)
    .filter((j) => received[j] > 0);
  const list = best.map((j) => `${quoted(key_tokens[j], j)} ${shown(received[j])}`).join(", ");
  const one = `Query ${quoted(tokens[from[0]], from[0])}`;
  const rows = `${from.length === 1 ? one : `Sum of the rows of ${from.length} queries`}: ${list || "no weight"}.`;
  const column = byKey ? `Key ${quoted(key_tokens[key], key)} receives ${shown(received[key])} in all.` : "";
  at("sum").textContent = all ? "All rows." : byKey ? column : rows;
  at("clear").disabled = !chosen.size;
}

function point(query, key) {
  Object.assign(state, { query, key });
  drawTokens();
  drawPair();
}

// ---- Queries and keys of a pair

const products = new Matrix(at("products"), {
  label: () => `Products of channels, ${nameOfHead()}`,
  cell: 14,
  tall: 420,
});

// The pair that is pointed at, or that was kept, or the last query with the key that it weighs most.
function pairNow() {
  const columns = now().key_tokens.length;
  const [i, j] =
    state.query !== null && state.key !== null
      ? [state.query, state.key]
      : (state.pair ?? [now().tokens.length - 1, null]);
  if (j !== null) return [i, j];
  const row = state.values.subarray(i * columns, (i + 1) * columns);
  return [i, row.reduce((best, x, n) => (x > row[best] ? n : best), 0)];
}

function drawPair() {
  const example = now(),
    { tokens, key_tokens, heads, channels, key_heads, scale } = example;
  at("pair").hidden = !example.queries;
  if (!example.queries) return;
  const [i, j] = pairNow(),
    columns = key_tokens.length;
  const group = Math.floor(state.head / (heads.length / key_heads));
  const q = example.queries.subarray(
    (chosenHead() * tokens.length + i) * channels,
    (chosenHead() * tokens.length + i + 1) * channels,
  );
  const keyOf = (place) => {
    const start = ((state.layer * key_heads + group) * columns + place) * channels;
    return example.keys.subarray(start, start + channels);
  };
  const k = keyOf(j),
    product = q.map((x, d) => x * k[d]),
    dot = product.reduce((x, y) => x + y, 0);
  at("pair-title").textContent = `${nameOfHead()}: query ${quoted(tokens[i], i)}, key ${quoted(key_tokens[j], j)}`;
  const canvas = at("bars"),
    width = canvas.parentElement.clientWidth - 34,
    height = 78;
  const context = prepared(canvas, Math.max(width, 200), 3 * height);
  [
    ["q", q],
    ["k", k],
    ["q ⊙ k", product],
  ].forEach(([name, values], n) => {
    const size = sizeOf(values) || 1,
      middle = n * height + height / 2 + 6,
      half = height / 2 - 12,
      step = (width - 4) / channels;
    context.fillStyle = getComputedStyle(canvas).color;
    context.fillText(`${name}   ±${shown(size)}`, 0, n * height + 11);
    context.globalAlpha = 0.3;
    context.fillRect(0, middle, width, 1);
    context.globalAlpha = 1;
    values.forEach((x, d) => {
      context.fillStyle = x < 0 ? red() : blue();
      const tall = (Math.abs(x) / size) * half;
      context.fillRect(d * step, x < 0 ? middle : middle - tall, Math.max(step - 1, 0.7), tall);
    });
  });
  const weight = state.values[i * columns + j];
  const text = `q · k = ${shown(dot)}; times ${shown(scale)} = ${shown(dot * scale)}; weight ${shown(weight)}`;
  at("dot").textContent = text;
  canvas.setAttribute("aria-label", text);
  const values = new Float32Array(columns * channels);
  for (let s = 0; s < columns; s++) keyOf(s).forEach((x, d) => (values[s * channels + d] = q[d] * x));
  const size = sizeOf(values);
  products.show({
    values,
    rows: numbered(key_tokens),
    columns: Array.from({ length: channels }, (_, d) => String(d)),
    kind: "signed",
    mostOf: () => size,
    read: (s, d, x) => `key ${quoted(key_tokens[s], s)}, channel ${d}: ${shown(x)}`,
    legend: legendOf(shown(size), "signed"),
  });
}

// ---- Statistics, lens, other matrices

function drawStatistics() {
  const { statistics, layers, heads } = now();
  at("statistics").hidden = !statistics.length;
  at("maps").replaceChildren();
  for (const { name, values } of statistics) {
    const box = made("div");
    box.append(made("h3", name));
    at("maps").append(box);
    const numbers = Float32Array.from(values.flat(), (x) => x ?? NaN),
      kind = numbers.some((x) => x < 0) ? "signed" : "even",
      size = sizeOf(numbers);
    const map = new Matrix(box, {
      label: () => `${name} of each head`,
      cell: heads.length > 6 ? 18 : 26,
      tall: 420,
      kept: (layer, head) => choose(layer, head),
    });
    map.show({
      values: numbers,
      rows: layers.map(String),
      columns: heads.map(String),
      kind,
      mostOf: () => size,
      space: Math.min(at("maps").clientWidth, 520),
      read: (i, j, x) => `layer ${layers[i]}, head ${heads[j]}: ${shown(x)}`,
      legend: legendOf(shown(size), kind),
    });
  }
}

function drawLens() {
  const { lens, tokens } = now();
  at("lens").hidden = !lens;
  if (!lens) return;
  const ahead = lens.ahead;
  const column = ahead
    ? `Column t has read the tokens up to t and predicts the token at t+${ahead}.`
    : "Column t names the token at t.";
  at("lens-about").textContent =
    `Each row reads the residual stream after a layer as if it were the output. ${column} ` +
    "The stronger the colour, the likelier. A red frame marks a prediction that is the token of the text.";
  const table = at("table"),
    head = made("thead"),
    body = made("tbody");
  const wanted = tokens.map((_, t) => tokens[t + ahead]);
  const line = (title, texts) => {
    const row = made("tr");
    row.append(...[title, ...texts].map((text) => Object.assign(made("th", text), { scope: "col" })));
    head.append(row);
  };
  line(
    "reads",
    tokens.map((token, t) => `${t} ${token}`),
  );
  if (ahead)
    line(
      "next",
      wanted.map((token) => token ?? "—"),
    );
  lens.rows.forEach((name, r) => {
    const row = made("tr");
    row.append(Object.assign(made("th", name), { scope: "row" }));
    lens.tokens[r].forEach((best, t) => {
      const cell = made("td", best[0]),
        shade = colour(lens.probabilities[r][t][0], 1, "even");
      Object.assign(cell.style, { background: css(shade), color: ink(shade) });
      if (best[0] === wanted[t]) cell.className = "right";
      cell.dataset.place = `${r},${t}`;
      row.append(cell);
    });
    body.append(row);
  });
  table.replaceChildren(head, body);
}

function readLens(event) {
  const place = event.target.dataset?.place;
  if (!place) return;
  const [r, t] = place.split(",").map(Number),
    { lens, tokens } = now();
  const best = lens.tokens[r][t].map((token, n) => `“${token}” ${shown(lens.probabilities[r][t][n])}`).join(", ");
  at("cell").textContent = `${lens.rows[r]}, at token ${quoted(tokens[t], t)}: ${best}`;
}

function drawMatrices() {
  const { matrices, tokens, key_tokens } = now();
  at("others").hidden = !matrices.length;
  at("matrices").replaceChildren();
  for (const { name, values } of matrices) {
    const box = made("div");
    box.append(made("h3", name));
    at("matrices").append(box);
    const numbers = values.dense(0),
      { rows, columns, kind } = values,
      size = sizeOf(numbers);
    const named = (count, tokens) =>
      count === tokens.length ? numbered(tokens) : Array.from({ length: count }, (_, n) => String(n));
    const view = new Matrix(box, { label: () => name, tall: 460 });
    view.show({
      values: numbers,
      rows: named(rows, tokens),
      columns: named(columns, key_tokens),
      kind,
      mostOf: () => size,
      space: Math.min(at("matrices").clientWidth, 560),
      read: (i, j, x) => `row ${view.rows[i]}, column ${view.columns[j]}: ${shown(x)}`,
      legend: legendOf(shown(size), kind),
    });
  }
}

// ---- From one head, text or look to another

function drawAll() {
  chooseRamps();
  drawGrid();
  drawHead();
  drawTokens();
  drawPair();
  drawStatistics();
  drawLens();
  drawMatrices();
}

function choose(layer, head) {
  state.layer = clamp(layer, 0, now().layers.length - 1);
  state.head = clamp(head, 0, now().heads.length - 1);
  at("layer").selectedIndex = state.layer;
  at("head").selectedIndex = state.head;
  markGrid();
  reveal();
  drawHead();
  drawTokens();
  drawPair();
  remember();
}

function open(number) {
  Object.assign(state, { example: number, query: null, key: null, pair: null, chosen: new Set() });
  const { layers, heads, notes, queries } = now();
  at(queries ? "columns" : "pair").after(at("statistics")); // where there is room
  state.layer = clamp(state.layer, 0, layers.length - 1);
  state.head = clamp(state.head, 0, heads.length - 1);
  for (const [id, names] of [
    ["layer", layers],
    ["head", heads],
  ]) {
    at(id).replaceChildren(...names.map((name) => made("option", name)));
    at(id).selectedIndex = state[id];
  }
  at("example").selectedIndex = number;
  at("notes").replaceChildren(...notes.map((note) => made("li", note)));
  fillTokens();
  drawAll();
  reveal();
  remember();
}

// The address holds what is shown.
function remember() {
  const said = new URLSearchParams({ layer: now().layers[state.layer], head: now().heads[state.head] });
  if (state.example) said.set("text", now().name);
  if (state.hide) said.set("hide", "1");
  if (state.scale !== "all") said.set("colours", state.scale);
  if (document.documentElement.dataset.theme) said.set("theme", document.documentElement.dataset.theme);
  history.replaceState(null, "", `#${said}`);
}

function recall() {
  const said = new URLSearchParams(location.hash.slice(1));
  const place = (names, wanted) =>
    Math.max(
      0,
      names.findIndex((name) => String(name) === wanted),
    );
  const number = place(
    data.examples.map(({ name }) => name),
    said.get("text"),
  );
  state.layer = place(data.examples[number].layers, said.get("layer"));
  state.head = place(data.examples[number].heads, said.get("head"));
  state.hide = at("hide").checked = said.get("hide") === "1";
  state.scale = ["head", "row"].includes(said.get("colours")) ? said.get("colours") : "all";
  at("scale").value = state.scale;
  if (["light", "dark"].includes(said.get("theme"))) document.documentElement.dataset.theme = said.get("theme");
  open(number);
}

function turn() {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  drawAll();
  remember();
}

function hide() {
  state.hide = at("hide").checked;
  drawGrid();
  choose(state.layer, state.head);
}

function pressed(event) {
  if (
    at("help").open ||
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    ["SELECT", "INPUT"].includes(event.target.tagName)
  )
    return;
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const scrolls = event.target.getAttribute?.("role") === "region"; // where arrows move what is seen
  if (step && !scrolls) choose(state.layer + step[0], state.head + step[1]);
  else if (event.key === "?") at("help").showModal();
  else if (event.key === "d") turn();
  else if (event.key === "0") {
    at("hide").checked = !state.hide;
    hide();
  } else return;
  event.preventDefault();
}

function pressedToken(event) {
  const queries = event.currentTarget.id === "queries",
    tokens = queries ? now().tokens : now().key_tokens;
  const here = queries ? state.query : state.key,
    step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (step) {
    const next = here === null ? 0 : clamp(here + step, 0, tokens.length - 1),
      item = event.currentTarget.children[next];
    event.currentTarget.setAttribute("aria-activedescendant", item.id);
    item.scrollIntoView({ block: "nearest" });
    queries ? point(next, null) : point(null, next);
  } else if (queries && [" ", "Enter"].includes(event.key) && here !== null) toggle(here);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function toggle(query) {
  state.chosen.delete(query) || state.chosen.add(query);
  drawTokens();
}

for (const id of ["queries", "keys"]) {
  const number = (event) => {
    const item = event.target.closest("li");
    return item ? Number(item.id.split("-")[1]) : null;
  };
  at(id).addEventListener("pointerover", (event) =>
    id === "queries" ? point(number(event), null) : point(null, number(event)),
  );
  at(id).addEventListener("pointerleave", () => point(null, null));
  at(id).addEventListener("blur", () => point(null, null));
  at(id).addEventListener("keydown", pressedToken);
}
at("queries").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) {
    toggle(Number(item.id.split("-")[1]));
    point(null, null);
  }
});
at("clear").addEventListener("click", () => {
  state.chosen.clear();
  drawTokens();
});
at("grid").addEventListener("pointermove", (event) => {
  grid.hover = headUnder(event);
  markGrid();
});
at("grid").addEventListener("pointerleave", () => {
  grid.hover = null;
  markGrid();
});
at("grid").addEventListener("click", (event) => {
  const under = headUnder(event);
  if (under) choose(...under);
});
at("layer").addEventListener("change", () => choose(at("layer").selectedIndex, state.head));
at("head").addEventListener("change", () => choose(state.layer, at("head").selectedIndex));
at("scale").addEventListener("change", () => {
  state.scale = at("scale").value;
  drawGrid();
  choose(state.layer, state.head);
});
at("hide").addEventListener("change", hide);
at("example").addEventListener("change", () => open(at("example").selectedIndex));
at("theme").addEventListener("click", turn);
at("ask").addEventListener("click", () => at("help").showModal());
at("table").addEventListener("pointerover", readLens);
at("controls").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", pressed);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) {
    width = innerWidth;
    requestAnimationFrame(drawAll);
  }
});
addEventListener("hashchange", recall);

at("example").append(...data.examples.map(({ name }) => made("option", name)));
at("example-label").hidden = data.examples.length < 2;
recall();
document.documentElement.dataset.ready = "true";
