// Keeps a page up to date, and shows the lens. What others wrote enters as text alone: through textContent, or within
// our own pages, which the server escapes and DOMParser reads without running anything.
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
    const body = JSON.stringify({model: $("model").value, prompt: $("prompt").value});
    const answer = await fetch("read", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    const text = await answer.text();
    const isJson = answer.headers.get("Content-Type").startsWith("application/json");
    if (!answer.ok) throw new Error(isJson ? JSON.parse(text).error : text);
    found = JSON.parse(text);
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
setTimeout(renew, 1000 * Number(document.querySelector("main").dataset.every));
