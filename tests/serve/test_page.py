"""The page in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import ANN, LONG, Serving, sharp

from seesr.serving.app import PAGE

CHROMIUM = shutil.which("chromium")
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, service: Serving) -> Iterator[BrowserContext]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    context.set_default_timeout(30_000)
    context.add_init_script(f"sessionStorage.setItem('key', '{ANN}')")
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, service: Serving) -> Page:
    page = context.new_page()
    page.goto(service.url)
    page.fill("#seed", "1")
    page.fill("#num_inference_steps", "1")
    return page


@pytest.fixture
def photo_file(tmp_path: Path) -> Path:
    (tmp_path / "photo.png").write_bytes(sharp(64, 48))
    return tmp_path / "photo.png"


def test_choose_slide_download(page: Page, service: Serving, photo_file: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_input_files("#files", photo_file)
    expect(page.locator(".result")).to_be_visible()
    expect(page.locator(".state")).to_contain_text("done, seed 1, 256x192, pocket weights")
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "51"
    assert "51%" in (page.locator(".stage").get_attribute("style") or "")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "photo-x4.png"
    assert Path(download.value.path()).read_bytes() == service.upscale(photo_file.read_bytes()).content
    zoom = page.get_by_role("button", name="1:1")
    zoom.click()
    assert zoom.get_attribute("aria-pressed") == "true"
    assert page.locator(".after").bounding_box()["width"] == 256  # type: ignore[index]
    page.fill("#seed", "7")
    page.get_by_role("button", name="Same settings again").first.click()
    assert page.input_value("#seed") == "1"
    assert all(url.startswith((service.url, "blob:", "data:")) for url in asked)


def test_all_views_are_a_zip_to_download(page: Page, photo_file: Path) -> None:
    page.select_option("#output_view", "all")
    page.set_input_files("#files", photo_file)
    link = page.get_by_role("link", name="Download")
    expect(link).to_be_visible()
    expect(page.locator(".view")).to_be_hidden()
    expect(page.get_by_role("slider")).to_be_hidden()
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "photo-x4.zip" and zipfile.is_zipfile(download.value.path())


def test_a_pasted_picture(page: Page) -> None:
    """By a real Ctrl+V, from the clipboard."""
    page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement('canvas'), { width: 24, height: 18 });
        const ink = canvas.getContext('2d');
        ink.fillStyle = 'teal'; ink.fillRect(0, 0, 24, 18); ink.fillStyle = 'gold'; ink.fillRect(4, 4, 9, 9);
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
        await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]);
    }""")
    page.keyboard.press("Control+V")
    expect(page.locator(".result")).to_be_visible()
    expect(page.locator(".state")).to_contain_text("96x72")


def test_progress_and_cancel_at_the_next_tile(page: Page, service: Serving, photo_file: Path) -> None:
    for name in ("num_inference_steps", "scale_factor", "latent_tiled_size"):
        page.fill(f"#{name}", str(LONG[name]))
    page.set_input_files("#files", photo_file)
    expect(page.locator(".state")).to_contain_text("denoise")
    while page.locator("progress").evaluate("bar => bar.value") < 0.01:
        time.sleep(0.05)
    page.get_by_role("button", name="Cancel").click()
    started = time.monotonic()
    expect(page.locator(".state")).to_have_text("canceled")
    assert time.monotonic() - started < 1
    assert service.ask("GET", "/status").json()["running"] is None


def test_a_closed_tab_frees_the_engine(page: Page, service: Serving, photo_file: Path) -> None:
    for name in ("num_inference_steps", "scale_factor", "latent_tiled_size"):
        page.fill(f"#{name}", str(LONG[name]))
    page.set_input_files("#files", photo_file)
    expect(page.locator(".state")).to_contain_text("denoise")
    page.close()
    started = time.monotonic()
    while service.ask("GET", "/status").json()["running"] is not None:
        assert time.monotonic() - started < 1.5
        time.sleep(0.02)


def test_a_bad_file_and_a_bad_setting_are_told_in_words(page: Page, tmp_path: Path, photo_file: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.set_input_files("#files", [tmp_path / "bad.png", photo_file])
    expect(page.locator(".state").filter(has_text="this is not an image")).to_have_count(1)
    expect(page.locator(".result:visible")).to_have_count(1)
    page.fill("#scale_factor", "9")
    page.set_input_files("#files", photo_file)
    expect(page.locator("#told")).to_contain_text("scale_factor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_is_usable_by_everybody(page: Page, photo_file: Path, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 844})
    page.set_input_files("#files", photo_file)
    expect(page.locator(".result")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_without_a_key_it_asks_for_one(browser: Browser, service: Serving, photo_file: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(service.url)
    page.fill("#num_inference_steps", "1")
    page.set_input_files("#files", photo_file)
    page.get_by_label("Key of this server").fill(ANN)
    page.get_by_role("button", name="Use").click()
    page.set_input_files("#files", photo_file)
    expect(page.locator(".result:visible")).to_have_count(1)
    context.close()


def test_our_own_code_is_small() -> None:
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 20_000
