"""A picture of a report: `python tests/cost/screenshot.py REPORT.html OUT.png [--width 390] [--dark] [--whole]`.

By default its upper part, light, at the width of the documentation.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, MOST_BYTES = 1160, 300_000


def screenshot(
    page: Path, output: Path, *, width: int = WIDTH, dark: bool = False, whole: bool = False
) -> None:
    """Write a PNG of everything down to the end of the chart of quality against cost, or of the whole page."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    with webdriver.Chrome(options=options, service=service) as browser:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(page.resolve().as_uri())
        end = browser.execute_script(
            "return document.documentElement.scrollHeight"
            if whole
            else "return document.getElementById('frontier').getBoundingClientRect().bottom + scrollY + 16"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": end, "scale": 1}
        shot = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)
    if not whole and output.stat().st_size > MOST_BYTES:
        sys.exit(f"{output} has {output.stat().st_size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the whole page, whatever its size")
    args = parser.parse_args()
    screenshot(args.page, args.output, width=args.width, dark=args.dark, whole=args.whole)
