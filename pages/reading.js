// ---- Code for explain.html and learning.html -----------------------------------------------------

function unpack({dtype, shape, base64}) {  // -> a typed array, with its shape
  const types = {int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array};
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return Object.assign(new types[dtype](bytes.buffer), {shape});
}

const data = JSON.parse(document.getElementById("data").textContent, (key, value) =>
  value && value.base64 !== undefined ? unpack(value) : value);
const {n_layer, n_head, n_embd, n_ctx, n_vocab} = data.hparams;
const n_seq = data.ids.length, n_past = n_seq * (n_seq + 1) / 2, n_lens = data.lens_ids.shape.at(-1);

// ---- Words -------------------------------------------------------------------------------------

const bytesOf = (id) => unhex(data.bytes[id]);
const hex = (id) => (data.bytes[id].match(/../g) ?? []).join(" ");
const nameOf = (id) => nameOfBytes(bytesOf(id));
const {texts, begun} = readText(data.ids.map(bytesOf));
const isPart = (i) => texts[i] === "" && data.bytes[data.ids[i]] !== "";
const nameAt = (i) => isPart(i) ? PART : visible(texts[i] || "") || nameOf(data.ids[i]);
const nameAfter = (i, id) => nameOfBytes(bytesOf(id), begun[i]);
const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] || "th");

// ---- Elements ----------------------------------------------------------------------------------

// Buttons of which one is chosen. The Tab key stops at only one of them, and arrows move between them.
function choices(container, buttons, n_columns, choose) {
  buttons.forEach((button, i) => button.addEventListener("click", () => choose(i)));
  container.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -n_columns, ArrowDown: n_columns,
      Home: -buttons.length, End: buttons.length}[event.key];
    const i = buttons.indexOf(document.activeElement);
    if (!move || i < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const to = Math.abs(move) === buttons.length && event.key.length < 5
      ? (move < 0 ? 0 : buttons.length - 1) : i + move;
    if (buttons[to]) { choose(to); buttons[to].focus(); }
  });
}
function mark(buttons, chosen) {
  buttons.forEach((button, i) => {
    button.setAttribute("aria-pressed", i === chosen);
    button.tabIndex = i === chosen ? 0 : -1;
  });
}
function intoView(scroller, element) {  // sideways only, so the page does not move
  const [outer, inner] = [scroller.getBoundingClientRect(), element.getBoundingClientRect()];
  const middle = (inner.left + inner.right - outer.left - outer.right) / 2;
  if (inner.left < outer.left + 90 || inner.right > outer.right) scroller.scrollLeft += middle;
}

function fade(scroller) {
  const rest = scroller.scrollWidth - scroller.clientWidth - scroller.scrollLeft;
  scroller.classList.toggle("before", scroller.scrollLeft > 2);
  scroller.classList.toggle("after", rest > 2);
}
for (const scroller of document.querySelectorAll(".scroll")) {
  scroller.addEventListener("scroll", () => fade(scroller));
  new ResizeObserver(() => fade(scroller)).observe(scroller);
}

// ---- The text ----------------------------------------------------------------------------------

function tokenButton(id, i, background) {
  const text = texts[i], title = `bytes ${hex(id)}\nid ${id}`;
  const odd = !text || /^[\n\t\p{Cc}\p{Cf}]/u.test(text);
  const kind = isPart(i) ? "token part" : odd ? "token odd" : "token";
  const button = make("button", {class: kind, title, style: `background: ${background}`},
    odd ? nameAt(i) : text);
  return text === "\n" ? [button, make("br")] : [button];
}

const tokens = data.ids.map((id, i) => tokenButton(id, i, "none"));
const shaded = data.ids.map((id, i) => tokenButton(id, i, "none"));
for (const [box, parts] of [[$("tokens"), tokens], [$("shaded"), shaded]]) {
  parts.forEach((parts, i) => addToken(box, parts, texts[i - 1], texts[i]));
}
shaded.forEach(([button], i) => {
  button.tabIndex = -1;
  button.addEventListener("click", () => set({position: i}));
});
choices($("tokens"), tokens.map(([button]) => button), 1, (i) => set({position: i}));
$("surprise").style.background = `linear-gradient(90deg, ${shade(0, "--orange")}, ${shade(1, "--orange")})`;

// ---- Attention ---------------------------------------------------------------------------------

function drawMap(canvas, layer, head) {
  const style = getComputedStyle(document.documentElement);
  const [low, high] = ["--map-low", "--map-high"].map((name) => style.getPropertyValue(name).trim().split(" "));
  canvas.width = canvas.height = n_seq;
  const image = new ImageData(n_seq, n_seq);
  for (let i = 0; i < n_seq; i++) {
    for (let j = 0; j <= i; j++) {
      const part = Math.sqrt(attention(layer, head, i, j)), at = 4 * (i * n_seq + j);
      for (let c = 0; c < 3; c++) image.data[at + c] = low[c] * (1 - part) + high[c] * part;
      image.data[at + 3] = 255;  // the future is not drawn and stays transparent
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const maps = [];
document.documentElement.style.setProperty("--n", n_seq);
$("heads").style.gridTemplateColumns = `max-content repeat(${n_head}, minmax(1.5rem, 5rem))`;
$("heads").append(make("span"));
for (let head = 0; head < n_head; head++) $("heads").append(make("span", {class: "label top"}, head));
for (let layer = 0; layer < n_layer; layer++) {
  $("heads").append(make("span", {class: "label"}, layer));
  for (let head = 0; head < n_head; head++) {
    const map = make("button", {class: "map future"}, make("canvas"), make("span", {class: "row"}));
    maps.push(map);
    $("heads").append(map);
  }
}
choices($("heads"), maps, n_head, (i) => set({layer: Math.floor(i / n_head), head: i % n_head}));

function drawMaps() {
  maps.forEach((map, i) => drawMap(map.firstChild, Math.floor(i / n_head), i % n_head));
  drawMap($("large").firstChild, state.layer, state.head);
}
function strongest(layer, head, i, n) {  // -> [[weight, position], ...]
  const all = Array.from({length: i + 1}, (_, j) => [attention(layer, head, i, j), j]);
  return all.sort((a, b) => b[0] - a[0]).slice(0, n);
}
function showAttention() {
  const {position, layer, head} = state, name = quote(nameAt(position));
  document.documentElement.style.setProperty("--position", position);
  mark(maps, layer * n_head + head);
  maps.forEach((map, i) => {
    const [[weight, at]] = strongest(Math.floor(i / n_head), i % n_head, position, 1);
    map.title = `block ${Math.floor(i / n_head)}, head ${i % n_head}: ${name} looks most at ` +
      `${quote(nameAt(at))}, ${percent(weight)}`;
    map.setAttribute("aria-label", map.title);
  });
  $("head").textContent = `Block ${layer}, head ${head}`;
  $("looks").replaceChildren("Token ", String(position + 1), ", ", make("span", {class: "mono"}, name), ", looks at");
  $("weights").replaceChildren(...strongest(layer, head, position, 8).flatMap(([weight, at]) => bar(
    `${at + 1} ${nameAt(at)}`, [["", weight]], percent(weight))));
  shaded.forEach(([button], j) => {
    button.style.background = j > position ? "none" : shade(Math.sqrt(attention(layer, head, position, j)));
    button.style.opacity = j > position ? 0.4 : 1;
    button.setAttribute("aria-pressed", j === position);
  });
  $("readout").textContent = "Point at the map or tap it to read a weight. Click to choose the row.";
}
function cellAt(event) {
  const box = $("large").getBoundingClientRect(), to = (x) => Math.min(n_seq - 1, Math.max(0, Math.floor(x * n_seq)));
  return [to((event.clientY - box.top) / box.height), to((event.clientX - box.left) / box.width)];
}
function read(event) {
  const [i, j] = cellAt(event), [from, to] = [quote(nameAt(i)), quote(nameAt(j))];
  $("readout").textContent = j > i ? `Token ${i + 1}, ${from}, cannot see token ${j + 1}, which comes later.` :
    `Token ${i + 1}, ${from}, looks at token ${j + 1}, ${to}: ${percent(attention(state.layer, state.head, i, j))}`;
}
$("large").addEventListener("pointermove", read);
$("large").addEventListener("click", (event) => { set({position: cellAt(event)[0]}); read(event); });

// ---- The logit lens ----------------------------------------------------------------------------

const layerName = (layer) => layer === 0 ? "wte + wpe" : "block " + (layer - 1);
const heading = make("tr", {}, make("th", {}, "after"));
data.ids.forEach((id, i) => heading.append(make("th", {class: "mono"}, nameAt(i))));
$("lens").append(make("thead", {}, heading), make("tbody"));
const cells = [];
for (let layer = 0; layer <= n_layer; layer++) {
  const row = make("tr", {}, make("th", {}, layerName(layer)));
  for (let i = 0; i < n_seq; i++) {
    cells.push(make("button", {class: "cell"}));
    row.append(make("td", {}, cells.at(-1)));
  }
  $("lens").tBodies[0].append(row);
}
choices($("lens"), cells, n_seq, (i) => set({lens: Math.floor(i / n_seq), position: i % n_seq}));

function fillLens() {  // each page has a lensOf(layer, i, k) -> the k-th likeliest id, its probability
  cells.forEach((cell, at) => {
    const layer = Math.floor(at / n_seq), i = at % n_seq, [id, p] = lensOf(layer, i, 0);
    cell.textContent = nameAfter(i, id);
    cell.title = `${layerName(layer)}, after ${quote(nameAt(i))}: ${quote(nameAfter(i, id))}, ${percent(p)}`;
    cell.style.background = shade(p);
  });
}
function showLens() {
  const {position, lens} = state;
  mark(cells, lens * n_seq + position);
  [...heading.cells].forEach((cell, i) => cell.classList.toggle("here", i === position + 1));
  $("lens-title").replaceChildren(lens === 0 ? "Before any block" : `After block ${lens - 1}`, ", following ",
    make("span", {class: "mono"}, quote(nameAt(position))));
  $("lens-bars").replaceChildren(...Array.from({length: n_lens}, (_, k) => k).flatMap((k) => {
    const [id, p] = lensOf(lens, position, k);
    return bar(nameAfter(position, id), [["", p]], percent(p));
  }));
  intoView($("lens-scroll"), cells[lens * n_seq + position]);
}
