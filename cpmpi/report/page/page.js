// The page: what is where, and what follows from a choice.

const $ = (id) => document.getElementById(id);
const state = { all: null, chosen: -1, tokens: null, axis: "log", view: null, known: new Map(), table: null, text: null, plots: [] };
const KEPT_DOCUMENTS = 3; // unpacked at a time

function tiles() {
  const { run, documents } = state.all, done = documents.state.filter((s) => !s).length;
  const facts = [
    [count(done), `${done === 1 ? "document" : "documents"}${run.all > documents.id.length ? ` of ${count(run.all)}` : ""}`],
    [short(run.tokens), `tokens (${count(run.tokens)})`],
    [digits(run.perplexity, 5), "perplexity"],
    [digits(run.nll / Math.LN2 / run.scored, 4), "bits per token"],
  ];
  if (run.bits_per_byte !== null) facts.push([digits(run.bits_per_byte, 4), "bits per byte"]);
  facts.push([count(run.world), run.world === 1 ? "rank" : "ranks"]);
  const failed = documents.state.length - done;
  if (failed) facts.push([count(failed), "without results"]);
  $("tiles").replaceChildren(...facts.map(([value, name]) => { const tile = element("div", "tile"); tile.append(element("b", "", value), element("span", "", name)); return tile; }));
}

// ---- perplexity by position

const LEAST_BAND = 4; // documents
function positions() {
  const name = state.axis, all = state.all, edges = all[`${name}_edges`], n = edges.length - 1;
  const power = (values) => Float32Array.from(values, (v) => 2 ** v);
  const at = Float32Array.from({ length: n }, (_, i) => (name === "log" ? Math.sqrt(Math.max(edges[i], 1) * edges[i + 1]) : (edges[i] + edges[i + 1]) / 2));
  const documents = all[`${name}_documents`], quantiles = all[`${name}_quantiles`];
  const rows = [0, 1, 2, 3, 4].map((q) => power(Float32Array.from({ length: n }, (_, i) => (documents[i] >= LEAST_BAND ? quantiles[q * n + i] : NaN))));
  return { edges, n, at, documents, rows, pooled: power(all[`${name}_pooled`]) };
}

function drawPositions(plot) {
  const p = (state.positions ??= positions()), own = state.chosen >= 0 ? ownByPosition(p) : null;
  const seen = [...p.pooled, ...(p.documents.some((d) => d >= LEAST_BAND) ? [...p.rows[0], ...p.rows[4]] : []), ...(own || [])].filter((v) => v > 0 && Number.isFinite(v)).sort((a, b) => a - b);
  const low = Math.max(1, seen[Math.floor(seen.length * 0.002)] * 0.9), high = Math.max(low * 2, seen[Math.ceil(seen.length * 0.998) - 1] * 1.1);
  const log = state.axis === "log";
  plot.axes({ x: [log ? p.at[0] : 0, p.edges[p.n]], y: [low, high], xLog: log, yLog: true, xLabel: "position (tokens)", yLabel: "perplexity" });
  plot.band(p.at, p.rows[0], p.rows[4], colour("wide"));
  plot.band(p.at, p.rows[1], p.rows[3], colour("band"));
  plot.line(p.at, p.rows[2], colour("accent"), 1, [4, 3]);
  plot.line(p.at, p.pooled, colour("accent"), 2);
  if (own) plot.line(p.at, own, colour("second"), 1.4);
  const several = state.all.documents.id.length > 1, band = p.documents.some((d) => d >= LEAST_BAND);
  const name = state.chosen >= 0 ? inOneLine(state.all.documents.id[state.chosen]).slice(0, 60) : "";
  legend($("position-legend"), [
    ["all tokens at a position", "accent", "stroke"], ...(band ? [["half of the documents", "band"], ["80% of them", "wide"], ["median, dashed", "accent", "stroke"]] : []),
    ...(own && several ? [[name, "second", "stroke"]] : []),
  ]);
}

function ownByPosition(p) {
  const t = state.tokens;
  if (!t || state.all.documents.id.length === 1) return null;
  return Float32Array.from({ length: p.n }, (_, i) => 2 ** t.mean(p.edges[i], Math.min(p.edges[i + 1], t.n)));
}

function tellPosition(plot, x) {
  const p = state.positions, i = clamp(lastAtMost(p.edges, x), 0, p.n - 1), own = ownByPosition(p);
  const rows = [["all tokens", digits(p.pooled[i])], ["documents that reach it", count(p.documents[i])]];
  if (p.documents[i] >= LEAST_BAND) rows.push(["median", digits(p.rows[2][i])], ["half of them", `${digits(p.rows[1][i])} to ${digits(p.rows[3][i])}`], ["80% of them", `${digits(p.rows[0][i])} to ${digits(p.rows[4][i])}`]);
  if (own && !Number.isNaN(own[i])) rows.push(["the chosen one", digits(own[i])]);
  return { title: `tokens ${count(p.edges[i])} to ${count(p.edges[i + 1] - 1)}`, rows };
}

// ---- the chosen document's curve

function curveOf(plot) {
  const { tokens: t, all, chosen } = state, n = all.documents.tokens[chosen], first = all.documents.first[chosen];
  const [from, to] = state.view || [0, n];
  if (t) {
    const key = `${chosen} ${from} ${to} ${plot.width}`;
    if (state.curveKey !== key) Object.assign(state, { curveKey: key, curve: t.curve(Math.floor(from), Math.ceil(to), Math.floor(plot.width / 2.5)) });
    return { ...state.curve, from, to, n };
  }
  const place = all.with_curve.indexOf(chosen), width = all.curves.shape[2], part = (k) => all.curves.subarray((place * 3 + k) * width, (place * 3 + k + 1) * width);
  const w = Math.min(width, n - first);
  return { bounds: Float64Array.from({ length: w + 1 }, (_, i) => first + Math.floor((i * (n - first)) / w)), mean: part(0).subarray(0, w), low: part(1).subarray(0, w), high: part(2).subarray(0, w), from: 0, to: n, n };
}

function drawCurve(plot) {
  if (state.chosen < 0 || state.all.documents.state[state.chosen]) { plot.x = null; return plot.pen.save(); }
  const c = curveOf(plot), at = Float64Array.from(c.mean, (_, i) => (c.bounds[i] + c.bounds[i + 1] - 1) / 2);
  const highs = [...c.high].sort((a, b) => a - b), high = Math.max(1, (highs[Math.floor(highs.length * 0.995)] || 1) * 1.15);
  plot.axes({ x: [c.from, Math.max(c.to, c.from + 1)], y: [0, high], xLabel: "position (tokens)", yLabel: "bits per token" });
  if (state.text?.lines && state.tokens) {
    const [a, b] = state.text.visible, pen = plot.pen;
    pen.fillStyle = colour("wide");
    pen.fillRect(plot.xAt(a), 0, Math.max(2, plot.xAt(b) - plot.xAt(a)), plot.height);
  }
  plot.band(at, c.low, c.high, colour("band"));
  plot.line(at, c.mean, colour("accent"), 1.2);
  if (state.tokens && !state.view) {
    const t = state.tokens, xs = Float64Array.from({ length: 300 }, (_, i) => t.first + ((i + 1) * (t.n - t.first)) / 300);
    plot.line(xs.slice(8), Float64Array.from(xs.slice(8), (x) => t.mean(t.first, Math.floor(x))), colour("second"), 1.8);
  }
  legend($("curve-legend"), [["mean", "accent", "stroke"], ["quartiles", "band"], ...(state.tokens && !state.view ? [["mean so far", "second", "stroke"]] : []), ...(state.tokens ? [["in view below", "wide"]] : [])]);
}

function tellCurve(plot, x) {
  const c = curveOf(plot), i = clamp(lastAtMost(c.bounds, x, c.mean.length), 0, c.mean.length - 1);
  const [a, b] = [c.bounds[i], c.bounds[i + 1] - 1], rows = [["mean", `${digits(c.mean[i])} bits`], ["perplexity", digits(2 ** c.mean[i])]];
  if (b > a) rows.push(["quartiles", `${digits(c.low[i], 3)} to ${digits(c.high[i], 3)} bits`]);
  return { title: a === b ? `token ${count(a)}` : `tokens ${count(a)} to ${count(b)}`, rows };
}

function zoomCurve(from, to) {
  const n = state.all.documents.tokens[state.chosen];
  state.view = from === null || !state.tokens || to - from < 16 ? null : [Math.max(0, Math.floor(from)), Math.min(n, Math.ceil(to))];
  state.plots[1].redraw();
}

// ---- passages

function passageButton(bits, words, where, go) {
  const item = element("li"), button = element("button"), right = element("span");
  const step = colourOf(bits);
  button.type = "button";
  const amount = element("span", `amount ${step ? "s" + step : ""}`, bits.toFixed(1));
  amount.title = "bits per token";
  right.append(element("span", "words", words), element("span", "where", where));
  button.append(amount, right);
  button.addEventListener("click", go);
  item.append(button);
  return item;
}

function topPassages() {
  const { passages, documents } = state.all;
  $("overview-pair").classList.toggle("alone", documents.id.length === 1); // its own list is beside its text
  $("top-card").hidden = documents.id.length === 1;
  $("top-note").textContent = passages.length ? `bits per token over ${passages[0].stop - passages[0].start} tokens` : "";
  $("top").replaceChildren(...passages.map((p) =>
    passageButton(p.bits, inOneLine(p.text).trim(), `${documents.id.length > 1 ? inOneLine(documents.id[p.document]) + ", " : ""}token ${count(p.start)}`,
      () => choose(p.document, { token: p.start, marked: [p.start, p.stop], reveal: true }))));
}

function ownPassages() {
  const list = state.tokens ? state.all.documents.passages[state.chosen] : [];
  $("passages").replaceChildren(...list.map(([start, stop, bits]) =>
    passageButton(bits, inOneLine(state.tokens.text.slice(state.tokens.starts[start], state.tokens.starts[stop])).trim(), `token ${count(start)}`,
      () => { state.text.go(start, [start, stop]); $("text").focus({ preventScroll: true }); })));
}

function nextPassage(step) {
  const list = state.all.documents.passages[state.chosen].slice().sort((a, b) => a[0] - b[0]), at = state.text.cursor;
  if (!list.length || !state.tokens) return;
  const found = step > 0 ? list.find(([start]) => start > at) || list[0] : list.findLast(([start]) => start < at) || list[list.length - 1];
  state.text.go(found[0], [found[0], found[1]]);
  say(`token ${count(found[0])}: ${found[2].toFixed(1)} bits per token`);
}

// ---- a document

const COLOURINGS = {
  surprisal: { name: "surprisal", of: (t) => t.bits, words: ["0", "15+ bits"], },
  entropy: { name: "entropy", of: (t) => t.entropy, words: ["0", "15+ bits"] },
  rank: { name: "rank", of: (t) => t.rank, scale: Math.log2, words: ["1", "32,768+"] },
};

function scoresOf(t, name) {
  const { of, scale } = COLOURINGS[name], values = of(t), out = new Uint8Array(t.n);
  for (let i = 0; i < t.n; i++) {
    const value = scale ? scale(values[i]) : values[i];
    out[i] = value >= 1 ? Math.min(15, value) : 0; // NaN and -Infinity are 0, too
  }
  return out;
}

function setColouring(name) {
  const words = COLOURINGS[name].words, bar = element("span");
  for (let i = 0; i < 16; i++) bar.append(element("i", i ? `s${i}` : ""));
  $("scale").replaceChildren(words[0], bar, words[1]);
  state.colouring = name;
}

async function tokensOf(place) {
  if (!state.known.has(place)) {
    state.known.set(place, new Tokens(await block(String(place)), state.all.documents.first[place]));
    for (const old of state.known.keys()) if (state.known.size > KEPT_DOCUMENTS && old !== place) { state.known.delete(old); break; }
  }
  return state.known.get(place);
}

// Show a document, and a place of it. Choices overtake those that are still being unpacked.
async function choose(place, { token = null, marked = null, reveal = false } = {}) {
  if (place < 0 || place === undefined) return;
  const { documents: d } = state.all, ticket = (state.ticket = {});
  state.table.mark(place);
  if (place !== state.chosen) {
    Object.assign(state, { chosen: place, view: null, tokens: null, curveKey: "" });
    $("reader-title").textContent = inOneLine(d.id[place]);
    const facts = [plural(d.tokens[place], "token")];
    if (d.state[place]) facts.push(d.state[place]);
    else facts.push(`perplexity ${digits(d.perplexity[place], 5)}`, `${digits(d.bits[place])} bits per token`);
    if (d.bits_per_byte?.[place]) facts.push(`${digits(d.bits_per_byte[place])} bits per byte`);
    if (d.source[place] && d.source[place] !== d.id[place]) facts.push(inOneLine(d.source[place]));
    $("reader-facts").textContent = facts.join("  ·  ");
    for (const [id, step] of [["document-before", -1], ["document-after", 1]]) $(id).disabled = state.table.neighbour(step) < 0;
    $("text-part").hidden = !d.has[place];
    $("no-tokens").hidden = d.has[place];
    $("curve-plot").hidden = $("curve-legend").hidden = Boolean(d.state[place]) || !d.scored?.[place];
    $("no-tokens").textContent = d.state[place] ? `It has no results: ${inOneLine(d.state[place])}` : `Its tokens are not in this page, which has those of ${count(state.all.page.most_tokens)} at most: cpmpi report ... --documents ${d.number[place]}`;
    if (d.has[place]) {
      const tokens = await tokensOf(place);
      if (state.ticket !== ticket) return;
      state.tokens = tokens;
      const kinds = Object.keys(COLOURINGS).filter((name) => COLOURINGS[name].of(tokens));
      $("colour").replaceChildren(...kinds.map((name) => { const o = element("option", "", COLOURINGS[name].name); o.value = name; return o; }));
      $("colour-by").hidden = kinds.length < 2;
      setColouring(kinds.includes(state.colouring) ? state.colouring : "surprisal");
      $("colour").value = state.colouring;
      $("goto").max = tokens.n - 1;
      ownPassages();
      await state.text.show(tokens, scoresOf(tokens, state.colouring));
      if (state.ticket !== ticket) return;
    }
    state.plots.forEach((plot) => plot.redraw());
  }
  if (token !== null && state.tokens) state.text.go(token, marked);
  if (reveal) $("reader").scrollIntoView();
  remember();
}

function remember() {
  const token = state.text.cursor >= 0 ? `&token=${state.text.cursor}` : "";
  try { history.replaceState(null, "", `#document=${state.all.documents.number[state.chosen]}${token}`); } catch { /* some browsers forbid it for files */ }
}

function tellToken(i) {
  const t = state.tokens, bits = t.bits[i], word = inOneLine(t.word(i)), scored = i >= t.first;
  const rows = [["token", count(i)]];
  rows.push(["surprisal", scored ? `${digits(bits)} bits` : "not scored"]);
  if (scored) rows.push(["probability", probability(bits)], ["log-probability", `${digits(-bits * Math.LN2)} nats`]);
  if (t.rank?.[i]) rows.push(["rank", count(t.rank[i])]);
  if (t.entropy && scored) rows.push(["entropy", `${digits(t.entropy[i])} bits`]);
  if (t.characters) rows.push(["character", count(t.characters[i])]);
  rows.push(["id", count(t.ids[i])]);
  const best = [];
  if (t.best && scored) for (let k = 0, width = t.best.shape[1]; k < width; k++) best.push([`‘${inOneLine(t.bestTexts[t.best[i * width + k]])}’`, probability(t.bestBits[i * width + k])]);
  return { title: word ? `‘${word}’` : "(no character of its own)", rows, best };
}
const probability = (bits) => { const p = 2 ** -bits; return p >= 0.001 ? `${(100 * p).toFixed(p > 0.1 ? 1 : 2)}%` : digits(p, 3); };

function say(words) { $("said").textContent = words; }

function findNext() {
  const wanted = $("find").value, t = state.tokens;
  if (!wanted || !t) return ($("found").textContent = "");
  const from = state.text.cursor >= 0 ? t.starts[state.text.cursor + 1] : 0;
  let at = t.text.indexOf(wanted, from);
  if (at < 0) at = t.text.indexOf(wanted);
  $("found").textContent = at < 0 ? "not there" : "";
  if (at < 0) return;
  const token = t.at(at);
  state.text.go(token, [token, t.at(at + wanted.length - 1) + 1]);
}

// ---- the rest

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "☀" : "☾";
  $("theme").setAttribute("aria-label", name === "dark" ? "Light theme" : "Dark theme");
  state.plots.forEach((plot) => plot.redraw());
  if (state.text) state.text.refresh();
}

function timeAndMachine() {
  const { spent, machine, run } = state.all;
  if (spent.ranks.length) {
    spentBars($("spent"), spent);
    $("time-note").textContent = `seconds of each rank, from its log, of ${plural(spent.documents, "document")}`;
  } else $("spent").append(element("p", "soft", "The run's logs say nothing of it."));
  if (state.all.trace_rank) {
    $("timeline-part").hidden = false;
    state.plots.push(new Timeline($("timeline"), state.all).plot);
    legend($("timeline-legend"), state.all.trace_kinds.filter((_, k) => state.all.trace_what.includes(k)).map((kind) => [KIND_WORDS[kind], KIND_LOOKS[kind][0]]));
    if (state.all.trace_left_out) $("no-trace").textContent = `The ${count(state.all.trace_left_out)} shortest intervals are left out.`;
  } else $("no-trace").textContent = "A job that runs with --trace FILE records a timeline: cpmpi report ... --trace FILE shows it here.";
  $("machine-text").textContent = machine.text || "The run does not say.";
  $("machine-sides").classList.toggle("alone", !machine.picture);
  if (machine.picture) Object.assign($("machine-picture"), { src: machine.picture, hidden: false, alt: "The machine: nodes, ranks and links, as described above" });
  $("command").textContent = run.command;
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(run.command);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  });
  for (const [name, value] of run.settings) $("facts").append(element("dt", "", name), element("dd", "", value));
  const kept = state.all.documents.has.filter(Boolean).length;
  $("footer").textContent = `${fileSize(state.all.page.bytes)} of data; tokens of ${plural(kept, "document")}. Surprisal is -log2 p(token given all tokens before it), in bits; perplexity is 2 to the power of its mean. Nothing here comes from a network.`;
}

function listen() {
  for (const name of ["log", "linear"]) $(`axis-${name}`).addEventListener("click", () => {
    Object.assign(state, { axis: name, positions: null });
    for (const other of ["log", "linear"]) $(`axis-${other}`).setAttribute("aria-pressed", String(other === name));
    state.plots[0].redraw();
  });
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("filter").addEventListener("input", (e) => { state.table.pattern = e.target.value; $("table").scrollTop = 0; state.table.arrange(); });
  for (const [id, step] of [["document-before", -1], ["document-after", 1]]) $(id).addEventListener("click", () => choose(state.table.neighbour(step)));
  $("colour").addEventListener("change", (e) => { setColouring(e.target.value); state.text.colour(scoresOf(state.tokens, e.target.value)); });
  $("goto").addEventListener("change", (e) => e.target.value !== "" && state.text.go(Number(e.target.value)));
  $("find").addEventListener("keydown", (e) => e.key === "Enter" && findNext());
  $("text").addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (!step || e.ctrlKey || e.altKey || e.metaKey) return;
    e.preventDefault();
    state.text.go(state.text.cursor < 0 ? state.text.visible[0] : state.text.cursor + step);
    state.text.tipAtCursor();
    const told = tellToken(state.text.cursor);
    say(`${told.title}: ${told.rows.map((row) => row.join(" ")).join(", ")}`);
  });
  $("text").addEventListener("blur", () => showTip(null));
  document.addEventListener("keydown", (e) => {
    if (["INPUT", "SELECT"].includes(e.target.tagName) || e.ctrlKey || e.altKey || e.metaKey || !state.tokens) return;
    if (e.key === "n" || e.key === "p") nextPassage(e.key === "n" ? 1 : -1);
  });
  addEventListener("scroll", () => showTip(null), { passive: true });
}

function fromAddress() {
  const found = new URLSearchParams(location.hash.slice(1)), place = state.all.documents.number.indexOf(Number(found.get("document") ?? NaN));
  return { place, token: found.has("token") ? Number(found.get("token")) : null };
}

async function start() {
  theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const all = (state.all = await block("all"));
  $("run-name").textContent = inOneLine(all.run.name);
  if (all.run.no_text) { $("no-text").hidden = false; $("no-text").textContent = `Tokens are shown as ids: ${all.run.no_text}. cpmpi report ... --model DIR says where the tokenizer is.`; }
  tiles();
  topPassages();
  state.text = new TextView($("text"), $("map"), { tell: tellToken, moved: (token) => { state.plots[1]?.redraw(); if (token >= 0) { $("goto").value = token; remember(); } } });
  state.plots.push(
    new Plot($("position-plot"), "Perplexity by position, with the band of the documents", { draw: drawPositions, tell: tellPosition }),
    new Plot($("curve-plot"), "Surprisal along the document", { draw: drawCurve, tell: tellCurve, pick: (x) => state.tokens && state.text.go(Math.floor(x)), zoom: zoomCurve }),
  );
  state.table = new Table($("table"), all.documents, all.sparks, choose);
  timeAndMachine();
  listen();
  const { place, token } = fromAddress();
  await choose(place >= 0 ? place : Math.max(0, all.documents.has.indexOf(true)), { token, reveal: place >= 0 });
  document.documentElement.dataset.ready = "yes";
}

if (typeof document !== "undefined")
  start().catch((problem) => { $("trouble").hidden = false; $("trouble").textContent = `This page could not be shown (${problem.message}). It needs a browser of 2023 or later.`; });
