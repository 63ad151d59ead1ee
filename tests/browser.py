"""Pages in headless Chromium: is every text on the page readable, on a phone and on a desk, in light and in dark mode?"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from .debian import apt_install

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")  # pixels

# What is wrong with the texts inside an element: off the page, cut off by a box around them, or hard to see.
_PROBLEMS = """([within, contrast]) => {
  const found = [], root = document.querySelector(within), width = innerWidth;
  if (document.scrollingElement.scrollWidth > width) found.push(`the page is ${document.scrollingElement.scrollWidth} wide`);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
  };
  const moves = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
  const scrolls = element =>
    element !== null && element !== document.body && (moves(element) || scrolls(element.parentElement));
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode, element = node.parentElement, range = document.createRange();
    if (!node.textContent.trim() || !element.checkVisibility({checkVisibilityCSS: true})) continue;
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), say = node.textContent.trim().slice(0, 40);
    for (let around = element; around && around !== document.body && !moves(around); around = around.parentElement) {
      const edge = around.getBoundingClientRect().right;
      if (getComputedStyle(around).overflowX !== 'visible' && box.right > edge + 1) found.push(`cut off: ${say}`);
    }
    if (!scrolls(element) && box.width && (box.right > width + 1 || box.left < -1)) found.push(`off the page: ${say}`);
    for (const word of node.textContent.matchAll(/(?<=\\s|^)\\S{2,14}(?=\\s|$)/g)) {
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(part => Math.round(part.top)));
      if (lines.size > 1 && !/[-/._]/.test(word[0])) found.push(`broken word: ${word[0]}`);
    }
    const [one, other] = [light(numbers(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
    if (contrast && (one + 0.05) / (other + 0.05) < 4.5) found.push(`pale: ${say}`);
  }
  for (const image of root.querySelectorAll('img')) {
    if (!image.complete || !image.naturalWidth) found.push(`no picture: ${image.alt}`);
    if (!scrolls(image) && image.getBoundingClientRect().right > width + 1) found.push(`off the page: picture ${image.alt}`);
  }
  return found;
}"""


def problems(pages: Iterable[Path], within: str = "body", contrast: bool = True) -> list[str]:
    """What is wrong with HTML files at each width and in each mode; empty if all can be read.

    Args:
        pages: the files.
        within: CSS selector of the element to look at.
        contrast: whether each text must have the contrast to its ground that WCAG 2 asks for (4.5).
    """
    if shutil.which("chromium") is None:
        if shutil.which("apt-get") is None:
            pytest.skip("needs chromium")
        assert (problem := apt_install("chromium", "fonts-dejavu-core")) == "", problem
    found = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page, width, scheme in itertools.product(pages, WIDTHS, SCHEMES):
            view = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            view.goto(page.resolve().as_uri())
            found += [f"{page.name} {width} {scheme}: {text}" for text in view.evaluate(_PROBLEMS, [within, contrast])]
            view.close()
        chromium.close()
    return found
