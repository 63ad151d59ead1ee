"""The words of README, pages and docstrings: short sentences, no banned phrase, numbers in tables."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED_OR_LOGS = {"configuration.md", "decisions.md", "experiments.md"}  # checked by nobody, or kept as they were written
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(f for f in ROOT.glob("docs/*.md") if f.name not in GENERATED_OR_LOGS),
    *sorted(ROOT.glob("docs/api/*.md")),
    *sorted(ROOT.glob("docs/tutorials/*.md")),
]
README_WORDS, README_LINE = 900, 160
PAGE_SENTENCE, DOCSTRING_SENTENCE = 30, 40
INTERVALS = 2

BANNED = re.compile(
    r"\b(?:ways? of the body|(?:put|puts|putting) (?:\w+ )?in force|of one's own|in vain|likewise|hence|whose|thereby"
    r"|sa(?:y|ys|id) what it is)\b"
    r"|\b(?:is|are|was|were) (?:not )?there\b(?=\s*(?:[.,;:)]|$))",
    re.IGNORECASE,
)
BANNED_IN_PAGES = re.compile(r"\b(?:made of|tells?)\b", re.IGNORECASE)
INTERVAL = re.compile(r"\[\s*[-+−]?\d+(?:\.\d+)?\s*,\s*[-+−]?\d+(?:\.\d+)?\s*\]")

_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|et al|vs|cf|approx|No|Fig|pp|Eq)|\b[A-Z])\.$")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")


def paragraphs(markdown: str) -> Iterator[str]:
    """The prose of a page: paragraphs and list items, without code blocks, tables, headings, and what links point to."""
    text = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    text = re.sub(r"^([ \t]*)(```|~~~).*?^\1\2[ \t]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^::: .*\n(?:[ \t]+\S.*\n?)*", "", text, flags=re.MULTILINE)
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        skipped = re.match(r"\s*(?:\||#|!\[|<)", line)
        if lines and (not line.strip() or skipped or _LIST_ITEM.match(line)):
            yield plain(" ".join(lines))
            lines = []
        if line.strip() and not skipped:
            lines.append(_LIST_ITEM.sub("", line, count=1).strip())


def plain(text: str) -> str:
    """Without markup: a piece of code counts as one word, a link as its text."""
    text = re.sub(r"(`+)(?:.+?)\1", "Code", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<?https?://\S+", "Link", text)
    return re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", text)


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences of one paragraph. Abbreviations and decimal points end none."""
    begin = 0
    for end in re.finditer(r"[.!?]+[\"')\]”]*(?=\s+[\"'(\[“]?[A-Z0-9])", paragraph):
        if not _ABBREVIATION.search(paragraph[begin : end.end()]):
            yield paragraph[begin : end.end()].strip()
            begin = end.end()
    if paragraph[begin:].strip():
        yield paragraph[begin:].strip()


def num_words(sentence: str) -> int:
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def faults_of_page(markdown: str) -> list[str]:
    faults = []
    for paragraph in paragraphs(markdown):
        long = [s for s in sentences(paragraph) if num_words(s) > PAGE_SENTENCE]
        faults += [f"{num_words(s)} words: {s}" for s in long]
        words = [m.group() for pattern in (BANNED, BANNED_IN_PAGES) for m in pattern.finditer(paragraph)]
        faults += [f"{word!r} in: {paragraph[:80]}" for word in words]
        if len(INTERVAL.findall(paragraph)) > INTERVALS:
            faults.append(f"more than {INTERVALS} intervals outside a table: {paragraph[:80]}")
    return faults


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module, its classes and functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield getattr(node, "name", "module"), inspect.cleandoc(text)


def blocks_of_docstring(text: str) -> Iterator[str]:
    """Paragraphs, and each entry of `Args:`, `Attributes:`, `Raises:`; lines in columns are tables."""
    lines: list[str] = []
    entry = 0  # indentation of the entries of a section; 0: outside of one
    for line in [*text.splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        heading = re.fullmatch(r"\s*(?:Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):\s*", line)
        in_columns = re.search(r"\S {2,}\S", line.strip()) is not None
        code = re.search(r"^\s*(?:>>> |\w+(?:, \w+)* = \w+[.(]|\w+\.\w+\(|with \w+\(.*:$)", line) is not None
        new = indent == entry > 0 or _LIST_ITEM.match(line)
        if lines and (not line.strip() or heading or in_columns or code or new):
            yield plain(" ".join(lines))
            lines = []
        if heading:
            entry = indent + 4
        elif line.strip() and indent < entry:
            entry = 0
        if line.strip() and not heading and not in_columns and not code:
            lines.append(line.strip())


def test_the_splitter_sees_sentences() -> None:
    text = "One `a. B c` two, e.g. Three. Four has 0.5 of [it](x.md#a. B)! `Five` by Huang et al. Six?\nEnd"
    assert list(sentences(plain(text.replace("\n", " ")))) == [
        "One Code two, e.g. Three.", "Four has 0.5 of it!", "Code by Huang et al. Six?", "End",
    ]  # fmt: skip
    page = "# Title\n\nA b.\n- item one\n  goes on\n- two\n\n| cell | x |\n|---|---|\n\n"
    page += "```\ncode. Code\n```\n\n::: a.b\n    x: y\n\nLast."
    assert list(paragraphs(page)) == ["A b.", "item one goes on", "two", "Last."]
    assert num_words("a - b, c") == 3


@pytest.mark.parametrize(
    "text",
    [
        "This sentence " + "goes on and " * 10 + "on.",
        "The penalty is put in force.",
        "A model whose head is new.",
        "Take the file if it is there.",
        "It is 1 [0.1, 1.2], 2 [-0.3, 4.0] and 3 [1, 2].",
        "- The log tells\n  which.",
    ],
)
def test_faults_are_found(text: str) -> None:
    assert faults_of_page(text)
    assert not faults_of_page("Is there a GPU? There is one [0.1, 1.2]. " + "Short ones. " * 30)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_easy_to_read(page: Path) -> None:
    assert faults_of_page(page.read_text()) == []


def test_the_readme_is_read_in_a_minute() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= README_WORDS
    assert [line for line in text.splitlines() if len(line) > README_LINE] == []


def test_docstrings_are_easy_to_read() -> None:
    faults = []
    for file in sorted((ROOT / "dcft_dist").rglob("*.py")):
        for name, text in docstrings(file):
            for block in blocks_of_docstring(text):
                words = [f"{m.group()!r}" for m in BANNED.finditer(block)]
                words += [f"{num_words(s)} words" for s in sentences(block) if num_words(s) > DOCSTRING_SENTENCE]
                faults += [f"{file.relative_to(ROOT)}: {name}: {word}: {block[:60]}" for word in words]
    assert faults == [], f"{len(faults)} faults\n" + "\n".join(faults)
