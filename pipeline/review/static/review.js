"use strict";

// Everything works without this file; it adds keys, zoom, the map overlay, and corrections without a reload.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);

// ---- forms -----------------------------------------------------------------------------------------------

for (const form of all("form[data-submit-on-change]")) {
  form.addEventListener("change", () => form.requestSubmit());
  // An empty field narrows nothing: it has no place in the address.
  form.addEventListener("formdata", (event) => {
    for (const [name, value] of [...event.formData]) if (value === "") event.formData.delete(name);
  });
}

document.addEventListener("error", (event) => {
  if (event.target.matches?.(".grid img, .stage img")) event.target.classList.add("missing");
}, true);

// ---- one image: concepts ---------------------------------------------------------------------------------

const statusLine = one("#status");
const map = one("#map");
const opacity = one("#opacity");
const done = [];
let mapShown = true;

const concepts = () => all(".concept");
const picked = () => one(".concept.picked");

function pick(row, { focus = true } = {}) {
  if (!row) return;
  for (const other of concepts()) {
    const chosen = other === row;
    other.classList.toggle("picked", chosen);
    one(".pick", other).setAttribute("aria-pressed", String(chosen));
  }
  if (focus) one(".pick", row).focus({ preventScroll: true });
  if (focus) row.scrollIntoView({ block: "nearest" });
  else row.parentElement.scrollTop = row.offsetTop - row.parentElement.offsetTop;
  showMap(row.dataset.heatmap, row.dataset.name);
}

function showMap(source, name) {
  if (!map || !opacity) return;
  one("#map-name").value = source ? name : `none for ${name}`;
  map.hidden = !source || !mapShown;
  if (source) map.src = source;
  map.style.opacity = opacity.value / 100;
}

function step(direction) {
  const rows = concepts();
  pick(rows[Math.min(Math.max(rows.indexOf(picked()) + direction, 0), rows.length - 1)]);
}

function say(text, failed = false) {
  statusLine.textContent = text;
  statusLine.classList.toggle("failed", failed);
}

async function ask(address, options = {}) {
  const answer = await fetch(address, { ...options, headers: { "X-Requested-With": "fetch" } });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return text;
}

async function send(form, button, { onward = false } = {}) {
  const body = new URLSearchParams(new FormData(form, button));
  const row = form.closest(".concept");
  const isUndo = button.classList.contains("undo");
  const text = await ask(button.getAttribute("formaction") || form.getAttribute("action"), { method: "POST", body });
  const holder = document.createElement("template");
  holder.innerHTML = text.trim();
  const fresh = holder.content.firstElementChild;
  const wasPicked = row.classList.contains("picked");
  row.replaceWith(fresh);
  if (!isUndo) done.push(fresh.dataset.concept);
  say(`${fresh.dataset.name}: ${isUndo ? "taken back" : `${button.value}, saved`}.`);
  if (wasPicked) pick(fresh);
  if (wasPicked && onward) step(1);
}

function submit(form, button, options) {
  return send(form, button, options).catch((error) => say(`Not saved: ${error.message}`, true));
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.closest(".concept") && event.submitter) {
    event.preventDefault();
    submit(form, event.submitter);
  } else if (form.matches("[data-fragment]")) {
    event.preventDefault();
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    load(form.closest(".model"), `${form.getAttribute("action")}?${query}`);
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest(".pick");
  if (button) pick(button.closest(".concept"));
  const shown = event.target.closest("[data-map]");
  if (shown) { mapShown = true; showMap(shown.dataset.map, shown.dataset.name); }
});

opacity?.addEventListener("input", () => { map.style.opacity = opacity.value / 100; });

async function load(holder, address) {
  holder.setAttribute("aria-busy", "true");
  try {
    holder.innerHTML = await ask(address);
    // Where there is no place for a map there is no button for one.
    if (!map) for (const button of all("[data-map]", holder)) button.remove();
  } catch (error) {
    holder.textContent = error.message;
  }
  holder.removeAttribute("aria-busy");
}

for (const holder of all("[data-load]")) load(holder, holder.dataset.load);

// ---- one image: zoom, pan, window ------------------------------------------------------------------------

const stage = one(".stage[tabindex]");
const view = { scale: 1, x: 0, y: 0 };

function place() {
  const { width, height } = stage.getBoundingClientRect();
  view.scale = Math.min(Math.max(view.scale, 1), 32);
  view.x = Math.min(0, Math.max(view.x, width * (1 - view.scale)));
  view.y = Math.min(0, Math.max(view.y, height * (1 - view.scale)));
  one(".canvas", stage).style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  stage.classList.toggle("close", view.scale > 4);
  one("[data-zoom-level]").value = `${Math.round(view.scale * 100)} %`;
}

function zoom(factor, x, y) {
  const box = stage.getBoundingClientRect();
  const [cx, cy] = [x ?? box.width / 2, y ?? box.height / 2];
  const before = view.scale;
  view.scale = Math.min(Math.max(before * factor, 1), 32);
  view.x = cx - (cx - view.x) * view.scale / before;
  view.y = cy - (cy - view.y) * view.scale / before;
  place();
}

function showAll() { Object.assign(view, { scale: 1, x: 0, y: 0 }); place(); }

if (stage) {
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    stage.classList.add("dragged");
    event.preventDefault();
  });
  stage.addEventListener("pointermove", (event) => {
    if (!stage.hasPointerCapture(event.pointerId)) return;
    view.x += event.movementX;
    view.y += event.movementY;
    place();
  });
  stage.addEventListener("pointerup", () => stage.classList.remove("dragged"));
  for (const button of all("[data-zoom]")) {
    button.addEventListener("click", () => {
      if (button.dataset.zoom === "all") showAll();
      else zoom(button.dataset.zoom === "in" ? 1.5 : 1 / 1.5);
    });
  }
  const picture = one("#picture");
  if (picture.complete) offerWindow(picture);
  else picture.addEventListener("load", () => offerWindow(picture));
}

function offerWindow(picture) {
  // Grey values get a window and a level; colours would be falsified by them.
  const small = Object.assign(document.createElement("canvas"), { width: 48, height: 48 });
  const context = small.getContext("2d");
  context.drawImage(picture, 0, 0, 48, 48);
  const values = context.getImageData(0, 0, 48, 48).data;
  for (let i = 0; i < values.length; i += 4) {
    if (Math.max(values[i], values[i + 1], values[i + 2]) - Math.min(values[i], values[i + 1], values[i + 2]) > 6) return;
  }
  const [level, width] = [one("#level"), one("#width")];
  one(".window").hidden = false;
  const apply = () => {
    const slope = 255 / width.value;
    for (const part of all("#window feComponentTransfer > *")) {
      part.setAttribute("slope", slope);
      part.setAttribute("intercept", 0.5 - slope * level.value / 255);
    }
    stage.classList.toggle("windowed", !(Number(width.value) === 255 && Number(level.value) === 128));
  };
  for (const input of [level, width]) input.addEventListener("input", apply);
  one("[data-window-reset]").addEventListener("click", () => { level.value = 128; width.value = 255; apply(); });
}

// ---- the grid --------------------------------------------------------------------------------------------

const bulk = one("form[data-bulk]");
const ticks = () => all(".tick input", bulk);

function countSelected() {
  const output = one("[data-selected]");
  if (output) output.value = `${ticks().filter((tick) => tick.checked).length} selected`;
}

function selectAll() {
  const wanted = !ticks().every((tick) => tick.checked);
  for (const tick of ticks()) tick.checked = wanted;
  countSelected();
}

if (bulk) {
  bulk.addEventListener("change", countSelected);
  one("[data-select-all]")?.addEventListener("click", selectAll);
  // A browser that goes back keeps the ticks.
  countSelected();
}

function card(direction) {
  const links = all(".grid a");
  const at = links.indexOf(document.activeElement.closest?.(".grid li")?.querySelector("a"));
  links[Math.min(Math.max(at + direction, 0), links.length - 1)]?.focus();
}

// ---- keys ------------------------------------------------------------------------------------------------

const SAYS = { p: "present", a: "absent", u: "uncertain" };

function onImage(key, event) {
  const row = picked();
  if (key === "j") step(1);
  else if (key === "k") step(-1);
  else if (key in SAYS && row) submit(one("form", row), one(`button[value="${SAYS[key]}"]`, row), { onward: true });
  else if (key === "z") undo();
  else if (key === "h" && map) { mapShown = !mapShown; map.hidden = !mapShown || !map.getAttribute("src"); }
  else if (key === "+" || key === "=") zoom(1.5);
  else if (key === "-") zoom(1 / 1.5);
  else if (key === "0") showAll();
  else if (event.shiftKey && key.startsWith("Arrow")) {
    view.x += { ArrowLeft: 40, ArrowRight: -40 }[key] || 0;
    view.y += { ArrowUp: 40, ArrowDown: -40 }[key] || 0;
    place();
  } else return false;
  return true;
}

function undo() {
  // What was said last on this page; else the reviewer's last word on the picked concept.
  const last = done.pop();
  const row = last ? document.getElementById(`c-${last}`) : picked();
  const button = row && one(".undo", row);
  if (!button || button.disabled) { say("Nothing of yours to take back here."); return; }
  pick(row);
  submit(one("form", row), button);
}

function onGrid(key) {
  if (key === "j") card(1);
  else if (key === "k") card(-1);
  else if (key === "x") one(".tick input", document.activeElement.closest(".grid li") || document.createElement("p"))?.click();
  else if (key === "s") selectAll();
  else return false;
  return true;
}

function onAudit(key, form) {
  if (key in SAYS) one(`button[value="${SAYS[key]}"]`, form).click();
  else if (key === "z") one(".undo", form)?.click();
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea")) return;
  if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  const sheet = one("form[data-audit]");
  const taken = (stage && onImage(event.key, event)) || (bulk && onGrid(event.key)) || (sheet && onAudit(event.key, sheet));
  const link = !taken && one(`a[data-key="${event.key}"], a[data-key-also="${event.key}"]`);
  if (link) link.click();
  if (taken || link) event.preventDefault();
});

if (stage) {
  // The concept of the address, else the first that is still open: there a reviewer wants to begin.
  const wanted = location.hash && document.getElementById(location.hash.slice(1));
  pick(wanted || one(".concept.uncertain") || concepts()[0], { focus: false });
}

// ---- waiting for a large run -----------------------------------------------------------------------------

const progress = one("[data-progress]");
if (progress) {
  const timer = setInterval(async () => {
    const now = JSON.parse(await ask("/progress"));
    if (now.ready) { clearInterval(timer); location.reload(); return; }
    progress.textContent = `Reading ${now.what}: ${Math.round(now.share * 100)} %`;
    one("progress").value = now.share;
  }, 700);
}
