"use strict";

const runs = JSON.parse(document.getElementById("data").textContent);
const DASH = "–";
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const say = (text) => { document.getElementById("said").textContent = text; };

// ---- tables ----

function sortKey(row, column, isText) {
  const cell = row.cells[column];
  return isText ? cell.textContent : parseFloat(cell.title || cell.textContent);
}

function compareKeys(a, b, isText) {
  if (isText) return a.localeCompare(b, undefined, { numeric: true });
  return a - b;
}

/** Rows without a value stay last, whichever way the others go. */
function sortTable(table, column, order) {
  const rows = [...table.tBodies[0].rows];
  const isText = column === 0 || rows.every((row) => Number.isNaN(sortKey(row, column, false)));
  const sign = order === "ascending" ? 1 : -1;
  const isKnown = ([key]) => isText || !Number.isNaN(key);
  const pairs = rows.map((row) => [sortKey(row, column, isText), row]);
  const known = pairs.filter(isKnown).sort(([a], [b]) => sign * compareKeys(a, b, isText));
  table.tBodies[0].append(...[...known, ...pairs.filter((pair) => !isKnown(pair))].map(([, row]) => row));
}

function sortOnClick(heading, table) {
  const column = heading.cellIndex;
  const first = column === 0 ? "ascending" : "descending";
  const other = column === 0 ? "descending" : "ascending";
  heading.querySelector("button").addEventListener("click", () => {
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    all("th[aria-sort]", table).forEach((one) => one.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    sortTable(table, column, order);
  });
}

function searchOnInput(input) {
  const rows = all("tbody tr", document.getElementById(input.dataset.table));
  const names = rows.map((row) => row.cells[0].textContent.toLowerCase());
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    rows.forEach((row, index) => { row.hidden = !names[index].includes(wanted); });
    const found = rows.filter((row) => !row.hidden).length;
    input.parentElement.querySelector("output").textContent = `${found.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  });
}

function rowOf(kind, cells) {
  const row = document.createElement("tr");
  for (const text of cells) {
    row.append(Object.assign(document.createElement(kind), { textContent: text || DASH, scope: "col" }));
  }
  return row;
}

/** Of results.csv as it is, made when it is first asked for. */
function fillEpochs(details) {
  const { epochs, columns } = runs[0].tables.results;
  const names = Object.keys(columns);
  const table = Object.assign(document.createElement("table"), { className: "figures" });
  table.createTHead().append(rowOf("th", names));
  table.createTBody().append(...epochs.map((_, index) => rowOf("td", names.map((name) => columns[name][index]))));
  details.querySelector(".box").replaceChildren(table);
}

// ---- charts ----

const charts = all(".chart").filter((figure) => figure.querySelector("svg[role]")).map(readChart);

function readChart(figure) {
  const svg = figure.querySelector("svg");
  const [x0, x1] = JSON.parse(figure.dataset.x), [y0, y1] = JSON.parse(figure.dataset.y);
  const [left, right, top, bottom] = JSON.parse(figure.dataset.plot);
  const lines = all(".readout li", figure).map((item) => {
    const table = runs[item.dataset.run].tables[figure.dataset.table];
    const value = item.querySelector("b");
    return { item, value, resting: value.textContent, epochs: table.epochs, cells: table.columns[item.dataset.column] };
  });
  return {
    figure, svg, lines, top, bottom, width: svg.viewBox.baseVal.width,
    epochs: [...new Set(lines.flatMap((line) => line.epochs))].sort((a, b) => a - b),
    x: (epoch) => left + (epoch - x0) / (x1 - x0) * (right - left),
    y: (value) => bottom - (value - y0) / (y1 - y0) * (bottom - top),
    epochAt: (px) => x0 + (px - left) / (right - left) * (x1 - x0),
  };
}

function svgElement(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function nearest(sorted, wanted) {
  return sorted.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best), sorted[0]);
}

function eraseCursor(chart) {
  chart.svg.querySelector(".cursor")?.remove();
  chart.svg.classList.remove("read");
}

function drawCursor(chart, epoch) {
  eraseCursor(chart);
  const x = chart.x(epoch);
  const [gap, anchor] = x < chart.width / 2 ? [-2, "start"] : [2, "end"];
  const word = svgElement("text", { x: x + gap, y: chart.top - 4, "text-anchor": anchor });
  word.textContent = `epoch ${epoch}`;
  const cursor = svgElement("g", { class: "cursor" });
  cursor.append(svgElement("path", { d: `M${x} ${chart.top}V${chart.bottom}` }), word);
  for (const line of chart.lines) {
    const cell = line.cells[line.epochs.indexOf(epoch)] ?? "";
    line.value.textContent = cell || DASH;
    const y = chart.y(Number.parseFloat(cell));
    if (Number.isFinite(y)) cursor.append(svgElement("circle", { class: line.item.className, cx: x, cy: y, r: 3.5 }));
  }
  chart.svg.append(cursor);
  chart.svg.classList.add("read");
}

/** The same epoch in all charts, so that one look tells all of it. */
function showEpoch(epoch) {
  charts.forEach((chart) => drawCursor(chart, epoch));
  all(".at").forEach((place) => { place.textContent = `Values of epoch ${epoch}`; });
  for (const { svg, lines } of charts) {
    svg.setAttribute("aria-valuenow", epoch);
    svg.setAttribute("aria-valuetext", `epoch ${epoch}: ${lines.map((line) => line.item.textContent.trim()).join(", ")}`);
  }
}

function showBest() {
  for (const chart of charts) {
    eraseCursor(chart);
    chart.lines.forEach((line) => { line.value.textContent = line.resting; });
  }
  all(".at").forEach((place) => { place.textContent = place.dataset.rest; });
}

function epochUnder(chart, event) {
  const { left, width } = chart.svg.getBoundingClientRect();
  return nearest(chart.epochs, chart.epochAt((event.clientX - left) / width * chart.width));
}

function epochByKey(chart, key) {
  const now = chart.epochs.indexOf(Number(chart.svg.getAttribute("aria-valuenow")));
  const last = chart.epochs.length - 1;
  const steps = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: last,
    PageDown: now - 10, PageUp: now + 10 };
  return key in steps ? chart.epochs[Math.min(Math.max(steps[key], 0), last)] : undefined;
}

function makeReadable(chart) {
  const { svg, epochs } = chart;
  const start = runs[0].best ?? epochs.at(-1);
  const attributes = { role: "slider", tabindex: 0, "aria-valuemin": epochs[0], "aria-valuemax": epochs.at(-1), "aria-valuenow": start,
    "aria-valuetext": `epoch ${start}` };
  for (const [key, value] of Object.entries(attributes)) svg.setAttribute(key, value);
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, (event) => showEpoch(epochUnder(chart, event)));
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") showBest(); });
  svg.addEventListener("blur", (event) => { if (!event.relatedTarget?.closest(".chart")) showBest(); });
  svg.addEventListener("keydown", (event) => {
    const epoch = epochByKey(chart, event.key);
    if (epoch === undefined) return;
    event.preventDefault();
    showEpoch(epoch);
  });
}

// ---- pictures and commands ----

const enlarged = document.getElementById("enlarged");

function enlarge(picture) {
  const image = enlarged.querySelector("img");
  Object.assign(image, { src: picture.src, alt: picture.alt });
  enlarged.classList.remove("whole");
  enlarged.showModal();
}

async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {  // not allowed: what is selected is copied by hand
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ---- all of it ----

for (const table of all("table.sortable")) all("thead th", table).forEach((heading) => sortOnClick(heading, table));
all("input[type=search]").forEach(searchOnInput);
all("#all-epochs").forEach((one) => one.addEventListener("toggle", () => fillEpochs(one), { once: true }));
charts.forEach(makeReadable);
all(".enlarge").forEach((button) => button.addEventListener("click", () => enlarge(button.querySelector("img"))));
enlarged.querySelector("img").addEventListener("click", () => enlarged.classList.toggle("whole"));
all(".copy").forEach((button) => button.addEventListener("click", () => copy(button)));
