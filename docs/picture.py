"""Takes the picture of a report that the README shows.

    python docs/picture.py demo-output/store      # writes docs/report.png, 1200 pixels wide

Needs Debian's chromium and chromium-driver, or CHROMIUM and CHROMEDRIVER naming others.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from canopy_store.report import write_report

WIDTH, HEIGHT = 1200, 1740
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def picture(page: Path, out: Path) -> Path:
    """The path of a PNG of the page's top, in the light theme."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver"))
        with webdriver.Chrome(options=options, service=service) as driver:
            size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
            driver.get(page.resolve().as_uri())
            WebDriverWait(driver, 60).until(
                lambda d: d.execute_script("return document.body.dataset.ready === 'light'")
            )
            shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    out.write_bytes(base64.b64decode(shot["data"]))
    return out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        report = write_report(sys.argv[1], Path(scratch) / "report.html")
        print(picture(report, Path(__file__).with_name("report.png")))
