"""The page in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import io
import os
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
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import ANN, Serving, sharp

from seesr.serving.app import PAGE

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
    made = []

    def make(**options: object) -> BrowserContext:
        made.append(browser.new_context(**options))  # type: ignore[arg-type]
        made[-1].set_default_timeout(30_000)
        return made[-1]

    yield make
    for context in made:
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
    page.get_by_role("button", name="100 %").click()
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
    assert Path(download.value.path()).read_bytes() == service.upscale(photo_file.read_bytes()).content
    assert all(url.startswith((service.url, "blob:", "data:")) for url in requested)


def test_the_sample_takes_one_click(page: Page) -> None:
    page.get_by_role("spinbutton", name="Size", exact=True).fill("1")
    page.get_by_role("button", name="Try this sample").click()
    expect(page.locator(".state")).to_contain_text("Done, seed 1, 192x128")
    expect(page.locator(".result")).to_be_visible()
    page.get_by_role("button", name="Pocket model").click()
    expect(page.get_by_role("dialog")).to_contain_text("./scripts/weights")


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


@pytest.mark.long
def test_a_refused_size_has_its_remedy_as_a_button(slow_page: Page, tmp_path: Path) -> None:
    """A browser does not read TIFF, so that only the server knows the size."""
    Image.fromarray(np.zeros((3000, 4000), np.uint8)).save(tmp_path / "phone.tif")
    slow_page.set_input_files("#files", tmp_path / "phone.tif")
    slow_page.get_by_role("button", name="Use 2.36x").click()
    expect(slow_page.locator(".state")).to_contain_text("Done")


@pytest.mark.long
def test_thirty_images_at_once(slow_page: Page, slow: Serving) -> None:
    slow_page.set_input_files("#files", names(30))
    expect(slow_page.locator(".card")).to_have_count(30)
    expect(slow_page.locator(".state").filter(has_text="UpscaleRun")).to_have_count(1)
    other = slow_page.context.new_page()
    started = time.monotonic()
    other.goto(slow.url)
    expect(other.locator("#presets button")).to_have_count(3)
    assert time.monotonic() - started < 3
    other.close()
    for name in ("29.png", "15.png"):  # the newest, and one in the middle
        card = slow_page.locator(".card").filter(has=slow_page.get_by_role("heading", name=name, exact=True))
        started = time.monotonic()
        card.get_by_role("button", name="Cancel").click()
        expect(card.locator(".state")).to_have_text("Canceled")
        assert time.monotonic() - started < 1
    slow_page.get_by_role("button", name="Cancel all").click()
    expect(slow_page.locator(".state").filter(has_text="ahead")).to_have_count(0)
    expect(slow_page.get_by_role("button", name="Cancel all")).to_be_hidden()
    assert slow.ask("GET", "/status").json()["queue_length"] == 0


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
    expect(slow_page.locator(".state").filter(has_text="UpscaleRun")).to_have_count(1)
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
def test_a_killed_server_and_its_successor(new_context: Callable[..., BrowserContext], tmp_path: Path) -> None:
    with Echo(tmp_path, 2) as first:
        page = new_context().new_page()
        page.goto(first.url)
        page.set_input_files("#files", names(2))
        expect(page.locator(".state").filter(has_text="UpscaleRun")).to_have_count(1)
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
    expect(page.locator(".failed .state")).to_contain_text("this is not an image")
    expect(page.locator(".state").filter(has_text="Done")).to_have_count(1)
    page.fill("#size", "9")
    page.set_input_files("#files", photo_file)
    expect(page.locator("#note")).to_contain_text("Size")


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
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_accessible(page: Page, photo_file: Path, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 844})
    page.set_input_files("#files", photo_file)
    expect(page.locator(".result")).to_be_visible()
    page.get_by_text("Use as code").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 60_000
