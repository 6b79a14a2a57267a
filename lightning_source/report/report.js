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
function show(e, alt) {
  return e.image ? el("img", { src: e.image, alt: alt }) : el("span", { class: "text", tabindex: "0" }, e.text);
}
function bar(share, bad) {
  const b = el("div", { class: bad ? "bar bad" : "bar" });
  b.style.width = Math.max(0, Math.min(100, 100 * share)) + "%";
  return el("div", { class: "track" }, b);
}
function table(rows, size) {
  const keyed = rows.map((r, i) => ({ rank: i + 1, id: r[0], label: D.examples[r[0]].label || "", score: r[1], share: Math.abs(r[1]) / (size || 1) }));
  keyed.sort((a, b) => (a[sorted] < b[sorted] ? -1 : a[sorted] > b[sorted] ? 1 : 0) * (up ? 1 : -1));
  const head = ["rank", "id", "label", "score", "share"].map((name) => el("th", { scope: "col", class: name === "label" ? "" : "num", "aria-sort": name === sorted ? (up ? "ascending" : "descending") : "none" },
    el("button", { type: "button", onclick: () => { up = name === sorted ? !up : true; sorted = name; draw(); } }, name)));
  const body = keyed.map((r) => el("tr", {}, el("td", {}, show(D.examples[r.id], "training example " + r.id)), el("td", { class: "num" }, r.rank),
    el("td", { class: "num" }, r.id), el("td", {}, r.label), el("td", { class: "num" }, number(r.score)), el("td", { class: "num" }, percent(r.share))));
  return el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "example"), ...head)), el("tbody", {}, ...body)));
}
function sides(tops, size) {
  return el("div", { class: "two" }, el("section", { class: "good" }, el("h3", {}, "Helped most"), table(tops.helpful, size)),
    el("section", { class: "bad" }, el("h3", {}, "Harmed most"), table(tops.harmful, size)));
}
function picture(points, closed, label) {
  const ns = "http://www.w3.org/2000/svg", s = document.createElementNS(ns, "svg"), p = document.createElementNS(ns, closed ? "polygon" : "polyline");
  s.setAttribute("viewBox", "0 0 400 140"); s.setAttribute("role", "img"); s.setAttribute("aria-label", label);
  p.setAttribute("points", points.map(([x, y]) => (400 * x).toFixed(1) + "," + (138 - 132 * y).toFixed(1)).join(" "));
  p.setAttribute("fill", closed ? "currentColor" : "none"); p.setAttribute("stroke", "currentColor"); p.setAttribute("stroke-width", "2");
  s.append(p);
  return s;
}
function overview() {
  const h = D.histogram, most = Math.max(...h.counts.map((c) => Math.log1p(c)), 1), n = h.counts.length;
  const steps = h.counts.flatMap((c, i) => [[i / n, Math.log1p(c) / most], [(i + 1) / n, Math.log1p(c) / most]]);
  main.replaceChildren(el("h2", {}, "Over all " + D.queries.length + " queries"), sides(D.overall, D.overall_size));
  if (D.suspects) main.append(el("h3", {}, "Look at these labels first (highest self-influence)"), el("p", {}, el("button", { type: "button", id: "export", onclick: () =>
    copy([["id"], ...[...marked].sort((a, b) => a - b).map((i) => [i])]) }, "Copy marked ids")), el("div", { class: "scroll", tabindex: "0" }, el("table", { class: "narrow" }, el("thead", {}, el("tr", {}, ...["mark", "example", "id", "label", "self-influence"].map((name) => el("th", { scope: "col", class: /id|self/.test(name) ? "num" : "" }, name)))), el("tbody", {}, ...D.suspects.map((r) => {
    const box = el("input", { type: "checkbox", "aria-label": "mark example " + r[0] });
    box.checked = marked.has(r[0]);
    box.addEventListener("change", () => (box.checked ? marked.add(r[0]) : marked.delete(r[0])));
    return el("tr", {}, el("td", {}, box), el("td", {}, show(D.examples[r[0]], "training example " + r[0])), el("td", { class: "num" }, r[0]), el("td", {}, D.examples[r[0]].label || ""), el("td", { class: "num" }, number(r[1])));
  })))));
  main.append(el("div", { class: "two" },
    el("section", {}, el("h3", {}, "Histogram of scores"), picture([[0, 0], ...steps, [1, 0]], true, "Histogram of scores"), el("p", { class: "soft" }, "From " + number(-h.limit) + " to " + number(h.limit) + "; heights are logarithmic.")),
    el("section", {}, el("h3", {}, "Concentration"), picture(D.concentration.map((y, i) => [i / 20, y]), false, "Concentration curve"), el("p", { class: "soft" }, "Share of the absolute score that the largest examples hold, from none to all " + D.N + "."))));
}
function one(q) {
  const e = D.queries[q];
  main.replaceChildren(el("h2", {}, "Query " + e.id), el("div", { class: "big" }, show(e, "query " + e.id)),
    el("p", {}, ["label", "prediction", "loss"].filter((k) => e[k] !== undefined).map((k) => k + ": " + e[k]).join(" · ")), sides(D.tops[q], D.sizes[q]));
  const parts = el("div", { class: "two" });
  if (D.shares) parts.append(el("section", {}, el("h3", {}, "When: share of each segment"), ...D.shares[q].map((s, i) => el("div", {}, "segment " + i + ", " + percent(s), bar(s)))));
  if (D.classes) {
    const sums = D.classes.sums[q], most = Math.max(...sums.map(Math.abs), 1e-300);
    parts.append(el("section", {}, el("h3", {}, "Sum of scores by training label"), ...D.classes.labels.map((l, i) => el("div", {}, "label " + l + ", " + number(sums[i]), bar(Math.abs(sums[i]) / most, sums[i] < 0)))));
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
  copy([["side", "rank", "id", "label", "score"], ...["helpful", "harmful"].flatMap((s) => tops[s].map((r, i) => [s, i + 1, r[0], D.examples[r[0]].label || "", r[1]]))]);
});
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j") step(1); else if (event.key === "k") step(-1); else if (event.key === "/") { event.preventDefault(); $("search").focus(); }
});
addEventListener("hashchange", read);
read();
