"""Trains the parts that need no denoiser: autoencoder, tagger, tokenizer and text encoder."""

from __future__ import annotations

import collections
import itertools
import json
import math

import cv2
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.pocket import data
from experiments.pocket.curve import Curve
from experiments.pocket.sizes import DAMAGE, DRAWN, LABELS, SEED, TAGGER, TAGS, TEXT, TOKENIZER, VAE, WIDTH, WORK
from lab.quality.degradations import Rgb
from seesr.networks.autoencoders import AutoencoderTiny
from seesr.networks.tagger import Tagger, preprocess
from seesr.networks.text_encoder import ClipTokenizer, TextEncoder
from seesr.pipeline import prompt
from seesr.settings import Settings

LUMA = np.float32([0.299, 0.587, 0.114])


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def rate(step: int, done: float, peak: float) -> float:
    """Warm-up, then a cosine down to 2 % of the peak at `done` = 1."""
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def autoencoder(device: torch.device, steps: int) -> None:
    """Pixels -> latents -> pixels, of sharp images and of enlarged ones, where the denoiser starts."""
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    net = AutoencoderTiny(**VAE).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimiser = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    feed = data.batches(rng, *data.corpus(SEED, DRAWN), side=64, count=16)
    curve = Curve("autoencoder")
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, step / steps, 1e-3)
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


def attributes(high: Rgb, small: Rgb, damaged: bool) -> np.ndarray:
    """Which of TAGS hold: of the undamaged image, and of what the way to the small one did to it."""
    rgb = high.astype(np.float32)
    luma = rgb @ LUMA
    saturation = np.ptp(rgb, axis=2).mean()
    red, green, blue = rgb.mean((0, 1)) - rgb.mean()
    detail = np.abs(np.diff(luma, axis=1)).mean()
    best = cv2.resize(luma, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    seen = small.astype(np.float32) @ LUMA
    error = seen - best
    fine = (error - cv2.GaussianBlur(error, (0, 0), 1.5)).std()
    slopes = [np.abs(np.diff(cv2.GaussianBlur(x, (0, 0), 0.7), axis=1)).mean() for x in (seen, best)]
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
    which is in the high ones, is not seen in whole images.
    """
    k = torch.arange(8)
    waves = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    terms = sorted(itertools.product(range(8), repeat=2), key=sum)
    luma, red, blue = torch.tensor([[0.299, 0.587, 0.114], [0.5, -0.42, -0.08], [-0.17, -0.33, 0.5]])
    chosen = [(luma, *term) for term in terms[:26]] + [(c, *term) for term in terms[:3] for c in (red, blue)]
    for row, (colour, u, v) in zip(weight, chosen, strict=True):
        row.copy_(colour[:, None, None] * waves[u][:, None] * waves[v] * (1 + u + v) ** 3)


def tagger(device: torch.device, steps: int, further: bool = False) -> None:
    """Attributes that code can measure, from the damaged small image; what damaged it is the hardest to see.

    `further`: from the checkpoint that is there, at half the rate.
    """
    rng = np.random.default_rng(SEED + 1)
    torch.manual_seed(SEED + 1)
    net = Tagger(**TAGGER, **LABELS).to(device)
    nn.init.normal_(net.label_embed)
    start_as_cosines(net.visual_encoder.patch_embed.proj.weight)
    if further:
        net.load_state_dict(torch.load(WORK / "tagger.pt", weights_only=True))
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    images, mix = data.corpus(SEED, DRAWN)
    recent: collections.deque = collections.deque(maxlen=2000)  # each example serves six times
    importance = torch.tensor([1.0 if tag not in DAMAGE else 3.0 for tag in TAGS], device=device)
    curve = Curve("tagger-further" if further else "tagger", 50)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, step / steps, 5e-4 if further else 1e-3)
        for _ in range(2):
            single = rng.random() < 0.5
            image = images[rng.choice(len(images), p=mix)] if single else data.mosaic(rng, images, mix)
            high, _, small, damaged = data.example(rng, image)
            high, small = data.part(rng, high, small)
            recent.append((small, attributes(high, small, damaged)))
        examples = [recent[i] for i in rng.integers(len(recent), size=12)]
        x = torch.cat([preprocess(to_tensor(small[None], device), net.image_size) for small, _ in examples])
        truth = torch.from_numpy(np.stack([result for _, result in examples])).to(device).float()
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


def build_tokenizer() -> ClipTokenizer:
    """A byte-pair vocabulary in CLIP's format, from the tags and the default prompts; other words are spelled out."""
    folder = WORK / "tokenizer"
    folder.mkdir(exist_ok=True)
    lines = [*TAGS, Settings.positive_prompt, Settings.negative_prompt]
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
    bpe.train_from_iterator(lines, trainer)
    bpe.model.save(str(folder))
    config = {"model_max_length": 77, "pad_token": "!", "tokenizer_class": "CLIPTokenizer", **TOKENIZER}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return ClipTokenizer(folder)


def text_encoder(device: torch.device, steps: int) -> None:
    """The text encoder, without images: from its end on, every token of a prompt learns to name the tags in it.

    It stays as it is afterwards, as CLIP's does. Trained with the denoiser it hardly told prompts apart: most of 77
    tokens are padding, and what they say of the prompt was lost.
    """
    rng = np.random.default_rng(SEED + 5)
    torch.manual_seed(SEED + 5)
    net = TextEncoder(**TEXT).to(device)
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    head = nn.Linear(WIDTH, len(TAGS) + 2).to(device)
    optimiser = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=1e-2)
    tokenizer = build_tokenizer()
    curve = Curve("words")
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, step / steps, 1e-3)
        truth = rng.random((48, len(TAGS) + 2)) < rng.uniform(0.05, 0.5, (48, 1))  # the last two: the default prompts
        truth[:8, -1], truth[:8, :-1], truth[8:, -1] = True, False, False
        prompts = [Settings.negative_prompt] * 8
        for row in truth[8:]:
            named = [tag for tag, on in zip(TAGS, row[:-2], strict=True) if on]
            prompts.append(prompt.compose(named, "", Settings.positive_prompt if row[-2] else ""))
        ids = tokenizer.encode_batch(prompts).to(device)
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
