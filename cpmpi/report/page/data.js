// Blocks of the page to typed arrays: the other half of cpmpi/report/pack.py.

const WIDTHS = { u8: 1, u16: 2, f16: 2, u32: 4, i32: 4, f32: 4 };
const ARRAYS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, i32: Int32Array, f32: Float32Array };

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The planes of numbers of several bytes, put together again.
function merged(bytes, width) {
  if (width === 1) return bytes.slice();
  const n = bytes.length / width, out = new Uint8Array(bytes.length);
  for (let b = 0; b < width; b++) for (let i = 0, at = b * n; i < n; i++) out[i * width + b] = bytes[at + i];
  return out;
}

let halfTable = null;
function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
function floatsOf(halves) {
  halfTable ??= Float32Array.from({ length: 65536 }, (_, bits) => halfToFloat(bits));
  const out = new Float32Array(halves.length);
  for (let i = 0; i < out.length; i++) out[i] = halfTable[halves[i]];
  return out;
}

// The sections of an inflated block by name. Numbers in float16 are given as float32; their bits as NAME_halves.
// Pauses between sections: those of a million tokens take some 30 ms each.
async function sectionsOf(bytes) {
  const size = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true), utf8 = new TextDecoder();
  const found = {};
  for (const [name, kind, shape, at, length] of JSON.parse(utf8.decode(bytes.subarray(4, 4 + size)))) {
    const part = bytes.subarray(4 + size + at, 4 + size + at + length);
    if (kind === "text") found[name] = new TextDecoder("utf-8", { ignoreBOM: true }).decode(part);
    else if (kind === "json") found[name] = JSON.parse(utf8.decode(part));
    else {
      const whole = merged(part, WIDTHS[kind]);
      if (kind === "f16") {
        found[name + "_halves"] = new Uint16Array(whole.buffer);
        found[name] = floatsOf(found[name + "_halves"]);
      } else found[name] = new ARRAYS[kind](whole.buffer);
      found[name].shape = shape;
    }
    if (length > 1e5) await pause();
  }
  return found;
}

async function block(name) {
  const bytes = bytesOf(document.getElementById("block-" + name).textContent);
  await pause();
  return sectionsOf(await inflated(bytes));
}

// Lets the browser draw and answer before more work is done.
const pause = () => new Promise((done) => { const c = new MessageChannel(); c.port1.onmessage = () => done(); c.port2.postMessage(0); });

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

const grouped = new Intl.NumberFormat("en-US");
const count = (n) => grouped.format(n);
const plural = (n, one, many = one + "s") => `${count(n)} ${n === 1 ? one : many}`;
function digits(value, n = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(n - 2);
  const places = Math.max(0, n - 1 - Math.floor(Math.log10(Math.abs(value) || 1)));
  return value.toLocaleString("en-US", { minimumFractionDigits: Math.min(places, 3), maximumFractionDigits: Math.min(places, 3) });
}
function fileSize(n) {
  for (const unit of ["bytes", "kB", "MB", "GB"]) {
    if (n < 1000 || unit === "GB") return `${n >= 100 || unit === "bytes" ? Math.round(n) : n.toPrecision(2)} ${unit}`;
    n /= 1000;
  }
}
function seconds(s) {
  for (const [limit, factor, unit] of [[1e-3, 1e6, "µs"], [1, 1e3, "ms"], [600, 1, "s"], [36000, 1 / 60, "min"]])
    if (Math.abs(s) < limit) return `${Number((s * factor).toPrecision(3))} ${unit}`;
  return `${Number((s / 3600).toPrecision(3))} h`;
}
// A character that would move, hide or turn round what stands beside it is shown as a sign of one column.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;
const visible = (text) => text.replace(HIDDEN, (c) => (c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "\u00b7"));
const inOneLine = (text) => visible(text.replace(/\n/g, "↵").replace(/\t/g, "⇥"));
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const colourOf = (bits) => (bits >= 1 ? Math.min(15, Math.floor(bits)) : 0); // class s1 .. s15
