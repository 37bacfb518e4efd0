"""The last stages: UNet, ControlNet and decoder together, on clean and damaged pictures."""

from __future__ import annotations

import functools
import math
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lab.pocket import data
from lab.pocket.curve import Curve
from lab.pocket.sizes import BLOCKS, CONTROLNET, DRAWN, LABELS, SCHEDULER, SEED, TAGGER, TEXT, UNET, VAE, WORK
from lab.pocket.stages import build_tokenizer, rate, to_tensor
from seesr import sampling, text
from seesr.networks import models
from seesr.networks.tagger import Tagger, preprocess
from seesr.settings import Settings

POOL, POOL_STEPS = 1200, 2000  # low-resolution pictures at a time, and for how many steps
EARLY = 0.1  # clean pictures alone; in as many more steps the others join
DAMAGED = {"denoiser": 0.4, "repair": 0.5}  # the share of damaged pictures
PEAK = {"denoiser": 6e-4, "repair": 4e-4}  # of the learning rate
LATER = 0.25  # the share of later timesteps
UNTAGGED = 0.4  # prompts without tags, once the others have joined: or the image tokens would have nothing to add


class Student(nn.Module):
    """All that is trained together in the last stages, and the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.text = CLIPTextModel(CLIPTextConfig(**TEXT)).requires_grad_(False)
        self.unet = models.build_diffusion_network(UNet2DConditionModel, UNET)
        self.controlnet = models.build_diffusion_network(ControlNetModel, CONTROLNET)
        self.vae = AutoencoderTiny(**VAE)
        for module in [*self.unet.modules(), *self.controlnet.modules()]:
            if isinstance(module, nn.GroupNorm) and module.eps == BLOCKS["norm_eps"]:
                nn.init.constant_(module.weight, 2 * module.eps**0.5)

    def forward(self, z: Tensor, t: Tensor, hint: Tensor, words: Tensor, tokens: Tensor) -> Tensor:
        """Noisy latents [B, 32, h, w] at t -> predicted noise."""
        context = (words, tokens)
        down, mid = self.controlnet(z, t, context, hint, return_dict=False)
        return self.unet(
            z, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0]


class Pool:
    """Low-resolution pictures with their image tokens and prompts, made once and cropped many times."""

    def __init__(
        self, rng: np.random.Generator, tags: Tagger, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, untagged: float
    ) -> None:
        self.pictures, self.hints, self.tokens, self.damaged, prompts = [], [], [], [], []
        device = tags.image_proj.weight.device
        pictures, mix = data.corpus(SEED, DRAWN)
        for _ in range(POOL):
            high, hint, small, damaged = data.example(rng, pictures[rng.choice(len(pictures), p=mix)])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                tokens = tags.tokens(preprocess(to_tensor(small[None], device), tags.image_size)).float()
                names = [] if untagged and rng.random() < untagged else tags.names(tags.logits(tokens))
            self.pictures.append(high)
            self.hints.append(hint)
            self.tokens.append(tokens.half())
            self.damaged.append(damaged)
            prompts.append(text.compose(names, "", Settings.positive_prompt if rng.random() < 0.8 else ""))
        prompts.append(Settings.negative_prompt)
        with torch.autocast(device.type, torch.bfloat16):
            self.prompts = text.encode(encoder, tokenizer, prompts).float()

    def place(self, rng: np.random.Generator, i: int, side: int) -> tuple[slice, slice]:
        """A square of picture `i`, in whole pixels of a clean small picture."""
        top, left = (4 * int(rng.integers((limit - side) // 4 + 1)) for limit in self.pictures[i].shape[:2])
        return slice(top, top + side), slice(left, left + side)

    def error(self, i: int, place: tuple[slice, slice]) -> float:
        return cv2.norm(self.pictures[i][place], self.hints[i][place])

    def draw(
        self, rng: np.random.Generator, count: int, side: int, share: float, device: torch.device
    ) -> tuple[Tensor, ...]:
        """(target, truth, hint [B, 3, side, side] in [0, 1], prompts, image tokens, whether damaged [B]).

        Of two places in a picture, the one where bicubic errs more. One in twelve has the negative prompt, and its
        input as the target: what guidance is to lead away from. `share` of them are damaged.
        """
        targets, truths, hints, prompts, tokens, damaged = [], [], [], [], [], []
        for _ in range(count):
            i = int(rng.choice(np.flatnonzero(np.array(self.damaged) == (rng.random() < share))))
            place = max((self.place(rng, i, side) for _ in range(2)), key=functools.partial(self.error, i))
            poor = rng.random() < 1 / 12
            targets.append((self.hints if poor else self.pictures)[i][place])
            truths.append(self.pictures[i][place])
            hints.append(self.hints[i][place])
            prompts.append(self.prompts[-1 if poor else i])
            tokens.append(self.tokens[i])
            damaged.append(self.damaged[i])
        images = (to_tensor(np.stack(pictures), device) for pictures in (targets, truths, hints))
        return *images, torch.stack(prompts), torch.cat(tokens).float(), torch.tensor(damaged, device=device)


def denoiser(device: torch.device, steps: int) -> None:
    """UNet, ControlNet and the decoder, on clean pictures first, then on damaged ones too.

    Damaged ones join little by little, since a mixture from the start teaches the network to leave everything alone.
    """
    rng = np.random.default_rng(SEED + 2)
    torch.manual_seed(SEED + 2)
    net = Student()
    net.vae.load_state_dict(torch.load(WORK / "autoencoder.pt", weights_only=True))
    net.text.load_state_dict(torch.load(WORK / "words.pt", weights_only=True))
    net = net.to(device, memory_format=torch.channels_last)
    sharp = to_tensor(next(data.batches(rng, *data.corpus(SEED, DRAWN), side=128, count=32)), device)
    with torch.no_grad():
        scaling = 1 / net.vae.encoder(sharp * 2 - 1).std().item()  # brings the latents to unit variance
    train("denoiser", net, scaling, rng, steps)


def repair(device: torch.device, steps: int) -> None:
    """The same networks go on, with more damaged pictures."""
    saved = torch.load(WORK / "denoiser.pt", map_location=device, weights_only=True)
    net = Student()
    net.load_state_dict(saved["net"])
    net = net.to(device, memory_format=torch.channels_last)
    train("repair", net, saved["scaling"], np.random.default_rng(SEED + 3), steps)


def train(stage: str, net: Student, scaling: float, rng: np.random.Generator, steps: int) -> None:
    """By the logarithm of the decoded picture's error: bad inputs do not drown good ones, and giving back pays.

    A share of the batches is at later timesteps, from states that the model's own first steps lead to. A run that was
    interrupted goes on where its last pool of pictures began, to the same result.
    """
    device = net.unet.device
    net.vae.encoder.requires_grad_(False)
    tags = Tagger(**TAGGER, **LABELS).to(device).eval()
    tags.load_state_dict(torch.load(WORK / "tagger.pt", weights_only=True))
    tokenizer = build_tokenizer()
    keep = [p for p in net.parameters() if p.requires_grad]
    slow = {id(p) for p in net.vae.parameters()}
    fast = [p for p in keep if id(p) not in slow]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in fast if p.ndim > 1], "peak": PEAK[stage], "weight_decay": 0.1},
            {"params": [p for p in fast if p.ndim == 1], "peak": PEAK[stage], "weight_decay": 0.0},
            {"params": [p for p in keep if id(p) in slow], "peak": PEAK[stage] / 3, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000, device=device) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    schedule = models.DDPMScheduler.from_config({k: v for k, v in SCHEDULER.items() if k != "_class_name"})

    def predict(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * eps.float()) / a.sqrt()

    begin, interrupted = 0, WORK / f"{stage}.interrupted"
    scripts = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    recipe = f"{steps} steps of {zlib.crc32(scripts)}"
    if interrupted.exists():
        saved = torch.load(interrupted, map_location=device, weights_only=True)
        if saved["recipe"] != recipe:
            raise SystemExit(f"{interrupted} is of another number of steps or another script: remove it to begin anew")
        for part, state in zip((net, average, optimiser), saved["states"], strict=True):
            part.load_state_dict(state)
        begin, rng.bit_generator.state = saved["step"], saved["rng"]
    curve = Curve(stage, first=begin)
    for step in range(begin, steps):
        joined = min(max(step / (EARLY * steps) - 1, 0), 1) if stage == "denoiser" else 1
        if step % POOL_STEPS == 0:
            states = [part.state_dict() for part in (net, average, optimiser)]
            now = {"recipe": recipe, "step": step, "states": states, "rng": rng.bit_generator.state}
            torch.save(now, interrupted)
            pool = Pool(rng, tags, net.text, tokenizer, UNTAGGED if joined == 1 else 0)
            torch.manual_seed(SEED + step)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, group["peak"])
        target, truth, hint, prompt, tokens, damaged = pool.draw(rng, 6, 112, joined * DAMAGED[stage], device)
        rough = torch.autocast(device.type, torch.bfloat16, enabled=step < 0.95 * steps)
        with torch.no_grad(), rough, sdpa_kernel(SDPBackend.MATH):
            t = torch.full((len(target),), sampling.START, device=device)
            z = net.vae.encoder(hint * 2 - 1).float() * scaling
            x = sampling.start_latents(z, torch.randn_like(z), schedule)
            visits = sampling.schedule(schedule, int(rng.integers(2, 9)))
            if rng.random() < joined * LATER:
                for visit in visits[: rng.integers(1, min(4, len(visits)))]:
                    first = predict(x, t, net(x, t, hint, prompt, tokens))
                    x = sampling.ddpm_step(x, first, visit, torch.randn_like(x))
                    t = torch.full_like(t, visits[visits.index(visit) + 1].t)
        with rough, sdpa_kernel(SDPBackend.MATH):
            z = predict(x, t, net(x, t, hint, prompt, tokens))
            picture = (net.vae.decoder(z / scaling).float() + 1) / 2
        plain = (hint - truth).square().mean((1, 2, 3))
        error = (picture - target).square().mean((1, 2, 3))
        loss = ((error + 2e-4) / (plain + 2e-4)).log().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(keep, 0.5)
        optimiser.step()
        average.update_parameters(net)
        asked = (target == truth).flatten(1).all(1)
        ours = (picture.detach().clamp(0, 1) - truth).square().mean((1, 2, 3))
        gain = 10 * ((plain + 2e-5) / (ours + 2e-5)).log10()
        curve.add(
            step,
            loss=loss.item(),
            gain_db=average_of(gain[asked]),
            gain_clean_db=average_of(gain[asked & ~damaged]),
            gain_damaged_db=average_of(gain[asked & damaged]),
            gain_negative_db=average_of(gain[~asked]),
        )
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            torch.save({"net": average.module.state_dict(), "scaling": scaling}, WORK / f"{stage}.pt")
    interrupted.unlink()


def average_of(values: Tensor) -> float:
    return values.mean().item() if len(values) else math.nan
