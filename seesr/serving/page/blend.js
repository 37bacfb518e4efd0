"use strict";
// The bicubic upscale and the `fidelity` blend as the server computes them, for images of 8 bits.

const PRECISION = 22; // bits of Pillow's fixed-point weights
const HIDDEN = 3; // alpha up to which a pixel is invisible
const REACH = 6; // pixels of the original that influence a visible pixel
const LARGEST_BLEND = 4.2e6; // pixels; a larger image takes the browser seconds

// Pillow's bicubic filter along one axis: for each output pixel [first input pixel, weights].
function bicubicTaps(from, to) {
  const scale = from / to, stretch = Math.max(1, scale), reach = 2 * stretch;
  const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5)), last = Math.min(from, Math.trunc(center + reach + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => cubic(Math.abs((k + first - center + 0.5) / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((weight) => Math.trunc(weight / sum * 2 ** PRECISION + (weight < 0 ? -0.5 : 0.5)))];
  });
}

// One pass over rows of `count` values that lie `step` apart: [lines, from] -> [lines, to], rounded to 8 bits.
function pass(source, target, taps, lines, lineIn, lineOut, step) {
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < taps.length; i++) {
      const [first, weights] = taps[i];
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (PRECISION - 1), at = line * lineIn + first * step + c;
        for (const weight of weights) { sum += source[at] * weight; at += step; }
        target[line * lineOut + i * step + c] = sum >> PRECISION; // a Uint8ClampedArray clamps
      }
    }
  }
}

// The piece [left, top, w, h] of RGB [height * width * 3] at the size `whole`, equal to Pillow's to the byte.
function bicubic(rgb, [width, height], whole, [left, top, w, h]) {
  const wide = new Uint8ClampedArray(height * w * 3), tall = new Uint8ClampedArray(h * w * 3);
  pass(rgb, wide, bicubicTaps(width, whole[0]).slice(left, left + w), height, width * 3, w * 3, 3);
  pass(wide, tall, bicubicTaps(height, whole[1]).slice(top, top + h), w, 3, 3, w * 3);
  return tall;
}

// OpenCV's Gaussian of float values [height * width * 3], mirrored at the borders without the border pixel.
function gaussian(values, width, height, sigma) {
  const reach = (Math.round(sigma * 8 + 1) | 1) >> 1, kernel = [];
  for (let k = -reach; k <= reach; k++) kernel.push(Math.exp(-k * k / (2 * sigma * sigma)));
  const sum = kernel.reduce((a, b) => a + b, 0);
  const mirror = (i, size) => {
    if (size === 1) return 0;
    while (i < 0 || i >= size) i = i < 0 ? -i : 2 * size - 2 - i;
    return i;
  };
  const along = (source, size, lines, lineStep, step) => {
    const target = new Float32Array(source.length);
    for (let i = 0; i < size; i++) {
      const taps = kernel.map((weight, k) => [mirror(i + k - reach, size) * step, weight / sum]);
      for (let line = 0; line < lines; line++) {
        for (let c = 0; c < 3; c++) {
          const base = line * lineStep + c;
          let total = 0;
          for (const [offset, weight] of taps) total += source[base + offset] * weight;
          target[base + i * step] = total;
        }
      }
    }
    return target;
  };
  return along(along(values, width, height, width * 3, 3), height, width, 3, width * 3);
}

// Pixels of an image: {width, height, rgb, alpha}.
async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob), { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height), rgb = new Uint8ClampedArray(width * height * 3), alpha = new Uint8Array(width * height);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    rgb[to++] = data[from]; rgb[to++] = data[from + 1]; rgb[to++] = data[from + 2];
    alpha[from / 4] = data[from + 3];
  }
  return { width, height, rgb, alpha };
}

// Gives invisible pixels near visible ones the color of a visible neighbor, so that they do not bleed into edges.
function fillHidden({ width, rgb, alpha }) {
  let shown = alpha.map((value) => value > HIDDEN);
  for (let far = 0; far < REACH && shown.includes(0); far++) {
    const next = shown.slice();
    for (let i = 0; i < shown.length; i++) {
      if (shown[i]) continue;
      const x = i % width, across = [0, ...(x > 0 ? [-1] : []), ...(x < width - 1 ? [1] : [])];
      const near = [-width, 0, width].flatMap((down) => across.map((step) => i + down + step)).find((j) => shown[j]);
      if (near === undefined) continue;
      rgb.copyWithin(3 * i, 3 * near, 3 * near + 3);
      next[i] = 1;
    }
    shown = next;
  }
}

// Blends a result towards the bicubic upscale; `draw(fidelity, canvas)` shows it. It equals the server's image except within
// two pixels of the original of the edge of a piece, of a mask or of transparency, where the server knows more pixels.
class Blend {
  // source: the original. result: of fidelity 0; the piece at left, top of an image of the size `whole`.
  constructor(source, result, whole, left, top) {
    const { width, height, alpha } = result, scale = whole[0] / source.width;
    fillHidden(source);
    Object.assign(this, { width, height, alpha });
    this.plain = bicubic(source.rgb, [source.width, source.height], whole, [left, top, width, height]);
    this.added = Float32Array.from(result.rgb, (value, i) => alpha[Math.floor(i / 3)] > HIDDEN ? value - this.plain[i] : 0);
    this.coarse = gaussian(this.added, width, height, scale / 2);
  }

  draw(fidelity, canvas) {
    const { plain, added, coarse, width, height, alpha } = this, image = new ImageData(width, height), { data } = image;
    const low = Math.min(1, Math.max(0, 1 - 2 * fidelity)), high = Math.min(1, Math.max(0, 2 - 2 * fidelity));
    for (let from = 0, to = 0; from < plain.length; from++) {
      data[to++] = plain[from] + low * coarse[from] + high * (added[from] - coarse[from]);
      if (from % 3 === 2) data[to++] = alpha[(from - 2) / 3];
    }
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}
