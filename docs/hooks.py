"""MkDocs hook: links that lead out of docs/ work on the site as they do on GitHub.

A page links to a file of the repository by its relative path, such as `../configs/icd.toml`. MkDocs knows only what is
inside `docs/`. So the hook copies each file that a page links to into the site, under `source/`, and points the link there.
CONTRIBUTING and CHANGELOG become pages of the site. The start page is `docs/index.md`; links to the README lead there.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # in the repository -> on the site
START = {"README.md": "index.md"}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^[ \t]*(```|~~~).*?^[ \t]*\2[ \t]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/, and every file that a page links to there."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    linked = {target for file in files.documentation_pages() for target in _outside(file)}
    for target in sorted(linked):
        if (ROOT / target).is_file():
            files.append(File.generated(config, f"source/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links that lead out of docs/ to their copies. A link to a folder becomes the folder's name."""
    source = _in_repository(page.file.src_uri)

    def point(match: re.Match[str]) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        path = _resolve(source, target)
        if path is None or (path.startswith("docs/") and source.startswith("docs/") and (ROOT / path).is_file()):
            return match.group()
        if (ROOT / path).is_dir():
            return f"{text[1:-1]} (`{path}`)" if path not in text else text[1:-1]
        on_site = PAGES.get(path) or START.get(path) or _from_docs(path)
        return f"{text}({os.path.relpath(on_site, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    pieces = _CODE.split(markdown)  # text, code, fence, text, ...
    return "".join(_LINK.sub(point, piece) if i % 3 == 0 else piece for i, piece in enumerate(pieces) if i % 3 != 2)


def _from_docs(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def _in_repository(src_uri: str) -> str:
    """Where a page of the site lies in the repository."""
    moved = {page: name for name, page in PAGES.items()}
    return moved.get(src_uri, f"docs/{src_uri}")


def _resolve(source: str, target: str) -> str | None:
    """The path in the repository of what a page links to; None for addresses on the web."""
    if re.match(r"[a-z]+:", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _outside(file: File) -> set[str]:
    """Files outside docs/ that a page links to."""
    source = _in_repository(file.src_uri)
    text = _CODE.sub("", file.content_string)
    targets = {_resolve(source, match.group(2)) for match in _LINK.finditer(text)}
    known = PAGES.keys() | START.keys()
    return {t for t in targets if t and not t.startswith(("docs/", "..")) and t not in known}
