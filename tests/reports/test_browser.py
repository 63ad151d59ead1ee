"""Reports and pages as a browser shows them."""

from __future__ import annotations

from pathlib import Path

from ..browser import problems

GOOD = (
    '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
    '<p>read me</p><div style="overflow-x: auto"><p style="white-space: nowrap">%s</p></div>'
) % ("a table that scrolls " * 20)


def test_what_cannot_be_read_is_found(tmp_path: Path) -> None:
    """Each fault once, and none on a good page."""
    bad = {
        "wide": '<p style="white-space: nowrap">' + "long " * 100,
        "pale": '<p style="color: #888; background: #999">pale</p>',
        "dark": '<p style="color: #222">dark on dark</p>',
        "cut": f'<div style="width: 5rem; overflow: hidden"><p style="white-space: nowrap">{"cut " * 20}</p></div>',
        "broken": '<p style="width: 2rem; overflow-wrap: anywhere">immeasurable</p>',
        "lost": '<img alt="lost" src="data:image/png;base64,AAAA">',
    }
    for name, html in {"good": "", **bad}.items():
        (tmp_path / f"{name}.html").write_text(GOOD + html)
    found = problems(sorted(tmp_path.glob("*.html")))
    assert not [text for text in found if text.startswith("good")]
    for name, words in {
        "wide": "off the page: long",
        "pale": "pale: pale",
        "cut": "cut off: cut",
        "lost": "no picture",
        "broken": "broken word: immeasurable",
    }.items():
        assert len([text for text in found if text.startswith(name) and words in text]) == 4, found
    assert sorted(text for text in found if text.startswith("dark")) == [
        "dark.html 1280 dark: pale: dark on dark",
        "dark.html 390 dark: pale: dark on dark",
    ]
