"""A picture of a report's upper part, light, for the documentation: `python tests/cost/screenshot.py REPORT.html OUT.png`."""

from __future__ import annotations

import base64
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, MOST_BYTES = 1160, 300_000


def screenshot(page: Path, output: Path) -> None:
    """Write a PNG of everything down to the end of the chart of quality against cost."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    with webdriver.Chrome(options=options, service=service) as browser:
        size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.resolve().as_uri())
        end = browser.execute_script(
            "return document.getElementById('frontier').getBoundingClientRect().bottom + scrollY + 16"
        )
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": end, "scale": 1}
        shot = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)
    if output.stat().st_size > MOST_BYTES:
        sys.exit(f"{output} has {output.stat().st_size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
