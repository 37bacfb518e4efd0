"""Training images of the pocket model: Debian's wallpapers and stamps, scikit-image's samples, and drawn ones.

astronaut, chelsea and coffee are held out, and a fifth of Debian's: nothing here returns them.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image

from experiments.pocket.sizes import DRAWN, SEED
from lab.quality import degradations
from lab.quality.degradations import Rgb
from lab.quality.photographs import photographs

COLOUR = ("rocket", "hubble_deep_field", "immunohistochemistry", "retina")
GREY = ("brick", "camera", "cell", "coins", "grass", "gravel", "moon", "page", "text", "clock")

MIX = {"wallpapers": 0.45, "stamps": 0.1, "shipped": 0.2, "drawn": 0.25}  # the share of each domain
MILD, STRONG = 0.25, 0.35  # the shares of examples with mild damage, and with Real-ESRGAN's at a random strength
CROPS, SIDE = 8, 112  # squares of each example that the denoiser is trained on, and their side
LARGEST = 640  # side of a crop: the tagger, which sees every image in one size, must know damage at any scale

Random = np.random.Generator


def workers() -> ProcessPoolExecutor:
    """One process for each core but one; each is a copy of this one, with the corpus if it is there already."""
    count = max(1, len(os.sched_getaffinity(0)) - 1)
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"), torch.set_num_threads, (1,))


def shipped() -> list[Rgb]:
    """scikit-image's photographs."""
    left, right, _ = skimage.data.stereo_motorcycle()
    return [*(getattr(skimage.data, name)() for name in (*COLOUR, *GREY)), left, right]


def at_sizes(images: list[Rgb]) -> list[Rgb]:
    """Each image, in colour, also at smaller sizes, where the same detail is sharper."""
    results = []
    for image in images:
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        for scale in (1.0, 0.7, 0.5):
            height, width = (round(side * scale) for side in image.shape[:2])
            if min(height, width) >= 192:
                resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
                results.append(np.ascontiguousarray(resized))
    return results


def colour(rng: Random, palette: Rgb) -> NDArray[np.float32]:
    """A colour: usually from a photograph, sometimes any."""
    if rng.random() < 0.7:
        return palette.reshape(-1, 3)[rng.integers(palette.shape[0] * palette.shape[1])].astype(np.float32)
    return rng.uniform(0, 255, 3).astype(np.float32)


def texture(rng: Random, size: int, palette: Rgb) -> NDArray[np.float32]:
    """[size, size, 3] around zero: nothing, noise of one octave band, stripes, checks or a photograph's detail."""
    kind = rng.integers(6)
    if kind <= 1:
        return np.zeros((size, size, 3), np.float32)
    if kind == 2:  # power-law noise
        points = int(2 ** rng.uniform(2, np.log2(size)))
        noise = rng.normal(0, 1, (points, points, 1)).astype(np.float32).repeat(3, axis=2)
        field = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    elif kind == 3:  # stripes or checks
        y, x = np.mgrid[:size, :size].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 60)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period) + rng.uniform(0, 6))
        if rng.random() < 0.3:
            wave = wave * np.sin((y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period))
        field = (np.sign(wave) if rng.random() < 0.5 else wave)[..., None].repeat(3, axis=2)
    else:
        zoom = rng.uniform(1, 3)
        side = int(min(size / zoom, *palette.shape[:2]))
        top, left = (rng.integers(limit - side + 1) for limit in palette.shape[:2])
        patch = palette[top : top + side, left : left + side].astype(np.float32)
        field = cv2.resize(patch, (size, size), interpolation=cv2.INTER_CUBIC)
        return field - field.mean()
    return (field * rng.uniform(4, 60)).astype(np.float32)


def dead_leaves(rng: Random, palette: Rgb, size: int = 256) -> Rgb:
    """Opaque shapes of power-law sizes, shaded and textured, drawn twice as large and area-averaged."""
    side = 2 * size
    canvas = np.tile(colour(rng, palette), (side, side, 1)) + texture(rng, side, palette)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    smallest = rng.uniform(3, 24)
    for _ in range(int(rng.uniform(20, 220))):
        radius = smallest * (1 - rng.random() * 0.995) ** -0.7
        radius = min(radius, side / 2.5)
        mask = np.zeros((side, side), np.uint8)
        centre = rng.uniform(0, side, 2)
        kind = rng.integers(4)
        if kind == 0:
            axes = (int(radius * rng.uniform(0.3, 1)) + 1, int(radius) + 1)
            cv2.ellipse(mask, centre.astype(int).tolist(), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
        elif kind == 3:  # a bar
            turn = rng.uniform(0, 2 * np.pi)
            reach = radius * rng.uniform(1, 6) * np.array([np.cos(turn), np.sin(turn)])
            ends = (centre - reach).astype(int).tolist(), (centre + reach).astype(int).tolist()
            cv2.line(mask, *ends, 255, int(max(2, radius * 0.2)), cv2.LINE_AA)
        else:
            corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            points = centre + radius * np.stack([np.cos(corners), np.sin(corners)], 1)
            cv2.fillPoly(mask, [points.astype(np.int32)], 255, cv2.LINE_AA)
        y0, x0 = np.maximum(centre[::-1] - 7 * radius, 0).astype(int)
        y1, x1 = np.minimum(centre[::-1] + 7 * radius + 1, side).astype(int)
        alpha = mask[y0:y1, x0:x1, None] / np.float32(255)
        shade = rng.normal(0, 25) * ramp[y0:y1, None, None] + rng.normal(0, 25) * ramp[None, x0:x1, None]
        leaf = colour(rng, palette) + shade + texture(rng, side, palette)[y0:y1, x0:x1]
        canvas[y0:y1, x0:x1] += alpha * (leaf - canvas[y0:y1, x0:x1])
    if rng.random() < 0.3:
        strokes(rng, canvas, palette)
    if rng.random() < 0.25:
        letters(rng, canvas, palette)
    if rng.random() < 0.2:  # out of focus
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(1, 6))
    return cv2.resize(canvas.clip(0, 255), (size, size), interpolation=cv2.INTER_AREA).round().astype(np.uint8)


def strokes(rng: Random, canvas: NDArray[np.float32], palette: Rgb) -> None:
    """Hair and grass: many thin curves that nearly follow one direction."""
    side = canvas.shape[0]
    direction, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.5)
    tint = colour(rng, palette)
    for _ in range(int(rng.uniform(100, 900))):
        turn = direction + rng.normal(0, spread) + np.linspace(0, rng.normal(0, 0.6), 8)
        steps = rng.uniform(4, 20) * np.stack([np.cos(turn), np.sin(turn)], 1)
        points = rng.uniform(0, side, 2) + np.cumsum(steps, axis=0)
        shade = (tint + rng.normal(0, 30)).clip(0, 255).tolist()
        cv2.polylines(canvas, [points.astype(np.int32)], False, shade, int(rng.integers(1, 5)), cv2.LINE_AA)


def letters(rng: Random, canvas: NDArray[np.float32], palette: Rgb) -> None:
    side = canvas.shape[0]
    for _ in range(int(rng.integers(1, 8))):
        text = "".join(chr(rng.integers(33, 127)) for _ in range(rng.integers(3, 16)))
        place = (int(rng.uniform(-20, side * 0.7)), int(rng.uniform(10, side)))
        font, scale = int(rng.integers(0, 8)), rng.uniform(0.6, 3)
        mask = np.zeros((side, side), np.uint8)
        cv2.putText(mask, text, place, font, scale, 255, int(rng.integers(1, 6)), cv2.LINE_AA)
        canvas += mask[..., None] / np.float32(255) * (colour(rng, palette) - canvas)


@functools.cache
def corpus(seed: int, drawn: int) -> tuple[list[Rgb], list[float]]:
    """All photographs and `drawn` drawn images, with the weight of each in the training mix (MIX)."""
    rng = np.random.default_rng(seed)
    domains = {kind: at_sizes(images) for kind, images in {**photographs(held_out=False), "shipped": shipped()}.items()}
    palettes = [image for images in domains.values() for image in images]
    chosen = [palettes[rng.integers(len(palettes))] for _ in range(drawn)]
    with workers() as pool:
        domains["drawn"] = list(pool.map(dead_leaves, rng.spawn(drawn), chosen))
    weights = [MIX[kind] / len(images) for kind, images in domains.items() for _ in images]
    return [image for images in domains.values() for image in images], weights


def crop(rng: Random, image: Rgb, side: int) -> Rgb:
    """A `side` x `side` crop, flipped, turned and recoloured at random."""
    top, left = (rng.integers(limit - side + 1) for limit in image.shape[:2])
    piece = np.rot90(image[top : top + side, left : left + side], rng.integers(4))  # pyright: ignore[reportCallIssue]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    piece = piece.astype(np.float32)
    if np.ptp(piece.mean((0, 1))) < 1 and rng.random() < 0.7:  # grey: tint between two colours
        dark, light = rng.uniform(0, 90, 3), rng.uniform(140, 255, 3)
        piece = dark + piece / 255 * (light - dark)
    if rng.random() < 0.3:
        piece = piece[..., rng.permutation(3)]
    if rng.random() < 0.2:
        piece = 255 - piece
    if rng.random() < 0.6:
        piece = (piece - 128) * rng.uniform(0.6, 1.3) + 128 + rng.normal(0, 20)
        piece = 255 * (piece.clip(0, 255) / 255) ** rng.uniform(0.7, 1.4)
    return piece.clip(0, 255).round().astype(np.uint8)


def example(rng: Random, image: Rgb) -> tuple[Rgb, Rgb, Rgb, bool]:
    """A crop -> (high resolution [S, S, 3], enlarged input [S, S, 3], small input, whether it was damaged).

    Clean ones are averaged, most by 4, some by less; the damaged ones follow MILD and STRONG.
    """
    maximum = min(LARGEST, *image.shape[:2]) // 64
    high = crop(rng, image, 64 * int(3 + (maximum - 2) * rng.random() ** 0.5))
    kind, seed = rng.random(), int(rng.integers(2**31))
    damaged = kind < MILD + STRONG
    if kind < MILD:
        small = degradations.mild(high, seed)
    elif damaged:
        small = degradations.realesrgan(high, seed, strength=rng.uniform(0.1, 1))
    else:
        side = round(len(high) / (4.0 if rng.random() < 0.8 else rng.uniform(1, 4)))
        small = cv2.resize(high, (side, side), interpolation=cv2.INTER_AREA)
    return high, enlarge(small, high.shape[1::-1]), small, damaged


def crops(seed: tuple[int, ...]) -> tuple[NDArray[np.uint8], Rgb, bool]:
    """An example as the denoiser sees it: CROPS squares of truth and input [2, CROPS, SIDE, SIDE, 3], the small input,
    whether it was damaged. Of two places each, the one where bicubic errs more. The seed decides all.
    """
    rng = np.random.default_rng(seed)
    images, weights = corpus(SEED, DRAWN)
    high, conditioning, small, damaged = example(rng, images[rng.choice(len(images), p=weights)])

    def place() -> tuple[slice, slice]:
        """In whole pixels of a clean small image."""
        top, left = (4 * int(rng.integers((limit - SIDE) // 4 + 1)) for limit in high.shape[:2])
        return slice(top, top + SIDE), slice(left, left + SIDE)

    def error(at: tuple[slice, slice]) -> float:
        return cv2.norm(high[at], conditioning[at])

    places = [max((place(), place()), key=error) for _ in range(CROPS)]
    return np.stack([[image[at] for at in places] for image in (high, conditioning)]), small, damaged


def mosaic(rng: Random, images: list[Rgb], weights: list[float]) -> Rgb:
    """Nine crops of images, [576, 576, 3]: as much content at once as a large photograph has."""
    crops = next(batches(rng, images, weights, side=192, count=9))
    return np.vstack([np.hstack(crops[row : row + 3]) for row in (0, 3, 6)])  # pyright: ignore[reportCallIssue]


def part(rng: Random, *images: Rgb) -> list[Rgb]:
    """The same rectangle of images of one content, each side at least 0.6 of the whole: damage at other aspects."""
    size = rng.uniform(0.6, 1, 2)
    start = rng.uniform(0, 1 - size)
    results = []
    for image in images:
        (top, left), (bottom, right) = ((at * image.shape[:2]).astype(int) for at in (start, start + size))
        results.append(image[top:bottom, left:right])
    return results


def batches(rng: Random, images: list[Rgb], weights: list[float], side: int, count: int) -> Iterator[Rgb]:
    """Endless batches of crops, [count, side, side, 3]."""
    while True:
        chosen = rng.choice(len(images), size=count, p=weights)
        yield np.stack([crop(rng, images[i], side) for i in chosen])


def enlarge(image: Rgb, size: tuple[int, int]) -> Rgb:
    """Pillow's bicubic, which the product uses too. `size` is (width, height)."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
