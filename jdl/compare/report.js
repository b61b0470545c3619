"use strict";
// Draws the charts of the page's data, sorts its tables, and hides optimizers in both.
const { lines, charts } = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const NS = "http://www.w3.org/2000/svg";
const NAMED = 20; // more lines than these are not named at their ends

function element(parent, name, attributes = {}, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return parent.appendChild(made);
}

const number = (v) => String(Number(v.toPrecision(3)));

function place(axis, from, to) {
  const scaled = axis.log ? Math.log : (v) => v, low = scaled(axis.low), high = scaled(axis.high);
  return (v) => from + ((to - from) * (scaled(v) - low)) / (high - low);
}

function path(chart, X, Y, s, key) {
  const to = chart.drawn === "steps" ? (x) => `H${x}L` : () => "L";
  const points = s.x.map((x, i) => [X(x).toFixed(1), Y(s[key][i]).toFixed(1)]);
  return points.map(([x, y], i) => `${i ? to(x) : "M"}${x} ${y}`).join("");
}

// Heights at which names do not overlap, near where their lines end.
function apart(heights, bottom, gap = 12.5) {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
  const found = [...heights];
  order.forEach((i, n) => (found[i] = Math.max(found[i], n ? found[order[n - 1]] + gap : 0)));
  order.reverse();
  order.forEach((i, n) => (found[i] = Math.min(found[i], n ? found[order[n - 1]] - gap : bottom)));
  return found;
}

function draw(figure) {
  const chart = charts[figure.dataset.chart];
  figure.querySelector("svg")?.remove();
  const shown = chart.series.filter((s) => !hidden.has(s.line) && s.x.length);
  const names = shown.length <= NAMED ? shown.map((s) => lines[s.line].short) : [];
  const W = 480, H = 300, left = 52, top = 8, bottom = H - 40;
  const right = W - 10 - 7.4 * Math.max(0, ...names.map((n) => n.length));
  const X = place(chart.x, left, right), Y = place(chart.y, bottom, top);
  const label = `${chart.title}. Arrow keys read the values; the tables have the numbers.`;
  const box = { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": label };
  const svg = element(figure, "svg", box);
  for (const [v, text] of chart.x.ticks) {
    element(svg, "path", { class: "grid", d: `M${X(v)} ${top}V${bottom}` });
    element(svg, "text", { x: X(v), y: bottom + 14, "text-anchor": "middle" }, text);
  }
  for (const [v, text] of chart.y.ticks) {
    element(svg, "path", { class: "grid", d: `M${left} ${Y(v)}H${right}` });
    element(svg, "text", { x: left - 5, y: Y(v) + 3.5, "text-anchor": "end" }, text);
  }
  element(svg, "text", { x: (left + right) / 2, y: H - 6, "text-anchor": "middle" }, chart.x.label);
  const turned = `translate(11 ${(top + bottom) / 2}) rotate(-90)`;
  element(svg, "text", { transform: turned, "text-anchor": "middle" }, chart.y.label);
  if (chart.level !== null) {
    const y = Y(chart.level);
    element(svg, "path", { class: "target", d: `M${left} ${y}H${right}` });
    element(svg, "text", { x: left + 4, y: y - 4, class: "muted" }, "target");
  }
  const ends = apart(shown.map((s) => Y(s.y.at(-1))), bottom);
  shown.forEach((s, i) => {
    const { color, dashes, thin } = lines[s.line];
    const group = element(svg, "g", { style: `--c:var(--line-${color})`, class: "series" });
    if (s.low) {
      const back = { x: [...s.x].reverse(), low: [...s.low].reverse() };
      const lower = path(chart, X, Y, back, "low").replace("M", "L");
      element(group, "path", { class: "band", d: `${path(chart, X, Y, s, "high")}${lower}Z` });
    }
    const line = { class: "line", d: path(chart, X, Y, s, "y"), "stroke-width": thin ? 1 : 1.9 };
    if (s.joined) element(group, "path", { ...line, "stroke-dasharray": dashes.join(" ") });
    for (const kind of new Set(s.marks.map((mark) => mark[2]))) {
      const r = kind === "chosen" ? 5 : 3;
      const d = s.marks
        .filter((mark) => mark[2] === kind)
        .map(([x, y]) => [X(x), y === null ? top : Y(y)])
        .map(([x, y]) => (kind === "diverged" ? `M${x - 4} ${y - 4}l8 8m0-8l-8 8`
          : `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`));
      element(group, "path", { class: kind === "diverged" ? "line" : `dot ${kind}`, d: d.join("") });
    }
    if (!names.length) return;
    const leader = `M${X(s.x.at(-1))} ${Y(s.y.at(-1))}L${right + 3} ${ends[i]}`;
    element(group, "path", { class: "line", d: leader, "stroke-width": 0.6 });
    element(group, "text", { class: "name", x: right + 5, y: ends[i] + 3.5 }, names[i]);
  });
  follow(figure, svg, shown, X, [left, right, top, bottom], chart);
}

// Values at the pointer, or at the cursor that the arrow keys move.
function follow(figure, svg, shown, X, [left, right, top, bottom], chart) {
  const grid = [...new Set(shown.flatMap((s) => s.x))].sort((a, b) => a - b);
  const cursor = element(svg, "path", { class: "cursor" });
  const told = figure.querySelector("output");
  let at = -1;
  function show(i) {
    if (!grid.length) return;
    at = Math.min(Math.max(i, 0), grid.length - 1);
    const x = grid[at];
    cursor.setAttribute("d", `M${X(x)} ${top}V${bottom}`);
    const values = shown
      .map((s) => [s, s.x.findLastIndex((v) => v <= x)])
      .filter(([, k]) => k >= 0)
      .map(([s, k]) => [s.y[k], lines[s.line].name])
      .sort((a, b) => a[0] - b[0])
      .map(([y, name]) => `${name} ${chart.y.ticks.find(([v]) => v === y)?.[1] ?? number(y)}`);
    const where = chart.x.ticks.find(([v]) => v === x)?.[1] ?? number(x);
    told.textContent = `${chart.x.label} ${where}: ${values.join(" · ")}`;
  }
  const hide = () => { cursor.removeAttribute("d"); told.textContent = ""; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) * 480) / box.width;
    if (wanted < left || wanted > right) return hide();
    const distance = grid.map((x) => Math.abs(X(x) - wanted));
    show(distance.indexOf(Math.min(...distance)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    let next = at + step; // a few points further on
    while (grid[next + step] && at >= 0 && Math.abs(X(grid[next]) - X(grid[at])) < 8) next += step;
    show(next);
  });
}

// The number that a cell begins with, or its p; ∞ for none that was reached; else its text.
function worth(cell) {
  const text = cell.textContent.trim().replaceAll(",", "");
  const found = parseFloat(text.replace(/^(yes|undecided) \(p (< )?/, ""));
  if (!Number.isNaN(found)) return found;
  return /^(–|∞|no$|not reached|diverged|failed|missing)/.test(text) ? Infinity : text;
}

function sort(head, column) {
  const table = head.closest("table"), rows = [...table.tBodies[0].rows];
  const up = head.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const before = (a, b) => (typeof a === typeof b ? a < b : typeof a === "number");
  const compare = (a, b) => Number(before(b, a)) - Number(before(a, b));
  rows.sort((a, b) => (up ? 1 : -1) * compare(worth(a.cells[column]), worth(b.cells[column])));
  table.tBodies[0].append(...rows);
}

document.querySelectorAll("thead tr").forEach((row) =>
  [...row.cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, column));
    head.append(button);
  }),
);

const bar = document.getElementById("bar"), toggles = [...bar.querySelectorAll("button")];
const figures = [...document.querySelectorAll("figure[data-chart]")];
let waiting = 0;

function refresh() {
  toggles.forEach((button, i) => button.setAttribute("aria-pressed", String(!hidden.has(i))));
  document.querySelectorAll("tr[data-line]").forEach((row) => {
    row.hidden = row.dataset.line.split(" ").some((i) => hidden.has(Number(i)));
  });
  clearTimeout(waiting);
  drawn(figures);
}

// The first charts at once, the others when the page is shown.
function drawn(left) {
  left.slice(0, 4).forEach(draw);
  if (left.length > 4) waiting = setTimeout(drawn, 0, left.slice(4));
}

toggles.forEach((button, i) =>
  button.addEventListener("click", () => {
    if (!hidden.delete(i)) hidden.add(i);
    refresh();
  }),
);
bar.querySelector("input").addEventListener("input", (event) => {
  hidden.clear();
  const wanted = event.target.value.toLowerCase();
  lines.forEach((line, i) => { if (!line.name.toLowerCase().includes(wanted)) hidden.add(i); });
  refresh();
});
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((x) => { x.open = true; });
  figures.forEach(draw);
});
bar.hidden = false;
refresh();
