// ---- Code for all pages --------------------------------------------------------------------------

// Does what gpt2.probabilities does, for the likeliest tokens one by one and for the others in
// groups. next: top_logits, descending; tail_logits and tail_counts of the groups. top_k: 0 for all.
function reweigh(next, temperature, top_k, top_p, min_p = 0) {  // -> {probs of the tokens shown, n_kept}
  const n_shown = next.top_logits.length;
  let logits = [...next.top_logits, ...next.tail_logits];
  const counts = [...new Array(n_shown).fill(1), ...next.tail_counts], best = logits[0];
  if (temperature === 0) logits = logits.map((_, i) => i === 0 ? 0 : -Infinity);
  else logits = logits.map((logit) => (logit - best) / temperature);
  if (top_k > 0 && top_k <= n_shown) {
    const least = logits[top_k - 1];
    logits = logits.map((logit) => logit < least ? -Infinity : logit);
  }
  let mass = logits.map((logit, i) => counts[i] * Math.exp(logit));
  let total = mass.reduce((a, b) => a + b), seen = 0, n_kept = 0;
  const goal = (top_p - 1e-12) * total;  // a sum that is below p only by rounding counts as p
  const kept = mass.map((m, i) => {  // how much of each group is kept; a single token is kept or not
    const part = m === 0 || seen >= goal && top_p < 1 ? 0 :
      counts[i] === 1 || top_p === 1 ? 1 : Math.min(1, Math.ceil((goal - seen) / (m / counts[i])) / counts[i]);
    seen += m;
    return part;
  });
  const last = kept.findLastIndex((part) => part > 0);  // tokens that tie with it also stay
  for (let i = last + 1; i < n_shown && logits[i] === logits[last]; i++) kept[i] = 1;
  logits.forEach((logit, i) => { if (Math.exp(logit) < min_p) kept[i] = 0; });  // the best logit is 0
  mass = mass.map((m, i) => m * kept[i]);
  total = mass.reduce((a, b) => a + b);
  kept.forEach((part, i) => n_kept += Math.round(part * counts[i]));
  return {probs: mass.slice(0, n_shown).map((m) => m / total), n_kept};
}

// Does what gpt2.penalize_repetition does to the tokens that are shown -> next, sorted again.
function penalize(next, seen, penalty) {  // next: also ids; seen: a Set of the text's ids
  const logits = next.top_logits.map((logit, k) =>
    !seen.has(next.ids[k]) ? logit : logit < 0 ? logit * penalty : logit / penalty);
  const order = logits.map((_, k) => k).sort((a, b) => logits[b] - logits[a]);
  return {...next, ids: order.map((k) => next.ids[k]), top_logits: order.map((k) => logits[k])};
}

const unhex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));

function visible(text) {  // -> the text in one line, with visible white space
  const signs = {" ": "·", "\n": "⏎", "\t": "⇥", "\u00a0": "⍽"};
  return text.replace(/[ \n\t\u00a0]/g, (c) => signs[c])
    .replace(/[\p{Cc}\p{Cf}\p{Zs}\p{Zl}\p{Zp}]/gu, (c) => "‹" + c.codePointAt(0).toString(16) + "›");
}

// A character's bytes may be spread over several tokens. The last of them shows the character, and
// the ones before it a dim PART. Bytes that are not UTF-8 are shown in hexadecimal.
const PART = "⋯";
function split(bytes) {  // -> [the text, the bytes of an unfinished character], or null if not UTF-8
  try {
    const text = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(bytes, {stream: true});
    return [text, bytes.slice(new TextEncoder().encode(text).length)];
  } catch { return null; }
}
function readText(tokens) {  // each token's bytes -> each token's text or null, and its unfinished bytes
  const texts = [], begun = [];
  let open = [];  // the tokens that began a character
  const give_up = () => { open.forEach((i) => texts[i] = null); open = []; };
  tokens.forEach((bytes, i) => {
    let parts = split(new Uint8Array([...begun[i - 1] ?? [], ...bytes]));
    if (!parts) {
      give_up();
      parts = split(bytes) ?? [null, []];
    }
    [texts[i], begun[i]] = parts;
    if (parts[1].length) open = parts[0] ? [i] : [...open, i]; else open = [];
  });
  give_up();
  return {texts, begun};
}
function nameOfBytes(bytes, before = []) {  // before: the bytes of an unfinished character
  const parts = before.length ? split(new Uint8Array([...before, ...bytes])) : null;
  if (parts && parts[0] && !parts[1].length) return visible(parts[0]);
  const [text, rest] = split(bytes) ?? ["", bytes];
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  return rest.length ? "‹" + hex + "›" : visible(text) || "‹" + hex + "›";
}
const quote = (name) => "“\u2068" + name + "\u2069”";  // isolated, so Hebrew or Arabic reorders nothing
const percent = (p) => p === 0 ? "0" : p < 0.00001 ? "< 0.001 %" :
  (100 * p).toFixed(p < 0.001 ? 3 : p < 0.0995 ? 1 : 0) + " %";
const short = (x) => x >= 99.5 ? x.toFixed(0) : x.toPrecision(2);

// A text is shown word by word, so that lines break between words, not between the tokens of a word.
const UNSPACED = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u;  // no spaces
function beginsWord(before, text) {  // texts of two tokens, null for what is not UTF-8
  return /\s$/u.test(before ?? "") || /^\s+\S/u.test(text ?? "") || UNSPACED.test(text ?? "") ||
    UNSPACED.test(before ?? "");
}
function addToken(box, [button, ...breaks], before, text) {
  const last = box.lastElementChild;
  const joins = last?.className === "word" && (!beginsWord(before, text) || /^\s+$/u.test(text ?? ""));
  const word = joins ? last : box.appendChild(make("span", {class: "word"}));
  word.append(button);
  box.append(...breaks);
}

const $ = (id) => document.getElementById(id);
function make(tag, attributes = {}, ...children) {  // text is only ever text, never HTML
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const shade = (part, colour = "--blue") =>
  `color-mix(in srgb, var(${colour}) ${(55 * part).toFixed(1)}%, transparent)`;

function bar(name, parts, value, title = "") {  // parts: [[class, from 0 to 1], ...]
  const track = make("div", {class: "track"});
  for (const [kind, part] of parts) {
    track.append(make("div", {class: "bar " + kind, style: `width: ${(100 * part).toFixed(2)}%`}));
  }
  return [make("div", {class: "name mono", title}, name), track, make("div", {class: "value"}, value)];
}

// Values that survive a reload, in "localStorage" or, while the tab is open, in "sessionStorage". If
// the browser denies both, they are kept as long as the page is open.
const forgetful = new Map();
function recall(storage, key) {  // -> a string or null
  try { return window[storage].getItem(key); } catch { return forgetful.get(key) ?? null; }
}
function remember(storage, key, value) {
  try { window[storage].setItem(key, value); } catch { forgetful.set(key, value); }
}

function authorization() {  // -> headers with the server's key, as bytes, if it has one
  const key = recall("sessionStorage", "api_key");
  return key ? {authorization: "Bearer " + String.fromCharCode(...new TextEncoder().encode(key))} : {};
}
