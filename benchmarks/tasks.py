"""One run for each kind of task on real data, compared with a baseline without a neural network.

    pip install scikit-learn; python benchmarks/tasks.py image segmentation language

Each kind takes ten minutes on two cores. Each model and each baseline uses the test data once.

`image`: the region of the brain from an MRI patch. Model: DINOv2 ViT-S (configs/mri.toml). Baseline: logistic regression on
16 x 16 pixels.
`segmentation`: grey and white matter of the MNI152 brain in a held-out slab, with a gap to the other slabs. Model: a small
U-Net of MONAI from random weights, since no package has pre-trained ones. Baseline: a normal distribution of intensities for
each tissue.
`language`: the description of an ICD-10-CM code from its chapter, with whole categories held out. Model: a small decoder
from random weights. Baseline: a smoothed bigram model; validation data choose its constant.

Text classification and its baseline are in docs/results/icd.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import machine

from dcft_dist.config.toml import load_config
from dcft_dist.data.tasks import load_task
from dcft_dist.packages import nilearn_file

Row = tuple[str, str, str, float, float]  # task, method, metric, validation, test


def trained(folder: Path, name: str, config: str, *words: str) -> dict[str, Any]:
    """Trains in one process and returns the summary of the run.

    Args:
        folder: of the runs.
        name: of the run.
        config: a configuration file.
        words: further configuration keys, as on the command line.
    """
    common = ["--runs_dir", str(folder), "--name", name, "--engine", "single", "--removal.fractions", "[]"]
    command = [sys.executable, "-m", "dcft_dist.cli", "train", config, *words, *common, "--test_resamples", "0"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return summary


def rows_of(task: str, method: str, summary: dict[str, Any], *metrics: str) -> list[Row]:
    return [(task, method, m, summary["validation"][m], summary["test"][m]) for m in metrics]


# -- image ---------------------------------------------------------------------------------------------------------------


def image(folder: Path) -> list[Row]:
    """The rows of the table for the image task."""
    task = "MRI region (8 classes)"
    rows = []
    for method in ("linear_probe", "dcft"):
        rows += rows_of(task, f"DINOv2, {method}", trained(folder, method, "mri.toml", "--method", method), "accuracy")
    return [*rows, (task, "logistic regression on pixels", "accuracy", *_pixels())]


def _pixels() -> tuple[float, float]:
    """Validation and test accuracy of logistic regression on patches averaged to 16 x 16 pixels."""
    from sklearn.linear_model import LogisticRegression

    data = load_task(load_config("mri.toml"))
    parts = (data.train, data.validation, data.test)
    values = [np.stack([np.asarray(p, dtype=np.float64) / 255 for p in part.inputs]) for part in parts]
    small = [v.reshape(len(v), 16, v.shape[1] // 16, 16, v.shape[2] // 16).mean((2, 4)).reshape(len(v), -1) for v in values]
    models = [LogisticRegression(C=c, max_iter=2000).fit(small[0], data.train.labels) for c in (0.01, 0.1, 1.0, 10.0)]
    best = max(models, key=lambda m: float(m.score(small[1], data.validation.labels)))
    return float(best.score(small[1], data.validation.labels)), float(best.score(small[2], data.test.labels))


# -- segmentation --------------------------------------------------------------------------------------------------------

# First slice and the one after the last of each slab, in mm above the lowest. Slabs of different splits are 4 mm apart.
SLABS = {"train": [(36, 60), (80, 104), (120, 132)], "val": [(64, 76)], "test": [(108, 116)]}
TISSUES = ("none", "grey", "white")


def _brain() -> tuple[Any, Any, Any]:
    """T1 image, tissue (0 none, 1 grey, 2 white) and affine of MNI152 at 1 mm resolution."""
    import nibabel

    names = {key: f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz" for key in ("t1", "gm", "wm")}
    t1, grey, white = (nibabel.load(nilearn_file(name)) for name in names.values())
    tissue = np.stack([np.full(t1.shape, 127.0), grey.get_fdata(), white.get_fdata()]).argmax(0)
    return t1.get_fdata(), tissue, t1.affine


def segmentation(folder: Path) -> list[Row]:
    """The rows of the table for the segmentation task."""
    import nibabel

    t1, tissue, affine = _brain()
    lines = ["image,mask,split,slab"]
    for split, slabs in SLABS.items():
        for low, high in slabs:
            for name, values in (("image", t1.astype(np.float32)), ("mask", tissue.astype(np.uint8))):
                nibabel.save(nibabel.Nifti1Image(values[..., low:high], affine), folder / f"{name}{low}.nii.gz")
            lines.append(f"image{low}.nii.gz,mask{low}.nii.gz,{split},slab{low}")
    (folder / "slabs.csv").write_text("\n".join(lines) + "\n")
    (folder / "unet.toml").write_text(f"""
name = "unet"
method = "full"
[model]
build = "monai.networks.nets.UNet"
head = ["model.2*"]
[model.args]
spatial_dims = 3
in_channels = 1
out_channels = "num_outputs"
num_res_units = 1
channels = [16, 32, 64]
strides = [2, 2]
[task]
name = "own"
kind = "segmentation"
[data]
path = "{folder}/slabs.csv"
modality = "volume"
input = "image"
label = "mask"
split = "split"
group = "slab"
classes = {list(TISSUES)}
patch = [64, 64, 8]
[head_warmup]
max_epochs = 0
[importance]
num_samples = 2
score_batch = 2
[optimizer]
lr = 3e-3
[train]
epochs = 250
global_batch = 3
micro_batch = 3
evaluation_batch = 1
""")
    task, metrics = "tissue of MNI152", ("dice_grey", "dice_white", "dice")
    rows = rows_of(task, "U-Net from random weights", trained(folder, "unet", str(folder / "unet.toml")), *metrics)
    validation, test = (_by_intensity(t1, tissue, split) for split in ("val", "test"))
    return [*rows, *((task, "intensity alone", m, validation[m], test[m]) for m in metrics)]


def _by_intensity(t1: Any, tissue: Any, split: str) -> dict[str, float]:
    """Dice of the most probable tissue, from one normal distribution of intensities for each tissue.

    The distributions are fitted to the training slabs.
    """

    def voxels(name: str) -> tuple[Any, Any]:
        """Intensities and tissues of a split."""
        slices = [slice(*slab) for slab in SLABS[name]]
        return tuple(np.concatenate([v[..., p] for p in slices], -1).ravel() for v in (t1, tissue))  # type: ignore[return-value]

    values, labels = voxels("train")
    log_probabilities = []
    test, truth = voxels(split)
    for c in range(len(TISSUES)):
        own = values[labels == c]
        log_probabilities.append(np.log(len(own)) - np.log(own.std()) - (test - own.mean()) ** 2 / (2 * own.var()))
    predicted = np.argmax(log_probabilities, 0)
    dice = {f"dice_{t}": 2 * np.mean((predicted == c) & (truth == c)) / (np.mean(predicted == c) + np.mean(truth == c))
            for c, t in enumerate(TISSUES) if c}  # fmt: skip
    return {**dice, "dice": float(np.mean(list(dice.values())))}


# -- language ------------------------------------------------------------------------------------------------------------


def language(folder: Path) -> list[Row]:
    """The rows of the table for the language task."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = ["--task.train_per_class", "400", "--task.validation_per_class", "50", "--task.test_per_class", "100"]
    data = load_task(load_config("icd.toml", sizes))
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    for name, part in splits.items():
        chapters = [data.class_names[label] for label in part.labels]
        rows = [{"chapter": c, "text": t, "code": g} for c, t, g in zip(chapters, part.inputs, part.groups, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.WordLevelTrainer(vocab_size=3000, special_tokens=special)
    raw.train_from_iterator([*data.train.inputs, *data.class_names], trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.save_pretrained(folder / "decoder")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=raw.get_vocab_size(), **shape)).save_pretrained(folder / "decoder")
    overrides = ["--method", "full", "--optimizer.lr", "1e-3", "--train.epochs", "6", "--train.global_batch", "32"]
    overrides += [
        "--train.micro_batch",
        "32",
        "--train.precision",
        "fp32",
        "--head_warmup.max_epochs",
        "0",
        "--task.max_tokens",
        "96",
    ]
    overrides += ["--data.path", "", "--data.input", "chapter", "--data.label", "text"]
    overrides += ["--model.weights", str(folder / "decoder")]
    overrides += [word for name in splits for word in (f"--data.{name}", str(folder / f"{name}.jsonl"))]
    summary = trained(folder, "decoder_run", "instructions_7b.toml", *overrides)
    task = "ICD description from chapter"
    ids = {name: [[*tokenizer(t)["input_ids"], 2] for t in part.inputs] for name, part in splits.items()}
    decoder = rows_of(task, "decoder from random weights", summary, "perplexity", "token_accuracy")
    return [*decoder, (task, "bigrams", "perplexity", *_bigrams(ids, raw.get_vocab_size()))]


def _bigrams(ids: dict[str, list[list[int]]], words: int) -> tuple[float, float]:
    """Validation and test perplexity of bigrams that fall back on single words.

    The probability is (count + k p(word)) / (count of the first word + k); validation data choose k.
    """
    single = Counter(w for text in ids["train"] for w in text)
    pairs = Counter(p for text in ids["train"] for p in zip([1, *text], text, strict=False))
    firsts = Counter(first for text in ids["train"] for first in [1, *text][:-1])
    total = sum(single.values())

    def perplexity(name: str, k: float) -> float:
        logs = [
            np.log((pairs[p] + k * (single[p[1]] + 1) / (total + words)) / (firsts[p[0]] + k))
            for text in ids[name]
            for p in zip([1, *text], text, strict=False)
        ]
        return float(np.exp(-np.mean(logs)))

    best = min((0.3, 1.0, 3.0, 10.0, 30.0, 100.0), key=lambda k: perplexity("validation", k))
    return perplexity("validation", best), perplexity("test", best)


KINDS: dict[str, Callable[[Path], list[Row]]] = {"image": image, "segmentation": segmentation, "language": language}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kinds", nargs="+", choices=KINDS)
    rows: list[Row] = []
    for kind in arguments.parse_args().kinds:
        with tempfile.TemporaryDirectory() as folder:
            start = datetime.datetime.now()
            rows += KINDS[kind](Path(folder))
            print(f"{kind}: {(datetime.datetime.now() - start).seconds} s", file=sys.stderr)
    print("| task | method | metric | validation | test |\n|---|---|---|---|---|")
    for task, method, metric, validation, test in rows:
        print(f"| {task} | {method} | {metric} | {validation:.3f} | {test:.3f} |")
    print(f"\n{machine()}; one seed.")


if __name__ == "__main__":
    main()
