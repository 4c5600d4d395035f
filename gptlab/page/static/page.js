// Keeps a page up to date, sorts and searches the list, draws curves, shows the lens and what a model writes. What
// others wrote enters as text alone: through textContent, or within our own pages, which the server escapes and
// DOMParser reads without running anything.
"use strict";

const $ = id => document.getElementById(id);

// A page is renewed as a whole: asked with the mark of what is shown, the server answers 304 while nothing is new.

async function renew() {
  const shown = document.querySelector("main");
  const every = Number(shown.dataset.every);
  if (!every) return;
  try {
    if (!document.hidden && getSelection().isCollapsed) await replace(shown);
    $("notice").textContent = "";
  } catch (error) {
    $("notice").textContent = error instanceof TypeError
      ? "No answer: has gptlab page ended? Its next start prints a new link." : error.message;
  }
  setTimeout(renew, 1000 * (Number(document.querySelector("main").dataset.every) || every));
}

async function replace(shown) {
  const answer = await fetch(location.href, {headers: {"If-None-Match": `"${shown.dataset.mark}"`}, cache: "no-store"});
  if (answer.status === 304) return;
  if (!answer.ok) throw new Error(await answer.text());
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
  for (const box of shown.querySelectorAll("input:checked")) {
    const same = fresh.querySelector(`input[value="${CSS.escape(box.value)}"]`);
    if (same) same.checked = true;
  }
  for (const kept of shown.querySelectorAll("[data-keep]")) // what is typed there, and its answer
    fresh.querySelector(`[data-keep="${kept.dataset.keep}"]`)?.replaceWith(kept);
  arrange(fresh);
  const parts = page => [...page.querySelectorAll("details, summary, a, button, input, [tabindex]")];
  const before = parts(shown), after = parts(fresh);
  const focused = after[before.indexOf(document.activeElement)];
  before.forEach((part, i) => {
    if (!after[i] || after[i].tagName !== part.tagName) return;
    if ("open" in part) after[i].open = part.open;
    after[i].dataset.left = part.scrollLeft;
  });
  shown.replaceWith(document.adoptNode(fresh));
  for (const part of after) if (part.dataset.left > 0) part.scrollLeft = part.dataset.left;
  focused?.focus({preventScroll: true});
  overlay();
}

// The list of runs. A group of runs is a tbody: its first row is of the group, where there are several.

const MANY = 30;
let sorted = {column: 0, descending: false}, unfolded = new Set();

const key = row => {
  const text = row.cells[sorted.column]?.textContent.trim() ?? "", number = parseFloat(text.replaceAll(",", ""));
  return [2, 4, 5, 6].includes(sorted.column) ? number : text; // loss, step, bits a byte, dose
};

function compared(a, b) {
  const [x, y] = [key(a), key(b)];
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // no figure comes last
  const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, {numeric: true});
  return sorted.descending ? -order : order;
}

function arrange(page) {
  const table = page.querySelector("#runs table"), words = page.querySelector("#find")?.value.toLowerCase().split(/\s+/);
  if (!table) return;
  const groups = [...table.tBodies], many = table.querySelectorAll("[name=run]").length > MANY;
  for (const group of groups) {
    const rows = [...group.rows], head = rows[0].matches(".group") ? rows.shift() : null;
    const has = row => words.every(word => `${head?.textContent ?? ""} ${row.textContent}`.toLowerCase().includes(word));
    const found = rows.filter(has), some = found.length && found.length < rows.length;
    const open = !head || !many || some || unfolded.has(group.dataset.group);
    for (const row of rows) row.hidden = !open || !found.includes(row);
    group.hidden = !found.length;
    head?.querySelector(".fold").setAttribute("aria-expanded", open);
    if (head) head.querySelector(".all").checked = rows.every(row => row.querySelector("input").checked);
    if (sorted.column) group.append(...rows.sort(compared));
  }
  if (sorted.column) table.append(...groups.sort((a, b) => compared(a.rows[0], b.rows[0])));
  for (const [i, column] of [...table.tHead.rows[0].cells].entries())
    column.ariaSort = i && i === sorted.column ? (sorted.descending ? "descending" : "ascending") : null;
}

function clicked(event) {
  const sort = event.target.closest(".sort"), fold = event.target.closest(".fold"), all = event.target.closest(".all");
  if (sort) {
    const column = sort.parentElement.cellIndex;
    sorted = {column, descending: sorted.column === column && !sorted.descending};
  } else if (fold) {
    const group = fold.closest("tbody").dataset.group;
    if (!unfolded.delete(group)) unfolded.add(group);
  } else if (all) {
    for (const box of all.closest("tbody").querySelectorAll("tr:not(.group) input")) box.checked = all.checked;
  } else return;
  if (!all) arrange(document);
}

// Curves over each other. A run is {name, arm, curves: {figure: [[step, value], ...]}}; arms have colours by their order.

const SVG = "http://www.w3.org/2000/svg", LEFT = 56, TOP = 28, BOTTOM = 326, HEIGHT = 366;
let shownStep = Infinity;

function shape(parent, tag, attributes, text) {
  const made = parent.appendChild(document.createElementNS(SVG, tag));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, log) { // 1, 2 or 5 times a power of ten; of a wide logarithmic axis the powers alone
  if (log && high / low > 50) {
    const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
    return Array.from({length: last - first + 1}, (_, i) => 10 ** (first + i));
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(times => times * power >= rough), first = Math.ceil(low / step);
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => (first + i) * step);
}

function scale(values, log, from, to) { // {at: value -> place, back: place -> value, marks: the ticks}
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 20, high + (Math.abs(low) || 1) / 20];
  const f = log ? Math.log : x => x, g = log ? Math.exp : x => x, [a, b] = [f(low), f(high)];
  return {at: x => from + (to - from) * (f(x) - a) / (b - a), back: p => g(a + (p - from) / (to - from) * (b - a)),
    marks: ticks(low, high, log)};
}

const nearest = (points, step) => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
const brief = x => Math.abs(x) >= 10000 || (x && Math.abs(x) < 0.001) ? x.toExponential(1) : String(+x.toPrecision(4));

function overlay() {
  const plot = $("overlay");
  if (!plot) return;
  const figure = $("figure").value, logX = $("log-x").checked, logY = $("log-y").checked;
  const usable = ([x, y]) => y !== null && (!logX || x > 0) && (!logY || y > 0);
  const every = JSON.parse(plot.dataset.runs), arms = [...new Set(every.map(run => run.arm))];
  const runs = every.map(run => ({...run, points: run.curves[figure].filter(usable)})).filter(run => run.points.length);
  const width = Math.max(plot.clientWidth, 300), RIGHT = width - 12; // a unit is a pixel: text keeps its size
  plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  plot.replaceChildren();
  $("values").tBodies[0].replaceChildren();
  if (!runs.length) { shape(plot, "text", {x: LEFT, y: 40, fill: "currentColor"}, "no run has this figure"); return; }
  const points = runs.flatMap(run => run.points);
  const x = scale(points.map(p => p[0]), logX, LEFT, RIGHT), y = scale(points.map(p => p[1]), logY, BOTTOM, TOP);
  for (const mark of y.marks) {
    shape(plot, "path", {d: `M${LEFT} ${y.at(mark)}H${RIGHT}`, stroke: "var(--line)"});
    shape(plot, "text", {x: LEFT - 6, y: y.at(mark) + 4, "text-anchor": "end"}, brief(mark));
  }
  for (const mark of x.marks) shape(plot, "text", {x: x.at(mark), y: BOTTOM + 16, "text-anchor": "middle"}, brief(mark));
  shape(plot, "text", {x: 0, y: 14}, $("figure").selectedOptions[0].textContent);
  shape(plot, "text", {x: (LEFT + RIGHT) / 2, y: BOTTOM + 32, "text-anchor": "middle"}, "step");
  for (const run of runs) {
    const i = arms.indexOf(run.arm), colour = `var(--arm-${i < 8 ? i : 1 + (i - 1) % 7})`, dashes = i < 8 ? "none" : "6 3";
    const d = run.points.map(p => `${x.at(p[0]).toFixed(1)} ${y.at(p[1]).toFixed(1)}`).join("L");
    run.line = shape(plot, "path", {d: `M${d}`, fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-dasharray": dashes});
    const line = $("values").tBodies[0].insertRow();
    const name = line.appendChild(make("th", undefined, {scope: "row"}));
    name.append(make("i", undefined, {className: `swatch arm-${i < 8 ? i : 1 + (i - 1) % 7}${i < 8 ? "" : " dashed"}`}), make("bdi", run.name));
    run.cell = line.insertCell();
    line.insertCell().append(make("bdi", run.arm));
    line.addEventListener("mouseenter", () => run.line.setAttribute("stroke-width", 4));
    line.addEventListener("mouseleave", () => run.line.setAttribute("stroke-width", 1.8));
  }
  const rule = shape(plot, "path", {stroke: "var(--muted)", "stroke-dasharray": "2 3"});
  const steps = [...new Set(points.map(p => p[0]))].sort((a, b) => a - b);
  const at = step => {
    shownStep = nearest(steps.map(s => [s]), Math.min(step, steps.at(-1)))[0];
    rule.setAttribute("d", `M${x.at(shownStep)} ${TOP}V${BOTTOM}`);
    $("value").textContent = `${$("figure").selectedOptions[0].textContent} at step ${shownStep.toLocaleString("en")}`;
    for (const run of runs) {
      const [step, value] = nearest(run.points, shownStep);
      run.cell.textContent = value.toFixed(4) + (step === shownStep ? "" : ` (step ${step.toLocaleString("en")})`);
    }
  };
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect();
    at(x.back((event.clientX - box.left) * width / box.width));
  };
  plot.onkeydown = event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) { event.preventDefault(); at(steps[Math.min(Math.max(steps.indexOf(shownStep) + by, 0), steps.length - 1)]); }
  };
  at(shownStep);
}

// Text that a model writes.

async function write(event) {
  event.preventDefault();
  const form = event.target, button = form.querySelector("button");
  const body = {model: form.dataset.model, prompt: $("start").value || "\n", tokens: Number($("tokens").value),
    temperature: Number($("temperature").value)};
  button.disabled = true;
  $("wrote").textContent = "Generating…";
  try {
    const {text, note} = JSON.parse(await post("write", body));
    $("wrote").textContent = note;
    $("text").hidden = false;
    $("text").replaceChildren(make("span", body.prompt, {className: "prompt"}), text);
  } catch (error) {
    $("wrote").textContent = error instanceof TypeError ? "No answer: has gptlab page ended?" : error.message;
  }
  button.disabled = false;
}

async function post(path, content) {
  const body = JSON.stringify(content);
  const answer = await fetch(path, {method: "POST", headers: {"Content-Type": "application/json"}, body});
  const text = await answer.text();
  const isJson = answer.headers.get("Content-Type").startsWith("application/json");
  if (!answer.ok) throw new Error(isJson ? JSON.parse(text).error : text);
  return text;
}

// The lens. `found` is what `gptlab lens --json` prints; `cells[t][j]` shows block j + 1 at position t.

const SIGNS = {"\n": "⏎", "\t": "⇥", " ": "␣", "\0": "∅", "\x7f": "␡"};
const UNSHOWN = /[\u0080-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/u;
let found, cells = [], at = [0, 0];

function visible(text) {
  const sign = c => SIGNS[c] ?? (c < " " ? String.fromCodePoint(0x2400 + c.codePointAt(0)) : UNSHOWN.test(c) ? "\ufffd" : c);
  return Array.from(text, sign).join("") || "·";
}

function make(tag, text, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

function row(parent, tag, words) {
  const made = parent.appendChild(make("tr"));
  for (const word of words) made.append(make(tag, word));
}

const percent = (p, digits = 0) => `${(100 * p).toFixed(digits)}%`;
const reading = () => found.readers[document.querySelector("#readers input:checked").value];
const sure = block => block.top[0].probability;

async function ask(event) {
  event.preventDefault();
  const button = document.querySelector("#ask button");
  if (button.disabled) return;
  button.disabled = true;
  $("said").textContent = "Reading…";
  try {
    found = JSON.parse(await post("read", {model: $("model").value, prompt: $("prompt").value}));
    $("said").textContent = found.note;
    show();
  } catch (error) {
    $("lens").hidden = true;
    $("said").textContent = error instanceof TypeError ? "No answer: has gptlab page ended?" : error.message;
  }
  button.disabled = false;
}

function show() {
  const names = Object.keys(found.readers), before = document.querySelector("#readers input:checked")?.value;
  const chosen = names.includes(before) ? before : names[0];
  $("readers").replaceChildren(make("legend", "Reading"), ...names.map(name => {
    const label = make("label"), input = make("input", undefined, {type: "radio", name: "reader", value: name});
    input.checked = name === chosen;
    label.append(input, ` ${name}`);
    return label;
  }));
  $("lens").hidden = false;
  at = [0, 0];
  draw();
}

function draw() {
  const {positions, blocks} = reading(), L = blocks.length;
  const head = make("thead"), body = make("tbody"), top = head.appendChild(make("tr"));
  top.append(make("th", "read"));
  for (const position of positions) top.appendChild(make("th")).append(make("bdi", visible(position.text)));
  cells = positions.map(() => []);
  for (let j = L - 1; j >= 0; j--) {
    const line = body.appendChild(make("tr"));
    line.append(make("th", `block ${j + 1}`, {scope: "row"}));
    positions.forEach((position, t) => {
      const block = position.blocks[j], cell = make("td", undefined, {tabIndex: -1});
      cell.className = `p${Math.min(9, Math.floor(10 * sure(block)))}${block.agrees ? " same" : ""}`;
      cell.append(make("bdi", visible(block.top[0].text)), " ", make("small", percent(sure(block))));
      cell.dataset.at = `${t} ${j}`;
      cells[t][j] = line.appendChild(cell);
    });
  }
  $("map").replaceChildren(head, body);
  const means = make("tbody"), titles = make("thead");
  row(titles, "th", ["block", "confidence", "entropy, nats", "agrees with the final block"]);
  blocks.forEach((block, j) =>
    row(means, "td", [j + 1, percent(block.confidence, 1), block.entropy.toFixed(3), percent(block.agreement, 1)]));
  $("blocks").replaceChildren(titles, means);
  leave();
  select(Math.min(at[0], positions.length - 1), Math.min(at[1], L - 1));
}

// Where early exit stops: at the first block but the last that is as sure as τ, else at the last; τ = 1 never leaves.
function stop(position, tau) {
  const first = tau < 1 ? position.blocks.slice(0, -1).findIndex(block => sure(block) >= tau) : -1;
  return first < 0 ? position.blocks.length - 1 : first;
}

function leave() {
  const {positions, blocks} = reading(), L = blocks.length, tau = Number($("tau").value);
  let computed = 0;
  positions.forEach((position, t) => {
    const last = stop(position, tau);
    computed += last + 1;
    cells[t].forEach((cell, j) => {
      cell.classList.toggle("stops", j === last);
      cell.classList.toggle("left-out", j > last);
    });
  });
  const mean = computed / positions.length;
  $("share").textContent = `τ = ${tau.toFixed(2)}: ${mean.toFixed(2)} of ${L} blocks computed, ${percent(mean / L, 1)}`;
}

function select(t, j) {
  const before = cells[at[0]]?.[at[1]];
  if (before) { before.tabIndex = -1; before.removeAttribute("aria-selected"); }
  at = [t, j];
  cells[t][j].tabIndex = 0;
  cells[t][j].setAttribute("aria-selected", "true");
  const position = reading().positions[t], block = position.blocks[j];
  const list = make("ol"), title = make("h3", `Block ${j + 1} after `);
  title.append(make("bdi", visible(position.text)));
  for (const best of block.top) {
    const item = list.appendChild(make("li"));
    item.append(make("bdi", visible(best.text)), make("span", percent(best.probability, 1)));
    item.append(make("meter", undefined, {value: best.probability, ariaLabel: "probability"}));
  }
  const agrees = block.agrees ? "the final block says the same" : "the final block says something else";
  const stops = cells[t][j].classList.contains("stops") ? "; early exit stops here" : "";
  $("cell").replaceChildren(title, make("p", `entropy ${block.entropy.toFixed(2)} nats; ${agrees}${stops}`), list);
}

function over(event) {
  const cell = event.target.closest("td");
  if (!cell) return;
  const [t, j] = cell.dataset.at.split(" ").map(Number);
  if (event.type === "click") cell.focus({preventScroll: true});
  if (t !== at[0] || j !== at[1]) select(t, j);
}

function move(event) {
  const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1],
    Home: [-Infinity, 0], End: [Infinity, 0]};
  const step = steps[event.key];
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const within = (i, most) => Math.min(Math.max(i, 0), most);
  select(within(at[0] + step[0], cells.length - 1), within(at[1] + step[1], cells[0].length - 1));
  cells[at[0]][at[1]].focus();
}

if ($("ask")) {
  $("ask").addEventListener("submit", ask);
  $("prompt").addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
  });
  $("readers").addEventListener("change", draw);
  $("tau").addEventListener("input", () => { leave(); select(...at); });
  for (const kind of ["mouseover", "focusin", "click"]) $("map").addEventListener(kind, over);
  $("map").addEventListener("keydown", move);
}
document.addEventListener("click", clicked);
document.addEventListener("input", event => { if (event.target.id === "find") arrange(document); });
document.addEventListener("change", event => { if (event.target.closest("#axes")) overlay(); });
document.addEventListener("submit", event => { if (event.target.id === "write") write(event); });
addEventListener("resize", overlay);
arrange(document);
overlay();
setTimeout(renew, 1000 * Number(document.querySelector("main").dataset.every));
