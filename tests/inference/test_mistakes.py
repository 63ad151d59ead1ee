"""Examples that went wrong, in the report of a run: only if they are asked for, and from the validation data."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from dcft_dist.cli import main
from dcft_dist.inference.mistakes import _RANKED
from dcft_dist.reports import run_report

from ..processes import dcft
from .test_export import images


def text_off(figure: Figure) -> list[str]:
    """Texts that reach out of the picture, and axes without a name."""
    figure.set_dpi(110)  # as the file has it
    figure.canvas.draw()
    found, whole = [], figure.bbox
    for axes in figure.axes:
        if not axes.get_ylabel() or not (axes.get_xlabel() or axes.get_label() == "<colorbar>"):
            found.append(f"no name: {axes.get_label()}")
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        for text in texts:
            box = text.get_window_extent()
            inside = Bbox.intersection(box, whole)
            if text.get_text() and text.get_visible() and (inside is None or inside.width < box.width - 1):
                found.append(text.get_text())
    return found


def test_the_worst_validation_examples_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = images(tmp_path, "--method", "dcft", "--importance.num_samples", "16", "--removal.fractions", "[0.05]")
    assert "went wrong" not in (run / "report.html").read_text()
    figures, png = list[Figure](), run_report.png
    monkeypatch.setattr(run_report, "png", lambda figure: (figures.append(figure), png(figure))[1])
    assert main(["report", str(run), "--examples", "3"]) == 0
    path, careful = capsys.readouterr().out.splitlines()
    assert path == str(run / "report.html") and careful.startswith("careful: it contains ")
    assert len(figures) == 5 and [text_off(figure) for figure in figures] == [[]] * 5
    report = (run / "report.html").read_text()
    verdicts = re.findall(r"<b>(\w), predicted as (\w) with probability ([\d.]+)</b>", report)
    assert 0 < len(verdicts) <= 3 and all(label != said for label, said, _ in verdicts)
    sure = [float(value) for *_, value in verdicts]
    assert sure == sorted(sure, reverse=True) and report.count("<figure>") == len(verdicts)

    # By the model and the data alone: the same examples, predicted by `dcft predict`, in the same order.
    from dcft_dist.config.toml import load_config
    from dcft_dist.data.tasks import load_task

    validation = load_task(load_config(run / "config.toml")).validation
    np.save(tmp_path / "seen.npy", np.stack([np.asarray(image) for image in validation.inputs]))
    seen = "import numpy as np\n\ndef rows():\n    for image in np.load(%r):\n        yield {'input': image}\n"
    (tmp_path / "seen.py").write_text(seen % str(tmp_path / "seen.npy"))
    words = ["predict", str(run), "--data.build", "seen.rows", "--data.label", "", "--import_roots", f'["{tmp_path}"]']
    assert main([*words, "--out", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    wrong = [
        (-float(row[f"p({row['predicted']})"]), i)
        for i, (row, label) in enumerate(zip(rows, validation.labels, strict=True))
        if row["predicted"] != "abcd"[label]
    ]
    worst = [i for _, i in sorted(wrong)[:3]]
    assert [("abcd"[validation.labels[i]], rows[i]["predicted"]) for i in worst] == [verdict[:2] for verdict in verdicts]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        for text in re.findall(r'alt="" src="[^,]+,([^"]+)', report)
    ]
    assert all(np.array_equal(one, validation.inputs[i]) for one, i in zip(shown, worst, strict=True))

    assert main(["report", str(run)]) == 0  # not asked for: gone
    assert "went wrong" not in (run / "report.html").read_text()
    assert main(["report", str(run), "--examples", "0"]) == 2
    assert "--examples 0: must be at least 1" in capsys.readouterr().err
    (tmp_path / "blobs.py").write_text((tmp_path / "blobs.py").read_text().replace("default_rng(0)", "default_rng(1)"))
    done = dcft("report", run, "--examples", "1")
    assert done.returncode == 2 and "names code that would run" in done.stderr  # that code has changed
    done = dcft("report", run, "--examples", "1", "--trust-code")
    assert done.returncode == 2 and "its data have changed since" in done.stderr


@pytest.mark.parametrize(
    ("kind", "records", "labels", "names", "order", "worst"),
    [
        ("multi_label", [[3.0, -3.0], [3.0, 3.0], [-4.0, 0.1]], [[1, 0], [1, 0], [1, float("nan")]], ["gas", "mass"],
         [2, 1], "gas is present, predicted with probability 0.02"),
        ("regression", [[5.0], [9.0]], [5.5, 4.0], ["age"], [1, 0], "age 4, predicted as 9"),
        ("causal_lm", [[6.0, 3.0, 2.0], [0.1, 2.0, 2.0], [9.0, 3.0, 0.0]], [0, 0, 0], [],
         [2, 0], "0 of 3 tokens of the answer are right, loss of a token 3"),
        ("segmentation", [[0.1, 0.9, float("nan")], [0.5, 0.2, 0.4]], [0, 0], ["none", "grey", "white"],
         [1, 0], "Dice grey 0.20, Dice white 0.40"),
    ],
)  # fmt: skip
def test_how_wrong_an_example_is(
    kind: str, records: list[list[float]], labels: list[float], names: list[str], order: list[int], worst: str
) -> None:
    wrong, verdict = _RANKED[kind](torch.tensor(records, dtype=torch.float64), torch.tensor(labels), names)
    assert [i for i in wrong.argsort(descending=True).tolist() if wrong[i] > 0] == order
    assert verdict(order[0]) == worst
