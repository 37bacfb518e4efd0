"""The Cog shell: literal inputs -> Settings -> Engine -> file. No logic of its own.

Every Input is one line of literals because Cog parses this file without running it.
"""

from typing import Optional

from cog import BaseRunner, Input, Path

from seesr import Engine, Settings, logs
from seesr.config import Configuration
from seesr.engine.output_folder import OutputFolder, flat
from seesr.images.read import read_upload
from seesr.runtime.progress import Bar


class Predictor(BaseRunner):
    def setup(self) -> None:
        """Loads the weights that SEESR_WEIGHTS names and runs one small picture through everything."""
        logs.configure(Configuration.read().log_format)
        self.engine = Engine.load()
        self.outputs = OutputFolder()

    def healthcheck(self) -> bool:
        """False once the device has failed for good, so that the platform starts another worker."""
        return self.engine.healthy()

    def run(
        self,
        image: Path = Input(description="JPEG, PNG, WebP, AVIF, TIFF or HEIC to enlarge, at most 67.1 megapixels, 32768 pixels on a side and 100 MiB.", accept="image/*"),
        mask: Optional[Path] = Input(default=None, description="Where the model may change the picture: white is enhanced, black stays the plain enlargement, grey blends. An image of the same aspect, of any size.", accept="image/*"),
        scale_factor: float = Input(default=4.0, ge=1, le=8, description="Enlargement. The output is exactly round(width * scale) x round(height * scale) pixels, at most 67.1 megapixels (8192 x 8192) and 32768 on a side."),
        target_side: Optional[int] = Input(default=None, ge=1, le=32768, description="Longest side of the output in pixels, exactly; replaces scale_factor. The scale that it takes must be from 1 to 8."),
        target_megapixels: Optional[float] = Input(default=None, ge=0.0001, le=67.108864, description="Size of the output in megapixels, as near as whole pixels allow; replaces scale_factor. The scale that it takes must be from 1 to 8."),
        fidelity: float = Input(default=0.0, ge=0, le=1, description="How much of the plain bicubic enlargement is kept: 0 is all of the model's detail, 1 the plain enlargement, exactly; coarse changes go before fine ones. With use_kds detail on which the samples disagree goes first."),
        user_prompt: str = Input(default="", max_length=2000, description="What the picture shows, in a few words. Added to the tags that are found automatically."),
        positive_prompt: str = Input(default="clean, high-resolution, 8k", max_length=2000, description="Quality words that end the prompt."),
        negative_prompt: str = Input(default="dotted, noise, blur, lowres, smooth", max_length=2000, description="What to steer away from. Has no effect while cfg_scale is 1."),
        num_inference_steps: int = Input(default=4, ge=1, le=8, description="Denoising steps. 1 is fastest; 2 to 4 is usual for this model."),
        cfg_scale: float = Input(default=1.0, ge=1, le=2, description="Guidance. 1 is off and fastest; above 1 sharpens, costs twice the time and harms SD-Turbo when high."),
        latent_tiled_size: int = Input(default=64, ge=16, le=256, description="Side of the squares that the denoiser works on, latent cells (8 pixels with the full weights). 64 is what the networks were trained at; larger ones cost more per area."),
        latent_tiled_overlap: int = Input(default=6, ge=0, le=128, description="Least overlap of neighbouring squares, latent cells; below latent_tiled_size. More costs time and hides nothing further."),
        use_kds: bool = Input(default=False, description="Kernel Density Steering: several samples are denoised together and steered towards agreement; one is returned. Costs nearly num_particles times the denoising."),
        num_particles: int = Input(default=4, ge=1, le=16, description="Samples that Kernel Density Steering runs together. 1 is the same as off."),
        bandwidth: float = Input(default=0.0, ge=0, le=10, description="Kernel width of the steering, in latent units: small keeps detail, large pulls to the average. 0 chooses it from the samples."),
        color_fix: str = Input(default="wavelet", choices=["wavelet", "adain", "none"], description="How colours are matched to the input: wavelet keeps local colour, adain the overall one, none changes nothing."),
        output_view: str = Input(default="image", choices=["image", "comparison", "difference", "tiles", "uncertainty", "all"], description="What the output file shows: the enlarged image; comparison, the plain bicubic enlargement beside it; difference, twice what the model added to that (grey is nothing); tiles, the squares it worked on; uncertainty, a 16-bit grey PNG of where the samples of use_kds disagreed; or all, a zip of every one of these. The same seed gives the matching image."),
        output_format: str = Input(default="png", choices=["png", "webp", "jpg"], description="File format. png is lossless."),
        output_quality: int = Input(default=95, ge=1, le=100, description="Quality of webp and jpg files; png ignores it."),
        keep_exif: bool = Input(default=True, description="Keep the camera's EXIF data (date, place, settings). Off: none of it is in the result."),
        seed: Optional[int] = Input(default=None, ge=0, le=4294967295, description="Number that fixes the random noise: same seed, same picture. Leave empty for a random one, which is reported."),
    ) -> Path:
        """Returns the enlarged picture as one file."""
        settings = Settings(**{name: value for name, value in locals().items() if name not in ("self", "image", "mask")})
        picture, masked = read_upload(image), None if mask is None else read_upload(mask)
        self.outputs.clear()
        output = self.engine.run(picture, settings, watchers=(Bar(),), mask=masked)
        for name, value in flat(output.metrics):
            self.record_metric(name, value)
        return Path(self.outputs.save(output.data, output.seed, settings.suffix))
