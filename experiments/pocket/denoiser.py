"""Trains the UNet, the ControlNet and the decoder together, on clean and damaged images (the last stage)."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.pocket import data
from experiments.pocket.curve import Curve
from experiments.pocket.sizes import BLOCKS, CONTROLNET, DRAWN, LABELS, SCHEDULER, SEED, TAGGER, TEXT, UNET, VAE, WORK
from experiments.pocket.stages import build_tokenizer, rate, to_tensor
from lab.quality.degradations import Rgb
from seesr.networks.autoencoders import AutoencoderTiny
from seesr.networks.schedule import NoiseSchedule
from seesr.networks.tagger import Tagger, preprocess
from seesr.networks.text_encoder import ClipTokenizer, TextEncoder
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.pipeline import prompt, sampling
from seesr.runtime.memory import Budget
from seesr.settings import Settings

BATCH = 6  # on a CPU; a GPU takes more
POOL_STEPS = {"cpu": 2000, "cuda": 250}  # before other examples are drawn from
DRAWS = 24  # from one example: its squares, turned and mirrored
NOTED = 5  # steps between points of the curve
EARLY = 0.1  # clean images alone; in as many more steps the others join
DAMAGED = 0.5  # the share of damaged images
PEAK = 6e-4  # of the learning rate, for any batch: at 1.2e-3 and 96 squares the norms ran away within 200 steps
LATER = 0.25  # the share of later timesteps
UNTAGGED = 0.4  # prompts without tags, once the others have joined: or the image tokens would have nothing to add


class Student(nn.Module):
    """All that is trained together in the last stage, and the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(**TEXT).requires_grad_(False)
        self.unet = UNet2DConditionModel(**UNET)
        self.controlnet = ControlNetModel(**CONTROLNET)
        self.vae = AutoencoderTiny(**VAE)
        for module in [*self.unet.modules(), *self.controlnet.modules()]:
            if isinstance(module, nn.GroupNorm) and module.eps == BLOCKS["norm_eps"]:
                nn.init.constant_(module.weight, 2 * module.eps**0.5)

    def forward(self, z: Tensor, t: Tensor, conditioning: Tensor, text: Tensor, tokens: Tensor) -> Tensor:
        """Noisy latents [B, 32, h, w] at t -> predicted noise."""
        context = (text, tokens)
        down, mid = self.controlnet(z, t, context, conditioning)
        return self.unet(z, t, context, down, mid)


class Pool:
    """Examples with their image tokens and prompts, made once and drawn from many times; on the device."""

    def __init__(
        self,
        examples: Iterable[tuple[np.ndarray, Rgb, bool]],
        rng: np.random.Generator,
        tags: Tagger,
        encoder: TextEncoder,
        tokenizer: ClipTokenizer,
        untagged: float,
    ) -> None:
        device = tags.image_proj.weight.device
        crops, smalls, damaged = zip(*examples, strict=True)
        self.high, self.conditioning = (
            torch.from_numpy(np.stack(crops)).to(device).unbind(1)
        )  # [P, CROPS, SIDE, SIDE, 3]
        tokens, prompts = [], []
        for small in smalls:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                tokens.append(tags.tokens(preprocess(to_tensor(small[None], device), tags.image_size)).float())
        self.tokens = torch.cat(tokens)
        with torch.no_grad():
            logits = tags.logits(self.tokens).cpu()
        for row in logits:
            names = [] if untagged and rng.random() < untagged else tags.names(row[None])
            prompts.append(prompt.compose(names, "", Settings.positive_prompt if rng.random() < 0.8 else ""))
        prompts.append(Settings.negative_prompt)
        with torch.autocast(device.type, torch.bfloat16):
            self.prompts = prompt.encode(encoder, tokenizer, prompts, Budget()).float()
        self.damaged = torch.tensor(damaged, device=device)
        self.kinds = [np.flatnonzero(np.array(damaged) == kind) for kind in (False, True)]

    def draw(self, rng: np.random.Generator, count: int, share: float) -> tuple[Tensor, ...]:
        """(target, truth, conditioning [B, 3, side, side] in [0, 1], prompts, image tokens, damaged [B], negative [B]).

        One in twelve has the negative prompt, and its input as the target: what guidance is to lead away from.
        `share` of them are damaged.
        """
        device = self.damaged.device
        i = np.where(rng.random(count) < share, rng.choice(self.kinds[1], count), rng.choice(self.kinds[0], count))
        i, crop = (torch.from_numpy(result).to(device) for result in (i, rng.integers(data.CROPS, size=count)))
        negative = torch.from_numpy(rng.random(count) < 1 / 12).to(device)
        turn, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)

        def augmented(result: Tensor) -> Tensor:
            turned = torch.rot90(result[i, crop].permute(0, 3, 1, 2), turn, (2, 3))
            return (turned.flip(3) if mirror else turned).float() / 255

        truth, conditioning = augmented(self.high), augmented(self.conditioning)
        target = torch.where(negative[:, None, None, None], conditioning, truth)
        return (
            target,
            truth,
            conditioning,
            self.prompts[torch.where(negative, -1, i)],
            self.tokens[i],
            self.damaged[i],
            negative,
        )


def further(device: torch.device, steps: int, batch: int = BATCH, seconds: float | None = None) -> None:
    """More steps from the networks that `unpack` found, on the whole mixture, from half the rate."""
    saved = torch.load(WORK / "denoiser.pt", map_location="cpu", weights_only=True)
    net = Student()
    net.load_state_dict(saved["net"])
    net = net.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    train("further", net, saved["scaling"], np.random.default_rng(SEED + 6), steps, batch, seconds)


def denoiser(device: torch.device, steps: int, batch: int = BATCH, seconds: float | None = None) -> None:
    """UNet, ControlNet and the decoder, on clean images first, then on damaged ones too.

    Damaged ones join little by little, since a mixture from the start teaches the network to leave everything alone.
    """
    rng = np.random.default_rng(SEED + 2)
    torch.manual_seed(SEED + 2)
    net = Student()
    net.vae.load_state_dict(torch.load(WORK / "autoencoder.pt", weights_only=True))
    net.text.load_state_dict(torch.load(WORK / "words.pt", weights_only=True))
    net = net.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    sharp = to_tensor(next(data.batches(rng, *data.corpus(SEED, DRAWN), side=128, count=32)), device)
    with torch.no_grad():
        scaling = 1 / net.vae.encoder(sharp * 2 - 1).std().item()  # brings the latents to unit variance
    train("denoiser", net, scaling, rng, steps, batch, seconds)


def train(
    stage: str,
    net: Student,
    scaling: float,
    rng: np.random.Generator,
    steps: int,
    batch: int,
    seconds: float | None,
) -> None:
    """By the logarithm of the decoded image's error: bad inputs do not drown good ones, and giving back pays.

    A share of the batches is at later timesteps, from states that the model's own first steps lead to. A run that was
    interrupted goes on where its last pool of images began; to the same result, unless `seconds` instead of `steps`
    say how long it is (a lent machine).
    """
    device, new = net.unet.device, stage == "denoiser"
    peak = PEAK if new else PEAK / 2
    steps_per_pool = POOL_STEPS[device.type]
    net.vae.encoder.requires_grad_(False)
    tags = Tagger(**TAGGER, **LABELS).to(device).eval()
    tags.load_state_dict(torch.load(WORK / "tagger.pt", weights_only=True))
    tokenizer = build_tokenizer()
    keep = [p for p in net.parameters() if p.requires_grad]
    slow = {id(p) for p in net.vae.parameters()}
    fast = [p for p in keep if id(p) not in slow]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in fast if p.ndim > 1], "peak": peak, "weight_decay": 0.1},
            {"params": [p for p in fast if p.ndim == 1], "peak": peak, "weight_decay": 0.0},
            {"params": [p for p in keep if id(p) in slow], "peak": peak / 3, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000, device=device) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    schedule = NoiseSchedule(SCHEDULER)

    def predict(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * eps.float()) / a.sqrt()

    begin, before, interrupted = 0, 0.0, WORK / f"{stage}.interrupted"
    scripts = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    recipe = f"{seconds or steps} {'seconds' if seconds else 'steps'} of {batch} of {zlib.crc32(scripts)}"
    if interrupted.exists():
        saved = torch.load(interrupted, map_location=device, weights_only=True)
        if saved["recipe"] != recipe:
            raise SystemExit(f"{interrupted} is of another number of steps or another script: remove it to begin anew")
        for part, state in zip((net, average, optimiser), saved["states"], strict=True):
            part.load_state_dict(state)
        begin, before, rng.bit_generator.state = saved["step"], saved["elapsed"], saved["rng"]
    curve = Curve(stage, first=begin)
    examples = max(32, batch * (steps_per_pool if seconds else min(steps_per_pool, steps)) // DRAWS)
    data.corpus(SEED, DRAWN)  # before the workers, who have it from here
    makers = data.workers()

    def ask_for(pool: int) -> list[Future]:
        return [makers.submit(data.crops, (SEED + 2, pool, i)) for i in range(examples)]

    asked_for = ask_for(begin // steps_per_pool)
    started, done = time.monotonic() - before, 0.0
    for step in itertools.count(begin):
        elapsed = time.monotonic() - started
        done = elapsed / seconds if seconds else step / steps
        if done >= 1:
            break
        joined = min(max(done / EARLY - 1, 0), 1) if new else 1
        if step % steps_per_pool == 0:
            states = [part.state_dict() for part in (net, average, optimiser)]
            now = {"recipe": recipe, "step": step, "elapsed": elapsed, "states": states, "rng": rng.bit_generator.state}
            torch.save(now, interrupted)
            result = [future.result() for future in asked_for]
            asked_for = ask_for(step // steps_per_pool + 1)
            pool = Pool(result, rng, tags, net.text, tokenizer, UNTAGGED if joined == 1 else 0)
            torch.manual_seed(SEED + step)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, done, group["peak"])
        target, truth, conditioning, prompt, tokens, damaged, negative = pool.draw(rng, batch, joined * DAMAGED)
        half_precision = torch.autocast(device.type, torch.bfloat16, enabled=done < 0.95)
        with torch.no_grad(), half_precision, kernels(device):
            t = torch.full((len(target),), sampling.START, device=device)
            z = net.vae.encoder(conditioning * 2 - 1).float() * scaling
            x = sampling.start_latents(z, torch.randn_like(z), schedule)
            visits = sampling.schedule(schedule, int(rng.integers(2, 9)))
            if rng.random() < joined * LATER:
                for visit in visits[: rng.integers(1, min(4, len(visits)))]:
                    first = predict(x, t, net(x, t, conditioning, prompt, tokens))
                    x = sampling.ddpm_step(x, first, visit, torch.randn_like(x))
                    t = torch.full_like(t, visits[visits.index(visit) + 1].t)
        with half_precision, kernels(device):
            z = predict(x, t, net(x, t, conditioning, prompt, tokens))
            image = (net.vae.decoder(z / scaling).float() + 1) / 2
        bicubic_error = (conditioning - truth).square().mean((1, 2, 3))
        error = (image - target).square().mean((1, 2, 3))
        loss = ((error + 2e-4) / (bicubic_error + 2e-4)).log().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(keep, 0.5)
        optimiser.step()
        average.update_parameters(net)
        if (step + 1) % NOTED == 0:  # not every step: reading a number waits for the device
            ours = (image.detach().clamp(0, 1) - truth).square().mean((1, 2, 3))
            gain = 10 * ((bicubic_error + 2e-5) / (ours + 2e-5)).log10()
            curve.add(
                step,
                loss=loss.item(),
                gain_db=average_of(gain[~negative]),
                gain_clean_db=average_of(gain[~negative & ~damaged]),
                gain_damaged_db=average_of(gain[~negative & damaged]),
                gain_negative_db=average_of(gain[negative]),
            )
        if (step + 1) % 1000 == 0:
            torch.save({"net": average.module.state_dict(), "scaling": scaling}, WORK / "denoiser.pt")
    torch.save({"net": average.module.state_dict(), "scaling": scaling}, WORK / "denoiser.pt")
    makers.shutdown(cancel_futures=True)
    interrupted.unlink()


def kernels(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """On a CPU the plain products are the fastest that can be differentiated."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def average_of(values: Tensor) -> float:
    return values.mean().item() if len(values) else math.nan
