"""Makes screenshots of the web page: each state at three widths, in the light and the dark theme.

    python -m lab.serve.screenshots FOLDER [--language de]

It upscales the page's sample with the pocket weights in Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import FilePayload, Page, sync_playwright

from lab.serve.servers import EchoServer

WIDTHS = {390: 844, 820: 1180, 1280: 800}
THEMES = ("light", "dark")
STATES = ("empty", "done", "lens", "advanced", "editor", "running", "error", "hundred")
VIEWPORT = ("lens", "editor", "hundred")  # states of which only the visible part is taken


def take(page: Page, folder: Path, state: str) -> None:
    """A file for each width and theme."""
    for width, height in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": height})
        for theme in THEMES:
            page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
            page.wait_for_timeout(200)  # the view fits itself to its new size
            page.screenshot(path=folder / f"{state}-{width}-{theme}.png", full_page=state not in VIEWPORT)


def shoot(page: Page, url: str, folder: Path) -> None:
    page.goto(url)
    page.locator("#presets button").first.wait_for()
    take(page, folder, "empty")
    page.locator("#size").fill("3")
    page.locator("#sample").click()
    page.locator(".download:visible").wait_for(timeout=120_000)
    page.locator(".view").wait_for()
    page.locator(".reseed").click()
    page.wait_for_function("() => document.querySelectorAll('.download:not([hidden])').length === 2", timeout=120_000)
    page.locator(".blend input").first.fill("0.4")
    take(page, folder, "done")
    page.locator(".magnify").first.click()
    page.locator(".view").first.scroll_into_view_if_needed()
    take(page, folder, "lens")
    page.locator(".magnify").first.click()
    page.locator("#advanced summary").click()
    take(page, folder, "advanced")
    page.locator(".edit").first.click()
    canvas = page.locator("#paint")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.6)
    page.mouse.up()
    take(page, folder, "editor")
    page.locator("#close-editor").click()
    page.locator("#advanced summary").click()
    page.locator("#clear").click()
    page.route("**/upscale?*", lambda route: None)  # is never answered: the list stays as it is
    page.set_input_files("#files", images(2))
    take(page, folder, "running")
    page.set_input_files("#files", images(98))
    take(page, folder, "hundred")
    page.locator("#cancel-all").click()
    page.locator("#clear").click()
    page.unroute("**/upscale?*")
    page.set_input_files("#files", {"name": "broken.png", "mimeType": "image/png", "buffer": b"no image"})
    page.locator(".failed").wait_for()
    take(page, folder, "error")


def images(count: int) -> list[FilePayload]:
    """Small images of one color."""
    payloads: list[FilePayload] = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (24, 16), f"hsl({number * 37 % 360}, 60%, 50%)").save(buffer, "PNG")
        payloads.append({"name": f"photo-{number + 1}.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    return payloads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language", default="en")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, sync_playwright() as playwright:
        server = EchoServer(Path(data), module=("seesr", "serve"), SEESR_DEVICE="cpu", SEESR_API_KEYS="")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = browser.new_context(locale=args.language, bypass_csp=True).new_page()
            shoot(page, server.start(120), args.folder)
        finally:
            browser.close()
            server.end()
    print(f"{len(WIDTHS) * len(THEMES) * len(STATES)} screenshots in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
