// The table of documents: sorted, filtered, and only its visible rows made.

const ROW = 35; // pixels, as the style has it
const COLUMNS = [
  // heading, field, width, words of a value, what it is
  ["#", "number", "64px", count, "number in the run"],
  ["document", "id", "auto", String, "id of the document"],
  ["tokens", "tokens", "96px", count, "length in tokens"],
  ["nll", "nll", "112px", (v) => digits(v, 6), "negative log-likelihood of its scored tokens, in nats"],
  ["perplexity", "perplexity", "118px", (v) => digits(v, 5), "exp(nll / scored tokens)"],
  ["bits/token", "bits", "104px", digits, "mean surprisal of a token"],
  ["bits/byte", "bits_per_byte", "100px", digits, "nll in bits, by byte of text"],
];

class Table {
  constructor(place, documents, sparks, choose) {
    Object.assign(this, { place, documents, sparks, choose, chosen: -1, by: "number", down: false, pattern: "" });
    this.columns = COLUMNS.filter(([, field]) => field === "id" || documents[field].some((v) => v !== null));
    this.table = element("table");
    this.body = element("tbody");
    this.makeHead();
    this.table.append(this.body);
    place.append(this.table);
    place.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(place);
    place.addEventListener("keydown", (e) => this.key(e));
    this.body.addEventListener("click", (e) => { const row = e.target.closest("tr.row"); if (row) this.choose(Number(row.dataset.place)); });
    this.most = 1e-9; // of the small curves' heights
    const heights = sparks.filter((v) => v >= 0).sort();
    if (heights.length) this.most = heights[Math.floor((heights.length - 1) * 0.995)] || this.most; // not of an outlier
    this.arrange();
  }

  makeHead() {
    const head = element("thead"), row = element("tr");
    for (const [name, field, width, , title] of this.columns) {
      const cell = element("th", field === "id" ? "name" : ""), button = element("button", "", name);
      cell.scope = "col"; cell.style.width = width; cell.dataset.field = field; button.type = "button"; button.title = title;
      button.addEventListener("click", () => {
        this.down = this.by === field ? !this.down : field !== "number" && field !== "id";
        this.by = field;
        this.arrange();
      });
      cell.append(button);
      row.append(cell);
    }
    const curve = element("th", "name");
    curve.scope = "col"; curve.style.width = "190px";
    const words = element("button", "", "surprisal along it");
    words.disabled = true;
    curve.append(words);
    row.append(curve);
    head.append(row);
    this.table.append(head);
  }

  arrange() {
    const { documents: d, by, down } = this, values = d[by], wanted = this.pattern.toLowerCase();
    const missing = (v) => v === null || v === undefined;
    this.order = d.id.map((_, i) => i).filter((i) => !wanted || d.id[i].toLowerCase().includes(wanted));
    const collator = new Intl.Collator("en", { numeric: true });
    this.order.sort((a, b) => {
      if (missing(values[a]) || missing(values[b])) return missing(values[a]) - missing(values[b]) || a - b;
      const less = typeof values[a] === "string" ? collator.compare(values[a], values[b]) : values[a] - values[b];
      return (down ? -less : less) || a - b;
    });
    for (const cell of this.table.querySelectorAll("th[data-field]")) {
      if (cell.dataset.field === by) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    this.table.setAttribute("aria-rowcount", this.order.length + 1);
    document.getElementById("table-count").textContent =
      this.order.length === d.id.length ? plural(d.id.length, "document") : `${count(this.order.length)} of ${plural(d.id.length, "document")}`;
    this.drawn = "";
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.place.scrollTop / ROW) - 8);
    const stop = Math.min(this.order.length, first + Math.ceil((this.place.clientHeight || 430) / ROW) + 16);
    const state = `${first} ${stop} ${this.chosen} ${this.by} ${this.down} ${this.pattern}`;
    if (state === this.drawn) return;
    this.drawn = state;
    const gap = (rows) => { const row = element("tr", "gap"), cell = element("td"); cell.style.height = `${rows * ROW}px`; row.append(cell); row.setAttribute("aria-hidden", "true"); return row; };
    const rows = [];
    for (let i = first; i < stop; i++) rows.push(this.row(i));
    this.body.replaceChildren(gap(first), ...rows, gap(this.order.length - stop));
  }

  row(i) {
    const place = this.order[i], d = this.documents, row = element("tr", "row");
    row.dataset.place = place;
    row.setAttribute("aria-rowindex", i + 2);
    row.setAttribute("aria-selected", String(place === this.chosen));
    const failed = d.state[place];
    for (const [, field, , words] of this.columns) {
      if (failed && !["number", "id", "tokens"].includes(field)) continue;
      const cell = element("td", field === "id" ? "name" : "", field === "id" ? inOneLine(d.id[place]) : words === String ? "" : d[field][place] === null ? "–" : words(d[field][place]));
      if (field === "id") cell.title = inOneLine(d.id[place]);
      if (field === "bits" && d.bits[place] !== null) cell.replaceChildren(element("span", `chip s${colourOf(d.bits[place])}`, digits(d.bits[place])));
      row.append(cell);
    }
    const last = failed ? element("td", "why", inOneLine(failed)) : element("td");
    if (failed) { last.colSpan = this.columns.length + 1 - row.children.length; last.title = inOneLine(failed); }
    else last.append(this.spark(place));
    row.append(last);
    return row;
  }

  spark(place) {
    const n = this.sparks.shape[1], svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline"), points = [];
    let last = n;
    while (last && Number.isNaN(this.sparks[place * n + last - 1])) last--;
    for (let i = 0; i < last; i++) points.push(`${((i * 100) / Math.max(1, last - 1)).toFixed(1)},${(21 - 20 * Math.min(1, this.sparks[place * n + i] / this.most)).toFixed(1)}`);
    svg.setAttribute("viewBox", "0 0 100 22");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    line.setAttribute("points", points.join(" "));
    svg.append(line);
    return svg;
  }

  mark(place) {
    this.chosen = place;
    const at = this.order.indexOf(place);
    if (at >= 0 && (at * ROW < this.place.scrollTop || (at + 2) * ROW > this.place.scrollTop + this.place.clientHeight)) this.place.scrollTop = Math.max(0, at - 3) * ROW;
    this.draw();
  }

  // The document `step` rows below the chosen one; -1: there is none.
  neighbour(step) {
    const at = this.order.indexOf(this.chosen) + step;
    return this.order[at] ?? -1;
  }

  key(e) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[e.key];
    if (!step || e.target !== this.place) return;
    const at = clamp(this.order.indexOf(this.chosen) + step, 0, this.order.length - 1);
    this.choose(this.order[at], { stay: true });
    e.preventDefault();
  }
}
