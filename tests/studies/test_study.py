"""Studies: what is asked for, what is chosen, what the intervals say; and a whole one, carried out by two processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.data.tasks import load_task
from dcft_dist.errors import ConfigError, DataError, RunError
from dcft_dist.studies.bootstrap import Estimate, contrast_verdict, estimate
from dcft_dist.studies.results import StudyFolder
from dcft_dist.studies.runner import _train_loss
from dcft_dist.studies.study import Cell, final_cells, load_study, make_config, make_preparation, settings_of, tuning_cells
from dcft_dist.studies.table import results, table

from ..processes import dcft

ROOT = Path(__file__).parents[2]
SMALL = """
name = "small"
base = "smoke.toml"
tune_seeds = [10, 11]
seeds = [0, 1]
resample = true
[settings.small]
task.train_per_class = 8
[arms.full]
method = "full"
optimizer.lr = [1e-4, 2e-4]
[arms.dcft]
penalty.factor = 0.0
[[contrasts]]
arm = "dcft"
minus = "full"
"""


def write(path: Path, text: str = SMALL) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a study sets it; and put back."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


INTERPOLATED = """
name = "small"
base = "{base}"
tune_seeds = [10]
seeds = [0, 1]
[common]
train.epochs = 1
task.validation_per_class = 4
task.test_per_class = 4
task.external_tests = ["icd9"]
importance.num_samples = 64
[settings.small]
task.train_per_class = 8
[arms.full]
method = "full"
optimizer.lr = 2e-3
[arms.by_set]
method = "full"
interpolate = "selected"
optimizer.lr = [2e-3, 4e-3]
[arms.by_one_share]
method = "full"
interpolate = "diagonal"
optimizer.lr = 2e-3
[[contrasts]]
arm = "by_set"
minus = "by_one_share"
deciding = true
"""


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_interval_of_independent_examples_is_the_normal_one() -> None:
    values = (np.random.default_rng(0).random((1, 4000)) < 0.7).astype(float)
    found = estimate(values, [str(i) for i in range(4000)])
    error = (0.7 * 0.3 / 4000) ** 0.5
    assert found.mean == values.mean()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_interval_grows_with_likeness_in_groups_and_over_seeds() -> None:
    draw = np.random.default_rng(0)
    by_group = (draw.random(100) < 0.7).astype(float)
    alike = np.repeat(by_group, 20)[None]  # 2,000 examples that say what 100 say
    groups = [str(i // 20) for i in range(2000)]
    wide, few = estimate(alike, groups), estimate(by_group[None], [str(i) for i in range(100)])
    assert (wide.low, wide.high) == pytest.approx((few.low, few.high), abs=1e-9)
    narrow = estimate(alike, [str(i) for i in range(2000)])
    assert wide.high - wide.low > 3.5 * (narrow.high - narrow.low)
    seeds = np.stack([np.full(2000, v) for v in (0.6, 0.7, 0.8, 0.7)])  # seeds differ, examples do not
    spread = estimate(seeds, groups)
    assert spread.high - spread.low == pytest.approx(2 * 1.96 * np.std([0.6, 0.7, 0.8, 0.7]) / 2, rel=0.15)


def test_groups_of_unequal_size_weigh_by_their_examples() -> None:
    values, groups = np.array([[1.0] * 9 + [0.0]]), ["a"] * 9 + ["b"]
    found = estimate(values, groups)
    assert found.mean == 0.9 and found.low == 0.0 and found.high == 1.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.02, "supported"),
        (-0.02, 0.0, "not supported"),
        (-0.009, 0.009, "not supported"),
        (-0.02, 0.01, "undecided"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert contrast_verdict(Estimate((low + high) / 2, low, high, 8)) == expected


# -- what a study asks for ---------------------------------------------------------------------------------------------


def test_cells_of_a_study(tmp_path: Path) -> None:
    study = load_study(write(tmp_path / "s.toml"))
    tuning = list(tuning_cells(study))
    assert [c.name for c in tuning][:2] == ["small.full.lr-0.0001.seed-10", "small.full.lr-0.0002.seed-10"] and len(
        tuning
    ) == 4
    chosen = {("small", "full"): tuning[1].values, ("small", "dcft"): ()}
    final = list(final_cells(study, chosen))
    assert [c.name for c in final] == [f"small.{a}.seed-{s}" for s in (0, 1) for a in ("full.lr-0.0002", "dcft")]
    configs = [make_config(study, cell, tmp_path) for cell in (tuning[0], final[0], final[1])]
    assert [c.train.fall_back for c in configs] == [True, False, False]
    assert [c.test for c in configs] == [False, True, True] and [c.seed for c in configs] == [10, 0, 0]
    assert [c.task.sample_seed for c in configs] == [10, 0, 0] and configs[1].optimizer.lr == 2e-4
    head, full, dcft = (make_preparation(c, tmp_path).name for c in configs)
    assert full == dcft != head  # one head and one set of scores a seed, whatever the arm


def test_a_study_of_several_sizes_chooses_for_each(tmp_path: Path) -> None:
    large = "[settings.large]\ntask.train_per_class = 12\n[arms.full]"
    folder = StudyFolder(load_study(write(tmp_path / "s.toml", SMALL.replace("[arms.full]", large))), tmp_path)
    tuning = list(tuning_cells(folder.study))
    assert len(tuning) == 8 and {c.setting for c in tuning} == {"small", "large"}
    for cell in tuning:  # the lower rate is the better one of the small setting, the higher one of the large
        put(folder, cell, 0.7 if (dict(cell.values)["optimizer.lr"] == 1e-4) == (cell.setting == "small") else 0.6)
    chosen = folder.choose_all()
    assert [dict(chosen[s, "full"])["optimizer.lr"] for s in ("small", "large")] == [1e-4, 2e-4]
    final = list(final_cells(folder.study, chosen))
    assert len(final) == 8
    sizes = {c.setting: make_config(folder.study, c, tmp_path).task.train_per_class for c in final}
    assert sizes == {"small": 8, "large": 12}
    heads = {make_preparation(make_config(folder.study, c, tmp_path), tmp_path).name for c in final}
    assert len(heads) == 4  # one for each setting and seed, whatever the arm


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 10]", r"seeds \[10\] are in tune_seeds and in seeds"),
        ('minus = "full"', 'minus = "fall"', "contrasts name unknown arms: fall"),
        ("tune_seeds = [10, 11]", "tune_seeds = []", "there are no tune_seeds"),
        ("penalty.factor", "penalty.facter", r"penalty.facter: unknown key \(did you mean 'factor'\?\)"),
        ("1e-4", "-1e-4", r"optimizer.lr: Input should be greater than 0"),
        ("[settings.small]", "[setting.small]", "settings: Field required"),
    ],
)
def test_wrong_studies(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path / "s.toml", SMALL.replace(old, new, 1)))


def test_every_shipped_study_is_valid() -> None:
    files = sorted((ROOT / "configs/studies").glob("*.toml"))
    studies = [load_study(file) for file in files]
    assert studies and all(study.contrasts for study in studies if study.seeds)


def put(folder: StudyFolder, cell: Cell, accuracy: float | None, **more: Any) -> None:
    """A result as a cell leaves it; None: it diverged."""
    result: dict[str, Any] = {"cell": cell.name, "config": settings_of(make_config(folder.study, cell, folder.path))}
    rows = [{"validation/accuracy": a, "movement/body": 0.1} for a in (0.95, accuracy)]  # epoch 0 does not count
    folder.put(cell, result | ({"diverged": "x"} if accuracy is None else {"epochs": rows} | more))


def test_choice_by_mean_validation_accuracy(tmp_path: Path) -> None:
    folder = StudyFolder(load_study(write(tmp_path / "s.toml")), tmp_path)
    cells = list(tuning_cells(folder.study))
    for cell, accuracy in zip(cells[:3], (0.5, 0.9, 0.6), strict=True):
        put(folder, cell, accuracy)
    with pytest.raises(DataError, match="tuning is not finished for"):
        folder.choose("small", "full")
    put(folder, cells[3], None)  # diverged: counts as 0, so 0.55 beats 0.45
    assert folder.choose("small", "full") == (("optimizer.lr", 1e-4),)
    put(folder, cells[3], 0.2)
    assert folder.choose("small", "full") == (("optimizer.lr", 1e-4),)  # equal: the earlier one
    put(folder, cells[3], 0.3)
    assert folder.choose("small", "full") == (("optimizer.lr", 2e-4),)


def test_runs_that_diverged_are_shown_and_decide_nothing(tmp_path: Path) -> None:
    study = load_study(write(tmp_path / "study.toml", SMALL.replace("[1e-4, 2e-4]", "1e-4").replace("[0, 1]", "[0, 1, 2]")))
    folder = StudyFolder(study, tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/small.json").write_text(json.dumps({"group": ["a", "b", "c"], "label": [0, 1, 2]}))
    metrics = {"accuracy": 1.0, "macro_f1": 1.0}
    for cell in final_cells(study, {("small", "full"): (), ("small", "dcft"): ()}):
        lost = cell.arm == "full" and cell.seed == 2
        right = [0, 1, 2] if cell.arm == "dcft" else [0, 0, 0]
        loss = {"full": 1.0, "dcft": 0.75 + 0.25 * cell.seed}[cell.arm]
        summary = {"validation": metrics, "test": metrics | {"loss": loss}, "best_epoch": 1, "seconds": {"train": 90.0}}
        summary["jaccard_with_top"] = 0.25 * cell.seed if cell.arm == "dcft" else None
        put(folder, cell, None if lost else 0.5, predicted=right, summary=summary, prepared_seconds={"score": 30.0})
    found = results(tmp_path)[1][0]
    assert found.differences[0].value and found.differences[0].value.mean == pytest.approx(2 / 3)
    assert found.differences[0].value.num_seeds == 2 and found.differences[0].verdict == "undecided"
    shown = table(tmp_path, "md")
    assert "| full | nothing to choose | 2 of 3, 1 diverged |" in shown
    assert "| 0.1 |  | 1.5 + 0.5 |" in shown and "| 0.1 | 0.25 |" in shown
    assert "| dcft minus full | +66.67 [+0.00, +100.00] | 2 | undecided | -0.125 [0.125] |" in shown


def test_a_study_of_development_seeds_alone(tmp_path: Path) -> None:
    """Nothing is tested; arms are compared at their best values, paired by seed."""
    text = SMALL.replace("\nseeds = [0, 1]", "").replace("penalty.factor = 0.0", "penalty.factor = [0.0, 0.1]")
    study = load_study(write(tmp_path / "study.toml", text))
    folder = StudyFolder(study, tmp_path)
    found = {1e-4: (0.50, 0.60), 2e-4: (0.50, 0.58), 0.0: (0.52, 0.66), 0.1: (0.1, 0.1)}
    for cell in tuning_cells(study):
        put(folder, cell, found[cell.values[0][1]][cell.seed - 10])
    shown = table(tmp_path, "md")
    assert "small: development, validation data only" in shown and "test accuracy" not in shown
    assert "| full | lr 0.0001 | 2 | 55.0 |  |" in shown and "| dcft | factor 0 | 2 | 59.0 | +4.00 (2.00) |" in shown
    last = next(cell for cell in tuning_cells(study) if cell.arm == "dcft" and cell.seed == 11)
    folder.file(last).unlink()  # not all have been run: the seeds that all values have count
    assert "| dcft | factor 0 | 1 | 52.0 | +2.00 (nan) |" in table(tmp_path, "md")
    single = load_study(write(tmp_path / "s.toml", text.replace("[0.0, 0.1]", "0.0")))  # nothing to choose, all to run
    assert [c.name for c in tuning_cells(single) if c.arm == "dcft"] == ["small.dcft.seed-10", "small.dcft.seed-11"]
    with pytest.raises(ConfigError, match="neither tune_seeds nor seeds"):
        load_study(write(tmp_path / "s.toml", text.replace("[10, 11]", "[]").replace("[1e-4, 2e-4]", "1e-4")))


def test_tuned_words(tmp_path: Path) -> None:
    """Values that are no numbers have no end of the grid, and a table."""
    tuned = SMALL.replace("penalty.factor = 0.0", 'penalty.schedule = ["constant", "linear", "cosine"]')
    study = load_study(write(tmp_path / "study.toml", tuned))
    folder = StudyFolder(study, tmp_path)
    for cell in tuning_cells(study):
        put(folder, cell, 0.5)
    assert "| dcft | schedule constant |" in table(tmp_path, "md")
    assert "| full | lr 0.0001 |" in table(tmp_path, "md")
    assert "| arm | values | lr 0.0001 | lr 0.0002 | one lr |" in table(tmp_path, "md")
    assert "| full |  | 50.0 | 50.0 |  |" in table(tmp_path, "md")
    assert "| dcft | schedule linear |  |  | 50.0 |" in table(tmp_path, "md")


def test_other_training_texts_by_seed_from_the_same_categories() -> None:
    tasks = [load_task(load_config("smoke.toml", ["--task.sample_seed", str(s)])) for s in (0, 1)]
    plain = load_task(load_config("smoke.toml"))
    assert len({t.checksum for t in (*tasks, plain)}) == 3
    for task in tasks:
        assert task.test == plain.test and task.validation == plain.validation and len(task.train) == len(plain.train)
        assert not set(task.train.groups) & set(plain.test.groups + plain.validation.groups)
    assert set(tasks[0].train.inputs) != set(tasks[1].train.inputs)


# -- a whole study -----------------------------------------------------------------------------------------------------


def test_a_study_from_start_to_table(small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method, by two processes; then a lost cell, a changed study, a second version of some cells, the tables."""
    shipped, folder = (ROOT / "configs/studies/smoke.toml").read_text(), tmp_path / "smoke"
    study = write(tmp_path / "smoke.toml", shipped.replace('"smoke.toml"', f'"{small_base}"'))
    done = dcft("compare", study, "--folder", folder, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert f"{folder} is complete. Its table: dcft table {folder}. Its report: dcft report {folder}" in done.stdout
    assert "0:00:00 left at this rate)" in done.stderr
    assert main(["status", str(folder)]) == 2 and f"is a study: dcft table {folder}" in capsys.readouterr().err
    results = {f.stem: json.loads(f.read_text()) for f in (folder / "cells").glob("*.json")}
    loaded = load_study(study)
    assert len(results) == 4 + 2 * len(loaded.arms)
    for name, result in results.items():
        assert (result["predicted"] is None) == (result["summary"]["test"] is None) == ("seed-1000" in name)
        if result["predicted"] is not None:  # what is tested has been fine-tuned
            assert (result["summary"]["best_epoch"] == 0) == (result["arm"] == "probe")
        losses = result["train_loss"]
        assert len(losses) == len(result["epochs"]) - 1 and all(0 < loss < 10 for loss in losses)
    way = {r["arm"]: r["epochs"][-1]["movement/body"] for r in results.values() if r["seed"] == 0}
    assert way["probe"] == 0.0 < min(w for arm, w in way.items() if arm != "probe")
    shared = {r["arm"]: r["summary"].get("jaccard_with_top") for r in results.values()}
    assert shared["random"] is shared["dcft"] is None and 0 < shared["random_matched"] < 1
    assert not list((folder / "runs").iterdir())
    lost = folder / "cells/tiny.inverse.seed-1.json"
    before, old = lost.read_text(), {f: f.stat().st_mtime_ns for f in (folder / "cells").glob("*.json") if f != lost}
    lost.unlink()
    assert dcft("compare", study, "--folder", folder).returncode == 0
    again, once = json.loads(lost.read_text()), json.loads(before)
    assert again["predicted"] == once["predicted"] and again["epochs"] == once["epochs"]
    assert all(f.stat().st_mtime_ns == t for f, t in old.items())
    assert (
        "every cell has the same results, to the last digit"
        in dcft("compare", study, "--folder", folder, "--again", "0.05").stdout
    )
    assert main(["report", str(folder), "--pictures", str(tmp_path / "pictures")]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    report = (folder / "report.html").read_text()
    for words in (
        "<td>random_matched</td><td>selection.kind = random_magnitude</td>",
        "penalty.factor = 0 or 0.1",
        "<td>nothing to choose</td>",
    ):
        assert words in report
    assert re.search(r"(Undecided whether dcft is|dcft is|dcft is not) better than random_matched here: [+-]", report)
    assert report.count("data:image/png;base64,") == 2 and "http" not in report
    assert {f.name for f in (tmp_path / "pictures").iterdir()} == {"tiny_contrasts.png", "tiny_tuning.png"}
    check_tables(folder, tmp_path / "kept", capsys)
    lost.unlink()
    assert main(["table", str(folder)]) == 0
    assert "| inverse | nothing to choose | 1 of 2 |" in capsys.readouterr().out
    changed = write(tmp_path / "changed.toml", study.read_text().replace("train.epochs = 1", "train.epochs = 2"))
    done = dcft("compare", changed, "--folder", folder)
    assert done.returncode == 2 and "was run with another train.epochs" in done.stderr


def check_tables(folder: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for form in ("md", "csv", "tex"):
        assert main(["table", str(folder), "--format", form, "--pack", str(kept)]) == 0
        texts[form] = capsys.readouterr().out
        assert main(["table", str(kept), "--format", form]) == 0
        assert capsys.readouterr().out == texts[form]  # what is kept says the same
    assert "| dcft minus random_matched (deciding) |" in texts["md"] and "2 of 2" in texts["md"]
    assert texts["tex"].count(r"\begin{tabular}") == 3 and r"random\_matched" in texts["tex"]
    shutil.rmtree(kept / "examples")
    assert main(["table", str(kept)]) == 2


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_logged_steps() -> None:
    rows = [{"validation/loss": 9.0, "train/epoch": 0.0}]
    rows += [{"train/loss": loss, "train/epoch": epoch} for loss, epoch in ((4.0, 0.5), (2.0, 1.0), (1.0, 1.5))]
    assert _train_loss(rows) == [3.0, 1.0]


def test_shares(tmp_path: Path) -> None:
    """A share alone waits for the others, not for ever."""
    study = write(tmp_path / "s.toml")
    wrong = dcft("compare", study, "--folder", tmp_path / "f", "--share", "3/2")
    assert wrong.returncode == 2 and "a share looks like 2/8" in wrong.stderr
    alone = dcft("compare", study, "--folder", tmp_path / "f", "--share", "2/2", "--wait", "1")
    assert alone.returncode == 75 and "these preparations of other shares are missing" in alone.stderr


def test_a_result_of_another_study_is_refused(tmp_path: Path) -> None:
    folder = StudyFolder(load_study(write(tmp_path / "s.toml")), tmp_path)
    cell = next(tuning_cells(folder.study))
    put(folder, cell, 0.5)
    assert folder.get(cell)["epochs"][1]["validation/accuracy"] == 0.5
    other = StudyFolder(load_study(write(tmp_path / "t.toml", SMALL.replace("= 8", "= 9"))), tmp_path)
    with pytest.raises(RunError, match=r"was run with another task\.train_per_class"):
        other.get(cell)


@pytest.mark.usefixtures("quiet")
def test_arms_that_interpolate(small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells that differ in the interpolation alone have one training; each is tested on further test data too."""
    file, folder = write(tmp_path / "study.toml", INTERPOLATED.format(base=small_base)), tmp_path / "folder"
    assert main(["compare", str(file), "--folder", str(folder)]) == 0
    study = load_study(file)
    store = StudyFolder(study, folder)
    names = {cell: make_config(study, cell, folder).name for cell in final_cells(study, store.choose_all())}
    rate = dict(store.choose("small", "by_set"))["optimizer.lr"]
    assert len(set(names.values())) == (2 if rate == 2e-3 else 4) < len(names) == 6
    cells = {cell.arm: store.get(cell) for cell in names if cell.seed == 0}
    assert "places" not in cells["full"] and cells["full"]["summary"]["external"]["icd9"]["test"]
    for arm in ("by_set", "by_one_share"):
        found, places = cells[arm]["summary"], cells[arm]["places"]
        best = max(accuracy for _, _, accuracy, _ in places)
        assert found["validation"]["accuracy"] >= best and len(places) == (20 if arm == "by_set" else 25)
        groups = store.examples("small", "icd9")["group"]
        assert len(cells[arm]["external"]["icd9"]) == len(groups) > 0
        share = found["interpolation"]["on_set"]
        whole, moved = cells[arm]["epochs"][-1]["movement/body"], found["interpolation"]["movement"]
        assert moved == pytest.approx(share * whole, rel=1e-3) if arm == "by_one_share" else moved <= 1.001 * whole
    assert len({cells[arm]["summary"]["weights_checksum"] for arm in ("by_set", "by_one_share")}) == 2
    tuned = store.tuning_scores("small", "by_set")
    assert len(tuned) == 2 and all(len(scores) == 1 for scores in tuned.values())
    own, further = results(folder)[1]
    assert (own.setting, further.setting) == ("small", "small, icd9")
    assert own.differences[0].contrast.deciding and not further.differences[0].contrast.deciding
    assert own.num_examples == 84 and further.num_examples == len(groups)
    capsys.readouterr()
    assert main(["table", str(folder)]) == 0
    assert "small, icd9" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    text = file.read_text()
    file.write_text(text.replace('"selected"', '"random"'))
    with pytest.raises(RunError, match="was run with another interpolate"):
        StudyFolder(load_study(file), folder).get(next(cell for cell in names if cell.arm == "by_set"))
    for other, said in {
        'interpolate = "chosen"': "interpolate is one of selected, random, diagonal",
        'interpolate = "random"\nmethod = "lora"': "by_set: interpolate goes with method full",
        'interpolate = "random"\ntask.kind = "regression"': "task.name = 'icd10cm_chapter' needs task.kind",
    }.items():
        file.write_text(re.sub(r'(by_set\]\n)method = "full"\ninterpolate = "\w+"', rf"\1{other}", text))
        with pytest.raises(ConfigError, match=said):
            load_study(file)


@pytest.mark.usefixtures("quiet")
def test_a_study_on_images_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`medmnist.toml` with its data on the command line: every arm runs, and the folder knows which data they were."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, size in {"train": 64, "val": 16, "test": 12}.items():
        arrays[f"{split}_labels"] = draw.permutation(np.arange(size) % 4).reshape(size, 1).astype(np.uint8)
        arrays[f"{split}_images"] = draw.integers(0, 256, (size, 28, 28, 3), dtype=np.uint8)
    np.savez(tmp_path / "made_up.npz", **arrays)
    text = (ROOT / "configs/studies/medmnist.toml").read_text()
    data = ["--data.path", str(tmp_path / "made_up.npz")]
    assert main(["compare", str(write(tmp_path / "whole.toml", text)), *data, "--count"]) == 0
    counted = capsys.readouterr().out
    assert "| tuning | 144 | 108 | 34,560 |" in counted and "| testing | 45 | 35 | 9,600 |" in counted

    text = re.sub(r"= \[([\d.e-]+),.*\]", r"= \1", text)  # the first of several values
    text = text.replace("tune_seeds = 1000", "tune_seeds = []").replace("seeds = 0\n", "seeds = [0]\n")
    small = ["--model.num_layers", "1", "--model.image_size", "28", "--importance.num_samples", "32", "--train.epochs", "1"]
    file, folder = write(tmp_path / "study.toml", text), tmp_path / "folder"
    assert main(["compare", str(file), *data, *small, "--train.precision", "fp32", "--folder", str(folder)]) == 0
    stored, found = results(folder)
    assert stored.overrides[:2] == data
    before = (folder / "study.toml").read_text()
    assert main(["compare", str(file), "--folder", str(folder)]) == 0, "goes on with the keys that it was given"
    assert main(["compare", str(file), *data, "--train.epochs", "2", "--folder", str(folder)]) == 2
    capsys.readouterr()
    assert (folder / "study.toml").read_text() == before, "a start that is refused changes nothing"
    for key, value in {"--seed": "7", "--optimizer.lr": "1", "--test": "false"}.items():
        with pytest.raises(ConfigError, match=rf"{key} has no effect: (the study itself|arms.\w+) sets it"):
            load_study(file, [*data, key, value])
    assert {arm.arm for arm in found[0].arms if arm.correct} == set(load_study(file, data).arms) and len(found[0].arms) == 9
    with pytest.raises(RunError, match=r"another data\.path"):
        cell = next(iter(final_cells(stored, StudyFolder(stored, folder).choose_all())))
        StudyFolder(load_study(file, ["--data.path", "other.npz"]), folder).get(cell)
    capsys.readouterr()
    assert main(["compare", str(file), "--data.paht", "x", "--folder", str(folder)]) == 2
    dist.destroy_process_group()
    assert "data.paht" in capsys.readouterr().err
