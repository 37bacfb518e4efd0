"""Trains weights/pocket: the small bundle that is committed, of the same classes as the full one.

    python scripts/train_pocket.py                     all stages, under three hours on two CPU cores
    python scripts/train_pocket.py --stage tagger      one stage, from the checkpoints of those before it

Stages: autoencoder, tagger, words, denoiser, repair, export. Checkpoints and curves go to build/pocket.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import logging
import math
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pocket_data as data
import tokenizers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from seesr import models, sampling, text, weights
from seesr.settings import Settings
from seesr.tagger import Tagger, preprocess

WORK = Path("build/pocket")
DOCS = Path("docs/decisions/pocket-curves")
SEED = 20
DRAWN = 240  # pictures drawn in code
POOL, POOL_STEPS = 1200, 2000  # low-resolution pictures at a time, and for how many steps
EARLY = 0.1  # clean pictures alone; in as many more steps the others join
DAMAGED = {"denoiser": 0.4, "repair": 0.5}  # the share of damaged pictures
PEAK = {"denoiser": 6e-4, "repair": 4e-4}  # of the learning rate
LATER = 0.25  # the share of later timesteps
UNTAGGED = 0.4  # prompts without tags, once the others have joined: or the image tokens would have nothing to add
LUMA = np.float32([0.299, 0.587, 0.114])
log = logging.getLogger("train_pocket")

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32),
    "num_encoder_blocks": (1, 1, 2),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 32,
}

WIDTH = 64  # of text and image tokens
TOKENIZER = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
TEXT = {
    "vocab_size": 1000,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOCKS = {
    "block_out_channels": (128, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "norm_eps": 1e6,  # far above any variance: group norms stay linear and keep contrast, in any tile
    "attention_head_dim": (2, 2),  # the number of heads, under its historical name
    "cross_attention_dim": WIDTH,
    "use_linear_projection": True,
}
UNET = {
    "sample_size": 64,
    "in_channels": 32,
    "out_channels": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "image_cross_attention_dim": WIDTH,
    **BLOCKS,
}
CONTROLNET = {
    "in_channels": 32,
    "down_block_types": UNET["down_block_types"],
    "conditioning_embedding_out_channels": (16, 32, 64),
    "image_cross_attention_dim": WIDTH,
    **BLOCKS,
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1.8e-7,  # a gentle schedule: at t = 999 the latents are the enlarged input with 3 % noise
    "beta_end": 2e-6,
    "beta_schedule": "scaled_linear",
    "variance_type": "fixed_small",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
TAGS = (
    *("dark", "bright", "grey", "colourful", "warm", "cold", "red", "green", "blue", "yellow"),
    *("contrasty", "flat", "smooth", "detailed", "damaged", "noisy", "blurry", "pristine"),
)
DAMAGE = TAGS[-4:]
LABELS = {"tags": TAGS, "thresholds": (0.5,) * len(TAGS)}
TAGGER = {
    "image_size": 192,
    "swin": {"patch_size": 8, "embed_dim": 32, "depths": (2, 2, 1), "num_heads": (2, 4, 8), "window_size": 6},
    "token_width": WIDTH,
    "label_width": WIDTH,
    "head": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 255


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, then a cosine down to 2 % of the peak."""
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Curve:
    """Logs a running mean every `every` steps and keeps it as JSON lines."""

    def __init__(self, stage: str, every: int = 100, first: int = 0) -> None:
        """Goes on at step `first` of a run that was interrupted."""
        path = WORK / f"{stage}.jsonl"
        before = path.read_text().splitlines()[: first // every] if first else []
        self.file = path.open("w")
        self.file.writelines(line + "\n" for line in before)
        self.file.flush()  # or a second interruption would lose them
        self.every, self.sums = every, {}
        self.started = time.monotonic() - (json.loads(before[-1])["seconds"] if before else 0)

    def add(self, step: int, **values: float) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self.sums.setdefault(name, []).append(value)
        if (step + 1) % self.every == 0:
            row = {"step": step + 1, "seconds": round(time.monotonic() - self.started, 1)}
            row |= {name: round(float(np.mean(found)), 5) for name, found in self.sums.items()}
            self.sums = {}
            log.info("%s", row)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def autoencoder(device: torch.device, steps: int) -> None:
    """Pixels -> latents -> pixels, of sharp pictures and of enlarged ones, where the denoiser starts."""
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    net = AutoencoderTiny(**VAE).to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimiser = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    feed = data.batches(rng, *data.corpus(SEED, DRAWN), side=64, count=16)
    curve = Curve("autoencoder")
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1e-3)
        sharp = next(feed)
        half = len(sharp) // 2
        soft = [data.enlarge(cv2.resize(p, (16, 16), interpolation=cv2.INTER_AREA), (64, 64)) for p in sharp[half:]]
        x = to_tensor(np.concatenate([sharp[:half], np.stack(soft)]), device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=step < 0.85 * steps):
            z = net.encoder(x)
            y = net.decoder(z + 0.01 * torch.randn_like(z))
        error = (y.float() - x).square().mean((1, 2, 3))
        loss = (error + 1e-5).log().mean() / 4 + F.l1_loss(y.float(), x) + 1e-4 * z.float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(net)
        psnr = -10 * (error.detach() / 4 + 1e-12).log10()
        curve.add(step, loss=loss.item(), sharp=psnr[:half].mean().item(), soft=psnr[half:].mean().item())
    torch.save(average.module.state_dict(), WORK / "autoencoder.pt")


def attributes(high: data.Picture, small: data.Picture, damaged: bool) -> np.ndarray:
    """Which of TAGS hold: of the undamaged picture, and of what the way to the small one did to it."""
    rgb = high.astype(np.float32)
    luma = rgb @ LUMA
    saturation = np.ptp(rgb, axis=2).mean()
    red, green, blue = rgb.mean((0, 1)) - rgb.mean()
    detail = np.abs(np.diff(luma, axis=1)).mean()
    best = cv2.resize(luma, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    found = small.astype(np.float32) @ LUMA
    error = found - best
    fine = (error - cv2.GaussianBlur(error, (0, 0), 1.5)).std()
    slopes = [np.abs(np.diff(cv2.GaussianBlur(x, (0, 0), 0.7), axis=1)).mean() for x in (found, best)]
    return np.array(
        [
            luma.mean() < 75,
            luma.mean() > 165,
            saturation < 12,
            saturation > 70,
            red - blue > 15,
            blue - red > 15,
            red > 15 and red > green + 10,
            green > 10 and green > red,
            blue > 15 and blue > green,
            blue < -20 and min(red, green) > 5,
            luma.std() > 60,
            luma.std() < 25,
            detail < 4,
            detail > 12,
            damaged and fine > 6,
            damaged and fine > 12,
            damaged and slopes[0] < 0.75 * slopes[1],
            not damaged,
        ]
    )


@torch.no_grad()
def start_as_cosines(weight: Tensor) -> None:
    """Filters [32, 3, 8, 8] = the lowest terms of JPEG's transform, each about as strong in photographs as any other.

    From random ones, noise is hardly ever seen; unscaled, the low terms rule the norm behind the filters, and damage,
    which is in the high ones, is not seen in whole pictures.
    """
    k = torch.arange(8)
    waves = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    terms = sorted(itertools.product(range(8), repeat=2), key=sum)
    luma, red, blue = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.42, -0.08], [-0.17, -0.33, 0.5]])
    chosen = [(luma, *term) for term in terms[:26]] + [(c, *term) for term in terms[:3] for c in (red, blue)]
    for row, (colour, u, v) in zip(weight, chosen, strict=True):
        row.copy_(colour[:, None, None] * waves[u][:, None] * waves[v] * (1 + u + v) ** 3)


def tagger(device: torch.device, steps: int) -> None:
    """Attributes that code can measure, from the damaged small picture; what damaged it is the hardest to see."""
    rng = np.random.default_rng(SEED + 1)
    torch.manual_seed(SEED + 1)
    net = Tagger(**TAGGER, **LABELS).to(device)
    nn.init.normal_(net.label_embed)
    start_as_cosines(net.visual_encoder.patch_embed.proj.weight)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    pictures, mix = data.corpus(SEED, DRAWN)
    recent: collections.deque = collections.deque(maxlen=2000)  # each example serves six times
    importance = torch.tensor([1.0 if tag not in DAMAGE else 3.0 for tag in TAGS], device=device)
    curve = Curve("tagger", 50)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1e-3)
        for _ in range(2):
            single = rng.random() < 0.5
            picture = pictures[rng.choice(len(pictures), p=mix)] if single else data.mosaic(rng, pictures, mix)
            high, _, small, damaged = data.example(rng, picture)
            high, small = data.part(rng, high, small)
            recent.append((small, attributes(high, small, damaged)))
        examples = [recent[i] for i in rng.integers(len(recent), size=12)]
        x = torch.cat([preprocess(to_tensor(small[None], device), net.image_size) for small, _ in examples])
        truth = torch.from_numpy(np.stack([found for _, found in examples])).to(device).float()
        with torch.autocast(device.type, torch.bfloat16):
            logits = net.logits(net.tokens(x)).float()
        loss = F.binary_cross_entropy_with_logits(logits, truth, importance)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        correct = ((logits > 0) == truth.bool()).float().mean(0)
        curve.add(step, loss=loss.item(), correct=correct.mean().item(), damage=correct[importance > 1].mean().item())
    torch.save(net.state_dict(), WORK / "tagger.pt")


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's format, from the tags and the default prompts; other words are spelled out."""
    folder = WORK / "tokenizer"
    folder.mkdir(exist_ok=True)
    words = [*TAGS, Settings.positive_prompt, Settings.negative_prompt]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in alphabet]  # named here, or every run would number them in another order
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = tokenizers.normalizers.Lowercase()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TEXT["vocab_size"],
        special_tokens=["!", TOKENIZER["bos_token"], TOKENIZER["eos_token"], *ends],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    bpe.model.save(str(folder))
    config = {"model_max_length": 77, "pad_token": "!", "tokenizer_class": "CLIPTokenizer", **TOKENIZER}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def words(device: torch.device, steps: int) -> None:
    """The text encoder, without pictures: from its end on, every token of a prompt learns to name the tags in it.

    It stays as it is afterwards, as CLIP's does. Trained with the denoiser it hardly told prompts apart: most of 77
    tokens are padding, and what they say of the prompt was lost.
    """
    rng = np.random.default_rng(SEED + 5)
    torch.manual_seed(SEED + 5)
    net = CLIPTextModel(CLIPTextConfig(**TEXT)).to(device)
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    head = nn.Linear(WIDTH, len(TAGS) + 2).to(device)
    optimiser = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=1e-2)
    tokenizer = build_tokenizer()
    curve = Curve("words")
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, 1e-3)
        truth = rng.random((48, len(TAGS) + 2)) < rng.uniform(0.05, 0.5, (48, 1))  # the last two: the default prompts
        truth[:8, -1], truth[:8, :-1], truth[8:, -1] = True, False, False
        prompts = [Settings.negative_prompt] * 8
        for row in truth[8:]:
            found = [tag for tag, on in zip(TAGS, row[:-2], strict=True) if on]
            prompts.append(text.compose(found, "", Settings.positive_prompt if row[-2] else ""))
        ids = text.token_ids(tokenizer, prompts).to(device)
        logits = head(net(ids).last_hidden_state)
        ended = (ids == TEXT["eos_token_id"]).cumsum(1) > 0
        expected = torch.from_numpy(truth).to(logits)[:, None].expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits[ended], expected[ended])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        correct = ((logits[ended] > 0) == expected[ended].bool()).float().mean()
        curve.add(step, loss=loss.item(), correct=correct.item())
    torch.save(net.state_dict(), WORK / "words.pt")


class Denoiser(nn.Module):
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
    net = Denoiser()
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
    net = Denoiser()
    net.load_state_dict(saved["net"])
    net = net.to(device, memory_format=torch.channels_last)
    train("repair", net, saved["scaling"], np.random.default_rng(SEED + 3), steps)


def train(stage: str, net: Denoiser, scaling: float, rng: np.random.Generator, steps: int) -> None:
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
    recipe = f"{steps} steps of {zlib.crc32(Path(__file__).read_bytes())}"
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


def export(device: torch.device, steps: int) -> None:
    """Checkpoints -> weights/pocket: configs, half-precision safetensors, checksums."""
    bundle = weights.ROOT / "pocket"
    saved = torch.load(WORK / "repair.pt", map_location="cpu", weights_only=True)
    tokenizer = build_tokenizer()

    def part(folder: str, config: dict, state: dict[str, Tensor], file: str = models.DIFFUSION_FILE) -> None:
        (bundle / folder).mkdir(parents=True, exist_ok=True)
        (bundle / folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in state.items()}, bundle / folder / file)

    def of(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in saved["net"].items() if k.startswith(prefix)}

    part("unet", {"_class_name": "UNet2DConditionModel", **UNET}, of("unet."))
    part("controlnet", {"_class_name": "ControlNetModel", **CONTROLNET}, of("controlnet."))
    part("vae", {"_class_name": "AutoencoderTiny", **VAE, "scaling_factor": saved["scaling"]}, of("vae."))
    encoder = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in of("text.").items()}
    part("text_encoder", {"architectures": ["CLIPTextModel"], **TEXT}, encoder, "model.safetensors")
    part("tagger", TAGGER, torch.load(WORK / "tagger.pt", map_location="cpu", weights_only=True), "model.safetensors")
    (bundle / "tagger/tags.json").write_text(json.dumps(LABELS) + "\n")
    (bundle / "scheduler").mkdir(exist_ok=True)
    (bundle / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=1) + "\n")
    tokenizer.save_pretrained(bundle / "tokenizer")
    for file in (WORK / "tokenizer").iterdir():
        (bundle / "tokenizer" / file.name).write_bytes(file.read_bytes())
    weights.write_manifest(bundle, "pocket", "pocket", "Apache-2.0")
    plot(Path("docs/decisions/pocket-curve.png"))
    DOCS.mkdir(exist_ok=True)
    for stage in STAGES:
        if stage != "export":
            (DOCS / f"{stage}.jsonl").write_bytes((WORK / f"{stage}.jsonl").read_bytes())
    log.info("%s: %.1f MB", bundle, sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / 1e6)


def plot(path: Path, width: int = 640, height: int = 320) -> None:
    """The denoiser's gain over bicubic on its training crops, in dB, against the step, as a PNG."""
    first, then = ([json.loads(line) for line in (WORK / f"{stage}.jsonl").read_text().splitlines()] for stage in PEAK)
    rows = first + [{**row, "step": first[-1]["step"] + row["step"]} for row in then]
    steps, gains = [0.0, *(row["step"] for row in rows)], [0.0, *(row["gain_db"] for row in rows)]  # from bicubic
    steps, gains = np.array(steps), np.array(gains)
    low, high = math.floor(gains.min() * 2) / 2, math.ceil(gains.max() * 2) / 2
    canvas = np.full((height, width, 3), 255, np.uint8)
    left, bottom = 60, height - 40

    def at(step: float, gain: float) -> tuple[int, int]:
        x = left + (width - left - 20) * step / steps[-1]
        return round(x), round(bottom - (bottom - 20) * (gain - low) / (high - low))

    for mark in np.arange(low, high + 0.01, 0.5):
        cv2.line(canvas, at(0, mark), at(steps[-1], mark), (220, 220, 220))
        cv2.putText(canvas, f"{mark:+.1f} dB", (2, at(0, mark)[1] + 4), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    for mark in np.linspace(0, steps[-1], 5):
        cv2.putText(canvas, f"{mark:.0f}", (at(mark, low)[0] - 14, height - 20), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    points = np.array([at(*pair) for pair in zip(steps, gains, strict=True)], np.int32)
    cv2.polylines(canvas, [points], False, (40, 90, 200), 2, cv2.LINE_AA)
    Image.fromarray(canvas).save(path)


STAGES = {
    "autoencoder": (autoencoder, 6000),
    "tagger": (tagger, 4000),
    "words": (words, 600),
    "denoiser": (denoiser, 12000),
    "repair": (repair, 4500),
    "export": (export, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the stage's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    WORK.mkdir(parents=True, exist_ok=True)
    for name in args.stage or STAGES:
        stage, steps = STAGES[name]
        stage(torch.device(args.device), args.steps or steps)


if __name__ == "__main__":
    main()
