"""Degrades whole batches of images on the GPU, [B, 3, H, W] in [0, 1], so that training does not wait for the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 4
# The quantisation tables of ITU-T T.81, annex K.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8 for _ in range(4)),
)  # fmt: skip
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One random number for each image, [B, 1, 1, 1]."""
    return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)


def blur(x: Tensor, low: float, high: float) -> Tensor:
    """A Gaussian of `low` to `high` pixels standard deviation for each image, isotropic in half of them."""
    grid = torch.arange(-10, 11, device=x.device, dtype=torch.float32)
    first = uniform(x, low, high)
    second = torch.where(uniform(x, 0, 1) < 0.5, first, uniform(x, low, high))
    turn = uniform(x, 0, torch.pi)
    u = grid * turn.cos() + grid[:, None] * turn.sin()
    v = grid[:, None] * turn.cos() - grid * turn.sin()
    kernel = torch.exp(-0.5 * ((u / first).square() + (v / second).square()))[:, 0]
    kernel = kernel / kernel.sum((1, 2), keepdim=True)
    wide = F.pad(x, (10, 10, 10, 10), mode="reflect").reshape(1, -1, x.shape[2] + 20, x.shape[3] + 20)
    return F.conv2d(wide, kernel.repeat_interleave(3, 0)[:, None], groups=3 * len(x)).reshape(x.shape)


def noise(x: Tensor, low: float, high: float) -> Tensor:
    """Gaussian noise of `low` to `high` levels of 255: of all channels, of brightness alone, or of coarse colour."""
    color_noise, grey_noise = torch.randn_like(x), torch.randn_like(x[:, :1]).expand_as(x)
    coarse = F.interpolate(torch.randn_like(x[:, :, ::2, ::2]), size=x.shape[2:], mode="bilinear")
    coarse = coarse - coarse.mean(1, keepdim=True)
    kind = uniform(x, 0, 1)
    drawn = torch.where(kind < 0.45, color_noise, torch.where(kind < 0.8, grey_noise, coarse))
    return x + drawn * uniform(x, low / 255, high / 255)


def jpeg(x: Tensor, low: float, high: float) -> Tensor:
    """JPEG of quality `low` to `high` with halved chroma; sides must be multiples of 16."""
    quality = uniform(x, low, high)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    matrix = x.new_tensor(TO_YCC)
    ycc = torch.einsum("ij,bjhw->bihw", matrix, x.clamp(0, 1) * 255)
    ycc[:, 0] -= 128
    planes = [coded(ycc[:, :1], scale, LUMA), coded(F.avg_pool2d(ycc[:, 1:], 2), scale, CHROMA)]
    planes[1] = F.interpolate(planes[1], scale_factor=2, mode="bilinear")
    ycc = torch.cat(planes, 1)
    ycc[:, 0] += 128
    return (torch.einsum("ij,bjhw->bihw", matrix.inverse(), ycc) / 255).clamp(0, 1)


def coded(plane: Tensor, scale: Tensor, table: tuple[tuple[int, ...], ...]) -> Tensor:
    """Planes through the quantised DCT of 8 x 8 blocks."""
    n = torch.arange(8, device=plane.device, dtype=torch.float32)
    dct = torch.cos(torch.pi / 8 * (n + 0.5) * n[:, None]) / 2
    dct[0] /= 2**0.5
    b, c, h, w = plane.shape
    blocks = plane.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
    steps = (plane.new_tensor(table) * scale[..., None, None]).clamp_min(1)
    result = dct.T @ ((dct @ blocks @ dct.T / steps).round() * steps) @ dct
    return result.permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)


def shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """One of the kernels that programs use: box, bicubic, bilinear."""
    kind = torch.rand(()).item()
    if kind < 0.4 and x.shape[2] % size[0] == 0:
        return F.avg_pool2d(x, x.shape[2] // size[0])
    return F.interpolate(x, size=size, mode="bicubic" if kind < 0.8 else "bilinear", antialias=True)


def halo(x: Tensor) -> Tensor:
    """An unsharp mask on one image in five."""
    strength = torch.where(uniform(x, 0, 1) < 0.2, uniform(x, 0.3, 1.2), 0.0)
    return x + strength * (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1))


def clean(x: Tensor) -> Tensor:
    """A quarter of the size without damage; one in three through a soft lens."""
    soft = torch.where(uniform(x, 0, 1) < 0.33, blur(x, 0.4, 1.2), x)
    return shrink(soft, (x.shape[2] // SCALE, x.shape[3] // SCALE))


def mild(x: Tensor) -> Tensor:
    """What phones and the web do: a soft lens, a little noise and sharpening, JPEG of quality 60 to 95."""
    small = shrink(blur(x, 0.3, 1.5), (x.shape[2] // SCALE, x.shape[3] // SCALE))
    return jpeg(halo(noise(small, 0, 5)), 60, 95)


def strong(x: Tensor) -> Tensor:
    """Two rounds of blur, resizing, noise and JPEG, after Real-ESRGAN's recipe (Wang et al. 2021)."""
    sides = x.shape[2] // SCALE, x.shape[3] // SCALE
    middle = 16 * int(torch.randint(sides[0] // 16, x.shape[2] // 16 + 1, ()).item())
    x = jpeg(noise(shrink(blur(x, 0.3, 2.6), (middle, middle)), 1, 25), 35, 95)
    x = torch.where(uniform(x, 0, 1) < 0.7, blur(x, 0.3, 1.4), x)
    return jpeg(halo(noise(shrink(x, sides), 1, 18)), 35, 95)
