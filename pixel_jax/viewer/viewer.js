// The page of `pixel-jax view`. Texts of runs become text nodes and attribute values only, never markup.
"use strict";

const POLL = 2000, ROWS = 50, COLORS = 6, DASHES = 4;
const main = document.getElementById("main");
const FIELDS = ["side", "verdict", "tool", "category", "text", "change", "before", "to"];
let state = null, shown = null; // the runs; what is on the page: {update(), keys}
let sequence = 0; // of addresses: what arrives late for an earlier one is not shown

// ---- elements

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(9).filter((x) => x !== null && x !== undefined && x !== false).map((x) => (x instanceof Node ? x : String(x))));
  return made;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const color = (i) => "c" + (i % COLORS);
const number = (x, digits = 4) => (x === null || x === undefined ? "–" : String(Number(x.toPrecision(digits))));

function table(head, rows) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, head.map((x) => el("th", { scope: "col" }, x)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((x) => el("td", {}, x)))))));
}
const verdict = (right) => right === true ? el("span", { class: "right" }, "✓ right") : right === false ? el("span", { class: "wrong" }, "✗ wrong") : el("span", { class: "quiet" }, "–");
const pairList = (pairs) => el("dl", { class: "pairs" }, pairs.filter(([, x]) => x !== null && x !== undefined && x !== "").map(([name, x]) => [el("dt", {}, name), el("dd", {}, x)]));

// ---- the server

async function ask(path, fields = {}) {
  const query = new URLSearchParams(Object.entries(fields).filter(([, x]) => x !== "" && x !== undefined && x !== null));
  const answer = await fetch(path + (query.size ? "?" + query : ""), { headers: { accept: "application/json" } });
  if (answer.status === 204) return null;
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function say(text) { document.getElementById("status").textContent = text; }

async function poll() {
  try {
    if (document.visibilityState === "visible") {
      const news = await ask("state", { since: state ? state.version : "" });
      if (news) {
        const first = state === null;
        state = news;
        document.title = state.runs.map((x) => x.name).join(", ");
        if (first) route(); else if (shown) await shown.update();
      }
      say("");
    }
  } catch (error) {
    say(error instanceof TypeError ? "The server has ended; what is shown stays." : String(error.message));
  }
  setTimeout(poll, POLL);
}

// ---- addresses: #VIEW?field=value

function address() {
  const [view, query] = location.hash.slice(1).split(/\?(.*)/s);
  return { view: view || "runs", fields: Object.fromEntries(new URLSearchParams(query || "")) };
}
function link(view, fields) {
  const kept = Object.entries(fields).filter(([, x]) => x !== "" && x !== undefined && x !== null);
  return "#" + view + (kept.length ? "?" + new URLSearchParams(kept) : "");
}
const filterOf = (fields) => Object.fromEntries(FIELDS.filter((x) => fields[x]).map((x) => [x, fields[x]]));

function route() {
  if (!state) return;
  sequence++;
  const { view, fields } = address();
  for (const a of document.querySelectorAll("nav a")) {
    if (a.getAttribute("href") === "#" + (view === "trace" ? "traces" : view)) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  }
  const views = { runs: showRuns, traces: showTraces, trace: showTrace };
  (views[view] || showRuns)(fields).catch((error) => main.replaceChildren(el("p", { role: "alert" }, error.message)));
}

// ---- runs and curves

const swatch = (i) => el("span", { class: "swatch " + color(i), "aria-hidden": "true" });

async function showRuns() {
  const draw = () => main.replaceChildren(
    el("div", { class: "runs" }, state.runs.map((run, i) => el("section", { class: "run" },
      el("h3", {}, swatch(i), run.name), el("div", { class: "quiet" }, run.directory), pairList(run.status),
      run.parts.map((part) => el("div", {}, el("a", { href: link("traces", { side: part.side }) }, part.traces + " traces: " + part.name))),
      run.problems.length ? el("ul", { class: "problems" }, run.problems.map((x) => el("li", {}, x))) : null))),
    ...state.runs.filter((run) => run.table.rows.length).flatMap((run) => [el("h2", {}, run.name), table(run.table.head, run.table.rows)]),
    ...(state.differing.length ? [el("details", { open: state.differing.length <= 12 }, el("summary", {}, "Settings that differ"),
      table(["setting", ...state.runs.map((x) => x.name)], state.differing.map(([name, values]) => [name, ...values])))] : []),
    ...(state.charts.length ? [el("h2", {}, "Curves"), el("div", { class: "charts" }, state.charts.map(chart))] : []));
  shown = { update: draw, keys: {} };
  draw();
  window.scrollTo(0, 0);
}

// ---- charts

const WIDTH = 460, HEIGHT = 210, LEFT = 50, RIGHT = 10, TOP = 8, BOTTOM = 34;

function ticks(low, high, whole) {
  const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999);
  if (whole) step = Math.max(step, 1);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function chart(data) {
  const labels = [...new Set(data.lines.map((x) => x.label))], several = state.runs.length > 1;
  const lines = data.lines.map((x) => ({
    ...x, points: x.points.filter((p) => p[1] !== null), color: color(several ? x.run : labels.indexOf(x.label)), dash: "d" + (several ? labels.indexOf(x.label) % DASHES : 0),
    name: [several ? state.runs[x.run].name : null, labels.length > 1 || !several ? x.label : null].filter(Boolean).join(", "),
  }));
  const every = lines.flatMap((x) => x.points);
  if (!every.length) return null;
  const xs = every.map((p) => p[0]), ys = every.map((p) => p[1]);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity), least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const x0 = Math.min(0, least(xs)), x1 = Math.max(1, most(xs));
  let [y0, y1] = data.bounds || [least(ys), most(ys)];
  if (!(y1 - y0 > 1e-12 * Math.max(Math.abs(y1), 1e-12))) { const margin = Math.abs(y0) / 2 || 0.5; y0 -= margin; y1 += margin; }
  const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const py = (y) => HEIGHT - BOTTOM - ((Math.min(Math.max(y, y0), y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": `${data.title}. Left and right arrow keys read values.` },
    ticks(y0, y1).map((y) => [svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y) }), svg("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, number(y))]),
    ticks(x0, x1, true).map((x) => svg("text", { x: px(x), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, number(x, 6))),
    svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, data.unit),
    lines.map((x) => [svg("polyline", { class: `${x.color} ${x.dash}`, points: x.points.map((p) => px(p[0]).toFixed(1) + "," + py(p[1]).toFixed(1)).join(" ") }),
      x.points.length <= 40 ? x.points.map((p) => svg("circle", { class: x.color, cx: px(p[0]).toFixed(1), cy: py(p[1]).toFixed(1), r: 2.4 })) : null]),
    cursor);
  const values = lines.map(() => el("b"));
  const legend = el("ul", { class: "legend" }, lines.map((x, i) => el("li", {},
    svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, svg("polyline", { class: `${x.color} ${x.dash}`, points: "0,4 22,4" })), x.name, " ", values[i])));
  const where = el("span", { class: "quiet", role: "status" });
  const steps = [...new Set(xs)].sort((a, b) => a - b);
  let at = null;
  const nearest = (points, x) => points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best), points[0]);
  function read(x) {
    at = x;
    cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) { cursor.setAttribute("x1", px(x)); cursor.setAttribute("x2", px(x)); }
    where.textContent = x === null ? "" : `at ${number(x, 6)} ${data.unit}`;
    lines.forEach((line, i) => { values[i].textContent = x === null || !line.points.length ? "" : number(nearest(line.points, x)[1]); });
  }
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
    read(steps.reduce((best, s) => (Math.abs(s - x) < Math.abs(best - x) ? s : best), steps[0]));
  });
  drawing.addEventListener("pointerleave", () => read(null));
  drawing.addEventListener("blur", () => read(null));
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    read(steps[Math.min(Math.max((at === null ? (step > 0 ? -1 : steps.length) : steps.indexOf(at)) + step, 0), steps.length - 1)]);
  });
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", {}, data.title), " ", where), drawing, legend);
}

// ---- the list

function choice(name, label, options, value, change) {
  const known = options.some(([x]) => x === value) ? options : [...options, [value, value]];
  return el("label", {}, label, el("select", { name, change }, known.map(([x, words]) => el("option", { value: x, selected: x === value }, words))));
}

function sides() {
  return state.runs.flatMap((run, i) => [[String(i), run.name], ...run.parts.map((part) => [part.side, `${run.name}: ${part.name}`])]);
}

function filterForm(fields, changed) {
  const value = (name) => fields[name] || "";
  const set = (event) => {
    const next = { ...filterOf(fields), [event.target.name]: event.target.value };
    if (event.target.name === "change" && next.change && !(next.before && next.to)) {
      const all = sides(), runs = all.filter(([x]) => !x.includes("."));
      [next.before, next.to] = (runs.length > 1 ? runs : all.filter(([x]) => x.includes("."))).slice(0, 2).map(([x]) => x);
    }
    if (!next.change) delete next.before, delete next.to;
    changed(next);
  };
  let typing = null;
  const type = (event) => { clearTimeout(typing); typing = setTimeout(() => set(event), 250); };
  const all = sides(), any = [["", "all"]];
  const comparable = all.length > 1;
  return el("form", { class: "filter", role: "search", "aria-label": "Filter of the traces", submit: (event) => event.preventDefault() },
    value("change") ? null : choice("side", "Run", [...any, ...all], value("side"), set),
    choice("verdict", "Answer", [...any, ["right", "right"], ["wrong", "wrong"], ["unknown", "not judged"]], value("verdict"), set),
    choice("tool", "Tool", [...any, ["any", "any call"], ["none", "no call"], ...state.tools.map((x) => ["=" + x, x])], value("tool"), set),
    state.categories.length || value("category") ? choice("category", "Category", [...any, ...state.categories.map((x) => ["=" + x, x])], value("category"), set) : null,
    el("label", {}, "Text", el("input", { type: "search", name: "text", value: value("text"), maxlength: 200, input: type })),
    comparable ? choice("change", "Changed between two", [["", "–"], ["any", "any change"], ["gained", "wrong → right"], ["lost", "right → wrong"]], value("change"), set) : null,
    value("change") ? [choice("before", "from", all, value("before"), set), choice("to", "to", all, value("to"), set)] : null);
}

async function showTraces(fields) {
  let start = Number(fields.start) || 0, page = null;
  const filter = filterOf(fields), results = el("div");
  const go = (next, from) => { location.hash = link("traces", { ...next, start: from || "" }); };
  const form = filterForm(fields, (next) => go(next));
  const row = (x) => el("tr", {},
    el("td", {}, verdict(x.right)),
    el("td", {}, el("a", { href: link("trace", { n: x.number, ...filter }) }, x.title || "(no title)"), x.about && x.about !== x.title ? el("span", { class: "about" }, x.about) : null),
    el("td", { "data-name": "answer" }, x.answer ?? "–"), el("td", { "data-name": "reference" }, x.reference ?? "–"),
    el("td", {}, x.tools.length ? x.tools.map((tool) => el("span", { class: "tag" }, tool)) : x.calls ? el("span", { class: "tag" }, x.calls + (x.calls === 1 ? " call" : " calls")) : null),
    el("td", {}, x.category),
    el("td", { class: "quiet" }, swatch(x.run), [state.runs.length > 1 ? state.runs[x.run].name : null, x.part, x.when].filter(Boolean).join(", ")));
  const turn = (step) => { const next = start + step * ROWS; if (page && next >= 0 && next < page.of) go(filter, next); };
  const update = async () => {
    page = await ask("traces", { ...filter, start, count: ROWS });
    const end = Math.min(start + page.rows.length, page.of);
    const focused = results.contains(document.activeElement) ? [...results.querySelectorAll("a")].indexOf(document.activeElement) : -1;
    results.replaceChildren(
      el("div", { class: "pages" },
        el("button", { type: "button", click: () => turn(-1), disabled: start === 0 }, "← previous page"),
        el("span", { role: "status" }, page.of ? `${start + 1}–${end} of ${page.of} traces` : "No trace passes the filter.", page.judged ? `, ${page.right} of ${page.judged} right` : ""),
        el("button", { type: "button", click: () => turn(1), disabled: start + ROWS >= page.of }, "next page →")),
      page.rows.length ? el("table", { class: "list" },
        el("thead", {}, el("tr", {}, ["", "question", "answer", "reference", "calls", "category", "from"].map((x) => el("th", { scope: "col" }, x)))),
        el("tbody", {}, page.rows.map(row))) : "");
    if (focused >= 0) results.querySelectorAll("a")[focused]?.focus();
  };
  const move = (step) => {
    const links = [...results.querySelectorAll("a")], at = links.indexOf(document.activeElement);
    (links[at + step] || links[at] || links[0])?.focus();
  };
  const name = document.activeElement?.name, mine = sequence; // a changed filter keeps the focus where it was
  await update();
  if (mine !== sequence) return;
  main.replaceChildren(form, results);
  if (name && form.elements[name]) {
    form.elements[name].focus();
    if (name === "text") form.elements.text.setSelectionRange(9999, 9999);
  } else if (fields.at) {
    results.querySelector(`a[href="${CSS.escape(link("trace", { n: fields.at, ...filter }))}"]`)?.focus();
  }
  shown = { update, keys: { j: () => move(1), k: () => move(-1), n: () => turn(1), p: () => turn(-1) } };
}

// ---- one trace

function picture(trace, x, full) {
  const line = Math.max(x.width, x.height) / 150;
  const drawing = svg("svg", { viewBox: `0 0 ${x.width} ${x.height}`, role: "img", "aria-label": x.caption },
    svg("image", { href: `traces/${trace}/pictures/${x.picture}`, width: x.width, height: x.height, preserveAspectRatio: "none" }),
    x.boxes.map(([call, x1, y1, x2, y2]) => [
      svg("rect", { class: "box " + color(call - 1), x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0) }),
      svg("text", { class: "label " + color(call - 1), x: x1 + line, y: Math.max(y1 - line, 12 * line), "font-size": 12 * line, "stroke-width": line / 2 }, call)]));
  const figure = el("figure", { class: "picture" + (full ? " full" : "") },
    el("button", { type: "button", "aria-label": "Enlarge: " + x.caption, "aria-pressed": "false", click: (event) => {
      event.currentTarget.setAttribute("aria-pressed", String(figure.classList.toggle("large")));
    } }, drawing),
    el("figcaption", {}, `${x.caption}, ${x.width}×${x.height}`));
  return figure;
}

const bin = (p) => (p > -0.1 ? 0 : p > -0.5 ? 1 : p > -1.5 ? 2 : p > -3 ? 3 : 4);

function turnOf(trace, conversation, turn, index, call) {
  const tool = turn.role === "tool", text = el("pre", {}, turn.text), note = el("div");
  let open = false;
  async function toggle() {
    open = !open;
    button.setAttribute("aria-expanded", String(open));
    if (!open) { text.replaceChildren(turn.text); note.replaceChildren(); return; }
    const { pieces, log_probs: logs } = await ask(`traces/${trace}/tokens/${conversation}/${index}`);
    text.replaceChildren(...pieces.map((piece, i) => el("span", { class: "p" + bin(logs[i]), title: `${logs[i].toFixed(3)} (${(100 * Math.exp(logs[i])).toFixed(1)} %)` }, piece)));
    const least = logs.indexOf(logs.reduce((a, b) => Math.min(a, b), 0)), sum = logs.reduce((a, b) => a + b, 0);
    note.replaceChildren(el("p", { class: "scale" }, `${logs.length} tokens, log-probability ${number(sum)}, mean ${number(sum / logs.length)}`,
      least >= 0 ? `, least ${number(logs[least])} of “${pieces[least]}”` : "", ". ",
      ["above −0.1", "to −0.5", "to −1.5", "to −3", "below"].map((words, i) => el("span", { class: "p" + i }, words))));
  }
  const button = turn.tokens ? el("button", { type: "button", class: "tokens", "aria-expanded": "false", click: () => toggle().catch((error) => say(error.message)) }, "log-probabilities") : null;
  return el("section", { class: `turn ${tool ? "tool" + (turn.failed ? " failed" : "") + " " + color(call - 1) : "model"}` },
    el("div", { class: "who" }, tool ? `call ${call}${turn.tool ? ", " + turn.tool : ""}${turn.failed ? ", failed" : ""}` : "model", button), text, note,
    turn.pictures.length ? el("div", { class: "pictures" }, turn.pictures.map((x) => picture(trace, x))) : null);
}

function conversation(trace, item, index, count) {
  let call = 0;
  const pictures = [...item.pictures.map((x) => picture(trace, x, true)), ...item.overview.map((x) => picture(trace, x))];
  const terms = item.terms.filter(([, x]) => x).map(([name, x]) => `${name} ${x > 0 ? "+" : ""}${number(x, 3)}`).join(", ");
  return el("article", { class: "trace" },
    count > 1 ? el("h3", {}, `answer ${index + 1} of ${count}`) : null,
    pairList([["question", item.title ? item.question : ""], ["judged", item.correct === null ? "" : verdict(item.correct)], ["answer", item.answer], ["reference", item.reference],
      ["category", item.category], ["reward", item.reward === null ? "" : number(item.reward, 3) + (terms ? ` (${terms})` : "")],
      ["advantage", item.advantage === null ? "" : number(item.advantage, 3)], ["ended", item.stop]]),
    el("div", { class: "columns" + (pictures.length ? "" : " bare") },
      pictures.length ? el("div", { class: "pictures" + (item.pictures.length === 1 ? " single" : "") }, pictures) : null,
      el("div", {}, item.turns.map((turn, i) => turnOf(trace, index, turn, i, (call += turn.role === "tool"))),
        pictures.length ? null : el("p", { class: "quiet" }, "Only the text was kept of this answer: config.traces sets of how many questions pictures are kept."))));
}

function side(found) {
  const row = found.row, from = row ? [state.runs.length > 1 ? state.runs[row.run].name : null, row.part, row.when].filter(Boolean).join(", ") : "";
  return el("div", {}, el("p", { class: "quiet" }, row ? swatch(row.run) : null, from),
    found.conversations.map((item, i) => conversation(found.number, item, i, found.conversations.length)));
}

async function showTrace(fields) {
  const filter = filterOf(fields), wanted = Number(fields.n), mine = sequence;
  if (!Number.isInteger(wanted) || wanted < 0) throw new Error("There is no such trace.");
  const found = await ask("traces/" + wanted, filter);
  const other = found.before !== null && found.before !== undefined ? await ask("traces/" + found.before) : null;
  if (mine !== sequence) return;
  const back = link("traces", { ...filter, start: found.at === null ? "" : Math.floor(found.at / ROWS) * ROWS || "", at: wanted });
  const to = (n) => (n === null || n === undefined ? null : link("trace", { n, ...filter }));
  const step = (n, words, key) => (to(n) ? el("a", { href: to(n) }, `${words} (${key})`) : el("span", { class: "quiet" }, words));
  const go = (target) => { if (target) location.hash = target; };
  const title = found.conversations[0].title || found.conversations[0].question;
  const heading = el("h2", { tabindex: "-1" }, title || "(no title)");
  main.replaceChildren(
    el("div", { class: "pages" }, el("a", { href: back }, "list (Esc)"), step(found.previous, "← previous", "k"),
      el("span", {}, found.at === null ? "not in the filtered list" : `${found.at + 1} of ${found.of}`), step(found.next, "next →", "j")),
    heading, other ? el("div", { class: "sides" }, side(other), side(found)) : side(found));
  window.scrollTo(0, 0);
  heading.focus({ preventScroll: true });
  const next = () => go(to(found.next)), previous = () => go(to(found.previous));
  shown = { update: async () => {}, keys: {
    j: next, ArrowRight: next, k: previous, ArrowLeft: previous, Escape: () => go(back),
    t: () => main.querySelectorAll("button.tokens").forEach((x) => x.click()),
  } };
}

// ---- keys

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.matches("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
  const all = { "/": () => main.querySelector("input[type=search]")?.focus(), "?": () => { const keys = document.getElementById("keys"); keys.open = !keys.open; keys.scrollIntoView(); } };
  const action = { ...all, ...(shown?.keys || {}) }[event.key];
  if (action) { event.preventDefault(); action(); }
});
window.addEventListener("hashchange", route);
poll();
