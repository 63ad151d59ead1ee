"""The first hour: a configuration from a few answers, a look at the machine, help with examples, completion in a shell."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcft_dist.cli import _parser, main
from dcft_dist.config.toml import find_config, load_config, to_toml
from dcft_dist.data.user_task import user_task
from dcft_dist.screen import marked
from dcft_dist.start.doctor import Finding, examine
from dcft_dist.start.examples import EXAMPLES
from dcft_dist.start.init import Answers, configuration, next_command, patients
from dcft_dist.studies.study import load_study


def pictures(folder: Path, number: int = 24) -> Path:
    draw = np.random.default_rng(0)
    for label, level in (("benign", 60), ("malignant", 120)):
        (folder / label).mkdir(parents=True)
        for i in range(number):
            pixels = draw.integers(0, 90, (32, 32, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


def test_a_folder_of_pictures_becomes_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    assert main(["init", str(file), "--data", str(pictures(tmp_path / "images")), "--gpus", "0"]) == 0
    said = capsys.readouterr().out
    assert "train: " in said and "benign" in said and said.endswith(f"next: dcft train {file}\n")
    config = load_config(file)
    assert (config.name, config.engine, config.model.name) == ("mine", "single", "dinov2_small")
    assert config.data.path == str(tmp_path / "images") and config.task.kind == "single_label"
    assert main(["init", str(file), "--data", str(tmp_path / "images"), "--gpus", "0"]) == 2
    assert f"{file} exists: dcft check {file} --data looks at it again" in capsys.readouterr().err


def table(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("head", "row", "kind", "modality"),
    [
        ("Report,Diagnosis,patient_id", "a long report {i},c{j},p{i}", "single_label", "text"),
        ("prompt,answer", "what is {i},it is the number {i}", "causal_lm", "text"),
        ("image,age", "scans/{i}.png,{i}.5", "regression", "image"),
    ],
)
def test_a_table_becomes_a_configuration(head: str, row: str, kind: str, modality: str, tmp_path: Path) -> None:
    lines = [head, *(row.format(i=i, j=i % 3) for i in range(60))]
    file = table(tmp_path / "rows.csv", "\n".join(lines))
    label = "age" if "age" in head else None
    text = configuration(Answers(file, label=label, model="hub:lab/model", gpus=4), "mine")
    config = load_config(table(tmp_path / "mine.toml", text))
    assert (config.task.kind, config.data.modality, config.engine) == (kind, modality, "fsdp2")
    columns = head.split(",")
    assert (config.data.input, config.data.label, config.data.group) == (
        *columns[:2],
        columns[2] if len(columns) > 2 else None,
    )
    assert config.model.weights == "hub:lab/model" and config.train.precision == "bf16"


@pytest.mark.parametrize(
    ("name", "content", "words", "said"),
    [
        ("odd.csv", "a,b\n1,2\n", [], "--input is missing: which of the columns a, b?"),
        ("odd.csv", "path,b\n1,2\n", ["--label", "c"], "--label c: there is no such column"),
        ("empty.csv", "path,label\n", [], "has no rows"),
        ("notes.docx", "", [], "is neither a folder of images, nor a table"),
        ("nothing.csv", None, [], "nothing.csv"),
        ("masks.csv", "path,mask\na.nii.gz,b.nii.gz\n", [], "masks: start from swin_unetr.toml"),
        ("volumes.csv", "path,label\na.nii.gz,1\n", [], "volumes: start from swin_unetr.toml"),
    ],
)
def test_what_is_no_configuration(
    name: str, content: str | None, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["init", str(tmp_path / "x.toml"), "--data", str(tmp_path / name), "--gpus", "0", *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x.toml").exists()


def test_it_asks_at_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "images")
    assert main(["init", str(tmp_path / "x.toml"), "--gpus", "0"]) == 2
    assert "--data is missing: Where are your data" in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"\n{folder}\n\n"))  # Enter: asked again, and no GPU
    assert main(["init", str(tmp_path / "x.toml")]) == 0
    assert "How many GPUs" in capsys.readouterr().out and load_config(tmp_path / "x.toml").engine == "single"
    monkeypatch.setattr(sys, "stdin", Terminal(f"{folder}\n"))
    assert main(["init", str(tmp_path / "y.toml")]) == 2
    assert "--gpus is missing, and the input has ended" in capsys.readouterr().err


def test_what_lies_beside_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are no images by their names are mentioned, and one folder too deep is found out."""
    folder = pictures(tmp_path / "images")
    for name in ("notes.txt", ".DS_Store", "Thumbs.db"):
        (folder / "benign" / name).write_text("x")
    assert main(["init", str(tmp_path / "x.toml"), "--data", str(folder), "--gpus", "0"]) == 0
    assert f"left out, as it is no image: {folder}/benign/notes.txt\n" in capsys.readouterr().out
    assert main(["init", str(tmp_path / "y.toml"), "--data", str(folder / "benign"), "--gpus", "0"]) == 2
    assert "the images are in it itself. Make them, or name the folder above if benign is a class" in capsys.readouterr().err
    (folder / "malignant/odd.png").write_bytes(b"no picture")
    assert main(["init", str(tmp_path / "z.toml"), "--data", str(folder), "--gpus", "0"]) == 2
    said = capsys.readouterr().err
    assert "malignant/odd.png: cannot be read as an image: it is no picture that Pillow knows" in said
    assert "Replace or remove them" in said
    shutil.rmtree(folder)
    for name in ("benign", "malignant"):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "a.npy", np.zeros((8, 8, 3), np.uint8))
    assert 'format = "image_folder"' in configuration(Answers(folder, gpus=0), "mine")


def test_names_that_may_be_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "images")
    assert main(["init", str(tmp_path / "x.toml"), "--data", str(folder), "--gpus", "0"]) == 0
    said = capsys.readouterr().out
    assert "each picture" not in said and "examples, no groups; " in said
    for file in sorted(folder.rglob("*.png")):
        file.rename(file.with_name(f"{file.parent.name[0]}{int(file.stem) // 3}_{file.name}"))
    assert main(["init", str(tmp_path / "y.toml"), "--data", str(folder), "--gpus", "0"]) == 0
    said = capsys.readouterr().out
    assert "48 file names have only 16 beginnings. They are taken for patients: pictures of one stay in one split." in said
    assert re.search(r"train: \d+ examples in \d+ groups;", said), "the safe choice is the one that is made"
    assert load_config(tmp_path / "y.toml").data.group_pattern == "^([^_]+)_"
    classes = pictures(tmp_path / "classes")
    for file in sorted(classes.rglob("*.png")):
        file.rename(file.with_name(f"{file.parent.name}_{file.name}"))
    assert patients(folder) == ("^([^_]+)_", 16, 48) and patients(classes) is None  # a class is no patient
    words = ["--data", str(folder), "--gpus", "0", "--group-pattern", "^([^_]+)_"]
    assert main(["init", str(tmp_path / "z.toml"), *words]) == 0
    said = capsys.readouterr().out
    assert "each picture" not in said and load_config(tmp_path / "z.toml").data.group_pattern == "^([^_]+)_"
    assert re.search(r"train: \d+ examples in \d+ groups;", said)
    assert '# group_pattern = "^([^_]+)_"' in (tmp_path / "x.toml").read_text()
    assert load_config(tmp_path / "y.toml").optimizer.lr == 2e-5
    plain = user_task(load_config(tmp_path / "z.toml", ["--data.group_pattern", "^(.+)$"]))
    assert plain.caveat == "" and "48 names of files have only 16" in user_task(load_config(tmp_path / "x.toml")).caveat


def test_a_study_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The study that a report names next: its arms have equal budgets, and it can be counted."""
    mine = tmp_path / "mine.toml"
    mine.write_text(configuration(Answers(pictures(tmp_path / "images"), gpus=0), "mine"))
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(load_config(mine)))
    for source, name in ((mine, "a.toml"), (run, "b.toml")):
        file = tmp_path / name
        assert main(["init", str(file), "--study", str(source)]) == 0
        assert capsys.readouterr().out.endswith(
            f"next: dcft compare {file} --count, which counts; then dcft compare {file}\n"
        )
        study = load_study(file)
        assert study.folds == 5 and len(study.seeds) == 5 and not study.resample
        assert {arm: len(study.grid(arm)) for arm in study.arms} == {
            "probe": 1,
            "full": 3,
            "l2_sp": 3,
            "dcft": 3,
            "random_matched": 3,
        }
    assert main(["compare", str(file), "--count"]) == 0
    assert re.search(r"\| all \| 61 \|.*\(a processor\) [\d.]+, besides", capsys.readouterr().out, re.DOTALL)
    packaged = tmp_path / "icd_study.toml"
    assert main(["init", str(packaged), "--study", str(find_config("icd.toml"))]) == 0 and load_study(packaged).resample
    capsys.readouterr()
    for words, said in {
        ("--data", "x"): "--data: a study has the data and the model of",
        (): "task.kind is 'single_label', not 'regression'",
    }.items():
        mine.write_text('name = "m"\n[task]\nkind = "regression"\n[data]\npath = "x.csv"\nmodality = "text"\n')
        assert main(["init", str(tmp_path / "c.toml"), "--study", str(mine), *words]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "c.toml").exists()
    assert main(["compare", str(mine)]) == 2
    assert f"To compare methods on it: dcft init mine_study.toml --study {mine}" in capsys.readouterr().err


def test_the_next_command() -> None:
    assert next_command(Path("a.toml"), 4, slurm=False) == "torchrun --nproc-per-node 4 -m dcft_dist.cli train a.toml"
    assert next_command(Path("a.toml"), 4, slurm=True) == "dcft submit a.toml --gpus-per-node 4 --time 4:00:00"


def test_the_doctor_looks_at_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {finding.part: finding for finding in examine(tmp_path / "runs")}
    assert set(found) == {"torch", "GPU", "NCCL", "Slurm", "runs", "/dev/shm", "network"}
    assert found["runs"].verdict == "good" and f"{tmp_path}: " in found["runs"].text and "locks work" in found["runs"].text
    assert main(["doctor", "--folder", str(tmp_path)]) == int(any(f.verdict == "bad" for f in found.values()))
    assert capsys.readouterr().out.count("\n") == 7


def test_the_doctor_survives_a_broken_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that fail, a folder without locks: each is a line."""
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact' >&2; exit 1\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    for name in ("sinfo", "sbatch"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = next(f for f in examine(tmp_path) if f.part == "Slurm")
    assert slurm == Finding(
        "Slurm",
        "note",
        "no cluster answers (slurm_load_partitions: Unable to contact). Only a cluster needs it: is this a login node?",
    )
    runs = next(f for f in examine(Path("/proc/self/runs")) if f.part == "runs")
    assert runs.verdict == "bad"


def test_every_example_is_a_command() -> None:
    parser, commands = _parser()
    assert EXAMPLES.keys() == commands.keys()
    for name, command in commands.items():
        text = command.format_help()
        for example in EXAMPLES[name]:
            assert f"\n  {example}\n" in text
            words = shlex.split(example.split(" > ")[0])
            assert words[:2] == ["dcft", name]
            options, _ = parser.parse_known_args(words[1:])
            assert options.command == name


def test_help_imports_no_torch() -> None:
    code = "import sys; from dcft_dist.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-V"])
    assert capsys.readouterr().out.startswith("dcft_dist ")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["dcft", "tra"], {"train"}),
        (["dcft", "train", "--optimizer.b"], {"--optimizer.betas", "--optimizer.build"}),
        (["dcft", "train", "--optimizer.name", ""], {"sgd", "adamw"}),
    ],
)
def test_bash_completes(words: list[str], wanted: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "dcft.bash").write_text(capsys.readouterr().out)
    script = f"source {tmp_path}/dcft.bash; COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; "
    script += '_shtab_dcft; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert wanted <= set(done.stdout.split()), done.stdout
    assert main(["completion", "zsh"]) == 0
    assert "--optimizer.lr" in capsys.readouterr().out


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert marked("dcft: error:", "bold red", Terminal()) == "\x1b[1;31mdcft: error:\x1b[0m"
    assert marked("dcft: error:", "bold red", io.StringIO()) == "dcft: error:"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in marked("dcft: error:", "bold red", Terminal())
