"""The mean of several runs: their probabilities, and metrics of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch.distributed as dist

from dcft_dist.cli import main

from ..objectives.test_losses import ROWS
from .test_export import images


def test_folds_predict_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for fold in (0, 1):
        run = images(tmp_path, "--data.folds", "2", "--data.fold", str(fold), "--name", f"fold{fold}")
        runs.append(str(tmp_path / f"fold{fold}"))
        assert run.name == "images"
    more = ["--data.build", "blobs.rows", "--import_roots", f'["{tmp_path}"]']

    def rows_of(*names: str) -> list[dict[str, str]]:
        data = [] if "--data.build" in names else more
        assert main(["predict", *names, *data, "--out", str(tmp_path / "out.csv")]) == 0
        with (tmp_path / "out.csv").open() as file:
            return list(csv.DictReader(file))

    one, two, both = rows_of(runs[0]), rows_of(runs[1]), rows_of(*runs)
    columns = [name for name in both[0] if name.startswith("p(")]
    assert len(columns) == 4 and len(both) == 96
    for a, b, mean in zip(one, two, both, strict=True):
        for name in columns:
            assert float(mean[name]) == pytest.approx((float(a[name]) + float(b[name])) / 2, abs=2e-6)
        assert mean["predicted"] == max(columns, key=lambda name: float(mean[name]))[2:-1]
    assert any(a[columns[0]] != b[columns[0]] for a, b in zip(one, two, strict=True))
    capsys.readouterr()
    assert main(["evaluate", *runs, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    right = sum(row["predicted"] == "abcd"[i % 4] for i, row in enumerate(both))
    assert found["metrics"]["accuracy"] == pytest.approx(right / 96) and found["examples"] == 96

    mirrored = ROWS.replace("(28, 28, 3), dtype=np.uint8)", "(28, 28, 3), dtype=np.uint8)[:, ::-1].copy()")
    (tmp_path / "turned.py").write_text(mirrored)
    turned = rows_of(runs[0], "--data.build", "turned.rows", "--import_roots", f'["{tmp_path}"]')
    for a, b, mean in zip(one, turned, rows_of(runs[0], "--flips"), strict=True):
        for name in columns:
            assert float(mean[name]) == pytest.approx((float(a[name]) + float(b[name])) / 2, abs=2e-6)

    (tmp_path / "doses.py").write_text((tmp_path / "blobs.py").read_text().replace('"abcd"[i % 4]', "float(i % 4)"))
    images(tmp_path, "--data.build", "doses.rows", "--task.kind", "regression", "--name", "other")
    assert main(["predict", runs[0], str(tmp_path / "other"), *more]) == 2
    dist.destroy_process_group()
    assert "has another kind of task, or other classes" in capsys.readouterr().err
