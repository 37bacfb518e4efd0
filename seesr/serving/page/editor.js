"use strict";
// The dialog in which a person draws the piece to upscale, or paints a mask.

const editor = { entry: null, tool: "piece", strokes: [], piece: null, output: null };
const PIECE = ["left", "top", "width", "height"];

function edit(entry) {
  let values;
  try { values = chosen(); } catch (error) { return note(error.message); }
  const [width, height] = entry.size;
  Object.assign(editor, { entry, strokes: [], piece: null, output: fit(entry.size, values)?.size ?? entry.size });
  $("#editor img").src = entry.url;
  $("#easel").style.setProperty("--aspect", width / height);
  Object.assign($("#paint"), { width, height });
  $("#brush").max = Math.max(2, Math.round(Math.max(width, height) / 3));
  $("#brush").value = Math.max(2, Math.round(Math.max(width, height) / 15));
  $("#feather").max = Math.max(1, Math.round(Math.max(width, height) / 20));
  $("#feather").value = 0;
  PIECE.forEach((name, i) => Object.assign($(`#piece-${name}`), { value: "", min: i < 2 ? 0 : 1, max: editor.output[i % 2] }));
  useTool("piece");
  showEdit();
  $("#editor").showModal();
}

function useTool(name) {
  editor.tool = name;
  for (const button of document.querySelectorAll("#tools [data-tool]")) button.setAttribute("aria-pressed", button.dataset.tool === name);
  $("#brushes").hidden = name === "piece";
  $("#pieces").hidden = name !== "piece";
}

function stroke(context, { erase, size, points }) {
  Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round", strokeStyle: "#fff", globalCompositeOperation: erase ? "destination-out" : "source-over" });
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
  context.stroke();
}

function showEdit() {
  const canvas = $("#paint"), context = canvas.getContext("2d"), { piece, output, strokes } = editor;
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const one of strokes) stroke(context, one);
  $("#frame").hidden = !piece;
  if (piece) {
    const [left, top, width, height] = piece.map((value, i) => `${100 * value / output[i % 2]}%`);
    Object.assign($("#frame").style, { left, top, width, height });
  }
  $("#run-piece").disabled = !piece;
  $("#run-mask").disabled = $("#save-mask").disabled = $("#undo").disabled = !strokes.length;
}

function setPiece(piece) {
  editor.piece = piece;
  PIECE.forEach((name, i) => { $(`#piece-${name}`).value = piece[i]; });
  showEdit();
}

// The mask as the file that is sent: white where the model may change the image.
function maskFile() {
  const paint = $("#paint"), canvas = Object.assign(document.createElement("canvas"), { width: paint.width, height: paint.height });
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.filter = Number($("#feather").value) ? `blur(${$("#feather").value}px)` : "none";
  context.drawImage(paint, 0, 0);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(new File([blob], "mask.png", { type: "image/png" })), "image/png"));
}

function runEdited(extra, changes = {}) {
  const { entry } = editor;
  let values;
  try { values = { ...chosen(), ...changes }; } catch (error) { return note(error.message); }
  $("#editor").close();
  rerun(entry, values, { mask: entry.mask ?? undefined, ...extra });
  if (entry.state === "held") forget(entry);
}

{
  const canvas = $("#paint");
  let start = null;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((share) => Math.min(1, Math.max(0, share)));
  };
  const pixel = ([x, y]) => [x * canvas.width, y * canvas.height];
  const span = (a, b, size) => {
    const first = Math.min(size - 1, Math.floor(Math.min(a, b) * size));
    return [first, Math.max(1, Math.ceil(Math.max(a, b) * size) - first)];
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = at(event);
    if (editor.tool !== "piece") {
      editor.strokes.push({ erase: editor.tool === "erase", size: Number($("#brush").value), points: [pixel(start)] });
      showEdit();
    }
    event.preventDefault();
  };
  canvas.onpointermove = (event) => {
    if (!start) return;
    const here = at(event);
    if (editor.tool === "piece") {
      const [left, width] = span(start[0], here[0], editor.output[0]), [top, height] = span(start[1], here[1], editor.output[1]);
      setPiece([left, top, width, height]);
    } else {
      const last = editor.strokes.at(-1), from = last.points.at(-1);
      last.points.push(pixel(here));
      stroke(canvas.getContext("2d"), { ...last, points: [from, pixel(here)] });
    }
  };
  canvas.onpointerup = canvas.onpointercancel = () => { start = null; showEdit(); };
  $("#tools").onclick = (event) => { if (event.target.dataset.tool) useTool(event.target.dataset.tool); };
  $("#undo").onclick = () => { editor.strokes.pop(); showEdit(); };
  $("#pieces").oninput = () => {
    const inputs = PIECE.map((name) => $(`#piece-${name}`)), piece = inputs.map((input) => Number(input.value));
    const [w, h] = editor.output, [left, top, width, height] = piece;
    const good = inputs.every((input) => input.value && input.checkValidity()) && left + width <= w && top + height <= h;
    editor.piece = good ? piece : null;
    showEdit();
  };
  $("#run-piece").onclick = () => runEdited({}, { region: editor.piece.join() });
  $("#run-mask").onclick = async () => runEdited({ mask: await maskFile() });
  $("#save-mask").onclick = async () => saveFile(await maskFile(), "mask.png");
  $("#close-editor").onclick = () => $("#editor").close();
}
