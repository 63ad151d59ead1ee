"""The sections `[task]` and `[data]`: what is learned, from which examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .section import Count, Fraction, Positive, Section, Seed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of each channel, values from 0 to 1


class Task(Section):
    """The downstream task and its data."""

    name: Literal["icd10cm_chapter", "drug_review", "mri_region", "own"] = Field(
        "icd10cm_chapter",
        description="`icd10cm_chapter`: description of an ICD-10-CM code -> its chapter, 21 classes. `drug_review`: "
        "review of a drug -> negative, neutral or positive. `mri_region`: patch of an MRI slice -> region of the brain, "
        "8 classes. `own`: the data of `[data]`.",
    )
    kind: Literal["single_label", "multi_label", "regression", "causal_lm", "segmentation"] = Field(
        "single_label",
        description="`single_label`: one of several classes. `multi_label`: several findings, each there or not. "
        "`regression`: a number, or a grade. `causal_lm`: the answer to an instruction (`data.label` to `data.input`). "
        "`segmentation`: a class for each voxel (`data.label` is the column of the masks).",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="`single_label`: weight of each class in the loss; `balanced`: all classes count the same."
    )
    loss: str | None = Field(
        None,
        description="Import path of a loss of yours to train with: (outputs in float32 [size, ...], labels [size, ...]) -> "
        "[size]. The metric `loss` stays that of the kind.",
    )
    metrics: list[str] = Field(
        [],
        description="Import paths of functions that give further metrics: (what is kept of each example [size, ...] in "
        "float64, such as logits; labels [size, ...]) -> name -> number, the higher the better.",
    )
    train_per_class: Count = Field(150, description="Training texts of each class, at most.")
    validation_per_class: Count = Field(50, description="Validation texts of each class, at most.")
    test_per_class: Count = Field(100, description="Test texts of each class, at most.")
    split_seed: Seed = Field(
        1, description="Seed of the split by group (3-character category; drug) and of the draw of texts."
    )
    sample_seed: Seed | None = Field(
        None, description="Draws other training texts from the training groups; validation and test stay. Absent: none."
    )
    max_tokens: Count = Field(48, description="Longer texts are cut to this many tokens.")


class Data(Section):
    """The user's data, for `task.name = "own"` (docs/models.md)."""

    format: Literal["table", "image_folder", "medmnist", "dataset", "python"] = Field(
        "table",
        description="`table`: CSV, TSV, Parquet or JSON lines with a row for each example. `image_folder`: a folder for "
        "each class, within `train`, `validation` and `test` or without. `medmnist`: an .npz file with images and labels. "
        "`dataset`: what `datasets` saved to disk. `python`: a function of yours (`build`).",
    )
    path: str | None = Field(
        None, description="The file or folder with all splits; relative paths in a table are relative to its folder."
    )
    train: str | None = Field(None, description="`table`: file of the training split, where splits have files of their own.")
    validation: str | None = Field(None, description="`table`: file of the validation split.")
    test: str | None = Field(None, description="`table`: file of the test split.")
    build: str | None = Field(
        None,
        description="`python`: import path of a function without arguments that returns rows, or split -> rows; a row is a "
        "dictionary with the columns below.",
    )
    modality: Literal["image", "text", "volume", "own"] = Field(
        "image", description="What the inputs are; `own`: whatever `collate` makes batches of."
    )
    collate: str | None = Field(
        None,
        description="modality own: import path of a function of yours, [input of each example] -> the model's arguments by "
        "name, tensors [size, ...]. For causal_lm: [(input, answer)] -> those and `labels` [size, tokens], -100 where "
        "nothing is learned.",
    )
    input: str | list[str] = Field(
        "input",
        description="Column of the input: a text; path of an image or .npy file; an array. Of volumes also several columns: "
        "files on one grid, which become the channels.",
    )
    label: str | list[str] = Field(
        "label", description="Column of the label; several for multi_label: 1, 0, or empty for unknown."
    )
    template: str = Field("{input}\n", description="causal_lm: what the model is given; `{input}` is the instruction.")
    group: str | None = Field(
        None, description="Column of what must not be split: patient, scanner, site. Absent: every example for itself."
    )
    group_pattern: str | None = Field(
        None, description="`image_folder`: regular expression whose first group in the file's name is the patient."
    )
    split: str | None = Field(None, description="Column that says `train`, `validation` or `test`.")
    validation_share: Fraction = Field(0.15, description="Share of the groups that validates, where there is no such split.")
    test_share: Fraction = Field(0.2, description="Share of the groups that tests, where there is no such split.")
    classes: list[str] = Field([], description="Classes in their order; absent: those of the training data, sorted.")
    patch: list[Count] = Field(
        [96, 96, 96],
        description="Volumes: size of a training patch, and of a window that is evaluated; 2-D: two numbers. Where a whole "
        "volume has a label, the size it is cut or filled up to.",
    )
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.25, description="segmentation: overlap of neighbouring windows."
    )
    spacing: list[Positive] | None = Field(None, description="Volumes: mm of a voxel along each axis; absent: unchanged.")
    window: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Volumes: intensities that become 0 and 1 (CT); absent: mean 0, deviation 1."
    )
    cache: bool = Field(True, description="Whether volumes stay in memory once they have been read.")
    check: bool = Field(True, description="Whether every image is read once before the run begins.")
    mean: list[float] = Field(list(IMAGENET_MEAN), description="Mean of each channel, where the model's folder says none.")
    std: list[Positive] = Field(list(IMAGENET_STD), description="Standard deviation of each channel, likewise.")
    processor: bool = Field(
        False,
        description="Whether images are resized and cropped as the model's library does, by what is said beside the weights "
        "(`preprocessor_config.json`, `config.json` of timm, `open_clip_config.json`); else whole images become squares.",
    )
    transform: str | None = Field(
        None,
        description="Import path of a function that makes a random variant of a training image ([channels, side, side], "
        "before normalisation) or patch ({image: [channels, *patch], mask: [1, *patch]}, normalised): yours, or one of "
        "MONAI, with `transform_args`.",
    )
    transform_args: dict[str, Any] = Field({}, description="Keyword arguments that make it; absent: it is called as it is.")

    def sources(self) -> list[str]:
        """What is given of the keys that can say where the data are."""
        fitting = {"python": ("build",), "table": ("path", "train", "validation", "test")}.get(self.format, ("path",))
        return [key for key in fitting if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _groups_can_be_found(self) -> Data:
        if self.group_pattern and self.format != "image_folder":
            raise ValueError(
                f"group_pattern is for format = 'image_folder', not for '{self.format}': name a column as group"
            )
        if (self.collate is None) == (self.modality == "own"):
            raise ValueError("modality = 'own' and collate go together")
        if self.group and self.format in ("image_folder", "medmnist"):
            raise ValueError(f"format = '{self.format}' has no columns, so no group = '{self.group}'")
        return self
