"use strict";
// The page asks for the settings and builds its form from them; it talks to nobody but its own server.
const $ = (selector, root = document) => root.querySelector(selector);
const make = (tag, given = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), given);
  element.append(...children);
  return element;
};
let fields = [];

function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  return fetch(path, { ...options, headers: { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) } });
}

async function words(response) {
  try { return (await response.json()).detail; } catch { return `the server answered ${response.status}`; }
}

function tell(text) { $("#told").textContent = text; }

// Settings

function build(field) {
  const label = make("label", { htmlFor: field.name }, field.name.replaceAll("_", " "));
  const id = field.name, about = make("small", { id: `about-${id}` }, field.description);
  let input;
  if (field.choices) {
    input = make("select", { id }, ...field.choices.map((choice) => make("option", { value: choice }, choice)));
  } else if (field.kind === "switch") {
    input = make("input", { id, type: "checkbox" });
  } else if (field.kind === "text") {
    input = make("input", { id, type: "text", maxLength: field.max_length });
  } else {
    input = make("input", { id, type: "number", min: field.ge, max: field.le, step: field.kind === "int" ? 1 : "any", placeholder: field.empty ?? "" });
  }
  input.setAttribute("aria-describedby", about.id);
  label.append(about);
  $("#settings").append(label, input);
}

function fill(values) {
  for (const field of fields) {
    const value = field.name in values ? values[field.name] : field.default;
    const input = document.getElementById(field.name);
    if (field.kind === "switch") input.checked = value; else input.value = value ?? "";
  }
}

function chosen() {
  const values = {};
  for (const field of fields) {
    const input = document.getElementById(field.name);
    if (!input.checkValidity()) throw new Error(`${field.name}: ${input.validationMessage}`);
    const value = field.kind === "switch" ? input.checked : input.value;
    if (value !== "" || field.kind === "text") values[field.name] = value;
  }
  return values;
}

async function start() {
  const found = await (await ask("settings")).json();
  fields = found.fields;
  $("#settings").replaceChildren();
  fields.forEach(build);
  fill({});
  $("#presets").replaceChildren(...Object.entries(found.presets).map(([name, values]) =>
    make("button", { type: "button", onclick: () => fill(values) }, name)));
  showHistory();
  ready();
}

async function ready() {
  try {
    const response = await ask("ready");
    $("#ready").textContent = response.ok ? "ready" : await words(response);
  } catch { $("#ready").textContent = "the server does not answer"; }
  setTimeout(ready, 5000);
}

// Jobs

function add(file) {
  let values;
  try { values = chosen(); } catch (error) { tell(error.message); return; }
  tell("");
  const card = $("#card").content.firstElementChild.cloneNode(true);
  $("h3", card).textContent = file.name;
  $("#jobs").prepend(card);
  run(file, values, card).catch((error) => state(card, String(error.message || error)));
}

function state(card, text) { $(".state", card).textContent = text; }

async function run(file, values, card) {
  state(card, "sending");
  const query = new URLSearchParams({ ...values, wait: 0 });
  const mask = $("#mask").files[0], form = new FormData();
  form.append("image", file);
  if (mask) form.append("mask", mask);
  const response = await ask(`upscale?${query}`, { method: "POST", body: form });
  if (response.status === 401) {
    $("#key-form").hidden = false;
    $("#key").focus();
  }
  if (!response.ok) return stopped(card, await words(response));
  let job = await response.json();
  $(".cancel", card).onclick = () => ask(`jobs/${job.id}`, { method: "DELETE" });
  const events = await ask(`jobs/${job.id}/events?cancel_on_close=1`);
  for await (const event of lines(events.body)) {
    job = event;
    const share = job.total ? job.done / job.total : 0;
    $("progress", card).value = share;
    const left = job.seconds_left ? `, about ${Math.ceil(job.seconds_left)} s left in this stage` : "";
    state(card, job.status === "starting" ? "waiting" : job.stage ? `${job.stage} ${job.done} of ${job.total}${left}` : job.status);
  }
  if (job.status !== "succeeded") return stopped(card, job.error || job.status);
  const blob = await (await ask(`jobs/${job.id}/result`)).blob();
  finish(card, file, job, blob);
}

function stopped(card, text) {
  state(card, text);
  $("progress", card).hidden = $(".cancel", card).hidden = true;
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

function finish(card, file, job, blob) {
  stopped(card, `done, seed ${job.settings.seed}, ${job.metrics.output_size}, ${job.metrics.bundle} weights`);
  const { target_side: side, target_megapixels: size, scale_factor: scale } = job.settings;
  const label = side ? `${side}px` : size ? `${size}MP` : `x${scale}`;
  const several = blob.type === "application/zip";
  const name = `${file.name.replace(/\.[^.]*$/, "")}-${label}.${several ? "zip" : job.settings.output_format}`;
  const url = URL.createObjectURL(blob), view = $(".view", card), zoom = $(".zoom", card), slider = $(".slider", card);
  Object.assign($(".download", card), { href: url, download: name });
  for (const part of [view, slider.parentElement, zoom]) part.hidden = several;
  if (!several) $(".after", card).src = url;
  $(".before", card).src = URL.createObjectURL(file);
  slider.oninput = () => $(".stage", card).style.setProperty("--cut", `${slider.value}%`);
  zoom.onclick = () => zoom.setAttribute("aria-pressed", view.classList.toggle("whole"));
  pan(view);
  $(".result", card).hidden = false;
  const history = JSON.parse(localStorage.getItem("history") || "[]");
  history.unshift({ name: file.name, settings: job.settings, when: new Date().toLocaleString() });
  localStorage.setItem("history", JSON.stringify(history.slice(0, 20)));
  showHistory();
}

function pan(view) {
  let from = null;
  view.onpointerdown = (event) => {
    if (event.pointerType !== "mouse" || !view.classList.contains("whole")) return;
    from = { x: event.clientX + view.scrollLeft, y: event.clientY + view.scrollTop };
    view.setPointerCapture(event.pointerId);
    event.preventDefault();
  };
  view.onpointermove = (event) => { if (from) view.scrollTo(from.x - event.clientX, from.y - event.clientY); };
  view.onpointerup = view.onpointercancel = () => { from = null; };
}

function showHistory() {
  const history = JSON.parse(localStorage.getItem("history") || "[]");
  $("#history").replaceChildren(...history.map((entry) => make("li", {},
    `${entry.name}, seed ${entry.settings.seed}, ${entry.when} `,
    make("button", { type: "button", onclick: () => { fill(entry.settings); tell("the settings are those of that picture"); } },
      "Same settings again"))));
}

// Ways in

const pictures = (files) => [...files].filter((file) => file.type.startsWith("image/") || !file.type);
addEventListener("paste", (event) => {
  const files = pictures(event.clipboardData.files);
  if (files.length) { event.preventDefault(); files.forEach(add); }
});
addEventListener("DOMContentLoaded", () => {
  const drop = $("#drop");
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    pictures(event.dataTransfer.files).forEach(add);
  });
  $("#files").onchange = (event) => { [...event.target.files].forEach(add); event.target.value = ""; };
  $("#settings").onsubmit = (event) => event.preventDefault();
  $("#key-form").onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem("key", $("#key").value);
    $("#key-form").hidden = true;
  };
  start().catch(() => { $("#ready").textContent = "the server does not answer"; });
});
