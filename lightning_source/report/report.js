"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const main = $("main"), marked = new Set();
let view = -1, sorted = "rank", up = true;
// Every text enters the page as a text node: nothing of the data is ever read as markup.
function el(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes || {})) k === "onclick" ? e.addEventListener("click", v) : e.setAttribute(k, v);
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}
const number = (x) => (x === 0 ? "0" : (x > 0 ? "+" : "−") + Math.abs(x).toPrecision(3));
const percent = (x) => (100 * x).toFixed(1) + "%";
const drawn = (tag, attributes) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  return e;
};
function show(e, alt) {
  if (e.image) return el("img", { src: e.image, alt: alt });
  if (e.cells) return el("table", { class: "cells" }, el("tbody", {}, ...e.cells.map(([k, v]) => el("tr", {}, el("th", { scope: "row" }, k), el("td", {}, v)))));
  if (e.wave) {
    const s = drawn("svg", { viewBox: "0 0 160 40", role: "img", "aria-label": alt, class: "wave", preserveAspectRatio: "none" });
    s.append(drawn("path", { stroke: "currentColor", d: e.wave.map(([low, high], i) => "M" + (i + 0.5) + " " + (20.5 - 19 * high) + "V" + (19.5 - 19 * low)).join("") }));
    return s;
  }
  return el("span", { class: "text", tabindex: "0" }, e.text);
}
const content = (e) => e.image || e.text || JSON.stringify(e.cells || e.wave);
function bar(share) {
  const b = el("div", { class: "bar" });
  b.style.width = Math.max(0, Math.min(100, 100 * share)) + "%";
  return el("div", { class: "track" }, b);
}
// Whether examples of that score helped, and a bar of it from the middle, to the right where they did.
const helped = (score) => (score > 0) === D.helps_high;
function balance(score, most) {
  const b = el("div", { class: helped(score) ? "bar" : "bar harmed" }), half = (50 * Math.abs(score)) / (most || 1);
  b.style.width = half + "%";
  b.style.marginLeft = (helped(score) ? 50 : 50 - half) + "%";
  return el("div", { class: "track middle" }, b);
}
function table(rows, size) {
  const first = new Map(), keyed = rows.map((r, i) => {
    const what = content(D.examples[r[0]]), twin = first.get(what);
    if (twin === undefined) first.set(what, r[0]);
    return { rank: i + 1, id: r[0], label: D.examples[r[0]].label || "", score: r[1], share: Math.abs(r[1]) / (size || 1), error: r[3], twin };
  });
  keyed.sort((a, b) => (a[sorted] < b[sorted] ? -1 : a[sorted] > b[sorted] ? 1 : 0) * (up ? 1 : -1));
  const head = ["rank", "id", "label", "score", "share"].map((name) => el("th", { scope: "col", class: name === "label" ? "" : "num", "aria-sort": name === sorted ? (up ? "ascending" : "descending") : "none" },
    el("button", { type: "button", onclick: () => { up = name === sorted ? !up : true; sorted = name; draw(); } }, name)));
  const body = keyed.map((r) => el("tr", {}, el("td", {}, show(D.examples[r.id], "training example " + r.id), r.twin === undefined ? null : el("div", { class: "soft" }, "looks like " + r.twin)),
    el("td", { class: "num" }, r.rank), el("td", { class: "num" }, r.id), el("td", {}, r.label),
    el("td", { class: "num" }, number(r.score), r.error === undefined ? null : el("div", { class: "soft" }, "± " + r.error.toPrecision(2))), el("td", { class: "num" }, percent(r.share))));
  return el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "example"), ...head)), el("tbody", {}, ...body)));
}
function sides(tops, size) {
  return el("div", { class: "two" }, el("section", { class: "good" }, el("h3", {}, "Helped most"), table(tops.helpful, size)),
    el("section", { class: "bad" }, el("h3", {}, "Harmed most"), table(tops.harmful, size)));
}
const canvas = (label) => drawn("svg", { viewBox: "0 0 400 140", role: "img", "aria-label": label });
function picture(points, closed, label) {
  const s = canvas(label);
  s.append(drawn(closed ? "polygon" : "polyline", { points: points.map(([x, y]) => (400 * x).toFixed(1) + "," + (138 - 132 * y).toFixed(1)).join(" "), fill: closed ? "currentColor" : "none", stroke: "currentColor", "stroke-width": 2 }));
  return s;
}
// Mean score by label of the query and of the training example; the colour says the direction, its strength the size.
function matrix() {
  const rows = new Map();
  D.queries.forEach((e, q) => e.label !== undefined && rows.set(e.label, [...(rows.get(e.label) || []), D.classes.sums[q]]));
  if (!rows.size || rows.size > 20) return null;
  const means = [...rows].sort(([a], [b]) => (a < b ? -1 : 1)).map(([label, sums]) => [label, D.classes.labels.map((_, i) => sums.reduce((t, s) => t + s[i], 0) / sums.length)]);
  const most = Math.max(...means.flatMap(([, values]) => values.map(Math.abs)), 1e-300);
  const shade = (x) => {
    const cell = el("td", { class: "num shade", title: helped(x) ? "helped" : "harmed" }, number(x));
    cell.style.setProperty("--strength", Math.round((55 * Math.abs(x)) / most) + "%");
    cell.style.setProperty("--shade", helped(x) ? "var(--good)" : "var(--bad)");
    return cell;
  };
  return el("section", {}, el("h3", {}, "Sum of scores by label"), el("p", { class: "soft" }, "Rows: the query's label, mean over its queries. Columns: the training examples' label. Blue helped, orange harmed."),
    el("div", { class: "scroll", tabindex: "0" }, el("table", { class: "matrix" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "query"), ...D.classes.labels.map((l) => el("th", { scope: "col", class: "num" }, String(l))))),
      el("tbody", {}, ...means.map(([label, values]) => el("tr", {}, el("th", { scope: "row" }, label), ...values.map(shade)))))));
}
function validation() {
  const v = D.validation, at = (x) => 200 + 195 * Math.max(-1, Math.min(1, x)), s = canvas("Linear datamodeling score " + v.lds.toFixed(2));
  s.setAttribute("viewBox", "0 0 400 60");
  s.append(drawn("rect", { x: at(v.control[0]), width: Math.max(1, at(v.control[1]) - at(v.control[0])), y: 6, height: 40, fill: "currentColor", opacity: 0.15 }), drawn("path", { d: "M5 46H395M200 42V50", stroke: "currentColor" }),
    drawn("path", { d: "M" + at(v.interval[0]) + " 26H" + at(v.interval[1]), stroke: "currentColor", "stroke-width": 3 }), drawn("circle", { cx: at(v.lds), cy: 26, r: 6, fill: "currentColor" }));
  if (v.ceiling !== null) s.append(drawn("path", { d: "M" + at(v.ceiling) + " 6V46", stroke: "currentColor", "stroke-dasharray": "4 3" }));
  return el("section", {}, el("h3", {}, "Held against retraining"), s, el("p", { class: "soft" }, "Linear datamodeling score " + v.lds.toFixed(3) + " (95 % interval " + v.interval.map((x) => x.toFixed(3)).join(" to ") + "), from −1 to 1; grey: the same scores dealt to other examples" + (v.ceiling === null ? "." : "; dashed: " + v.ceiling.toFixed(2) + ", the most that the retrainings' noise allows.")));
}
function against() {
  const points = D.queries.map((e, q) => [Number(e.loss), D.sizes[q]]).filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
  if (points.length < 3) return null;
  const [low, high, most] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0])), Math.max(...points.map((p) => p[1]), 1e-300)], s = canvas("Size of the scores against the query's loss");
  s.append(...points.map(([x, y]) => drawn("circle", { cx: (6 + (388 * (x - low)) / (high - low || 1)).toFixed(1), cy: (134 - (128 * y) / most).toFixed(1), r: 4, fill: "currentColor", opacity: 0.6 })));
  return el("section", {}, el("h3", {}, "Scores against loss"), s, el("p", { class: "soft" }, "A point a query: its loss from " + low.toPrecision(3) + " to " + high.toPrecision(3) + ", its absolute score in all up to " + most.toPrecision(3) + "."));
}
function overview() {
  const h = D.histogram, most = Math.max(...h.counts.map((c) => Math.log1p(c)), 1), n = h.counts.length;
  const steps = h.counts.flatMap((c, i) => [[i / n, Math.log1p(c) / most], [(i + 1) / n, Math.log1p(c) / most]]);
  main.replaceChildren(el("h2", {}, "Over all " + D.queries.length + " queries"), sides(D.overall, D.overall_size));
  const more = [D.classes ? matrix() : null, D.validation ? validation() : null].filter((part) => part !== null);
  if (more.length) main.append(el("div", { class: "stack" }, ...more));
  main.append(el("div", { class: "two" },
    el("section", {}, el("h3", {}, "Histogram of scores"), picture([[0, 0], ...steps, [1, 0]], true, "Histogram of scores"), el("p", { class: "soft" }, "From " + number(-h.limit) + " to " + number(h.limit) + "; heights are logarithmic.")),
    el("section", {}, el("h3", {}, "Concentration"), picture(D.concentration.map((y, i) => [i / 20, y]), false, "Concentration curve"), el("p", { class: "soft" }, "Share of the absolute score that the largest examples hold, from none to all " + D.N + ".")), against() || ""));
  if (D.suspects) main.append(el("h3", {}, "Look at these labels first (highest self-influence)"), el("p", {}, el("button", { type: "button", id: "export", onclick: () =>
    copy([["id"], ...ids().map((i) => [i])]) }, "Copy marked ids"), " ", el("button", { type: "button", id: "save", onclick: save }, "Save marked ids")), el("div", { class: "scroll tall", tabindex: "0" }, el("table", { class: "narrow" }, el("thead", {}, el("tr", {}, ...["mark", "example", "id", "label", "self-influence"].map((name) => el("th", { scope: "col", class: /id|self/.test(name) ? "num" : "" }, name)))), el("tbody", {}, ...D.suspects.map((r) => {
    const box = el("input", { type: "checkbox", "aria-label": "mark example " + r[0] });
    box.checked = marked.has(r[0]);
    box.addEventListener("change", () => (box.checked ? marked.add(r[0]) : marked.delete(r[0])));
    return el("tr", {}, el("td", {}, box), el("td", {}, show(D.examples[r[0]], "training example " + r[0])), el("td", { class: "num" }, r[0]), el("td", {}, D.examples[r[0]].label || ""), el("td", { class: "num" }, number(r[1])));
  })))));
}
const shares = (title, entries) => el("section", {}, el("h3", {}, title), ...entries.map(([name, share]) => el("div", { class: "entry" }, el("span", {}, name), el("span", { class: "num" }, percent(share)), bar(share))));
function one(q) {
  const e = D.queries[q];
  main.replaceChildren(el("h2", {}, "Query " + e.id), el("div", { class: "big" }, show(e, "query " + e.id)),
    el("p", {}, ["label", "prediction", "loss"].filter((k) => e[k] !== undefined).map((k) => k + ": " + e[k]).join(" · ")), sides(D.tops[q], D.sizes[q]));
  const parts = el("div", { class: "two" });
  if (D.shares) parts.append(shares("When: share of each segment", D.shares[q].map((share, i) => [D.segments[i], share])));
  if (D.layers) parts.append(shares("Where: share of each layer", D.layers[q]));
  if (D.classes) {
    const sums = D.classes.sums[q], most = Math.max(...sums.map(Math.abs), 1e-300);
    parts.append(el("section", {}, el("h3", {}, "Sum of scores by training label"), el("p", { class: "soft" }, "To the right: helped. To the left: harmed."), ...D.classes.labels.map((l, i) => el("div", { class: "entry" }, el("span", {}, "label " + l), el("span", { class: "num" }, number(sums[i])), balance(sums[i], most)))));
  }
  main.append(parts);
}
// A spreadsheet would run a cell that begins like a formula; a leading apostrophe makes it a text.
const cell = (x) => (typeof x === "number" ? String(x) : '"' + (/^[=+\-@\t\r]/.test(x) ? "'" + x : x).replaceAll('"', '""') + '"');
async function copy(rows) {
  const text = rows.map((r) => r.map(cell).join(",")).join("\n");
  try { await navigator.clipboard.writeText(text); } catch {
    const area = el("textarea", { "aria-label": "CSV" }); area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
  $("said").textContent = rows.length - 1 + " rows copied";
}
const ids = () => [...marked].sort((a, b) => a - b);
function save() {
  const link = el("a", { href: URL.createObjectURL(new Blob([ids().join("\n") + "\n"], { type: "text/plain" })), download: "marked-ids.txt" });
  link.click();
  URL.revokeObjectURL(link.href);
  $("said").textContent = marked.size + " ids saved";
}
function draw() {
  view < 0 ? overview() : one(view);
  document.querySelectorAll("#list a").forEach((a) => (Number(a.dataset.q) === view ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current")));
  $("to-overview").setAttribute("aria-pressed", String(view < 0));
}
function go(q) { location.hash = q < 0 ? "overview" : "query-" + q; }
function read() {
  const found = /^#query-(\d+)$/.exec(location.hash);
  view = found && Number(found[1]) < D.queries.length ? Number(found[1]) : -1;
  draw();
}
const step = (by) => go(Math.max(-1, Math.min(D.queries.length - 1, view + by)));
const fact = Object.fromEntries(D.header);
$("facts").textContent = [fact.method, fact.measurement && "of the " + fact.measurement, D.queries.length + " queries × " + D.N + " training examples"].filter(Boolean).join(" · ");
$("header").append(...D.header.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
$("list").append(...D.queries.map((e, q) => el("a", { href: "#query-" + q, "data-q": q }, e.image ? el("img", { src: e.image, alt: "" }) : null, "Query " + e.id + (e.label !== undefined ? ": " + e.label : ""))));
$("search").addEventListener("input", () => {
  const wanted = $("search").value.toLowerCase();
  document.querySelectorAll("#list a").forEach((a, q) => { a.hidden = false; a.style.display = (a.textContent + " " + (D.queries[q].text || "")).toLowerCase().includes(wanted) ? "" : "none"; });
});
$("to-overview").addEventListener("click", () => go(-1));
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("copy").addEventListener("click", () => {
  const tops = view < 0 ? D.overall : D.tops[view];
  copy([["side", "rank", "id", "label", "score", "error"], ...["helpful", "harmful"].flatMap((s) => tops[s].map((r, i) => [s, i + 1, r[0], D.examples[r[0]].label || "", r[1], r[3] === undefined ? "" : r[3]]))]);
});
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j") step(1); else if (event.key === "k") step(-1); else if (event.key === "/") { event.preventDefault(); $("search").focus(); }
});
addEventListener("hashchange", read);
read();
