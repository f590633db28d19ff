// Plots on a canvas: axes, what is under the pointer, zoom. Each reads its colours from the style when it draws.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const MARGIN = { left: 52, right: 14, top: 10, bottom: 34 };

function short(value) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(value) >= size) return Number((value / size).toPrecision(3)) + unit;
  return String(Number(value.toPrecision(3)));
}
function ticks(low, high, most) {
  const step = 10 ** Math.floor(Math.log10((high - low) / most || 1));
  const size = [1, 2, 5, 10].map((k) => k * step).find((s) => (high - low) / s <= most);
  const found = [];
  for (let v = Math.ceil(low / size) * size; v <= high + size * 1e-9; v += size) found.push(Math.abs(v) < size * 1e-6 ? 0 : v);
  return found;
}
function logTicks(low, high, most) {
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const d of digits) { const v = d * 10 ** e; if (v >= low * 0.999 && v <= high * 1.001) found.push(v); }
    if (found.length <= most || digits.length === 1) return found.filter((_, i) => i % Math.ceil(found.length / most) === 0);
  }
}

class Plot {
  // `draw(plot)` sets the axes and draws; `tell(plot, x)` gives the words for a place; `pick(x)` is what a click does.
  constructor(place, label, { draw, tell, pick = null, zoom = null }) {
    Object.assign(this, { place, draw, tell, pick, zoom, cursor: null });
    this.canvas = element("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    place.append(this.canvas);
    this.pen = this.canvas.getContext("2d");
    this.listen();
    new ResizeObserver(() => this.redraw()).observe(place);
  }

  axes({ x, y, xLog = false, yLog = false, xLabel = "", yLabel = "", xText = short, yText = short }) {
    const [pen, w, h] = [this.pen, this.width, this.height];
    Object.assign(this, { x, y, xLog, yLog });
    const clear = (low, high, log) => (log ? logTicks : ticks)(low, high, log ? 9 : 7);
    pen.font = `11px ${colour("sans")}`;
    pen.lineWidth = 1;
    pen.textBaseline = "middle"; pen.textAlign = "right";
    for (const v of clear(...y, yLog)) {
      const at = Math.round(this.yAt(v)) + 0.5;
      pen.strokeStyle = colour("line");
      pen.beginPath(); pen.moveTo(MARGIN.left, at); pen.lineTo(w - MARGIN.right, at); pen.stroke();
      pen.fillStyle = colour("soft");
      pen.fillText(yText(v), MARGIN.left - 7, at);
    }
    pen.textBaseline = "top"; pen.textAlign = "center";
    for (const v of clear(...x, xLog)) pen.fillText(xText(v), clamp(this.xAt(v), MARGIN.left, w - MARGIN.right - 8), h - MARGIN.bottom + 6);
    pen.textAlign = "right";
    pen.fillText(xLabel, w - MARGIN.right, h - 13);
    pen.save();
    pen.translate(4, MARGIN.top + (h - MARGIN.top - MARGIN.bottom) / 2); pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(yLabel, 0, 0);
    pen.restore();
    pen.save();
    pen.beginPath();
    pen.rect(MARGIN.left, MARGIN.top - 4, w - MARGIN.left - MARGIN.right, h - MARGIN.top - MARGIN.bottom + 4);
    pen.clip(); // until redraw is done
  }

  part(value, [low, high], log) { return log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low); }
  xAt(v) { return MARGIN.left + this.part(v, this.x, this.xLog) * (this.width - MARGIN.left - MARGIN.right); }
  yAt(v) { return this.height - MARGIN.bottom - this.part(v, this.y, this.yLog) * (this.height - MARGIN.top - MARGIN.bottom); }
  xOf(pixel) {
    const part = clamp((pixel - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right), 0, 1), [low, high] = this.x;
    return this.xLog ? low * (high / low) ** part : low + part * (high - low);
  }

  line(xs, ys, style, width = 1.5, dash = []) {
    const pen = this.pen;
    pen.strokeStyle = style; pen.lineWidth = width; pen.lineJoin = "round"; pen.setLineDash(dash);
    pen.beginPath();
    let down = false;
    for (let i = 0; i < xs.length; i++) {
      if (Number.isNaN(ys[i])) { down = false; continue; }
      const at = [this.xAt(xs[i]), this.yAt(ys[i])];
      if (down) pen.lineTo(...at); else pen.moveTo(...at);
      down = true;
    }
    pen.stroke();
    pen.setLineDash([]);
  }

  band(xs, lows, highs, style) {
    const pen = this.pen;
    pen.fillStyle = style;
    for (let i = 0; i < xs.length; ) {
      while (i < xs.length && Number.isNaN(lows[i])) i++;
      let j = i;
      while (j < xs.length && !Number.isNaN(lows[j])) j++;
      if (j > i) {
        pen.beginPath();
        for (let k = i; k < j; k++) pen.lineTo(this.xAt(xs[k]), this.yAt(highs[k]));
        for (let k = j - 1; k >= i; k--) pen.lineTo(this.xAt(xs[k]), this.yAt(lows[k]));
        pen.fill();
      }
      i = j;
    }
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      const [width, height, scale] = [this.place.clientWidth, this.place.clientHeight, window.devicePixelRatio || 1];
      if (!width || !height) return;
      if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale))
        Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
      Object.assign(this, { width, height });
      this.pen.setTransform(scale, 0, 0, scale, 0, 0);
      this.pen.clearRect(0, 0, width, height);
      this.pen.save();
      this.draw(this);
      if (this.cursor !== null && this.x) this.drawCursor();
      this.pen.restore();
      this.pen.restore();
    });
  }

  drawCursor() {
    const pen = this.pen, at = this.xAt(this.cursor);
    if (this.from !== undefined) {
      pen.fillStyle = colour("wide");
      pen.fillRect(Math.min(at, this.xAt(this.from)), MARGIN.top - 4, Math.abs(at - this.xAt(this.from)), this.height);
    }
    pen.strokeStyle = colour("soft"); pen.lineWidth = 1; pen.setLineDash([3, 3]);
    pen.beginPath(); pen.moveTo(at, 0); pen.lineTo(at, this.height); pen.stroke();
    pen.setLineDash([]);
  }

  show(x, clientX, clientY, row) {
    this.cursor = x;
    const told = x === null ? null : this.tell(this, x, row);
    showTip(told, clientX, clientY);
    this.redraw();
  }

  listen() {
    const c = this.canvas, inside = (e) => e.clientX - c.getBoundingClientRect().left;
    c.addEventListener("pointermove", (e) => this.x && this.show(this.xOf(inside(e)), e.clientX, e.clientY, e.clientY - c.getBoundingClientRect().top));
    c.addEventListener("pointerleave", () => { this.from = undefined; this.show(null); });
    c.addEventListener("pointerdown", (e) => { if (this.x && e.button === 0) { this.from = this.xOf(inside(e)); this.down = inside(e); } });
    c.addEventListener("pointerup", (e) => {
      if (this.from === undefined) return;
      const to = this.xOf(inside(e)), moved = Math.abs(inside(e) - this.down);
      const from = this.from;
      this.from = undefined;
      if (moved > 5 && this.zoom) this.zoom(Math.min(from, to), Math.max(from, to));
      else if (this.pick) this.pick(to);
    });
    c.addEventListener("dblclick", () => this.zoom && this.zoom(null));
    c.addEventListener("keydown", (e) => this.key(e));
    c.addEventListener("blur", () => this.show(null));
  }

  key(e) {
    if (!this.x) return;
    const box = this.canvas.getBoundingClientRect(), at = this.cursor ?? this.xOf(this.width / 2), pixel = this.xAt(at);
    const step = { ArrowLeft: -4, ArrowRight: 4 }[e.key];
    if (step) this.show(this.xOf(pixel + step * (e.shiftKey ? 8 : 1)), box.left + pixel + step, box.top + 40, this.height / 2);
    else if (e.key === "Enter" && this.pick) this.pick(at);
    else if ((e.key === "+" || e.key === "=") && this.zoom) this.zoom(this.xOf(pixel - this.width / 6), this.xOf(pixel + this.width / 6));
    else if ((e.key === "-" || e.key === "Escape") && this.zoom) this.zoom(null);
    else return;
    e.preventDefault();
  }
}

// Words beside the pointer: a heading and rows of name and value; none hides it.
function showTip(told, x = 0, y = 0) {
  const tip = document.getElementById("tip");
  tip.hidden = !told;
  if (!told) return;
  tip.replaceChildren();
  if (told.title) tip.append(element("b", "", told.title));
  for (const [name, rows] of [["", told.rows], ["best", told.best || []]]) {
    if (!rows.length) continue;
    if (name) tip.append(element("p", "soft", "most probable"));
    const list = element("dl", name);
    for (const [term, value] of rows) list.append(element("dt", "", term), element("dd", "", value));
    tip.append(list);
  }
  const box = tip.getBoundingClientRect();
  tip.style.left = `${x + 16 + box.width > innerWidth - 8 ? Math.max(8, x - box.width - 16) : x + 16}px`;
  tip.style.top = `${clamp(y + 18 + box.height > innerHeight - 8 ? y - box.height - 14 : y + 18, 8, innerHeight)}px`;
}

function legend(place, items) {
  place.replaceChildren(...items.map(([name, style, kind]) => {
    const item = element("span"), sign = element("i", kind);
    sign.style.background = colour(style) || style;
    item.append(sign, name);
    return item;
  }));
}
