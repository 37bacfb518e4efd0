"use strict";
// The bicubic upscale and the `fidelity` blend as the server computes them, for images of 8 bits.

const PRECISION = 22; // bits of Pillow's fixed-point weights
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

// RGB [height * width * 3] at another size, equal to Pillow's to the byte.
function bicubic(rgb, [width, height], [w, h]) {
  const wide = w === width ? rgb : new Uint8ClampedArray(height * w * 3);
  if (w !== width) pass(rgb, wide, bicubicTaps(width, w), height, width * 3, w * 3, 3);
  if (h === height) return wide;
  const tall = new Uint8ClampedArray(h * w * 3), taps = bicubicTaps(height, h);
  pass(wide, tall, taps, w, 3, 3, w * 3);
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

// Pixels of an image: {width, height, rgb, opaque}.
async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob), { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height), rgb = new Uint8ClampedArray(width * height * 3);
  let opaque = true;
  for (let from = 0, to = 0; from < data.length; from += 4) {
    rgb[to++] = data[from]; rgb[to++] = data[from + 1]; rgb[to++] = data[from + 2];
    opaque &&= data[from + 3] === 255;
  }
  return { width, height, rgb, opaque };
}

// Blends a result towards the bicubic upscale; `draw(fidelity, canvas)` shows it.
class Blend {
  // source: the original. result: of fidelity 0.
  constructor(source, result) {
    const { width, height } = result, scale = width / source.width;
    this.width = width;
    this.height = height;
    this.plain = bicubic(source.rgb, [source.width, source.height], [width, height]);
    this.added = Float32Array.from(result.rgb, (value, i) => value - this.plain[i]);
    this.coarse = gaussian(this.added, width, height, scale / 2);
  }

  draw(fidelity, canvas) {
    const { plain, added, coarse, width, height } = this, image = new ImageData(width, height), { data } = image;
    const low = Math.min(1, Math.max(0, 1 - 2 * fidelity)), high = Math.min(1, Math.max(0, 2 - 2 * fidelity));
    for (let from = 0, to = 0; from < plain.length; from++) {
      data[to++] = plain[from] + low * coarse[from] + high * (added[from] - coarse[from]);
      if (from % 3 === 2) data[to++] = 255;
    }
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}
