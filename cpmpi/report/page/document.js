// A document's tokens: their places in the text, numbers, means over any stretch, lines of a width.

const BUCKETS = 2048; // of float16 numbers by their upper bits: 1.6% apart

class Tokens {
  constructor(sections, first) {
    Object.assign(this, { first, text: sections.text, bits: sections.bits, ids: sections.ids, rank: sections.rank, entropy: sections.entropy });
    this.halves = sections.bits_halves;
    this.n = this.bits.length;
    this.starts = new Uint32Array(this.n + 1); // of each token in the text, in UTF-16 units
    this.sums = new Float64Array(this.n + 1); // of the bits before each token
    for (let i = 0; i < this.n; i++) {
      this.starts[i + 1] = this.starts[i] + sections.lengths[i];
      this.sums[i + 1] = this.sums[i] + (i < first ? 0 : this.bits[i]);
    }
    if (sections.characters) {
      this.characters = sections.characters;
      for (let i = 1; i < this.n; i++) this.characters[i] += this.characters[i - 1];
    }
    if (sections.best) Object.assign(this, { best: sections.best, bestBits: sections.best_bits, bestTexts: sections.best_texts });
  }

  word(i) { return this.text.slice(this.starts[i], this.starts[i + 1]); }

  // The token that has a place of the text; of several that begin there, the one that goes on beyond it.
  at(place) {
    let low = 0, high = this.n - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= place) low = middle; else high = middle - 1;
    }
    return low;
  }

  // Mean surprisal of the scored tokens among from .. to; NaN where there is none.
  mean(from, to) {
    from = Math.max(from, this.first);
    return to > from ? (this.sums[to] - this.sums[from]) / (to - from) : NaN;
  }

  // Of n windows of from .. to: their bounds, mean and quartiles. As cpmpi.report.curves.curve, but that quartiles of
  // long windows are right to 1.6%.
  curve(from, to, n) {
    from = Math.max(from, this.first);
    n = Math.max(0, Math.min(n, to - from));
    const made = { bounds: new Float64Array(n + 1), mean: new Float32Array(n), low: new Float32Array(n), high: new Float32Array(n) };
    const counts = new Uint32Array(BUCKETS);
    for (let i = 0; i <= n; i++) made.bounds[i] = from + Math.floor((i * (to - from)) / n);
    for (let i = 0; i < n; i++) {
      const [a, b] = [made.bounds[i], made.bounds[i + 1]];
      made.mean[i] = this.mean(a, b);
      [made.low[i], made.high[i]] = b - a <= 256 ? this.exact(a, b) : this.rough(a, b, counts);
    }
    return made;
  }

  exact(a, b) {
    const sorted = this.bits.slice(a, b).sort();
    return [0.25, 0.75].map((q) => sorted[Math.round((sorted.length - 1) * q)]);
  }

  rough(a, b, counts) {
    counts.fill(0);
    for (let i = a; i < b; i++) counts[this.halves[i] >> 4]++;
    return [0.25, 0.75].map((q) => {
      const place = Math.round((b - a - 1) * q);
      let bucket = 0, before = 0;
      while (before + counts[bucket] <= place) before += counts[bucket++];
      return halfToFloat((bucket << 4) | 8);
    });
  }
}

// How many columns a character takes in a monospaced line: wide ones, as of Chinese, two.
function columnsOf(code) {
  if (code < 0x300) return 1;
  if ((code >= 0x300 && code <= 0x36f) || (code >= 0xdc00 && code <= 0xdfff) || (code >= 0xfe00 && code <= 0xfe0f)) return 0;
  if (code >= 0xd800 && code <= 0xdbff) return 2;
  return (code >= 0x1100 && code <= 0x115f) || (code >= 0x2e80 && code <= 0xa4cf) || (code >= 0xac00 && code <= 0xd7a3) ||
    (code >= 0xf900 && code <= 0xfaff) || (code >= 0xfe30 && code <= 0xfe6f) || (code >= 0xff00 && code <= 0xff60) ? 2 : 1;
}

// Where each line of the text begins, in lines of so many columns, broken after a blank where there is one; the last
// entry is the end. Pauses now and then; gives up, with null, when `wanted()` says no.
async function linesOf(text, columns, wanted = () => true) {
  let starts = new Uint32Array(1024), n = 0, begin = 0, column = 0, blank = -1, next = Date.now() + 12;
  const add = (at) => {
    if (n + 2 > starts.length) { const more = new Uint32Array(starts.length * 2); more.set(starts); starts = more; }
    starts[n++] = at;
  };
  add(0);
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code === 10) { add(i + 1); begin = i + 1; column = 0; blank = -1; }
    else {
      const width = code === 9 ? 4 - (column % 4) : columnsOf(code);
      if (column + width > columns && width) {
        const cut = blank > begin ? blank : i;
        add(cut);
        begin = cut; blank = -1; column = 0;
        i = cut - 1; // from there again
        continue;
      }
      column += width;
      if (code === 32 || code === 9) blank = i + 1;
    }
    if ((i & 0x3fff) === 0 && Date.now() > next) {
      await pause();
      if (!wanted()) return null;
      next = Date.now() + 12;
    }
  }
  starts[n] = text.length;
  return starts.slice(0, n + 1);
}

// The last place of a sorted array whose value is at most `value`.
function lastAtMost(sorted, value, length = sorted.length) {
  let low = 0, high = length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}
