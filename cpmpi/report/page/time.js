// Where the time went: the ranks' sums, and the timeline.

const KIND_WORDS = { layers: "computes the rest of a layer", compute: "attends", merge: "merges partials", wait: "waits (exposed)", transfer: "a message arrives", io: "writes keys and values" };
// As cpmpi/timeline/plot.py: colour, and of a row the bottom and height of the bar.
const KIND_LOOKS = { layers: ["#93b7f5", 0.2, 0.5], compute: ["#2563eb", 0.2, 0.5], merge: ["#7c3aed", 0.2, 0.5], wait: ["#fb923c", 0.2, 0.5], transfer: ["#14b8a6", 0.74, 0.14], io: ["#8a94a3", 0.9, 0.08] };
const PART_COLOURS = ["#93b7f5", "#2563eb", "#14b8a6", "#7c3aed", "#fb923c", "#8a94a3", "#be185d", "#65a30d"];
const MOST_RANKS = 32;

function spentBars(place, spent) {
  const totals = spent.parts.map((_, i) => spent.seconds.reduce((sum, row) => sum + row[i], 0));
  const all = totals.reduce((a, b) => a + b, 0), longest = Math.max(...spent.seconds.map((row) => row.reduce((a, b) => a + b, 0)), 1e-9);
  const grid = element("div", "spent"), shown = spent.ranks.length > MOST_RANKS ? Array.from({ length: MOST_RANKS }, (_, i) => Math.floor((i * spent.ranks.length) / MOST_RANKS)) : spent.ranks.keys();
  for (const i of shown) {
    const stack = element("div", "stack"), sum = spent.seconds[i].reduce((a, b) => a + b, 0);
    spent.seconds[i].forEach((s, part) => {
      const bar = element("div");
      bar.style.width = `${(s / longest) * 100}%`;
      bar.style.background = PART_COLOURS[part % PART_COLOURS.length];
      bar.title = `${spent.parts[part]}: ${seconds(s)}`;
      stack.append(bar);
    });
    stack.setAttribute("role", "img");
    stack.setAttribute("aria-label", spent.seconds[i].map((s, part) => `${spent.parts[part]} ${seconds(s)}`).join(", "));
    grid.append(element("span", "soft", `rank ${spent.ranks[i]}`), stack, element("span", "amount", seconds(sum)));
  }
  const words = element("p", "legend");
  place.append(grid, words);
  legend(words, spent.parts.map((name, i) => [`${name} ${seconds(totals[i])} (${Math.round((100 * totals[i]) / (all || 1))}%)`, PART_COLOURS[i % PART_COLOURS.length]]));
}

class Timeline {
  constructor(place, all) {
    const kinds = all.trace_kinds;
    Object.assign(this, { kinds, rank: all.trace_rank, what: all.trace_what, start: all.trace_start, length: all.trace_seconds, layer: all.trace_layer, round: all.trace_round });
    this.ranks = [...new Set(this.rank)].sort((a, b) => a - b);
    this.end = 0;
    for (let i = 0; i < this.start.length; i++) this.end = Math.max(this.end, this.start[i] + this.length[i]);
    this.view = [0, this.end];
    const shown = Math.min(MOST_RANKS, this.ranks.length);
    this.shown = Array.from({ length: shown }, (_, i) => this.ranks[Math.floor((i * this.ranks.length) / shown)]);
    place.style.height = `${Math.max(120, 46 + shown * (shown > 8 ? 26 : 44))}px`;
    this.plot = new Plot(place, "Timeline: what every rank did when", {
      draw: (plot) => this.draw(plot), tell: (plot, x, y) => this.tell(plot, x, y),
      zoom: (from, to) => { this.view = from === null ? [0, this.end] : [Math.max(0, from), Math.max(to, from + 1e-6)]; this.plot.redraw(); },
    });
  }

  draw(plot) {
    plot.axes({ x: this.view, y: [this.shown.length, 0], xLabel: "", yLabel: "", xText: (v) => (v ? seconds(v) : "0"), yText: (v) => (Number.isInteger(v) && v < this.shown.length ? "" : "") });
    const pen = plot.pen, row = (plot.height - MARGIN.top - MARGIN.bottom) / this.shown.length;
    const place = new Map(this.shown.map((rank, i) => [rank, i])), scale = (plot.width - MARGIN.left - MARGIN.right) / (this.view[1] - this.view[0]);
    // One bar for all that begins within a pixel: the longest of them.
    const last = new Map();
    for (let i = 0; i < this.start.length; i++) {
      const at = place.get(this.rank[i]);
      if (at === undefined || this.start[i] > this.view[1] || this.start[i] + this.length[i] < this.view[0]) continue;
      const [fill, bottom, height] = KIND_LOOKS[this.kinds[this.what[i]]], x = MARGIN.left + (this.start[i] - this.view[0]) * scale, w = this.length[i] * scale;
      const lane = at * 8 + (bottom > 0.8 ? 2 : bottom > 0.5 ? 1 : 0), pixel = Math.floor(x * 2);
      if (w < 0.5 && last.get(lane) === pixel) continue;
      last.set(lane, pixel);
      pen.fillStyle = fill;
      pen.fillRect(x, MARGIN.top + (at + bottom - 0.1) * row, Math.max(w, 0.5), height * row);
    }
    pen.restore(); pen.save();
    pen.fillStyle = colour("soft"); pen.textAlign = "right"; pen.textBaseline = "middle"; pen.font = `11px ${colour("sans")}`;
    this.shown.forEach((rank, i) => pen.fillText(`rank ${rank}`, MARGIN.left - 6, MARGIN.top + (i + 0.45) * row));
  }

  tell(plot, x, y) {
    const at = Math.floor(((y - MARGIN.top) / (plot.height - MARGIN.top - MARGIN.bottom)) * this.shown.length), rank = this.shown[clamp(at, 0, this.shown.length - 1)];
    const rows = [];
    for (let i = 0; i < this.start.length && rows.length < 6; i++)
      if (this.rank[i] === rank && this.start[i] <= x && this.start[i] + this.length[i] >= x)
        rows.push([KIND_WORDS[this.kinds[this.what[i]]], `${seconds(this.length[i])}, layer ${this.layer[i] + 1}, round ${this.round[i]}`]);
    return { title: `rank ${rank}, ${seconds(x)}`, rows };
  }
}
