"""The page in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright
from serving import ANN, Serving, sharp

from seesr.serving.pages import ASSETS, PAGE
from seesr.serving.refusal import ERRORS
from seesr.settings import Settings
from seesr.settings.presets import PRESETS

QUICK = {"num_inference_steps": 1, "seed": 1}  # what the page sends
SIZES = {"scale_factor", "target_side", "target_megapixels"}
CHROMIUM = shutil.which("chromium")
expect.set_options(timeout=30_000)
# Dispatches a drop of files on the page: [{name, type, data in base64}].
DROP = """(files) => {
    const transfer = new DataTransfer();
    for (const { name, type, data } of files)
        transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
    document.querySelector('#drop').dispatchEvent(
        new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""

# Keeps the mask that is sent next.
KEEP_MASK = """() => {
    const send = XMLHttpRequest.prototype.send;
    window.sentMask = new Promise((resolve) => {
        XMLHttpRequest.prototype.send = function (form) {
            resolve(form.get('mask').arrayBuffer());
            return send.call(this, form);
        };
    });
}"""
# Of both images of the first result, at one moment.
WIDTHS = "() => ['.before', '.after'].map((name) => document.querySelector(name).getBoundingClientRect().width)"
# Stands in for the desktop: keeps the title of the latest notification.
NOTIFICATION = """() => { window.Notification = class {
    static requestPermission = async () => 'granted';
    constructor(title) { document.body.dataset.told = title; }
} }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Echo(Serving):
    """A server without keys whose engine takes a set time and gives its input back."""

    def __init__(self, folder: Path, seconds: float, *arguments: str, **environment: str) -> None:
        keyless = {"SEESR_API_KEYS": "", "ECHO_SECONDS": str(seconds)}
        super().__init__(folder, *arguments, ready=False, **{**keyless, **environment})

    def __enter__(self) -> Echo:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lab.serve.echo", "--port", "0", *self.arguments],
                env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("seesr at "), (line, self.log())
        self.url = line.split()[-1].rstrip("/")
        self.until_ready()
        return self


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A second for each image."""
    with Echo(tmp_path_factory.mktemp("slow"), 1) as running:
        yield running


@pytest.fixture
def new_context(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    created = []

    def make(**options: object) -> BrowserContext:
        created.append(browser.new_context(**options))  # type: ignore[arg-type]
        created[-1].set_default_timeout(30_000)
        return created[-1]

    yield make
    for context in created:
        context.close()


@pytest.fixture
def page(new_context: Callable[..., BrowserContext], service: Serving) -> Page:
    """The page of the pocket bundle, with a key, one step and a seed."""
    context = new_context(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    context.add_init_script(f"sessionStorage.setItem('key', '{ANN}')")
    page = context.new_page()
    page.goto(service.url)
    page.get_by_text("Advanced", exact=True).click()
    page.fill("#seed", "1")
    page.fill("#num_inference_steps", "1")
    return page


@pytest.fixture
def slow_page(new_context: Callable[..., BrowserContext], slow: Serving) -> Page:
    page = new_context().new_page()
    page.goto(slow.url)
    expect(page.locator("#presets button").first).to_be_visible()
    return page


@pytest.fixture
def photo_file(tmp_path: Path) -> Path:
    (tmp_path / "photo.png").write_bytes(sharp(64, 48))
    return tmp_path / "photo.png"


def names(count: int) -> list[dict[str, object]]:
    return [{"name": f"{n}.png", "mimeType": "image/png", "buffer": sharp(16 + n, 16)} for n in range(count)]


def test_choose_compare_download(page: Page, service: Serving, photo_file: Path) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.set_input_files("#files", photo_file)
    expect(page.locator(".state")).to_have_text("Done, seed 1, 256x192")
    expect(page.locator(".size")).to_have_text("64x48 → 256x192")
    handle = page.get_by_role("slider", name="Before and after")
    handle.focus()
    page.keyboard.press("ArrowRight")
    expect(handle).to_have_attribute("aria-valuenow", "51")
    view = page.locator(".view")
    box = view.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 100, steps=3)
    page.mouse.up()
    expect(handle).to_have_attribute("aria-valuenow", "25")
    page.get_by_role("button", name="100 %", exact=True).click()
    before, after = (view.locator(name).bounding_box() for name in (".before", ".after"))
    assert before and after and after["width"] == 256 and before == after, "both images stay on top of each other"
    view.press("+")
    view.hover()
    page.mouse.wheel(0, -400)
    page.wait_for_function("document.querySelector('.after').getBoundingClientRect().width > 256 * 1.5")
    before, after = (view.locator(name).bounding_box() for name in (".before", ".after"))
    assert before and after and after["width"] > 256 * 1.5 and before == after
    view.press("0")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "photo-x4.png"
    assert (
        Path(download.value.path()).read_bytes()
        == service.upscale(photo_file.read_bytes(), latent_tiled_size="").content
    )
    assert all(url.startswith((service.url, "blob:", "data:")) for url in requested)


def test_a_lens_shows_both_images_at_100_percent(page: Page, photo_file: Path) -> None:
    page.set_input_files("#files", photo_file)
    view, lens = page.locator(".view"), page.locator(".lens")
    expect(page.locator(".state")).to_contain_text("Done")
    expect(lens).to_be_hidden()
    view.focus()
    page.keyboard.down("l")
    expect(lens).to_be_visible()
    lens_pixels = """() => {
        const lens = document.querySelector('.lens'), after = document.querySelector('.after');
        const canvas = new OffscreenCanvas(after.naturalWidth, after.naturalHeight), ink = canvas.getContext('2d');
        ink.drawImage(after, 0, 0);
        const half = lens.width / 2, size = 20;
        const read = (context, x, y) => [...context.getImageData(x, y, size, size).data];
        const middle = [canvas.width / 2, canvas.height / 2], glass = lens.getContext('2d');
        const [left, right] = [0.5, 1.5].map((share) => read(glass, half * share, lens.height / 2));
        return [right, read(ink, ...middle), left];
    }"""
    shown, result, original = page.evaluate(lens_pixels)
    assert shown == result, "a pixel of the result is a pixel of the lens"
    assert shown != original and abs(np.array(original) - result).mean() < 20, "the same place of the original"
    left = lens.evaluate("lens => lens.style.left")
    page.keyboard.press("ArrowRight")
    assert lens.evaluate("lens => lens.style.left") != left
    page.keyboard.up("l")
    expect(lens).to_be_hidden()
    button = page.get_by_role("button", name="Lens 100 %")
    button.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(lens).to_be_visible()
    view.hover(position={"x": 200, "y": 60})
    assert page.get_by_role("slider", name="Before and after").get_attribute("aria-valuenow") == "50"
    button.click()
    expect(lens).to_be_hidden()


def test_the_sample_takes_one_click(page: Page) -> None:
    page.get_by_role("spinbutton", name="Size", exact=True).fill("1")
    page.get_by_role("button", name="Try this sample").click()
    expect(page.locator(".state")).to_contain_text("Done, seed 1, 192x128")
    expect(page.locator(".result")).to_be_visible()
    page.get_by_role("button", name="Pocket model").click()
    expect(page.get_by_role("dialog")).to_contain_text("./scripts/weights")


@pytest.mark.long
def test_a_newcomer_upscales_the_sample_with_two_clicks(
    new_context: Callable[..., BrowserContext], service: Serving
) -> None:
    context = new_context(accept_downloads=True)
    context.add_init_script(f"sessionStorage.setItem('key', '{ANN}')")
    page = context.new_page()
    page.goto(service.url)
    page.get_by_role("button", name="Try this sample").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    with Image.open(download.value.path()) as result:
        assert (result.size, result.format) == ((768, 512), "PNG")


@pytest.mark.long
def test_the_keyboard_alone_is_enough(slow_page: Page) -> None:
    """The focus is always on something: what had it and is hidden then passes it on."""
    focused = "document.activeElement.closest('.card') ? 'card' : document.activeElement.id"
    for target in ("#sample", "#files"):
        slow_page.locator(target).focus()
        assert slow_page.evaluate("document.activeElement.id") == target[1:]
    slow_page.locator("#sample").focus()
    slow_page.keyboard.press("Enter")
    expect(slow_page.locator(".card:focus")).to_have_count(1)
    slow_page.keyboard.press("Tab")
    expect(slow_page.get_by_role("button", name="Cancel", exact=True)).to_be_focused()
    slow_page.keyboard.press("Enter")
    expect(slow_page.locator(".state")).to_have_text("Canceled")
    assert slow_page.evaluate(focused) == "card"
    slow_page.get_by_role("button", name="Run again").press("Enter")
    expect(slow_page.locator(".state").first).to_contain_text("Done")
    for count in (1, 0):
        slow_page.get_by_role("button", name="Remove", exact=True).last.press("Enter")
        expect(slow_page.locator(".card")).to_have_count(count)
        assert slow_page.evaluate(focused) == ("card" if count else "files")
    slow_page.set_input_files("#files", names(2))
    expect(slow_page.locator(".state").filter(has_text="Done")).to_have_count(2)
    slow_page.get_by_role("button", name="Remove finished").press("Enter")
    expect(slow_page.locator("#files")).to_be_focused()


@pytest.mark.long
def test_a_chosen_mask_has_a_name_and_can_be_removed(slow_page: Page) -> None:
    slow_page.get_by_text("Advanced", exact=True).click()
    slow_page.set_input_files("#mask", names(1)[0] | {"name": "sky.png"})
    expect(slow_page.locator("#mask-name")).to_have_text("sky.png")
    slow_page.locator("#no-mask").click()
    expect(slow_page.locator("#mask-name")).to_have_text("")
    assert slow_page.evaluate("document.querySelector('#mask').files.length") == 0


@pytest.mark.long
def test_all_views_are_a_zip_to_download(page: Page, photo_file: Path) -> None:
    page.select_option("#output_view", "all")
    page.set_input_files("#files", photo_file)
    link = page.get_by_role("link", name="Download")
    expect(link).to_be_visible()
    expect(page.locator(".view")).to_be_hidden()
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "photo-x4.zip" and zipfile.is_zipfile(download.value.path())


@pytest.mark.long
def test_paste_an_image(page: Page) -> None:
    """By a real Ctrl+V, from the clipboard."""
    page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement('canvas'), { width: 24, height: 18 });
        const ink = canvas.getContext('2d');
        ink.fillStyle = 'teal'; ink.fillRect(0, 0, 24, 18); ink.fillStyle = 'gold'; ink.fillRect(4, 4, 9, 9);
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
        await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]);
    }""")
    page.keyboard.press("Control+V")
    expect(page.locator(".state")).to_contain_text("96x72")


@pytest.mark.long
def test_a_phone_photo_is_limited_before_it_is_sent(slow_page: Page, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3000, 4000), np.uint8)).save(tmp_path / "phone.png")
    with slow_page.expect_request("**/upscale?*") as request:
        slow_page.set_input_files("#files", tmp_path / "phone.png")
    assert "scale_factor=2.36&" in request.value.url
    expect(slow_page.locator(".size")).to_have_text("4000x3000 → 9440x7080, the largest that fits")


def editor(page: Page) -> Locator:
    page.get_by_role("button", name="Piece or mask").first.click()
    expect(page.locator("#editor")).to_be_visible()
    return page.locator("#paint")


def drag(page: Page, canvas: Locator, *points: tuple[float, float]) -> None:
    """Draws a line through points given as shares of the canvas."""
    box = canvas.bounding_box()
    assert box
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.long
def test_a_dropped_folder_gives_its_images(slow_page: Page, tmp_path: Path) -> None:
    """By the browser's own drag and drop: a page cannot make a folder itself."""
    inner = tmp_path / "photos" / "inner"
    inner.mkdir(parents=True)
    for number, folder in enumerate((inner.parent, inner, inner)):
        (folder / f"{number}.png").write_bytes(sharp(16 + number, 16))
    (inner / "notes.txt").write_bytes(b"no image")
    box = slow_page.locator("#drop").bounding_box()
    assert box
    place = {"x": box["x"] + 50, "y": box["y"] + 50}
    data = {"items": [], "files": [str(inner.parent)], "dragOperationsMask": 1}
    session = slow_page.context.new_cdp_session(slow_page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    expect(slow_page.locator("#note")).to_contain_text("1 of 4 files")
    expect(slow_page.locator(".state").filter(has_text="Done")).to_have_count(3)
    expect(slow_page.locator("#summary")).to_have_text("3 of 3 done")


@pytest.mark.long
@pytest.mark.parametrize("scale", [1, 2.6, 4])
def test_the_live_fidelity_equals_the_servers_image(page: Page, service: Serving, tmp_path: Path, scale: float) -> None:
    """Also beside a flat area, where the model adds nothing."""
    page.fill("#size", str(scale))
    photo = pixels(sharp(64, 48)).copy()
    photo[:, :24] = 200
    photo[::3, 40:] //= 2
    Image.fromarray(photo).save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    page.set_input_files("#files", tmp_path / "photo.png")
    slider = page.get_by_role("slider", name="Try detail or faithful")
    for fidelity in (0.2, 0.5, 0.7, 1.0):
        slider.fill(str(fidelity))
        expect(page.locator(".live")).to_be_visible()
        shown = page.evaluate("document.querySelector('.live').toDataURL('image/png')")
        browser = pixels(base64.b64decode(shown.partition(",")[2])).astype(int)
        expected = pixels(service.upscale(data, fidelity=fidelity, scale_factor=scale, latent_tiled_size="").content)
        assert abs(browser - expected).max() <= 1, fidelity
    slider.fill("0.5")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save this").click()
    assert (
        Path(download.value.path()).read_bytes()
        == service.upscale(data, fidelity=0.5, scale_factor=scale, latent_tiled_size="").content
    )


@pytest.mark.long
def test_the_live_fidelity_of_a_piece_a_mask_and_transparency(page: Page, service: Serving, tmp_path: Path) -> None:
    """Equal to the server's image away from the edges, where the server knows more pixels; nearly equal there."""
    photo = pixels(sharp(64, 48)).copy()
    photo[::3, 20:] //= 2
    alpha = np.full((48, 64), 255, np.uint8)
    alpha[:12, :20], alpha[12:14, :20] = 0, 120
    mask = np.zeros((48, 64), np.uint8)
    mask[10:38, 10:40] = 255
    for name, image in (("photo", photo), ("clear", np.dstack([photo, alpha])), ("mask", mask)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")

    def compare(data: bytes, edge: NDArray[np.bool_], form: dict[str, bytes], **query: object) -> None:
        expect(page.locator(".state").first).to_contain_text("Done")
        card = page.locator(".card").first
        card.get_by_role("slider", name="Try detail or faithful").fill("0.6")
        expect(card.locator(".live")).to_be_visible()
        shown = page.evaluate("document.querySelector('.live').toDataURL('image/png')")
        answer = service.ask(
            "POST", "/upscale", params={**QUICK, "fidelity": 0.6, **query}, files={"image": data, **form}
        )
        browser, server = (
            np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")).astype(int)
            for image in (Image.open(io.BytesIO(one)).convert("RGBA")
                          for one in (base64.b64decode(shown.partition(",")[2]), answer.content))
        )  # fmt: skip
        wrong = abs(browser - server).max(2)
        assert wrong[~edge].max() <= 1 and wrong.max() <= 6, (wrong[~edge].max(), wrong.max())
        with page.expect_download() as download:
            card.get_by_role("button", name="Save this").click()
        assert Path(download.value.path()).read_bytes() == answer.content
        expect(page.locator(".state").filter(has_text="Done")).to_have_count(2)
        page.get_by_role("button", name="Remove finished").click()

    def around(area: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Up to two pixels of the original from the area's edge, in pixels of the result."""
        large = Image.fromarray(area).resize((256, 192))
        return np.asarray(large.filter(ImageFilter.MaxFilter(17))) != np.asarray(
            large.filter(ImageFilter.MinFilter(17))
        )

    data = (tmp_path / "clear.png").read_bytes()
    page.set_input_files("#files", tmp_path / "clear.png")
    compare(data, around((alpha > 3).astype(np.uint8) * 255), {})
    data = (tmp_path / "photo.png").read_bytes()
    page.set_input_files("#mask", tmp_path / "mask.png")
    page.set_input_files("#files", tmp_path / "photo.png")
    compare(data, around(mask), {"mask": (tmp_path / "mask.png").read_bytes()})


@pytest.mark.long
def test_the_page_says_why_live_fidelity_is_unavailable(slow_page: Page) -> None:
    slow_page.get_by_text("Advanced", exact=True).click()
    reasons = slow_page.locator(".no-blend").first
    large = io.BytesIO()
    Image.new("RGB", (2100, 2100)).save(large, "PNG")
    slow_page.fill("#size", "1")
    slow_page.set_input_files("#files", names(1)[0] | {"buffer": large.getvalue()})
    expect(reasons).to_contain_text("too large to blend")
    slow_page.get_by_label("Average several samples").check()
    slow_page.set_input_files("#files", names(1))
    expect(reasons).to_contain_text("Only the server can blend")
    slow_page.get_by_role("slider", name="Detail or faithful").first.fill("0.5")
    slow_page.set_input_files("#files", names(1))
    expect(reasons).to_contain_text("blended already")
    slow_page.select_option("#language", "de")
    expect(reasons).to_contain_text("schon gemischt")


@pytest.mark.long
def test_a_region_has_the_pixels_of_the_whole_image(page: Page, service: Serving, photo_file: Path) -> None:
    page.get_by_label("Wait before upscaling").check()
    page.set_input_files("#files", photo_file)
    expect(page.locator(".state")).to_have_text("Waiting for you to start it")
    drag(page, editor(page), (0.25, 0.25), (0.5, 0.75))
    sides = ("left", "top", "width", "height")
    left, top, width, height = (int(page.locator(f"#piece-{side}").input_value()) for side in sides)
    assert 60 <= left <= 68 and 44 <= top <= 52 and 60 <= width <= 68 and 92 <= height <= 100
    page.get_by_role("button", name="Upscale this piece").click()
    expect(page.locator(".state")).to_contain_text(f"Done, seed 1, {width}x{height}")
    expect(page.locator(".scale")).to_contain_text("%")
    before, after = page.evaluate(WIDTHS)
    assert abs(before / after - 256 / width) < 0.1, "the original is at its place"
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    whole = pixels(service.upscale(photo_file.read_bytes(), latent_tiled_size="").content)
    piece = pixels(Path(download.value.path()).read_bytes())
    assert np.array_equal(piece, whole[top : top + height, left : left + width])
    page.get_by_role("slider", name="Try detail or faithful").fill("0.6")
    expect(page.locator(".live")).to_be_visible()
    shown = page.evaluate("document.querySelector('.live').toDataURL('image/png')")
    blended = pixels(service.upscale(photo_file.read_bytes(), fidelity=0.6, latent_tiled_size="").content)[
        top : top + height, left : left + width
    ]
    wrong = abs(pixels(base64.b64decode(shown.partition(",")[2])).astype(int) - blended)
    assert wrong[8:-8, 8:-8].max() <= 1 and wrong.max() <= 6


@pytest.mark.long
def test_the_painted_mask_is_the_file_that_is_sent(page: Page, service: Serving, photo_file: Path) -> None:
    page.set_input_files("#files", photo_file)
    canvas = editor(page)
    page.get_by_role("button", name="Add to mask").click()
    page.get_by_label("Brush size").fill("20")
    drag(page, canvas, (0.2, 0.5), (0.8, 0.5))
    drag(page, canvas, (0.9, 0.1), (0.9, 0.9))
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Erase from mask").click()
    page.get_by_label("Brush size").fill("10")
    drag(page, canvas, (0.5, 0.0), (0.5, 1.0))
    page.get_by_label("Feather").fill("2")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download mask").click()
    mask = Path(download.value.path()).read_bytes()
    values = np.asarray(Image.open(io.BytesIO(mask)).convert("L"))
    assert values.shape == (48, 64) and values[24, 20] == 255 and values[24, 32] < 40 and values[4, 58] == 0
    assert len(set(values[:, 20])) > 4, "the edge is soft"
    page.evaluate(KEEP_MASK)
    page.get_by_role("button", name="Upscale with this mask").click()
    assert bytes(page.evaluate("window.sentMask.then((data) => [...new Uint8Array(data)])")) == mask
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(2)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    files = {"image": photo_file.read_bytes(), "mask": mask}
    answer = service.ask("POST", "/upscale", params=QUICK, files=files)
    assert Path(download.value.path()).read_bytes() == answer.content


@pytest.mark.long
def test_another_seed_and_two_results_on_one_slider(page: Page, photo_file: Path) -> None:
    page.set_input_files("#files", photo_file)
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(1)
    page.get_by_role("button", name="Another seed").click()
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(2)
    card = page.locator(".card").nth(1)  # the newest is first
    select = card.get_by_label("Compare with")
    select.select_option(index=1)
    expect(card.locator(".left")).to_contain_text("Result 2: Seed")
    sources = [page.locator(name).first for name in (".card >> nth=0 >> .after", ".card >> nth=1 >> .before")]
    page.select_option("#language", "de")
    expect(card.locator(".left")).to_contain_text("Ergebnis 2: Startwert")
    newer, compared = (source.get_attribute("src") for source in sources)
    assert newer and compared and newer.partition("?")[0] == compared.partition("?")[0]


@pytest.mark.long
def test_a_file_that_only_the_browser_reads_is_converted(page: Page) -> None:
    shape = b'<rect width="20" height="30" fill="teal"/>'
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30">' + shape + b"</svg>"
    page.set_input_files("#files", {"name": "drawing.svg", "mimeType": "image/svg+xml", "buffer": drawing})
    page.get_by_role("button", name="Convert to PNG").click()
    expect(page.locator(".state")).to_have_text("Done, seed 1, 160x120")


@pytest.mark.long
def test_print_sizes_give_the_target(slow_page: Page) -> None:
    slow_page.select_option("#size-kind", "cm")
    slow_page.fill("#size", "2.54")
    slow_page.fill("#print-dpi", "100")
    with slow_page.expect_request("**/upscale?*") as request:
        slow_page.set_input_files("#files", names(1)[0] | {"buffer": sharp(50, 25)})
    assert "target_side=100" in request.value.url and "dpi=100" in request.value.url
    expect(slow_page.locator(".size")).to_have_text("50x25 → 100x50")


def test_the_language_can_be_chosen_and_stays(slow_page: Page) -> None:
    expect(slow_page.get_by_label("Language", exact=True)).to_have_value("en")
    slow_page.select_option("#language", "de")
    expect(slow_page.get_by_text("Bilder auswählen")).to_be_visible()
    expect(slow_page.get_by_role("button", name="Ausgewogen")).to_have_attribute("aria-pressed", "true")
    slow_page.reload()
    expect(slow_page.get_by_role("heading", name="Einstellungen")).to_be_visible()
    assert slow_page.locator("html").get_attribute("lang") == "de"
    slow_page.set_input_files("#files", names(1))
    expect(slow_page.locator(".state")).to_contain_text("Fertig")
    slow_page.set_viewport_size({"width": 390, "height": 844})
    slow_page.get_by_text("Erweitert").click()
    for language in ("de", "es", "fr", "ja", "zh", "en"):
        slow_page.select_option("#language", language)
        assert slow_page.evaluate("document.documentElement.scrollWidth") <= 390, language


@pytest.mark.long
def test_a_refused_size_has_its_remedy_as_a_button(slow_page: Page, tmp_path: Path) -> None:
    """A browser does not read TIFF, so that only the server knows the size."""
    Image.fromarray(np.zeros((3000, 4000), np.uint8)).save(tmp_path / "phone.tif")
    slow_page.set_input_files("#files", tmp_path / "phone.tif")
    slow_page.get_by_role("button", name="Use 2.36x").click()
    expect(slow_page.locator(".state")).to_contain_text("Done")


@pytest.mark.long
def test_a_hundred_images_at_once(slow_page: Page, slow: Serving) -> None:
    """The queue takes them all; the page stays usable, and says how many are ahead, also of another tab."""
    slow_page.evaluate(NOTIFICATION)
    files = [{**file, "data": base64.b64encode(file["buffer"]).decode(), "type": "image/png"} for file in names(100)]
    slow_page.evaluate(DROP, [{key: file[key] for key in ("name", "type", "data")} for file in files])
    expect(slow_page.locator(".card")).to_have_count(100)
    slow_page.get_by_label("Notify me").check()
    expect(slow_page.locator(".state").filter(has_text="Upscaling")).to_have_count(1)
    other = slow_page.context.new_page()
    started = time.monotonic()
    other.goto(slow.url)
    expect(other.locator("#presets button")).to_have_count(3)
    assert time.monotonic() - started < 3
    other.close()
    for name in ("99.png", "50.png"):  # the newest, and one in the middle
        card = slow_page.locator(".card").filter(has=slow_page.get_by_role("heading", name=name, exact=True))
        started = time.monotonic()
        card.get_by_role("button", name="Cancel").click()
        expect(card.locator(".state")).to_have_text("Canceled")
        assert time.monotonic() - started < 1
    card = slow_page.locator(".card").filter(has=slow_page.get_by_role("heading", name="98.png", exact=True))
    expect(card.locator(".state")).to_have_text(re.compile(r"Waiting, \d\d ahead in the queue"))
    slow_page.get_by_role("button", name="Cancel all").click()
    expect(slow_page.locator(".state").filter(has_text="ahead")).to_have_count(0)
    expect(slow_page.get_by_role("button", name="Cancel all")).to_be_hidden()
    expect(slow_page.locator("body")).to_have_attribute("data-told", "All images are done")
    assert slow.ask("GET", "/status").json()["queue_length"] == 0


@pytest.mark.long
def test_an_answer_that_is_older_than_the_last_event_is_ignored(slow_page: Page) -> None:
    """The answer to a cancellation says that the job runs, but comes after the event of its end."""

    def late(route: Route) -> None:
        response = route.fetch()
        time.sleep(2)
        route.fulfill(json={**response.json(), "status": "processing"})

    slow_page.set_input_files("#files", names(1))
    expect(slow_page.locator(".state")).to_have_text(re.compile("Upscaling"))
    slow_page.route("**/jobs/*", lambda route: late(route) if route.request.method == "DELETE" else route.continue_())
    slow_page.get_by_role("button", name="Cancel", exact=True).click()
    slow_page.wait_for_timeout(3000)
    expect(slow_page.locator(".state")).to_have_text("Canceled", timeout=3000)


@pytest.mark.long
def test_cancel_while_an_image_is_sent(slow_page: Page) -> None:
    slow_page.route("**/upscale?*", lambda route: None)  # never answered
    slow_page.set_input_files("#files", names(4))
    expect(slow_page.locator(".state").filter(has_text="Sending")).to_have_count(2)
    expect(slow_page.locator(".state").filter(has_text="Waiting to be sent")).to_have_count(2)
    for card in slow_page.locator(".card").all():
        card.get_by_role("button", name="Cancel").click()
    expect(slow_page.locator(".state").filter(has_text="Canceled")).to_have_count(4, timeout=1000)


@pytest.mark.long
def test_a_reload_loses_nothing(slow_page: Page) -> None:
    slow_page.set_input_files("#files", names(3))
    expect(slow_page.locator(".state").filter(has_text="Upscaling")).to_have_count(1)
    slow_page.reload()
    expect(slow_page.locator(".state").filter(has_text="Done")).to_have_count(3)
    slow_page.reload()
    expect(slow_page.locator(".state").filter(has_text="Done")).to_have_count(3)
    slow_page.get_by_role("button", name="Compare").first.click()
    expect(slow_page.locator(".view:visible")).to_have_count(1)
    slow_page.get_by_role("button", name="Remove finished").click()
    slow_page.reload()
    expect(slow_page.locator("#presets button")).to_have_count(3)
    expect(slow_page.locator(".card")).to_have_count(0)


@pytest.mark.long
def test_images_that_were_not_sent_are_sent_after_a_reload(slow_page: Page) -> None:
    slow_page.route("**/upscale?*", lambda route: None)
    slow_page.set_input_files("#files", names(3))
    expect(slow_page.locator(".state").filter(has_text="Sending")).to_have_count(2)
    slow_page.unroute("**/upscale?*")
    slow_page.reload()
    expect(slow_page.locator(".state").filter(has_text="Done")).to_have_count(3)


@pytest.mark.long
def test_the_page_reconnects_to_a_restarted_server(new_context: Callable[..., BrowserContext], tmp_path: Path) -> None:
    with Echo(tmp_path, 2) as first:
        page = new_context().new_page()
        page.goto(first.url)
        page.set_input_files("#files", names(2))
        expect(page.locator(".state").filter(has_text="Upscaling")).to_have_count(1)
        first.process.kill()
        expect(page.locator(".state").filter(has_text="Waiting for the server")).to_have_count(2)
    successor = Echo(tmp_path, 0.1, "--port", first.url.rpartition(":")[2])
    with successor:
        expect(page.locator(".state").filter(has_text="Done")).to_have_count(2)


@pytest.mark.long
def test_a_zip(page: Page, service: Serving) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (("a.png", sharp()), ("b.png", sharp(20, 20)), ("c.png", b"no image")):
            archive.writestr(name, data)
    page.set_input_files("#files", {"name": "all.zip", "mimeType": "application/zip", "buffer": buffer.getvalue()})
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(2)
    expect(page.locator(".card.failed")).to_contain_text("this is not an image")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download zip").click()
    assert set(zipfile.ZipFile(download.value.path()).namelist()) == {"a.png", "b.png", "failed.txt"}


@pytest.mark.long
def test_a_bad_file_and_a_bad_setting(page: Page, tmp_path: Path, photo_file: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "text.txt").write_bytes(b"no image")
    page.set_input_files("#files", [tmp_path / "bad.png", photo_file, tmp_path / "text.txt"])
    expect(page.locator("#note")).to_contain_text("1 of 3 files")
    expect(page.locator(".failed .why")).to_contain_text("this is not an image")
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(1)
    page.fill("#size", "9")
    page.set_input_files("#files", photo_file)
    expect(page.locator("#note")).to_have_text("Size: must be a number from 1 to 8")


@pytest.mark.long
def test_an_error_and_the_options_are_in_the_chosen_language(page: Page, tmp_path: Path, photo_file: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    page.select_option("#language", "de")
    page.select_option("#color_fix", label="Keine Korrektur")
    page.set_input_files("#files", tmp_path / "bad.png")
    state = page.locator(".failed .state")
    expect(state).to_contain_text("Wählen Sie ein anderes Bild")
    expect(page.locator(".failed .why")).to_contain_text("this is not an image")
    page.route("**/upscale?*", lambda route: route.fulfill(status=418, json={"code": "new", "detail": "I am a teapot"}))
    page.set_input_files("#files", photo_file)
    expect(state.first).to_have_text("I am a teapot")
    page.unroute("**/upscale?*")
    page.route("**/upscale?*", lambda route: route.fulfill(status=502, body="<html>"))
    page.set_input_files("#files", photo_file)
    expect(state.first).to_have_text("Der Server antwortete 502.")
    page.reload()
    page.select_option("#language", "ja")
    expect(page.locator("#color_fix")).to_have_value("none")
    expect(state.first).to_have_text("サーバーの応答：502")
    expect(state.last).to_contain_text("別の画像を選ぶか")
    page.fill("#size", "9")
    page.set_input_files("#files", photo_file)
    expect(page.locator("#note")).to_have_text("サイズ：1 から 8 までの数にしてください")


@pytest.mark.long
def test_the_key_is_asked_for_first_and_checked_at_once(
    new_context: Callable[..., BrowserContext], service: Serving
) -> None:
    page = new_context().new_page()
    page.goto(service.url)
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_visible()
    page.fill("#size", "1")
    page.set_input_files("#files", names(2))
    expect(page.locator(".state").filter(has_text="Waiting for a key")).to_have_count(2)
    field.fill("not-the-key-0123456789")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_text("This key is not accepted")).to_be_visible()
    field.fill(ANN)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(2)
    expect(field).to_be_hidden()


@pytest.mark.long
def test_presets_show_which_one_is_chosen(slow_page: Page) -> None:
    pressed = slow_page.locator("#presets [aria-pressed=true]")
    expect(pressed).to_have_text("Balanced")
    slow_page.get_by_role("button", name="Careful").click()
    expect(pressed).to_have_text("Careful")
    assert slow_page.get_by_role("slider", name="Detail or faithful").input_value() == "0.2"
    slow_page.get_by_role("slider", name="Detail or faithful").fill("0.5")
    expect(pressed).to_have_count(0)


@pytest.mark.long
@pytest.mark.parametrize("language", ["Python", "JavaScript", "curl"])
def test_use_as_code(slow_page: Page, language: str, tmp_path: Path) -> None:
    commands = {"Python": [sys.executable], "JavaScript": ["node"], "curl": ["bash"]}
    if shutil.which(commands[language][0]) is None or (language == "curl" and shutil.which("curl") is None):
        pytest.skip(f"needs {language}")
    slow_page.get_by_text("Use as code").click()
    slow_page.get_by_role("button", name=language).click()
    (tmp_path / "photo.jpg").write_bytes(sharp())
    program = tmp_path / ("program.mjs" if language == "JavaScript" else "program")
    program.write_text(slow_page.locator("#code pre").inner_text())
    subprocess.run([*commands[language], program], cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "photo-x4.png").read_bytes() == sharp()


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_it_is_accessible(page: Page, photo_file: Path, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 844})
    page.set_input_files("#files", {"name": "bad.png", "mimeType": "image/png", "buffer": b"no image"})
    expect(page.locator(".failed .why")).to_be_visible()
    page.set_input_files("#files", photo_file)
    expect(page.locator(".result:visible")).to_have_count(1)
    page.get_by_role("button", name="Lens 100 %").click()
    page.get_by_text("Use as code").click()
    check_access(page, width)
    page.get_by_role("button", name="Piece or mask").click()
    for tool in ("Piece", "Add to mask"):
        page.get_by_role("button", name=tool, exact=True).click()
        check_access(page, width)


def check_access(page: Page, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()


def test_the_page_is_small(slow: Serving) -> None:
    """What the browser receives, compressed, of all files together."""
    sizes = {}
    for name in ("", *ASSETS):
        answer = slow.ask("GET", f"/{name}", headers={"Accept-Encoding": "gzip"}, stream=True)
        sizes[name] = len(answer.raw.read(decode_content=False))
    assert set(ASSETS) | {"index.html"} == {path.name for path in PAGE.iterdir()}
    assert sum(sizes.values()) < 60_000, sizes


@pytest.mark.long
def test_a_browser_receives_it_compressed(slow_page: Page) -> None:
    sizes = """() => ['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))
        .map(({ name, encodedBodySize, decodedBodySize }) => [name, encodedBodySize, decodedBodySize])"""
    files = {url.rpartition("/")[2]: rest for url, *rest in slow_page.evaluate(sizes)}
    assets = {name: files[name] for name in ("", *ASSETS) if name != "docs.css"}
    assert sum(sent for sent, _ in assets.values()) < 60_000, assets
    assert all(2 * sent < whole for name, (sent, whole) in assets.items() if name != "sample.webp"), assets


def test_every_text_is_in_every_language_and_is_used() -> None:
    table = json.loads((PAGE / "texts.json").read_text())
    assert list(table["languages"]) == ["en", "de", "es", "fr", "ja", "zh"]
    places = re.compile(r"\{\w+\}")
    for key, texts in table["texts"].items():
        assert len(texts) == len(table["languages"]) and all(texts), key
        assert all(set(places.findall(text)) == set(places.findall(texts[0])) for text in texts), key
    settings = {field.name for field in dataclasses.fields(Settings)} - {"region", *SIZES, "fidelity"}
    choices = {field.name: field.metadata.get("choices", ()) for field in dataclasses.fields(Settings)}
    options = {f"{name}.{choice}" for name, values in choices.items() for choice in values}
    fields = settings | {f"{name}.about" for name in settings} | options | {f"error.{code}" for code in ERRORS}
    markup = (PAGE / "index.html").read_text()
    code = "".join(path.read_text() for path in PAGE.glob("*.js"))
    named = set(re.findall(r'data-(?:t|label)="(\w+)"', markup))
    assert named | fields | set(PRESETS) | {"fidelity"} <= set(table["texts"]), "a text is missing"
    assert {key for key in table["texts"] if "." in key} <= fields, "a code or an option is not of the server"
    unused = [key for key in table["texts"] if key not in named | fields | set(PRESETS) and f'"{key}"' not in code]
    assert [key for key in unused if key not in ("reading", "held")] == [], "a text is not used"


def test_no_text_is_written_in_the_markup() -> None:
    """Each element takes its text from the table; what stays is the name, signs and commands."""
    markup = re.sub(r"<[^>]*>", "\n", (PAGE / "index.html").read_text())
    lines = [line.strip() for line in markup.splitlines() if re.search(r"[A-Za-z]", line)]
    assert set(lines) == {"SeeSR", "./scripts/weights", "seesr serve"}
