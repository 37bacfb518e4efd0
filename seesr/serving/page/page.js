"use strict";
// Sends images to this server, two at a time, and follows all of them over one event stream.
const $ = (selector, root = document) => root.querySelector(selector);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
const UPLOADS = 2; // at a time; browsers allow six connections to a server, over all tabs
const DAYS = 7; // that the list remembers an image
const ENDED = ["succeeded", "failed", "canceled"];
const SIZES = { scale_factor: 4, target_side: 4096, target_megapixels: 12 };
const PRINTS = { cm: [30, 2.54], inches: [12, 1] }; // unit -> [default length, units of an inch]
const entries = new Map(); // key -> entry, oldest first
const tab = sessionStorage.tab ||= random();
let fields = [], presets = {}, limits, needsKey = false, sending = 0, codeLanguage = "Python", stream = null;
let hasStarted; // called once texts and settings are there
const started = new Promise((resolve) => { hasStarted = resolve; });
let texts = {}, languages = [], languageNumber = 0, serverState = "connecting";

// Texts

// The text of a key of texts.json in the chosen language, with {names} replaced.
const t = (key, values = {}) => texts[key][languageNumber].replace(/\{(\w+)\}/g, (_, name) => values[name]);

function translate(root = document) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
}

function useLanguage(code) {
  languageNumber = Math.max(0, languages.indexOf(code));
  document.documentElement.lang = $("#language").value = languages[languageNumber];
  document.title = t("title");
  translate();
  showServer();
  if (fields.length) showFields(chosenOr({}));
  for (const entry of entries.values()) {
    show(entry);
    if (!entry.opened) continue;
    listOthers(entry);
    $(".against select", entry.card).onchange?.();
  }
}

async function loadTexts() {
  const found = await (await fetch("texts.json")).json();
  texts = found.texts;
  languages = Object.keys(found.languages);
  $("#language").replaceChildren(...Object.entries(found.languages).map(([value, name]) => make("option", { value, lang: value }, name)));
  const wanted = [localStorage.getItem("language"), ...navigator.languages.map((code) => code.slice(0, 2))];
  useLanguage(wanted.find((code) => languages.includes(code)) ?? "en");
}

// Requests

function authorization() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}
const ask = (path, options = {}) => fetch(path, { ...options, headers: { ...options.headers, ...authorization() } });

// Errors: {text, ...values} of this page, or {code, detail, field} of the server.

function problem(status, text) {
  try {
    const { code, detail, field } = JSON.parse(text);
    if (detail) return { code, detail, field };
  } catch { /* not an answer of this server */ }
  return { text: "answered", status };
}
// [what happened and what to do, in the chosen language; the server's own sentence].
function explain({ text, code, detail, field, ...values }) {
  if (text) return [t(text, values)];
  if (!(`error.${code}` in texts)) return [detail];
  const label = field in SIZES ? t("size") : fields.some(({ name }) => name === field) || field === "mask" ? name(field) : "";
  return [label ? t("field", { label, error: t(`error.${code}`) }) : t(`error.${code}`), detail];
}
const sentence = (error) => explain(error).join(" ");
class Failure extends Error {
  constructor(status, text) { super(sentence(problem(status, text))); }
}
const note = (text) => { $("#note").textContent = text; };

function askForKey(message = "") {
  needsKey = true;
  $("#key-form").hidden = false;
  $("#key-message").textContent = message;
  if (document.activeElement !== $("#key")) $("#key").focus();
}

async function useKey(event) {
  event.preventDefault();
  sessionStorage.setItem("key", $("#key").value.trim());
  let response;
  try { response = await ask("status"); } catch { return askForKey(t("keyRetry")); }
  if (response.status === 401) {
    sessionStorage.removeItem("key");
    return askForKey(t("keyWrong"));
  }
  needsKey = false;
  $("#key-form").hidden = true;
  focusOn();
  showStatus(await response.json());
  pump();
  listen();
}

function showStatus(status) { $("#badge").hidden = status.engine?.bundle?.kind !== "pocket"; }

// state: a key of the texts, or an error.
function showServer(state = serverState) {
  serverState = state;
  $("#ready").textContent = typeof state === "string" ? t(state) : sentence(state);
}

async function watchServer() {
  let known = false;
  for (;;) {
    try {
      const response = await ask("ready");
      showServer(response.ok ? "ready" : problem(response.status, await response.text()));
      if (response.ok && !known && !needsKey) {
        const status = await ask("status");
        if (status.status === 401) askForKey(); else { known = true; showStatus(await status.json()); }
      }
    } catch { showServer("noAnswer"); known = false; }
    await sleep(5);
  }
}

// Settings

const name = (id) => id in texts ? t(id) : id.replaceAll("_", " ");
// What is wrong with the value of a number field, in the chosen language.
const outside = ({ step, min, max }) => t(step === "1" ? "rangeWhole" : "range", { least: min, most: max });

function build(field) {
  const id = field.name, about = make("small", { id: `about-${id}` }, `${id}.about` in texts ? t(`${id}.about`) : field.description);
  let input;
  if (field.choices) {
    input = make("select", { id }, ...field.choices.map((choice) => make("option", { value: choice }, name(`${id}.${choice}`))));
  } else if (field.kind === "switch") {
    input = make("input", { id, type: "checkbox" });
  } else if (field.kind === "text") {
    input = make("input", { id, type: "text", maxLength: field.max_length });
  } else {
    input = make("input", { id, type: "number", min: field.ge, max: field.le, step: field.kind === "int" ? 1 : "any" });
  }
  input.setAttribute("aria-describedby", about.id);
  $("#fields").append(make("div", { className: field.kind === "switch" ? "field switch" : "field" }, make("label", { htmlFor: id }, name(id)), input, about));
}

function sizeKind(kind, value = SIZES[kind] ?? PRINTS[kind][0]) {
  const { ge, le } = fields.find((field) => field.name === kind) ?? { ge: 1, le: 1000 };
  $("#size-kind").value = kind;
  $("#print").hidden = !(kind in PRINTS);
  Object.assign($("#size"), { min: ge, max: le, step: kind === "target_side" ? 1 : "any", value });
}

function fill(values) {
  for (const field of fields) {
    const value = values[field.name] ?? field.default, input = document.getElementById(field.name);
    if (!input) continue;
    if (field.kind === "switch") input.checked = value; else input.value = value ?? "";
  }
  const kind = Object.keys(SIZES).findLast((name) => values[name]) ?? "scale_factor";
  sizeKind(kind, values[kind] ?? SIZES[kind]);
  changed();
}

// The fields of all settings in the chosen language, with these values.
function showFields(values) {
  const shown = [...Object.keys(SIZES), "fidelity", "region"], print = $("#size-kind").value in PRINTS && [$("#size-kind").value, $("#size").value];
  $("#fields").replaceChildren();
  fields.filter((field) => !shown.includes(field.name)).forEach(build);
  $("#presets").replaceChildren(...Object.keys(presets).map((preset) =>
    make("button", { type: "button", name: preset, onclick: () => usePreset(preset) }, name(preset))));
  fill(values);
  if (print) sizeKind(...print);
}

function chosenOr(otherwise) {
  try { return chosen(); } catch { return otherwise; }
}

// The settings that differ from the defaults, and the size.
function chosen() {
  const values = {};
  for (const field of fields) {
    const input = document.getElementById(field.name);
    if (!input) continue;
    if (!input.checkValidity()) {
      if ($("#advanced").contains(input)) $("#advanced").open = true;
      throw new Error(t("field", { label: name(field.name), error: outside(input) }));
    }
    const value = field.kind === "switch" ? input.checked : ["int", "float"].includes(field.kind) && input.value !== "" ? Number(input.value) : input.value;
    if (value !== (field.default ?? "")) values[field.name] = value;
  }
  const kind = $("#size-kind").value, size = Number($("#size").value);
  for (const [input, label] of [[$("#size"), "size"], ...(kind in PRINTS ? [[$("#print-dpi"), "dpi"]] : [])]) {
    if (!input.checkValidity()) throw new Error(t("field", { label: t(label), error: outside(input) }));
  }
  if (kind in PRINTS) {
    values.dpi = Number($("#print-dpi").value);
    values.target_side = Math.round(size / PRINTS[kind][1] * values.dpi);
  } else values[kind] = size;
  return values;
}

function changed() {
  const values = chosenOr(null);
  if (!values) return;
  localStorage.setItem("settings", JSON.stringify(values));
  for (const button of $("#presets").children) {
    const preset = presets[button.name];
    const names = Object.values(presets).flatMap(Object.keys);
    button.setAttribute("aria-pressed", names.every((name) => (values[name] ?? null) === (preset[name] ?? null)));
  }
  showCode(values);
}

function usePreset(name) {
  const values = chosen();
  for (const known of Object.values(presets).flatMap(Object.keys)) delete values[known];
  fill({ ...values, ...presets[name] });
}

function label(values) {
  return sizeLabel(values) + (values.region ? `-region-${values.region.replaceAll(",", "-")}` : "");
}
function sizeLabel(values) {
  return values.target_side ? `${values.target_side}px` : values.target_megapixels ? `${values.target_megapixels}MP` : `x${values.scale_factor ?? 4}`;
}
const suffix = (values) => values.output_view === "all" ? "zip" : values.output_view === "uncertainty" ? "png" : values.output_format ?? "png";

function showCode(values) {
  const url = new URL("upscale", location.href).href, target = `photo-${label(values)}.${suffix(values)}`;
  const query = { ...values, wait: 600 }, full = `${url}?${new URLSearchParams(query)}`;
  const keyed = Boolean(sessionStorage.getItem("key"));
  const python = JSON.stringify(query).replace(/("(?:[^"\\]|\\.)*")|true|false/g, (word, text) => text ?? (word === "true" ? "True" : "False"));
  const code = {
    Python: `import os\n\nimport requests\n\nwith open("photo.jpg", "rb") as image:\n    response = requests.post(\n        ${JSON.stringify(url)},\n        params=${python},\n${keyed ? '        headers={"Authorization": "Bearer " + os.environ["SEESR_KEY"]},\n' : ""}        files={"image": image},\n    )\nresponse.raise_for_status()\nwith open(${JSON.stringify(target)}, "wb") as result:\n    result.write(response.content)\n`,
    JavaScript: `import { readFile, writeFile } from "node:fs/promises";\n\nconst response = await fetch(${JSON.stringify(full)}, {\n  method: "POST",\n  headers: {\n    "Content-Type": "application/octet-stream",\n${keyed ? '    Authorization: `Bearer ${process.env.SEESR_KEY}`,\n' : ""}  },\n  body: await readFile("photo.jpg"),\n});\nif (!response.ok) throw new Error(await response.text());\nawait writeFile(${JSON.stringify(target)}, Buffer.from(await response.arrayBuffer()));\n`,
    curl: `curl --fail-with-body -o ${target} \\\n  -H 'Content-Type: application/octet-stream' \\\n${keyed ? '  -H "Authorization: Bearer $SEESR_KEY" \\\n' : ""}  --data-binary @photo.jpg \\\n  '${full.replaceAll("'", "%27")}'\n`,
  };
  if (!keyed) code.Python = code.Python.replace("import os\n\n", "");
  $("#code pre").textContent = code[codeLanguage];
  $("#languages").replaceChildren(...Object.keys(code).map((name) => {
    const button = make("button", { type: "button", onclick: () => { codeLanguage = name; changed(); $(`#languages [name=${name}]`).focus(); }, name }, name);
    button.setAttribute("aria-pressed", name === codeLanguage);
    return button;
  }));
}

// The largest scale up to the requested one whose result the server accepts; null: none of 1 or more.
function fit([width, height], values) {
  const view = values.output_view ?? "image", side = limits.longest_side[values.output_format ?? "png"];
  const at = (scale) => [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const fits = ([w, h]) => w * h <= limits.pixels && Math.max(w * limits.columns[view], h) <= side;
  const wanted = values.target_side ? values.target_side / Math.max(width, height)
    : values.target_megapixels ? Math.sqrt(values.target_megapixels * 1e6 / (width * height)) : values.scale_factor;
  let scale = Math.min(8, Math.max(1, wanted));
  if (!fits(at(scale))) {
    scale = Math.floor(scale * 100) / 100;
    while (scale >= 1 && !fits(at(scale))) scale = Math.round(scale * 100 - 1) / 100;
  }
  return scale < 1 ? null : { scale, wanted, size: at(scale) };
}

// (width, height) of an image that this browser can read, else null: the server then checks the size.
function measure(url) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
    image.onerror = () => resolve(null);
    image.src = url;
  });
}

// What a reload needs: entries in localStorage, their files in IndexedDB

const database = new Promise((resolve, reject) => {
  const request = indexedDB.open("seesr", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("files");
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
async function files(mode, work) {
  const store = (await database).transaction("files", mode).objectStore("files");
  return new Promise((resolve, reject) => {
    const request = work(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function save(entry) {
  const { key, name, values, size, output, limited, state, error, job, batch, time, zip, masked, source, saves } = entry;
  localStorage.setItem(`job:${key}`, JSON.stringify({ key, name, values, size, output, limited, state, error, job, batch, time, zip, masked, source, saves, tab: entry.tab }));
}

function dropFiles({ key }) {
  for (const kind of ["", ":mask"]) files("readwrite", (store) => store.delete(key + kind)).catch(() => {});
}

// Puts the focus on a card, or on the choice of files: what had it is gone or hidden.
const focusOn = (card) => (card ?? $("#files")).focus();

function forget(entry) {
  if (entry.card.contains(document.activeElement)) focusOn(entry.card.nextElementSibling ?? entry.card.previousElementSibling);
  entries.delete(entry.key);
  entry.card.remove();
  localStorage.removeItem(`job:${entry.key}`);
  dropFiles(entry);
  if (entry.url) URL.revokeObjectURL(entry.url);
  showAll();
}

async function restore() {
  const found = Object.keys(localStorage).filter((name) => name.startsWith("job:")).map((name) => JSON.parse(localStorage[name]));
  found.sort((a, b) => a.time - b.time);
  for (const entry of found) if (typeof entry.error === "string") entry.error = { detail: entry.error }; // stored by an older page
  for (const entry of found) {
    if (Date.now() - entry.time > DAYS * 864e5) {
      localStorage.removeItem(`job:${entry.key}`);
      dropFiles(entry);
    } else if (entry.job || entry.tab === tab) add(entry); // another tab sends its own
  }
  await Promise.all([...entries.values()].map(async (entry) => {
    const [file, mask] = await Promise.all(["", ":mask"].map((kind) => files("readonly", (store) => store.get(entry.key + kind)).catch(() => null)));
    if (file) attach(entry, file);
    entry.mask = mask;
    if (!entry.job && ["queued", "sending", "held"].includes(entry.state)) {
      const found = file && (mask || !entry.masked);
      if (!found) Object.assign(entry, { state: "failed", error: { text: "lost" } });
      else if (entry.state === "sending") entry.state = "queued";
    }
    show(entry);
  }));
  pump();
  listen();
}

function attach(entry, file) {
  entry.file = file;
  if (!entry.zip) entry.url = URL.createObjectURL(file);
}

// Images

function add(entry) {
  entry.source ??= entry.key;
  entry.card = $("#card").content.firstElementChild.cloneNode(true);
  const card = entry.card;
  translate(card);
  $("h2", card).textContent = entry.name;
  $(".cancel", card).onclick = () => cancel(entry);
  $(".remove", card).onclick = () => forget(entry);
  $(".again", card).onclick = () => rerun(entry);
  $(".reseed", card).onclick = () => rerun(entry, { ...entry.values, seed: crypto.getRandomValues(new Uint32Array(1))[0] }, { mask: entry.mask });
  $(".edit", card).onclick = () => edit(entry);
  $(".start", card).onclick = () => { entry.state = "queued"; save(entry); show(entry); pump(); };
  $(".show", card).onclick = () => toggle(entry);
  $(".download", card).onclick = (event) => { event.preventDefault(); download(entry); };
  entries.set(entry.key, entry);
  $("#jobs").prepend(card);
  show(entry);
  return entry;
}

// Takes a file into the list and sends it. extra: mask, source (which results are of one image), saves (downloads itself).
async function accept(file, values, { mask, source, saves, now = true } = {}) {
  await started;
  try { values ??= chosen(); } catch (error) { return note(error.message); }
  const zip = /\.zip$/i.test(file.name) || file.type === "application/zip";
  mask ??= $("#mask").files[0] ?? null;
  const key = random();
  const entry = add({ key, name: file.name, values, state: "reading", time: Date.now() + entries.size / 1000, tab, zip, mask, masked: Boolean(mask), source: source ?? key, saves });
  attach(entry, file);
  for (const [kind, part] of [["", file], [":mask", mask]]) {
    if (part) files("readwrite", (store) => store.put(part, key + kind)).catch(() => note(t("noStore")));
  }
  entry.size = zip ? null : await measure(entry.url);
  if (entry.state === "canceled") return;
  entry.state = now ? "queued" : "held";
  if (entry.size) {
    const found = fit(entry.size, values);
    if (!found) {
      Object.assign(entry, { state: "failed", error: { text: "tooLarge", size: entry.size.join("x") } });
    } else {
      entry.output = found.size;
      if (found.scale !== found.wanted) {
        const { target_side, target_megapixels, ...rest } = values;
        entry.values = { ...rest, scale_factor: found.scale };
        entry.limited = found.scale < found.wanted ? "largest" : "smallest";
      }
    }
  }
  save(entry);
  show(entry);
  pump();
}

// Sends the file of an entry again; values: null for those of the form.
function rerun(entry, values = null, extra = {}) {
  note("");
  return accept(new File([entry.file], entry.name, { type: entry.file.type }), values ?? undefined, { source: entry.source, ...extra });
}

// The same image as a PNG, made by this browser.
async function convert(entry) {
  const image = $(".thumb", entry.card), [width, height] = entry.size;
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  accept(new File([blob], entry.name.replace(/\.[^.]*$/, "") + ".png", { type: "image/png" }), entry.values, { mask: entry.mask });
  forget(entry);
}

function pump() {
  for (const entry of entries.values()) {
    if (needsKey || sending >= UPLOADS) return;
    if (entry.state === "queued" && entry.file && !(entry.after > Date.now())) send(entry);
  }
}

function send(entry) {
  entry.state = "sending";
  sending += 1;
  const request = entry.request = new XMLHttpRequest();
  const query = new URLSearchParams(entry.zip ? entry.values : { ...entry.values, wait: 0 });
  request.open("POST", `${entry.zip ? "batches" : "upscale"}?${query}`);
  for (const [name, value] of Object.entries({ ...authorization(), "Idempotency-Key": entry.key })) request.setRequestHeader(name, value);
  request.upload.onprogress = ({ loaded, total }) => { entry.sent = loaded / total; show(entry); };
  request.upload.onload = () => { entry.sent = 1; };
  request.onloadend = () => {
    sending -= 1;
    entry.request = null;
    answered(entry, request);
    pump();
  };
  if (entry.zip) {
    request.setRequestHeader("Content-Type", "application/zip");
    request.send(entry.file);
  } else {
    const form = new FormData();
    form.append("image", entry.file, entry.name);
    if (entry.mask) form.append("mask", entry.mask);
    request.send(form);
  }
  show(entry);
}

function answered(entry, request) {
  const { status } = request, canceled = entry.state === "canceled";
  if (status === 200 || status === 202) {
    const body = JSON.parse(request.responseText);
    for (const job of body.jobs ?? [body]) if (canceled) ask(`jobs/${job.id}`, { method: "DELETE" });
    if (canceled) return;
    if (entry.zip) unpacked(entry, body); else { entry.job = body; apply(entry, body); }
    return listen();
  }
  if (canceled) return;
  if (status === 401) {
    entry.state = "queued";
    askForKey(sessionStorage.getItem("key") ? t("keyWrong") : "");
  } else if (status === 0 || status === 429 || status === 503) {
    const wait = Number(request.getResponseHeader("Retry-After")) || 2;
    Object.assign(entry, { state: "queued", after: Date.now() + 1000 * wait - 50 });
    entry.waiting = status ? problem(status, request.responseText) : { text: "noAnswer" };
    setTimeout(pump, 1000 * wait);
  } else {
    Object.assign(entry, { state: "failed", error: problem(status, request.responseText), refused: true });
    news(t("newsFailed", { name: entry.name, error: sentence(entry.error) }));
  }
  save(entry);
  show(entry);
}

// A zip was sent: its images take the place of its card.
function unpacked(entry, { id, jobs, refused }) {
  const common = { values: entry.values, time: entry.time, tab, batch: id };
  for (const job of jobs) {
    const part = add({ ...common, key: job.id, name: job.name, state: "sending", job });
    apply(part, job);
  }
  for (const { name, code, error } of refused) save(add({ ...common, key: random(), name, state: "failed", error: { code, detail: error } }));
  forget(entry);
}

async function cancel(entry) {
  if (!entry.job) {
    const unsent = entry.request && !(entry.sent >= 1);
    entry.state = "canceled";
    if (unsent) entry.request.abort();
    save(entry);
    show(entry);
    return pump();
  }
  entry.canceling = true;
  show(entry);
  try {
    const response = await ask(`jobs/${entry.job.id}`, { method: "DELETE" });
    if (response.ok) return apply(entry, await response.json());
    throw new Failure(response.status, await response.text());
  } catch (error) {
    entry.canceling = false;
    note(t("notCanceled", { name: entry.name, error: error.message }));
    show(entry);
  }
}

// Events

const unfinished = (entry) => entry.job && !ENDED.includes(entry.state);

function apply(entry, job) {
  // An answer can be older than an event that came before it.
  if (entry.job?.id === job.id && ENDED.includes(entry.state) && !ENDED.includes(job.status)) return;
  const before = entry.state;
  entry.job = job;
  entry.state = job.status;
  entry.error = job.error && { code: "job_failed", detail: job.error };
  if (before !== entry.state) {
    save(entry);
    if (ENDED.includes(entry.state)) {
      news(entry.state === "succeeded" ? t("newsDone", entry) : t("newsFailed", { name: entry.name, error: entry.error ? sentence(entry.error) : t("canceled") }));
      if (entry.saves && entry.state === "succeeded") download(entry);
      if (entry.state === "succeeded" && [...entries.values()].filter((other) => other.opened).length < 3) toggle(entry);
    }
  }
  show(entry);
}

async function listen() {
  if (stream || needsKey || ![...entries.values()].some(unfinished)) return;
  stream = new AbortController();
  try {
    const response = await ask("events", { signal: stream.signal });
    if (response.status === 401) return askForKey(t("keyWrong"));
    if (!response.ok) throw new Failure(response.status, await response.text());
    const seen = new Set();
    for await (const { type, data } of parse(response.body)) {
      const entry = [...entries.values()].find((entry) => entry.job?.id === data.id);
      if (type === "queue") {
        for (const waiting of entries.values()) if (waiting.job?.id in data) show(Object.assign(waiting, { ahead: data[waiting.job.id] }));
      }
      if (type === "job") seen.add(data.id);
      if (type === "job" && entry) apply(entry, data);
      if (type === "ready") for (const entry of entries.values()) if (unfinished(entry) && !seen.has(entry.job.id)) await look(entry);
      if (![...entries.values()].some(unfinished)) return stream.abort();
    }
  } catch (error) {
    if (error.name !== "AbortError") for (const entry of entries.values()) if (unfinished(entry)) show(entry, t("waitServer"));
  } finally {
    stream = null;
    if (!needsKey && [...entries.values()].some(unfinished)) setTimeout(listen, 1000);
  }
}

async function look(entry) {
  const response = await ask(`jobs/${entry.job.id}`);
  if (response.ok) return apply(entry, await response.json());
  if (response.status !== 404) return;
  Object.assign(entry, { state: "failed", error: { text: "gone" } });
  save(entry);
  show(entry);
}

async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const found = /^event: (\w+)\ndata: (.*)$/.exec(part);
      if (found) yield { type: found[1], data: JSON.parse(found[2]) };
    }
  }
}

// The list

const news = (text) => { $("#news").textContent = text; };

function words(entry) {
  const { state, job } = entry;
  if (entry.canceling && !ENDED.includes(state)) return t("canceling");
  if (state === "queued") return needsKey ? t("waitKey") : entry.waiting ? t("waitSendWhy", { reason: sentence(entry.waiting) }) : t("waitSend");
  if (state === "sending") return t("sending", { percent: Math.floor(100 * (entry.sent ?? 0)) });
  if (state === "starting") return entry.ahead ? t("ahead", { count: entry.ahead }) : t("waiting");
  if (state === "processing") return job.seconds_left == null ? t("upscaling") : t("upscalingLeft", { seconds: Math.ceil(job.seconds_left) });
  if (state === "succeeded") {
    const { seed } = job.settings, size = job.metrics.output_size;
    return size ? t("doneSize", { seed, size }) : t("done", { seed });
  }
  return state === "failed" && entry.error ? explain(entry.error)[0] : t(state);
}

function sizes({ size, output, limited, values }) {
  if (!size || !output) return "";
  const [, , width, height] = values.region?.split(",") ?? [];
  return `${size.join("x")} → ${output.join("x")}${limited ? t(limited) : ""}${width ? t("piece", { width, height }) : ""}`;
}

function show(entry, text) {
  const { card, state, job } = entry, ended = ENDED.includes(state), focused = document.activeElement;
  $(".state", card).textContent = text ?? words(entry);
  $(".why", card).textContent = state === "failed" && entry.error ? explain(entry.error)[1] ?? "" : "";
  $(".size", card).textContent = sizes(entry);
  $("progress", card).setAttribute("aria-label", t("progressOf", entry));
  const bar = $("progress", card);
  bar.hidden = !["sending", "processing"].includes(state);
  if (state === "processing") bar.value = job.progress ?? 0; else bar.value = state === "sending" ? entry.sent ?? 0 : 0;
  card.classList.toggle("failed", state === "failed");
  $(".cancel", card).hidden = ended;
  $(".remove", card).hidden = !ended;
  $(".start", card).hidden = state !== "held";
  $(".again", card).hidden = $(".reseed", card).hidden = !ended || !entry.file;
  $(".edit", card).hidden = !(ended || state === "held") || !entry.url || !entry.size;
  $(".download", card).hidden = $(".show", card).hidden = state !== "succeeded";
  if (state === "succeeded") {
    $(".show", card).hidden = suffix(job.settings) === "zip";
    Object.assign($(".download", card), { href: link(entry), download: target(entry) });
  }
  const thumb = $(".thumb", card);
  if (entry.url && entry.size && !thumb.src) Object.assign(thumb, { src: entry.url, loading: "lazy", hidden: false });
  const remedy = state === "failed" && entry.file && /largest scale for this image is ([\d.]+)/.exec(entry.error?.detail ?? "");
  const fix = $(".fix", card), convertible = state === "failed" && entry.refused && entry.file && entry.size && entry.file.type !== "image/png";
  fix.hidden = !remedy && !convertible;
  if (remedy) {
    fix.textContent = t("useScale", { scale: remedy[1] });
    fix.onclick = () => {
      const { target_side, target_megapixels, ...rest } = entry.values;
      rerun(entry, { ...rest, scale_factor: Number(remedy[1]) }, { mask: entry.mask });
      forget(entry);
    };
  } else if (convertible) {
    fix.textContent = t("convert");
    fix.onclick = () => convert(entry);
  }
  if (focused?.hidden && card.contains(focused)) focusOn(card);
  showAll();
}

let scheduled = false, busy = false; // busy: an image of the list has not ended
function showAll() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    const all = [...entries.values()], count = (state) => all.filter((entry) => entry.state === state).length;
    const ended = all.filter((entry) => ENDED.includes(entry.state)).length;
    $("#work").classList.toggle("busy", all.length > 0);
    $("#all").hidden = all.length < 2;
    const failed = count("failed");
    $("#summary").textContent = t(failed ? "summaryFailed" : "summary", { done: count("succeeded"), all: all.length, failed });
    $("#overall").value = all.length ? all.reduce((sum, { state, job }) => sum + (ENDED.includes(state) ? 1 : state === "processing" ? job.progress ?? 0 : 0), 0) / all.length : 0;
    $("#cancel-all").hidden = $("#overall").hidden = ended === all.length;
    if (busy && ended === all.length && all.length && $("#notify").checked) new Notification(t("allDone"), { body: $("#summary").textContent });
    busy = ended < all.length;
    const batch = all.findLast((entry) => entry.batch)?.batch;
    $("#zip").hidden = !batch || all.some((entry) => entry.batch === batch && !ENDED.includes(entry.state));
    $("#zip").onclick = () => fetchFile(`batches/${batch}/result`, "results.zip").catch((error) => note(error.message));
  });
}

// The signed link is good without a key; its address is taken from this page, whatever the server calls itself.
const link = ({ job }) => job.result.slice(job.result.indexOf("/v1/outputs/") + 1);
const target = ({ name, job }) => `${name.replace(/\.[^.]*$/, "").replace(/.*\//, "")}-${label(job.settings)}.${suffix(job.settings)}`;

async function fetchFile(path, name) {
  const response = await ask(path);
  if (!response.ok) throw new Failure(response.status, await response.text());
  saveFile(await response.blob(), name);
}
function saveFile(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
const download = (entry) => fetchFile(`jobs/${entry.job.id}/result`, target(entry)).catch((error) => note(`${entry.name}: ${error.message}`));

// Comparing

async function toggle(entry) {
  const result = $(".result", entry.card);
  result.hidden = !result.hidden;
  $(".show", entry.card).setAttribute("aria-expanded", !result.hidden);
  if (entry.opened || suffix(entry.job.settings) === "zip") return (result.hidden ||= suffix(entry.job.settings) === "zip");
  entry.opened = true;
  const after = $(".after", entry.card);
  after.onerror = async () => { // the link is too old: the server makes a new one
    after.onerror = () => { result.hidden = true; note(t("notKept", entry)); };
    await look(entry);
    if (entry.state === "succeeded") after.src = link(entry);
  };
  after.onload = () => compare(entry, after);
  after.src = link(entry);
}

function compare(entry, after) {
  const view = $(".view", entry.card), stage = $(".stage", view), before = $(".before", view), handle = $(".handle", view);
  const lens = $(".lens", view), live = $(".live", view), magnify = $(".magnify", entry.card);
  const { settings } = entry.job, pair = entry.url && entry.size && settings.output_view === "image";
  const width = after.naturalWidth, height = after.naturalHeight, pixel = 1 / devicePixelRatio;
  for (const part of [before, handle, $(".left", view), $(".right", view)]) part.hidden = !pair;
  Object.assign(stage.style, { width: `${width}px`, height: `${height}px` });
  view.style.aspectRatio = width / height;
  after.alt = t("upscaled");
  const here = region(settings) ?? [0, 0, width, height], whole = entry.output ?? [width, height];
  let box = null; // of the image before, in pixels of this result
  function against(other) {
    const [left, top, w, h] = other ? region(other.job.settings) ?? [0, 0, ...(other.output ?? whole)] : [0, 0, ...whole];
    box = [left - here[0], top - here[1], w, h];
    before.src = other ? link(other) : entry.url;
    before.alt = $(".left", view).textContent = other ? about(other) : t("original");
    ["left", "top", "width", "height"].forEach((side, i) => { before.style[side] = `${box[i]}px`; });
    draw();
  }
  let scale = 1, x = 0, y = 0, cut = 0.5, fitted = true;
  const smallest = () => Math.min(view.clientWidth / width, view.clientHeight / height);

  function draw() {
    const [w, h] = [width * scale, height * scale];
    x = w <= view.clientWidth ? (view.clientWidth - w) / 2 : Math.min(0, Math.max(view.clientWidth - w, x));
    y = h <= view.clientHeight ? (view.clientHeight - h) / 2 : Math.min(0, Math.max(view.clientHeight - h, y));
    stage.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    stage.classList.toggle("sharp", scale > pixel * 1.5);
    view.classList.toggle("zoomed", !fitted);
    const at = cut * view.clientWidth;
    if (box) {
      const [left, top, w, h] = box, right = Math.min(width, (at - x) / scale);
      before.style.clipPath = `inset(${Math.max(0, -top)}px ${Math.max(0, left + w - right)}px ${Math.max(0, top + h - height)}px ${Math.max(0, -left)}px)`;
    }
    handle.style.left = `${at}px`;
    handle.setAttribute("aria-valuenow", Math.round(100 * cut));
    $(".scale", entry.card).textContent = `${Math.round(100 * scale / pixel)} %`;
    drawLens();
  }
  // The lens shows both images side by side around one point, a pixel of the result for each pixel of the screen.
  let held = false, point = null; // point: in the view; null: its center
  function drawLens() {
    lens.hidden = !held && magnify.getAttribute("aria-pressed") !== "true";
    view.classList.toggle("lensed", !lens.hidden);
    if (lens.hidden) return;
    const [px, py] = point ?? [view.clientWidth / 2, view.clientHeight / 2];
    const w = Math.min(480, view.clientWidth - 16), h = Math.min(240, view.clientHeight - 16);
    lens.width = Math.round(w / pixel);
    lens.height = Math.round(h / pixel);
    Object.assign(lens.style, { width: `${w}px`, height: `${h}px`,
      left: `${Math.min(view.clientWidth - w, Math.max(0, px - w / 2))}px`, top: `${Math.min(view.clientHeight - h, Math.max(0, py - h / 2))}px` });
    const shown = [[live.hidden ? after : live, [0, 0, width, height]]];
    if (box) shown.unshift([before, box]);
    const part = Math.floor(lens.width / shown.length), context = lens.getContext("2d");
    shown.forEach(([image, [left, top, w, h]], i) => {
      context.save();
      context.beginPath();
      context.rect(i * part, 0, part - (i < shown.length - 1 ? 2 : 0), lens.height);
      context.clip();
      context.drawImage(image, i * part + Math.round(part / 2 - (px - x) / scale + left), Math.round(lens.height / 2 - (py - y) / scale + top), w, h);
      context.restore();
    });
  }
  function movePoint(to) {
    point = [Math.min(view.clientWidth, Math.max(0, to[0])), Math.min(view.clientHeight, Math.max(0, to[1]))];
    drawLens();
  }
  magnify.onclick = () => { magnify.setAttribute("aria-pressed", magnify.getAttribute("aria-pressed") !== "true"); drawLens(); };
  before.onload = drawLens;
  function fitView() { fitted = true; scale = smallest(); draw(); }
  function zoom(next, px = view.clientWidth / 2, py = view.clientHeight / 2) {
    next = Math.min(16, Math.max(Math.min(smallest(), pixel), next)); // a small image may be shown at 100 %, below the view's size
    x = px - (px - x) * next / scale;
    y = py - (py - y) * next / scale;
    scale = next;
    fitted = Math.abs(next / smallest() - 1) < 0.001;
    draw();
  }
  const slide = (to) => { cut = Math.min(1, Math.max(0, to)); draw(); };
  const screen = () => document.fullscreenElement ? document.exitFullscreen() : view.requestFullscreen();

  const points = new Map();
  let sliding = false;
  const local = (event) => { const box = view.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  view.onpointerdown = (event) => {
    points.set(event.pointerId, local(event));
    view.setPointerCapture(event.pointerId);
    sliding = pair && points.size === 1 && (event.target === handle || (fitted && lens.hidden));
    if (sliding) slide(local(event)[0] / view.clientWidth);
    (event.target === handle ? handle : view).focus({ preventScroll: true });
    event.preventDefault();
  };
  view.onpointermove = (event) => {
    const from = points.get(event.pointerId), to = local(event);
    if (!sliding) movePoint(to);
    if (!from) return;
    points.set(event.pointerId, to);
    if (points.size === 2) {
      const other = [...points].find(([id]) => id !== event.pointerId)[1], far = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
      zoom(scale * far(to) / Math.max(1, far(from)), (to[0] + other[0]) / 2, (to[1] + other[1]) / 2);
    } else if (sliding) slide(to[0] / view.clientWidth);
    else if (lens.hidden) { x += to[0] - from[0]; y += to[1] - from[1]; draw(); }
  };
  view.onpointerup = view.onpointercancel = (event) => { points.delete(event.pointerId); sliding = false; };
  view.addEventListener("wheel", (event) => {
    if (fitted && event.deltaY > 0) return; // the page scrolls
    event.preventDefault();
    zoom(scale * Math.exp(-event.deltaY / 400), ...local(event));
  }, { passive: false });
  view.onkeydown = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.target === handle && step) slide(cut + (step[0] - step[1]) * (event.shiftKey ? 0.1 : 0.01));
    else if (event.target === handle && ["Home", "End"].includes(event.key)) slide(event.key === "End" ? 1 : 0);
    else if (step && !lens.hidden) { const [px, py] = point ?? [view.clientWidth / 2, view.clientHeight / 2]; movePoint([px + 20 * step[0], py + 20 * step[1]]); }
    else if (event.key.toLowerCase() === "l" && !event.ctrlKey && !event.metaKey) { held = true; drawLens(); }
    else if (step && !fitted) { x -= 60 * step[0]; y -= 60 * step[1]; draw(); }
    else if ("+=".includes(event.key)) zoom(scale * 1.25);
    else if (event.key === "-") zoom(scale / 1.25);
    else if (event.key === "0") fitView();
    else if (event.key === "1") zoom(pixel);
    else if (event.key.toLowerCase() === "f" && !event.ctrlKey && !event.metaKey) screen();
    else return;
    event.preventDefault();
  };
  view.onkeyup = (event) => { if (event.key.toLowerCase() === "l") { held = false; drawLens(); } };
  view.addEventListener("focusout", () => { held = false; drawLens(); });
  const buttons = { fit: fitView, full: () => zoom(pixel), in: () => zoom(scale * 1.25), out: () => zoom(scale / 1.25), screen };
  for (const [name, work] of Object.entries(buttons)) $(`.${name}`, entry.card).onclick = work;
  const select = $(".against select", entry.card);
  select.onfocus = select.onpointerdown = () => listOthers(entry);
  if (pair) {
    select.onchange = () => against(entries.get(select.value));
    against(null);
  }
  listOthers(entry);
  for (const other of entries.values()) if (other.opened && other !== entry) listOthers(other);
  blendable(entry, after, drawLens).catch((error) => console.error(error));
  new ResizeObserver(() => { if (fitted) fitView(); else draw(); }).observe(view);
}

const region = (settings) => settings.region?.split(",").map(Number) ?? null;
const about = (entry) => t("result", { number: [...entries.keys()].indexOf(entry.key) + 1, about: described(entry.job.settings) });
const described = (settings) => [`${t("seed")} ${settings.seed}`, ...fields.filter(({ name: id, default: value }) =>
  id !== "seed" && settings[id] != null && settings[id] !== value).map((field) => `${name(field.name)} ${valueName(field, settings[field.name])}`)].join(", ");
const valueName = ({ name: id, choices, kind }, value) => choices ? name(`${id}.${value}`) : kind === "switch" ? t(value ? "on" : "off") : value;

// Fills the list of what a result can be compared with: the original and every other result of the same image.
function listOthers(entry) {
  const select = $(".against select", entry.card), chosen = select.value;
  const others = [...entries.values()].filter((other) => other !== entry && other.source === entry.source && other.state === "succeeded" && other.job.settings.output_view === "image");
  select.replaceChildren(make("option", { value: "" }, t("original")), ...others.map((other) => make("option", { value: other.key }, about(other))));
  select.value = others.some((other) => other.key === chosen) ? chosen : "";
  $(".against", entry.card).hidden = !others.length || !entry.url;
}

// Offers the slider between the model's image and the bicubic upscale, or says why not.
async function blendable(entry, after, redraw) {
  const { settings } = entry.job, canvas = $(".live", entry.card), slider = $(".blend input", entry.card), keep = $(".keep", entry.card);
  if (settings.output_view !== "image") return;
  const why = !entry.url || !entry.size || (entry.masked && !entry.mask) ? "blendOriginal" : settings.fidelity > 0 ? "blendDone"
    : settings.use_kds && settings.num_particles > 1 ? "blendSamples" : after.naturalWidth * after.naturalHeight > LARGEST_BLEND ? "blendLarge" : null;
  if (why) {
    const reason = $(".no-blend", entry.card);
    Object.assign(reason, { textContent: t(why), hidden: false }).dataset.t = why;
    return;
  }
  const [left, top] = region(settings) ?? [0, 0];
  let blend = null;
  $(".blend", entry.card).hidden = false;
  slider.oninput = async () => {
    if (!blend) {
      blend = Promise.all([pixelsOf(entry.file), fetch(link(entry)).then((response) => response.blob()).then(pixelsOf)])
        .then(([source, result]) => new Blend(source, result, entry.output, left, top));
    }
    (await blend).draw(Number(slider.value), canvas);
    canvas.hidden = slider.value === "0";
    keep.disabled = slider.value === "0";
    redraw();
  };
  keep.onclick = () => rerun(entry, { ...entry.values, seed: settings.seed, fidelity: Number(slider.value) }, { saves: true, mask: entry.mask });
}

// Ways in

async function dropped(transfer) {
  const found = [];
  async function walk(item) {
    if (item.isFile) return found.push(await new Promise((resolve, reject) => item.file(resolve, reject)));
    const reader = item.createReader();
    for (;;) {
      const children = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!children.length) return;
      for (const child of children) await walk(child);
    }
  }
  const roots = [...transfer.items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  for (const root of roots) if (root instanceof File) found.push(root); else if (root) await walk(root);
  return found;
}

async function acceptAll(list) {
  const all = [...list]; // a clipboard's list is empty after its event
  await started;
  note("");
  const usable = all.filter((file) => !file.type || file.type.startsWith("image/") || /\.zip$/i.test(file.name));
  const now = !$("#hold").checked;
  usable.filter((file) => !file.name.startsWith(".")).forEach((file) => accept(file, undefined, { now }));
  if (usable.length < all.length) note(t("notImages", { count: all.length - usable.length, all: all.length }));
}

async function start() {
  await loadTexts();
  const found = await (await ask("settings")).json();
  ({ fields, presets, limits } = found);
  showFields(JSON.parse(localStorage.getItem("settings") ?? "{}"));
  await restore();
}

async function startWhenReached() {
  for (;;) {
    try { return hasStarted(await start()); } catch (error) { console.error(error); }
    await sleep(2);
  }
}

const drop = $("#drop");
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); acceptAll(event.clipboardData.files); }
});
addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", async (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  acceptAll(await dropped(event.dataTransfer));
});
$("#files").onchange = (event) => { acceptAll([...event.target.files]); event.target.value = ""; };
$("#sample").onclick = async () => {
  const sample = new File([await (await fetch("sample.webp")).blob()], "sample.webp", { type: "image/webp" });
  await accept(sample, undefined, { now: !$("#hold").checked });
  focusOn($("#jobs").firstElementChild); // the button is hidden now
};
$("#mask").onchange = () => {
  const [file] = $("#mask").files;
  $("#mask-name").textContent = file?.name ?? "";
  $("#no-mask").hidden = !file;
};
function clearMask() {
  $("#mask").value = "";
  $("#mask").onchange();
}
$("#no-mask").onclick = () => { clearMask(); $("#mask").focus(); };
$("#key-form").onsubmit = useKey;
$("#settings").onsubmit = (event) => event.preventDefault();
$("#settings").oninput = (event) => { if (event.target.id === "size-kind") sizeKind(event.target.value); changed(); };
$("#reset").onclick = () => { fill({}); clearMask(); };
$("#copy").onclick = async () => {
  await navigator.clipboard.writeText($("#code pre").textContent);
  $("#copy").textContent = t("copied");
  setTimeout(() => { $("#copy").textContent = t("copy"); }, 2000);
};
$("#cancel-all").onclick = () => [...entries.values()].filter((entry) => !ENDED.includes(entry.state)).reverse().forEach(cancel);
$("#clear").onclick = () => {
  [...entries.values()].filter((entry) => ENDED.includes(entry.state)).forEach(forget);
  focusOn($("#jobs").firstElementChild);
};
$("#language").onchange = (event) => {
  localStorage.setItem("language", event.target.value);
  useLanguage(event.target.value);
};
$("#notify").onchange = async (event) => {
  const allowed = "Notification" in window && await Notification.requestPermission() === "granted";
  event.target.checked &&= allowed;
  if (!allowed) note(t("noNotify"));
};
$("#badge").onclick = () => $("#how").showModal();
startWhenReached().then(watchServer);
