"use strict";
// Everything shown follows from `state`; an action changes it and calls render().
const find = (id) => document.getElementById(id);
const { pairs, note } = JSON.parse(find("examples").textContent);  // a shortened report has a note on what it lacks
const fromFigures = (name) => [...new Set([...document.querySelectorAll(`figure[data-${name}]`)].map((f) => f.dataset[name]))];
const choices = {
  asked: [...new Set([...fromFigures("asked"), ...pairs.flatMap((pair) => pair.shots.map((shot) => String(shot.asked)))])]
    .map((k) => [k, `${k} steps computed`]),
  view: [["slider", "Slider"], ["4", "Difference ×4"], ["32", "×32"]],  // a number is the gain of the difference
  metric: [...document.querySelectorAll("figure[data-metric][data-axis=speedup]")].map((f) => [f.dataset.metric, f.dataset.label]),
  axis: [["flops", "FLOPs counted"], ["speedup", "Measured"]],
};
const state = { pair: 0, method: null, frame: 0, split: 50, playing: 0 };
for (const [name, options] of Object.entries(choices)) state[name] = options.length ? options[0][0] : null;

function element(tag, kind, text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}

function button(kind, pressed, action) {
  const made = element("button", kind);
  made.type = "button";
  made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", action);
  return made;
}

function change(values) {
  Object.assign(state, values);
  render();
}

// A sprite holds all frames of a picture side by side; this shows one of them.
function paint(target, uri, pair, frame) {
  target.style.backgroundImage = `url("${uri}")`;
  target.style.backgroundSize = `${100 * pair.frames}% 100%`;
  target.style.backgroundPosition = pair.frames > 1 ? `${(100 * frame) / (pair.frames - 1)}% 0` : "0 0";
  target.classList.toggle("pixelated", pair.pixelated);
}

function renderChoices() {
  for (const group of document.querySelectorAll(".choice")) {
    const name = group.dataset.choice;
    if (group.children.length !== choices[name].length)
      group.replaceChildren(...choices[name].map(([value, label]) => {
        const made = button("", false, () => change({ [name]: value }));
        made.textContent = label;
        return made;
      }));
    choices[name].forEach(([value], index) => group.children[index].setAttribute("aria-pressed", value === state[name]));
  }
  for (const figure of document.querySelectorAll("figure[data-asked]")) figure.hidden = figure.dataset.asked !== state.asked;
  for (const figure of document.querySelectorAll("figure[data-metric]"))
    figure.hidden = figure.dataset.metric !== state.metric || figure.dataset.axis !== state.axis;
}

function tile(kind, pressed, action, uri, pair, label, number) {
  const made = button(`tile ${kind}`, pressed, action);
  const picture = element("span", "picture");
  picture.style.aspectRatio = `${pair.width} / ${pair.height}`;
  paint(picture, uri, pair, Math.min(state.frame, pair.frames - 1));
  made.append(picture, element("span", "label", label), element("span", "number", number));
  made.title = label;
  return made;
}

// Replacing tiles would drop the keyboard focus, so it is put back on the tile at the same place.
function replaceTiles(box, tiles) {
  const focused = [...box.children].indexOf(document.activeElement);
  box.replaceChildren(...tiles);
  if (focused >= 0 && tiles[focused]) tiles[focused].focus();
}

function setSplit(split) {
  state.split = Math.max(0, Math.min(100, split));
  const compare = find("compare");
  compare.style.setProperty("--split", `${state.split}%`);
  compare.setAttribute("aria-valuenow", Math.round(state.split));
  compare.setAttribute("aria-valuetext", `${Math.round(state.split)} percent uncached`);
}

function renderFrame(pair, shot) {
  paint(find("uncached"), pair.uri, pair, state.frame);
  paint(find("cached"), shot.uri, pair, state.frame);
  find("frame").value = state.frame;
  find("frame-number").textContent = `${state.frame + 1} of ${pair.frames}`;
}

function renderStrips(pair, shot, gain) {
  const rows = [["Uncached", `url("${pair.uri}")`], [shot.method, `url("${shot.uri}")`],
    [`Difference ×${gain}`, `url("${pair.uri}"), url("${shot.uri}")`]];
  find("strips").replaceChildren(...rows.flatMap(([label, image], index) => {
    const strip = element("span", `strip${index === 2 ? " difference" : ""}${pair.pixelated ? " pixelated" : ""}`);
    strip.style.cssText = `background-size: 100% 100%; aspect-ratio: ${pair.width * pair.frames} / ${pair.height}; `
      + `max-width: ${170 * pair.frames}px`;
    strip.style.backgroundImage = image;
    const share = `${100 / pair.frames}%`;  // a gap after each frame
    strip.style.maskImage = `repeating-linear-gradient(to right, #000 0 calc(${share} - 3px), #0000 0 ${share})`;
    strip.addEventListener("click", (event) => {
      const box = strip.getBoundingClientRect();
      change({ frame: Math.min(pair.frames - 1, Math.floor(((event.clientX - box.left) / box.width) * pair.frames)) });
    });
    return [element("p", "", label), strip];
  }));
}

function current() {
  const pair = pairs[state.pair];
  const shots = pair.shots.filter((shot) => String(shot.asked) === state.asked);
  return { pair, shots, shot: shots.find((shot) => shot.method === state.method) ?? shots[0] };
}

function render() {
  renderChoices();
  const { pair, shots, shot } = current();
  find("see").classList.toggle("empty", !shot);
  replaceTiles(find("prompts"), pairs.map((one, index) =>
    tile("", index === state.pair, () => change({ pair: index, frame: 0 }), one.uri, one, one.prompt, `seed ${one.seed}`)));
  replaceTiles(find("methods"), shots.map((one) => tile(one.ours ? "ours" : "", one === shot,
    () => change({ method: one.method }), one.uri, pair, one.method, `${one.psnr.toFixed(1)} dB`)));
  if (!shot) return;
  const compare = find("compare");
  compare.style.aspectRatio = `${pair.width} / ${pair.height}`;
  const gain = state.view === "slider" ? 4 : Number(state.view);
  compare.classList.toggle("difference", state.view !== "slider");
  find("see").style.setProperty("--gain", gain);
  find("tag").textContent = shot.method;
  const note = element("span", "", `Seed ${pair.seed}. ${shot.method}: ${shot.psnr.toFixed(2)} dB to the uncached `
    + `${pair.frames > 1 ? "video" : "picture"}, from the 8-bit pixels of this example.`);
  find("caption").replaceChildren(element("b", "", pair.prompt), note);
  find("film").hidden = find("strips").hidden = pair.frames === 1;
  find("frame").max = pair.frames - 1;
  if (pair.frames > 1) renderStrips(pair, shot, gain);
  renderFrame(pair, shot);
}

function play() {
  if (state.playing) {
    clearInterval(state.playing);
    state.playing = 0;
  } else {
    const pause = Math.max(125, 2000 / current().pair.frames);  // a clip of few frames lasts two seconds, too
    state.playing = setInterval(() => {
      const { pair, shot } = current();
      state.frame = (state.frame + 1) % pair.frames;
      if (shot) renderFrame(pair, shot);
    }, pause);
  }
  find("play").textContent = state.playing ? "Pause" : "Play";
}

function listen() {
  const compare = find("compare");
  const follow = (event) => {
    const box = compare.getBoundingClientRect();
    setSplit((100 * (event.clientX - box.left)) / box.width);
  };
  compare.addEventListener("pointerdown", (event) => {
    compare.setPointerCapture(event.pointerId);
    follow(event);
  });
  compare.addEventListener("pointermove", (event) => {
    if (compare.hasPointerCapture(event.pointerId)) follow(event);
  });
  compare.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    setSplit(state.split + moves[event.key]);
  });
  find("frame").addEventListener("input", (event) => change({ frame: Number(event.target.value) }));
  find("play").addEventListener("click", play);
}

renderChoices();
if (note) find("see").querySelector(".bar").before(element("p", "quiet", note));
if (pairs.length) {
  listen();
  setSplit(50);
  render();
} else {
  find("see").hidden = true;
}
