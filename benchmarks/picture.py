"""Take the screenshot of a report for the README.

Run: python benchmarks/picture.py runs/demo
Needs Chromium (apt-get install -y chromium) and a run folder with its report.html; writes docs/report.png.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "report.png"
WIDTH = 1200
LIMIT = 300_000
LAST = "Does the runtime compute what training computed?"  # the picture ends below this section


def main(run: Path) -> None:
    page_path, chromium = run / "report.html", shutil.which("chromium")
    if chromium is None or not page_path.is_file():
        sys.exit(f"chromium: {chromium or 'not installed'}; {page_path}: {page_path.is_file()}")
    with sync_playwright() as playwright:
        # as root, and without a request to anywhere
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        page.context.set_offline(True)
        page.goto(page_path.resolve().as_uri())
        box = page.locator("section", has=page.get_by_role("heading", name=LAST)).bounding_box()
        assert box is not None
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 18}
        page.screenshot(path=PICTURE, full_page=True, clip=clip)
        browser.close()
    size = PICTURE.stat().st_size
    print(f"written: docs/report.png ({size / 1000:.0f} kB)")
    sys.exit(0 if size < LIMIT else f"docs/report.png: {size} bytes, more than {LIMIT}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    main(parser.parse_args().run)
