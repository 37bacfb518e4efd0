"""Cog predictor: converts the inputs to Settings, runs the Engine and returns the file.

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
    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Loads the weights named by SEESR_WEIGHTS and warms every network up with one small image."""
        logs.configure(Configuration.read().log_format)
        self.engine = Engine.load()
        self.outputs = OutputFolder()

    def healthcheck(self) -> bool:
        """Returns False once the device has failed permanently, so that the platform starts another worker."""
        return self.engine.healthy()

    def run(
        self,
        image: Path = Input(description="JPEG, PNG, WebP, AVIF, TIFF, HEIC or JPEG XL image to upscale, at most 67.1 megapixels, 32768 pixels per side and 100 MiB.", accept="image/*"),
        mask: Optional[Path] = Input(default=None, description="Where the model may change the image: white is enhanced, black stays the bicubic upscale, grey blends. An image of any size with the same aspect ratio.", accept="image/*"),
        scale_factor: float = Input(default=4.0, ge=1, le=8, description="Upscaling factor. The output is exactly round(width * scale) x round(height * scale) pixels, at most 67.1 megapixels (8192 x 8192) and 32768 per side."),
        target_side: Optional[int] = Input(default=None, ge=1, le=32768, description="Longest side of the output in pixels. Replaces scale_factor; the resulting scale must be between 1 and 8."),
        target_megapixels: Optional[float] = Input(default=None, ge=0.0001, le=67.108864, description="Size of the output in megapixels, rounded to whole pixels. Replaces scale_factor; the resulting scale must be between 1 and 8."),
        fidelity: float = Input(default=0.0, ge=0, le=1, description="Blends the result towards the bicubic upscale: 0 keeps all detail of the model, 1 returns the bicubic upscale. As it rises, broad changes of tone go before fine detail; with use_kds, detail on which the samples disagree goes first. Raise it when invented detail is unwanted."),
        user_prompt: str = Input(default="", max_length=2000, description="What the image shows, in a few words. Added to the tags that are detected automatically."),
        positive_prompt: str = Input(default="clean, high-resolution, 8k", max_length=2000, description="Quality terms appended to the prompt."),
        negative_prompt: str = Input(default="dotted, noise, blur, lowres, smooth", max_length=2000, description="What to avoid. Only used when cfg_scale is above 1."),
        num_inference_steps: Optional[int] = Input(default=None, ge=1, le=8, description="Denoising steps; 1 is fastest. Leave empty for the bundle's default: 1 with the bundled pocket weights, 2 with the full weights."),
        cfg_scale: float = Input(default=1.0, ge=1, le=2, description="Classifier-free guidance. 1 turns it off. Above 1 it sharpens and doubles the time; high values cause artifacts with SD-Turbo."),
        latent_tiled_size: Optional[int] = Input(default=None, ge=16, le=512, description="Side of the denoiser's tiles in latent pixels (8 image pixels each with the full weights). The networks were trained at 64. Leave empty for the bundle's default: 64 or 72, whichever takes less work for this image."),
        latent_tiled_overlap: int = Input(default=6, ge=0, le=128, description="Minimum overlap of neighbouring tiles in latent pixels, below latent_tiled_size. More overlap costs time with no visible benefit."),
        use_kds: bool = Input(default=False, description="Kernel Density Steering: denoises several samples together, steers them towards agreement and returns one. Takes nearly num_particles times as long."),
        num_particles: int = Input(default=4, ge=1, le=16, description="Number of samples for Kernel Density Steering. 1 is the same as off."),
        bandwidth: float = Input(default=0.0, ge=0, le=10, description="Kernel width of Kernel Density Steering in latent units: small keeps detail, large averages. 0 selects it from the samples."),
        color_fix: str = Input(default="wavelet", choices=["wavelet", "adain", "none"], description="Color correction against the input: wavelet matches local colors, adain the overall color statistics, none applies no correction."),
        output_view: str = Input(default="image", choices=["image", "comparison", "difference", "tiles", "uncertainty", "confidence", "all"], description="What the output file shows: image, the upscaled image; comparison, the bicubic upscale beside it; difference, what the model added, doubled (grey is no change); tiles, the denoiser's tiles; uncertainty, a 16-bit grey PNG of where the samples of use_kds disagreed; confidence, a mask from the samples of use_kds that is white where the error is within a calibrated bound; all, a zip of every other view. uncertainty and confidence need use_kds. For the image that belongs to a view, use the same seed again."),
        region: Optional[str] = Input(default=None, max_length=60, description="Returns only this rectangle of the output: left,top,width,height in output pixels, such as 0,0,512,512. The pixels are those of the whole output with the same seed; with the bundled pocket weights only the tiles that they need are computed. Not with use_kds, color_fix adain or another output_view. Leave empty for the whole output."),
        output_format: str = Input(default="png", choices=["png", "webp", "jpg"], description="File format of the output. png is lossless."),
        output_quality: int = Input(default=95, ge=1, le=100, description="Compression quality of webp and jpg files. Ignored for png."),
        keep_exif: bool = Input(default=True, description="Keeps the EXIF and XMP data of the input (date, location, camera settings, titles, rights). Off removes all except marks of AI."),
        dpi: Optional[int] = Input(default=None, ge=1, le=9600, description="Resolution to write into the file in dots per inch, which sets the size of a print: 3000 pixels at 300 are 10 inches. Leave empty to keep that of the input."),
        seed: Optional[int] = Input(default=None, ge=0, le=4294967295, description="Seed of the random noise: the same seed and settings give the same image. Leave empty for a random seed, which is reported."),
    ) -> Path:
        """Upscales one image and returns the file."""
        settings = Settings(**{name: value for name, value in locals().items() if name not in ("self", "image", "mask")})
        data, mask_data = read_upload(image), None if mask is None else read_upload(mask)
        self.outputs.clear()
        output = self.engine.run(data, settings, watchers=(Bar(),), mask=mask_data)
        for name, value in flat(output.metrics):
            self.record_metric(name, value)
        return Path(self.outputs.save(output.data, output.seed, settings.suffix))
