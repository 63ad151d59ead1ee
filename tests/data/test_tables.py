"""Tables are read strictly: what is read is what another reading by hand gives, or the line with the mistake is named."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from dcft_dist.data.tables import is_blank, is_empty, records
from dcft_dist.errors import DataError

from .tables import TEXT, task_of


def read(file: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    file.write_text(text, encoding="utf-8", newline="")
    return list(records(file))


ROWS = "".join(f"text {i},{i % 2},p{i}\n" for i in range(20))
MISTAKES = {
    "a quote that is not closed": ("text,label,patient\n" + ROWS.replace(",p12\n", ',"p12\n'), ".csv", 14, "unexpected end"),
    "two texts that begin with a quote": ('text\tlabel\na\t1\n"b\t0\nc\t1\n"d\t0\n', ".tsv", 3, "expected"),
    "a comma without quotes": ("label,text\n1,a\n0,nodule in the left lung, 5 mm\n", ".csv", 3, "3 cells, but 2 columns"),
    "too few cells": ("label,text,patient\n1,a,p1\n\n0,b\n", ".csv", 4, "2 cells, but 3 columns"),
    "after a text of two lines": ('label,text\n1,"a\nb"\n0\n', ".csv", 4, "1 cells, but 2 columns"),
    "an object in two lines": ('{"text": "a"}\n{"text":\n"b"}\n', ".jsonl", 2, "not a JSON object"),
    "a list": ('{"text": "a"}\n["b"]\n', ".jsonl", 2, "not a JSON object but a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, suffix, line, problem = MISTAKES[name]
    with pytest.raises(DataError, match=rf"line {line}: .*{problem}"):
        read(tmp_path / f"table{suffix}", text)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with pytest.raises(DataError, match="two columns have the name 'label'"):
        read(tmp_path / "a.csv", "text,label,label\na,1,0\n")
    with pytest.raises(DataError, match="two columns have the name 'label'"):
        read(tmp_path / "a.jsonl", '{"text": "a", "label": 1, "label": 0}\n')
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array([1]), pyarrow.array([0])], names=["text", "label", "label"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"two columns have the name 'label'|cannot be read"):
        list(records(tmp_path / "a.parquet"))


def test_tables_of_any_text_are_read_as_they_were_written(tmp_path: Path) -> None:
    """600 tables: cells with quotes, separators and new lines; three ways of quoting, two separators, blank lines."""
    draw = random.Random(0)
    pieces = ["a", "ü", '"', ",", "\t", "\n", " ", "'", ";", "7", "None", "\\"]
    for number in range(600):
        suffix, separator = draw.choice([(".csv", ","), (".tsv", "\t")])
        cells = [["".join(draw.choices(pieces, k=draw.randrange(6))) for _ in range(3)] for _ in range(draw.randrange(1, 6))]
        quoting = draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC])
        file, begins = tmp_path / f"{number}{suffix}", []
        with file.open("w", newline="", encoding=draw.choice(["utf-8", "utf-8-sig"])) as out:
            writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"]))
            writer.writerow(["x", "y", "z"])
            line = 2
            for row in cells:
                if draw.random() < 0.2:
                    out.write("\n")
                    line += 1
                begins.append(line)
                writer.writerow(row)
                line += 1 + sum(cell.count("\n") for cell in row)
        found = list(records(file))
        assert [list(row.values()) for _, row in found] == cells, file.read_text()
        assert [line for line, _ in found] == begins, file.read_text()


def test_long_texts(tmp_path: Path) -> None:
    ((line, row),) = read(tmp_path / "a.csv", f"text,label\n{'word ' * 100_000},1\n")
    assert line == 2 and len(row["text"]) == 500_000


def test_json_lines_are_read_as_json_reads_them(tmp_path: Path) -> None:
    rows = [{"text": 'a "quoted"\u2028 line\n', "label": None}, {"text": "b", "label": 1.5}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read(tmp_path / "a.jsonl", text) == [(1, rows[0]), (3, rows[1])]


def test_what_an_empty_cell_is() -> None:
    nothing = [None, float("nan"), "", " ", "nan", "NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "null", "NULL"]
    assert all(map(is_empty, nothing)) and not any(map(is_empty, ["None", "0", 0, False, "no", "-"]))
    assert [value for value in nothing if is_blank(value)] == nothing[:4]


# -- labels ------------------------------------------------------------------------------------------------------------


def classes_of(folder: Path, labels: list[str], *words: str) -> list[str]:
    rows = "".join(f"text {i},{labels[i % len(labels)]}\n" for i in range(40))
    (folder / "t.csv").write_text("text,label\n" + rows)
    return task_of(
        *TEXT, "--data.input", "text", "--data.label", "label", "--data.path", str(folder / "t.csv"), *words
    ).class_names


def test_none_is_a_class_and_nothing_is_not(tmp_path: Path) -> None:
    assert classes_of(tmp_path, ["None", "Mild", "Severe"]) == ["Mild", "None", "Severe"]
    for word in ("", "N/A", "null", "<NA>"):
        with pytest.raises(DataError, match=r"line \d+: the (label|column 'label') is empty"):
            classes_of(tmp_path, ["0", "1", word])
    assert classes_of(tmp_path, ["NA", "EU"], "--data.classes", '["EU", "NA"]') == [
        "EU",
        "NA",
    ]  # the user says that it is one


@pytest.mark.parametrize("labels", [["0", "1", "0.0", "1.0"], ["1", "01", "2"], ["True", "TRUE", "False"], ["ill", "Ill"]])
def test_classes_that_differ_only_in_spelling(labels: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classes .* \(.*line \d+\) and .* differ only in how they are written"):
        classes_of(tmp_path, labels)
    assert classes_of(tmp_path, labels, "--data.classes", json.dumps(labels)) == labels


def test_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    assert classes_of(tmp_path, ["10", "9", "b", "2.5", "a"]) == ["2.5", "9", "10", "a", "b"]
