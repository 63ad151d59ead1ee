"""Takes the pictures of reports and pages that docs/images keeps:

python docs/screenshots.py RUN STUDY        needs Chromium, and pip install -c constraints.txt -e ".[docs]" playwright
    RUN: directory of a finished run with a report; STUDY: folder of a study with a report (dcft report makes both)
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
PAGES = ("index", "which_method", "troubleshooting")
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


def main(run: Path, study: Path) -> None:
    """Takes all pictures: of reports on a desk, and on a phone in dark mode; of pages on a desk."""
    with tempfile.TemporaryDirectory() as site, sync_playwright() as playwright:
        command = [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", site]
        subprocess.run(command, check=True, cwd=IMAGES.parents[1], env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
        taken = {"report_run": run / "report.html", "report_study": study / "report.html"}
        shots = [(name, file, DESK, "light") for name, file in taken.items()]
        shots += [(f"{name}_phone", file, PHONE, "dark") for name, file in taken.items()]
        shots += [(f"page_{name}", Path(site) / f"{name}.html", DESK, "light") for name in PAGES]
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, file, size, scheme in shots:
            view = chromium.new_page(viewport=size, color_scheme=scheme)
            view.goto(file.resolve().as_uri())
            picture = Image.open(io.BytesIO(view.screenshot()))
            picture.quantize(256).save(IMAGES / f"{name}.png", optimize=True)
            view.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
