// The text, coloured: only the lines in view are made, so that a million tokens scroll like a page of them.

const LINE = 24; // pixels, as the style has it
const TALLEST = 8e6; // pixels that every browser can scroll; longer texts move several lines a pixel
const EXTRA = 12; // lines made above and below those in view

class TextView {
  constructor(place, map, { moved, tell }) {
    Object.assign(this, { place, map, moved, tell, tokens: null, lines: null, cursor: -1, marked: [-1, -1], scores: null, scrolled: 0 });
    this.whole = element("div", "whole");
    this.inner = element("div", "lines");
    place.append(this.whole, this.inner);
    place.addEventListener("scroll", () => { this.scrolled = place.scrollTop; this.draw(); });
    place.addEventListener("pointermove", (e) => this.hover(e));
    place.addEventListener("pointerleave", () => showTip(null));
    place.addEventListener("click", (e) => { const i = e.target.dataset?.i; if (i !== undefined) { this.cursor = Number(i); this.refresh(); this.moved(this.cursor); } });
    map.addEventListener("pointerdown", (e) => { this.dragging = true; map.setPointerCapture(e.pointerId); this.toMap(e); });
    map.addEventListener("pointermove", (e) => this.dragging && this.toMap(e));
    map.addEventListener("pointerup", () => (this.dragging = false));
    new ResizeObserver(() => this.resized()).observe(place);
    this.measure();
  }

  // Sizes are asked for when they change: while lines are made, asking makes the browser lay out all of them.
  measure() { Object.assign(this, { height: this.place.clientHeight, width: this.place.clientWidth, mapHeight: this.map.clientHeight }); }

  // `scores` (one a token, in steps of colour) say how tokens are coloured.
  async show(tokens, scores) {
    Object.assign(this, { tokens, scores, cursor: -1, marked: [-1, -1], lines: null });
    this.place.scrollTop = this.scrolled = 0;
    this.inner.replaceChildren();
    await this.lay();
  }

  colour(scores) { this.scores = scores; this.refresh(); }

  get columns() {
    if (!this.letter) {
      const probe = element("span", "", "0".repeat(100));
      this.inner.append(probe);
      this.letter = probe.getBoundingClientRect().width / 100;
      probe.remove();
    }
    return Math.max(20, Math.min(160, Math.floor((this.width - 92 - 26) / (this.letter || 8))));
  }

  async lay() {
    this.measure();
    const tokens = this.tokens, columns = this.columns, ticket = (this.ticket = {});
    const lines = await linesOf(tokens.text, columns, () => this.ticket === ticket);
    if (!lines || this.ticket !== ticket) return;
    const top = this.lines ? this.tokens.at(this.lines[this.firstLine]) : -1;
    Object.assign(this, { lines, laidFor: columns });
    this.tall = Math.min(TALLEST, this.rows * LINE);
    this.whole.style.height = `${this.tall}px`;
    if (top > 0) this.toLine(this.lineOf(top));
    this.refresh();
    this.moved(-1);
  }

  resized() {
    this.measure();
    if (!this.tokens || !this.lines) return;
    if (this.columns !== this.laidFor) this.lay(); else this.refresh();
  }

  get rows() { return this.lines.length - 1; }
  // Pixels of the text to one of the scroll bar.
  get ratio() {
    const room = this.tall - this.height;
    return room > 0 ? (this.rows * LINE - this.height) / room : 1;
  }
  get firstLine() { return this.lines ? clamp(Math.floor((this.scrolled * this.ratio) / LINE), 0, this.rows - 1) : 0; }
  get visible() { // tokens from .. to
    if (!this.lines) return [0, 0];
    const last = Math.min(this.rows, this.firstLine + Math.ceil(this.height / LINE));
    return [this.tokens.at(this.lines[this.firstLine]), this.tokens.at(this.lines[last]) + 1];
  }
  lineOf(token) { return clamp(lastAtMost(this.lines, this.tokens.starts[token], this.rows), 0, this.rows - 1); }
  toLine(line) {
    this.place.scrollTop = (line * LINE) / this.ratio;
    this.scrolled = this.place.scrollTop;
  }

  refresh() { this.drawn = ""; this.draw(); this.drawMap(); }

  draw() {
    if (!this.lines) return;
    const first = Math.max(0, this.firstLine - EXTRA);
    const stop = Math.min(this.rows, this.firstLine + Math.ceil(this.height / LINE) + EXTRA);
    const offset = this.scrolled * (1 - this.ratio); // where the scroll bar lags behind the lines
    const state = `${first} ${stop}`;
    this.inner.style.transform = `translateY(${offset + first * LINE}px)`;
    if (state !== this.drawn) {
      this.drawn = state;
      const made = document.createDocumentFragment();
      for (let row = first; row < stop; row++) made.append(this.line(row, row - first));
      this.inner.replaceChildren(made);
      this.drawMap();
      this.moved(-1);
    }
  }

  line(row, place) {
    const { tokens, lines } = this, from = lines[row], to = lines[row + 1], line = element("div", "line");
    line.style.top = `${place * LINE}px`;
    let i = tokens.at(from);
    while (i > 0 && tokens.starts[i] === from && tokens.starts[i + 1] === from) i--; // tokens without characters
    line.dataset.at = count(i);
    for (; i < tokens.n && tokens.starts[i] < to; i++) {
      const a = Math.max(from, tokens.starts[i]), b = Math.min(to, tokens.starts[i + 1]);
      if (b <= a) continue;
      const text = tokens.text.slice(a, b), step = this.scores ? this.scores[i] : 0;
      const end = text.endsWith("\n");
      const span = element("span", step ? `s${step}` : "", visible(end ? text.slice(0, -1) : text));
      if (end) { const sign = element("span", "end", "↵"); sign.dataset.i = i; span.append(sign); }
      span.dataset.i = i;
      if (i === this.cursor) span.classList.add("cursor");
      if (i >= this.marked[0] && i < this.marked[1]) span.classList.add("marked");
      line.append(span);
    }
    return line;
  }

  go(token, marked = null) {
    if (!this.lines) return;
    this.cursor = clamp(token, 0, this.tokens.n - 1);
    if (marked) this.marked = marked;
    const line = this.lineOf(this.cursor), rows = Math.floor(this.height / LINE);
    if (line < this.firstLine + 1 || line > this.firstLine + rows - 3) this.toLine(Math.max(0, line - Math.floor(rows / 3)));
    this.refresh();
    this.moved(this.cursor);
  }

  tipAtCursor() {
    const span = this.inner.querySelector(".cursor");
    if (!span) return;
    const box = span.getBoundingClientRect();
    showTip(this.tell(this.cursor), box.left, box.bottom - 8);
  }

  hover(e) {
    const i = e.target.dataset?.i;
    showTip(i === undefined ? null : this.tell(Number(i)), e.clientX, e.clientY);
  }

  toMap(e) {
    if (!this.lines) return;
    const box = this.map.getBoundingClientRect(), part = clamp((e.clientY - box.top) / this.used, 0, 1);
    this.toLine(part * this.rows - this.height / LINE / 2);
  }

  // The whole text as a strip, each row of pixels in the colour of its mean, and where the view is.
  drawMap() {
    if (!this.lines || !this.scores) return;
    const { map, tokens } = this, height = this.mapHeight, scale = window.devicePixelRatio || 1, pen = map.getContext("2d");
    if (!height) return;
    const key = `${height} ${this.laidFor}`;
    if (this.mapKey !== key || this.mapScores !== this.scores || this.mapTheme !== document.documentElement.dataset.theme) {
      Object.assign(this, { mapKey: key, mapScores: this.scores, mapTheme: document.documentElement.dataset.theme });
      this.strip = this.makeStrip(Math.min(height, this.rows), tokens);
    }
    Object.assign(map, { width: 22 * scale, height: height * scale });
    pen.imageSmoothingEnabled = false;
    const used = Math.min(height, this.rows * 6) * scale;
    pen.drawImage(this.strip, 0, 0, map.width, used);
    this.used = used / scale;
    pen.strokeStyle = colour("accent"); pen.lineWidth = 2 * scale;
    const per = used / this.rows, seen = Math.max(8 * scale, (this.height / LINE) * per);
    pen.strokeRect(scale, clamp(this.firstLine * per, 0, Math.max(0, used - seen)) + scale, map.width - 2 * scale, seen - 2 * scale);
  }

  makeStrip(rows, tokens) {
    const strip = element("canvas"), pen = (Object.assign(strip, { width: 1, height: rows }), strip.getContext("2d"));
    const colours = Array.from({ length: 16 }, (_, i) => (i ? colour("s" + i) : colour("card")));
    for (let y = 0; y < rows; y++) {
      const a = tokens.at(this.lines[Math.floor((y * this.rows) / rows)]), b = Math.max(a + 1, tokens.at(this.lines[Math.floor(((y + 1) * this.rows) / rows)]));
      let sum = 0;
      for (let i = a; i < b; i++) sum += this.scores[i];
      pen.fillStyle = colours[clamp(Math.round(sum / (b - a)), 0, 15)];
      pen.fillRect(0, y, 1, 1);
    }
    return strip;
  }
}
