"use strict";

// Everything works without this file; it adds keys, the map overlay, and corrections without a reload.

const status = document.getElementById("status");
const map = document.getElementById("map");
const opacity = document.getElementById("opacity");
let mapShown = true;

for (const form of document.querySelectorAll("form[data-submit-on-change]")) {
  form.addEventListener("change", () => form.requestSubmit());
}

for (const image of document.querySelectorAll(".grid img, .stage img")) {
  image.addEventListener("error", () => image.classList.add("missing"));
}

function concepts() {
  return [...document.querySelectorAll(".concept")];
}

function picked() {
  return document.querySelector(".concept.picked");
}

function pick(row, { focus = true } = {}) {
  if (!row) return;
  for (const other of concepts()) {
    const chosen = other === row;
    other.classList.toggle("picked", chosen);
    other.querySelector(".pick").setAttribute("aria-pressed", String(chosen));
  }
  if (focus) row.querySelector(".pick").focus({ preventScroll: true });
  row.scrollIntoView({ block: "nearest" });
  showMap(row);
}

function showMap(row) {
  if (!map) return;
  const source = row.dataset.heatmap;
  document.getElementById("map-name").value = source ? row.dataset.name : `none for ${row.dataset.name}`;
  map.hidden = !source || !mapShown;
  if (source) map.src = source;
  map.style.opacity = opacity.value / 100;
}

function step(direction) {
  const rows = concepts();
  const at = rows.indexOf(picked());
  pick(rows[Math.min(Math.max(at + direction, 0), rows.length - 1)]);
}

async function send(form, button) {
  const body = new URLSearchParams(new FormData(form, button));
  const row = form.closest(".concept");
  const answer = await fetch(button.getAttribute("formaction") || form.getAttribute("action"), {
    method: "POST", body, headers: { "X-Requested-With": "fetch" },
  });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  const wasPicked = row.classList.contains("picked");
  const holder = document.createElement("template");
  holder.innerHTML = text.trim();
  const fresh = holder.content.firstElementChild;
  row.replaceWith(fresh);
  if (wasPicked) pick(fresh);
  status.textContent = `${fresh.dataset.name}: saved.`;
  status.classList.remove("failed");
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.closest(".concept") || !event.submitter) return;
  event.preventDefault();
  send(form, event.submitter).catch((error) => {
    status.textContent = `Not saved: ${error.message}`;
    status.classList.add("failed");
  });
});

document.addEventListener("click", (event) => {
  const button = event.target.closest(".pick");
  if (button) pick(button.closest(".concept"));
});

if (opacity) {
  opacity.addEventListener("input", () => { map.style.opacity = opacity.value / 100; });
}

const SAYS = { p: "present", a: "absent", u: "uncertain" };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=range]), select, textarea")) return;
  const link = document.querySelector(`a[data-key="${event.key}"]`);
  if (link && !event.target.matches("input")) { link.click(); return; }
  const row = picked();
  const scope = row || document.querySelector("form[data-audit]");
  if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key in SAYS && scope) scope.querySelector(`button[value="${SAYS[event.key]}"]`).click();
  else if (event.key === "z" && scope) scope.querySelector(".undo")?.click();
  else if (event.key === "h" && row) { mapShown = !mapShown; showMap(row); }
  else return;
  event.preventDefault();
});

// The first concept that is still open is where a reviewer wants to begin.
pick(document.querySelector(".concept.uncertain") || concepts()[0], { focus: false });
