"""Kernel Density Steering: several particles of one image, pulled towards local agreement, one returned.

Method: Hu, Mei, Sahraee-Ardakan, Kamilov, Milanfar, Delbracio, "Kernel Density Steering", arXiv 2507.05604. At every
step the predicted clean latents of the particles move by a mean shift, patch by patch, on the whole stitched latent.
The paper leaves the scale of the distance, the bandwidth and the schedule open; docs/decisions/0004 has our choices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

LATENT_PIXELS = 2**18  # per strip, which holds a few times particles^2 * LATENT_PIXELS / patch^2 floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """How particles are steered.

    Attributes:
        bandwidth: of the kernel, in root-mean-square latent units; small keeps detail, large pulls to the mean.
            0: per patch and step, from the median distance.
        patch: side of the patches that are compared, latent pixels.
        strength: share of the mean shift that is applied, 0 to 1.
    """

    bandwidth: float = 0.0
    patch: int = 2
    strength: float = 0.3


def particle_seeds(seed: int, count: int) -> list[int]:
    """Seeds of independent streams: the first is `seed` itself, the others are hashes, so seeds share none."""
    digests = [hashlib.sha256(f"kds:{seed}:{i}".encode()).digest() for i in range(1, count)]
    return [seed, *(int.from_bytes(digest[-8:], "big") % 2**63 for digest in digests)]


def strengths(steps: int, strength: float) -> list[float]:
    """Off while the noise is high: steers at step s if 10 s >= 3 (steps - 1)."""
    return [strength if 10 * s >= 3 * (steps - 1) else 0.0 for s in range(steps)]


def patch_sums(x: Tensor, patch: int) -> Tensor:
    """[..., H, W] -> sums over patches anchored at (0, 0), [..., ceil(H/p), ceil(W/p)]; border patches are smaller."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % patch, 0, -height % patch))
    return x.unflatten(-1, (-1, patch)).sum(-1).unflatten(-2, (-1, patch)).sum(-2)


def mean_shift(x: Tensor, steering: Steering, strength: float) -> tuple[Tensor, Tensor]:
    """One update of all particles.

    d2_ik = mean over a patch of (x_i - x_k)^2;  w_ik = exp(-d2_ik / (2 h^2));
    x_i <- x_i + strength * (sum_k w_ik x_k / sum_k w_ik - x_i), k over all particles, i included.
    Automatic bandwidth: h^2 = median of d2 over pairs / (2 ln(N + 1)), of the mean if the median is 0; a patch whose
    particles all agree is left as it is.

    Args:
        x: predicted clean latents [N, C, H, W], float32.

    Returns:
        The new latents, each value between the smallest and the largest of the old ones, and the bandwidth h of
        every patch [ceil(H/p), ceil(W/p)] (0 where nothing moved).
    """
    rows = max(1, LATENT_PIXELS // (x.shape[3] * steering.patch)) * steering.patch
    parts = [shift_strip(strip, steering, strength) for strip in x.split(rows, dim=2)]
    moved, bandwidths = zip(*parts, strict=True)
    return torch.cat(moved, dim=2), torch.cat(bandwidths, dim=0)


def shift_strip(x: Tensor, steering: Steering, strength: float) -> tuple[Tensor, Tensor]:
    count, channels, height, width = x.shape
    patch = steering.patch
    size = channels * patch_sums(x.new_ones(height, width), patch)
    distances = x.new_zeros(count, count, *size.shape)
    for i in range(count):  # differences, not a Gram matrix: close particles would cancel
        for k in range(i + 1, count):
            distances[i, k] = distances[k, i] = patch_sums((x[i] - x[k]).square().sum(0), patch) / size
    if steering.bandwidth:
        h2 = torch.full_like(size, steering.bandwidth**2)
        moving = torch.ones_like(size, dtype=torch.bool)
    else:
        i, k = torch.triu_indices(count, count, 1, device=x.device)
        pairs = distances[i, k].sort(dim=0).values
        median = (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
        scale = torch.where(median > 0, median, pairs.mean(0))
        moving = scale >= 1e-10
        h2 = scale.clamp(min=1e-10) / (2 * math.log(count + 1))
    weights = torch.exp(-distances / (2 * h2))
    weights = weights / weights.sum(1, keepdim=True)
    weights = weights.repeat_interleave(patch, 2)[:, :, :height].repeat_interleave(patch, 3)[..., :width]
    moved = torch.empty_like(x)
    for i in range(count):
        moved[i] = x[i] + strength * ((weights[i, :, None] * x).sum(0) - x[i])
    still = ~moving.repeat_interleave(patch, 0)[:height].repeat_interleave(patch, 1)[:, :width]
    return torch.where(still, x, moved.clamp(x.amin(0), x.amax(0))), torch.where(moving, h2.sqrt(), 0)


def spread(x: Tensor) -> Tensor:
    """Particles [N, C, H, W] -> root mean over channels of the unbiased variance over particles, [H, W]."""
    return x.var(dim=0, correction=1).mean(0).sqrt()


def choose(z: Tensor, height: int, width: int) -> tuple[int, list[float]]:
    """The particle nearest to the mean over `height` x `width` latent pixels, and every squared distance to it."""
    area = z[..., :height, :width].double()
    distances = (area - area.mean(0)).square().sum((1, 2, 3)).tolist()
    return min(range(len(distances)), key=distances.__getitem__), distances


class Ensemble:
    """Steers the particles of one image and remembers what it did.

    Attributes:
        uncertainty: spread of the last step's predictions before steering, [H, W].
    """

    def __init__(self, steering: Steering, steps: int, count: int, area: tuple[int, int]) -> None:
        self.steering, self.area = steering, area
        self.strengths = strengths(steps, steering.strength)
        self.count = count
        self.uncertainty: Tensor | None = None
        self.before: list[float] = []
        self.after: list[float] = []
        self.bandwidths: list[float] = []
        self.moved: list[float] = []

    def __call__(self, x0: Tensor, s: int) -> Tensor:
        """Predicted clean latents of step `s`, [N, C, H, W] -> the same, steered. One particle is left alone."""
        if len(x0) < 2:
            return x0
        width = spread(x0)
        self.uncertainty = width
        self.before.append(width.mean().item())
        if self.strengths[s] > 0:
            steered, bandwidth = mean_shift(x0, self.steering, self.strengths[s])
            self.moved.append((steered - x0).square().mean().sqrt().item())
            self.bandwidths.append(bandwidth.median().item())
            x0 = steered
        self.after.append(spread(x0).mean().item())
        return x0

    def winner(self, z: Tensor) -> tuple[Tensor, dict[str, object]]:
        """Final latents [N, C, H, W] -> the chosen one [1, C, H, W], and the metrics."""
        index, distances = choose(z, *self.area)
        steered = [b for b, strength in zip(self.before, self.strengths, strict=False) if strength > 0]
        effective = [m / max(b, 1e-12) >= 0.01 for m, b in zip(self.moved, steered, strict=True)]
        metrics: dict[str, object] = {
            "particles": self.count,
            "chosen": index,
            "distances": distances,
            "bandwidth": self.bandwidths,
            "spread_before": self.before,
            "spread_after": self.after,
            "effective": any(effective),
        }
        if self.uncertainty is not None:
            area = self.uncertainty[: self.area[0], : self.area[1]].flatten()
            metrics |= {
                "uncertainty_mean": area.mean().item(),
                "uncertainty_p95": area.sort().values[int(0.95 * (len(area) - 1))].item(),
                "uncertainty_max": area.max().item(),
            }
        return z[index : index + 1], metrics
