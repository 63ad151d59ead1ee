"""The typed, frozen schema of a run's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic.fields import FieldInfo

from .method import HeadWarmup, Importance, Lora, Penalty, Removal, Selection
from .model import Model
from .section import Count, ImportPath, Positive, Section, Seed
from .task import Data, Task
from .training import Checkpoint, Optimizer, Sharding, Train


class Config(Section):
    """Keys of the whole run."""

    name: str = Field(description="Name of the run's directory.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    method: Literal["dcft", "equal_displacement", "full", "linear_probe", "bitfit", "lora", "lora_dcft"] = Field(
        "dcft",
        description="`dcft`: `penalty.factor` multiplies the set of `[selection]`, `penalty.rest_factor` the other eligible "
        "weights. Factor 0 freezes the set; factor 1 with rest_factor 0 is sparse fine-tuning. `equal_displacement`: a "
        "control: the step of all body weights together is shortened to the length that it would have under dcft. `full`: "
        "no penalty. `linear_probe`: trains only the head (the warm-up). `bitfit`: trains the biases of the body, and the "
        "head. `lora`: trains the adapters of `[lora]` and the head; the adapters are merged at the end. `lora_dcft`: the "
        "same, and the weights of `lora.beside`, of which a set is selected and penalised as under `dcft`.",
    )
    engine: Literal["single", "ddp", "fsdp2", "fsdp1", "deepspeed"] | ImportPath = Field(
        "fsdp2",
        description="How the model is distributed over the ranks (docs/engines.md), or the import path of your own engine, "
        "`package.module:Class`.",
    )
    seed: Seed = Field(0, description="Seed of the new head, the data order, dropout and random sets.")
    import_roots: list[str] = Field(
        [], description="Folders with your own modules, for `model.build` and the other keys with import paths."
    )
    runs_dir: str = Field("runs", description="Directory of all runs.")
    timeout_s: Positive = Field(600.0, description="Seconds that a collective waits for a missing rank.")
    until: Literal["score", "select", "train"] = Field(
        "train",
        description="Last phase of the run. Start the run again with a later phase to continue. `score` saves the scores to "
        "a file.",
    )
    test: bool = Field(True, description="Whether to evaluate on the test data, once, at the end.")
    test_resamples: Annotated[int, Field(ge=0)] = Field(
        1000,
        description="Bootstrap resamples of the test groups for confidence intervals of the test metrics; 0: no intervals.",
    )
    start_from: str | None = Field(
        None,
        description="Directory of another run with the same task, model and seed. This run takes its head, and also its "
        "scores and fundamental set where the settings that determine them are equal.",
    )
    max_attempts: Count = Field(
        3,
        description="The run counts as failed after this many failed starts in a row from the same point: the last "
        "checkpoint, the fundamental set, the warmed-up head, or the beginning. A preempted start does not count.",
    )
    log_every: Count = Field(10, description="Steps between log lines.")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"],
        description="Where curves are shown. `tensorboard`: `tensorboard/` in the run's folder. `wandb`: Weights & Biases, "
        "offline in the run's folder unless WANDB_MODE says otherwise. `mlflow`: the folder `mlruns` in `runs_dir`, or "
        "MLFLOW_TRACKING_URI. An interrupted run goes on under its id.",
    )
    private: bool = Field(
        False, description="Whether only you can read the run's files; `predictions.csv` has the groups, such as patients."
    )
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
    def level(self) -> Literal["gradient", "update"]:
        """The penalty level, `gradient` or `update`, with `auto` resolved."""
        if self.penalty.level != "auto":
            return self.penalty.level
        return "gradient" if self.optimizer.name == "sgd" and not self.optimizer.decays else "update"

    @property
    def evaluation_batch(self) -> int:
        """Examples in one forward pass of one rank during evaluation; 1 for segmentation (whole volumes)."""
        return 1 if self.task.kind == "segmentation" else self.train.evaluation_batch

    @property
    def packs_one_row(self) -> bool:
        """Whether packed texts share one row, however long: flash attention tells texts apart in a single row only."""
        return "flash" in str(self.model.args.get("attn_implementation"))

    @property
    def uses_set(self) -> bool:
        """Whether the method treats a selected set of weights differently from the others."""
        return self.method in ("dcft", "equal_displacement", "lora_dcft")

    @property
    def has_adapters(self) -> bool:
        """Whether the method trains adapters, and only part of the body besides."""
        return self.method in ("lora", "lora_dcft")

    @property
    def uses_scores(self) -> bool:
        """Whether weights are scored: for a set, or for levels of the pull."""
        return self.uses_set or self.optimizer.pull_by_importance > 0.0

    @model_validator(mode="after")
    def _clipping_is_explicit(self) -> Config:
        order, gradient = self.train.clip_order, self.level == "gradient"
        if (self.train.clip_grad_norm is None) != (order is None):
            raise ValueError("train.clip_grad_norm and train.clip_order go together: give both or neither")
        if order == "before_penalty" and gradient and self.penalty.where == "before":
            raise ValueError(
                "train.clip_order = 'before_penalty' needs penalty.where = 'after': with 'before' a hook multiplies the "
                "gradients before they can be clipped"
            )
        if order == "after_penalty" and not gradient:
            raise ValueError(
                "train.clip_order = 'after_penalty' has no meaning at the update level, which follows the step: "
                "use 'before_penalty'"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _own_if_data_are_given(cls, values: Any) -> Any:
        """Data mean the user's own task, if none is named; the default would train on the packaged data in silence."""
        if isinstance(values, dict) and isinstance(data := values.get("data"), dict):
            task = values.get("task", {})
            if any(data.get(key) for key in ("path", "train", "validation", "test", "build")) and isinstance(task, dict):
                return {**values, "task": {"name": "own", **task}}
        return values

    @model_validator(mode="after")
    def _engine_can(self) -> Config:
        sharding, engine = self.sharding, self.engine
        if sharding.replicas > 1 and engine not in ("fsdp2", "fsdp1"):
            raise ValueError(f"sharding.replicas is for the engines fsdp2 and fsdp1, not for {engine}")
        if sharding.tensor_parallel > 1 and (engine != "fsdp2" or sharding.replicas > 1):
            raise ValueError("sharding.tensor_parallel is for the engine fsdp2, without sharding.replicas")
        if sharding.tensor_parallel > 1 and self.train.compile and self.train.activation_checkpointing == "blocks":
            raise ValueError(
                "train.compile with sharding.tensor_parallel needs train.activation_checkpointing = 'none' or 'selective'"
            )
        if sharding.offload and (engine in ("single", "ddp") or (engine == "deepspeed" and sharding.zero_stage == 0)):
            raise ValueError("sharding.offload needs an engine that shards: fsdp2, fsdp1, or deepspeed at stage 1 to 3")
        if self.has_adapters and (engine == "fsdp1" or sharding.tensor_parallel > 1):
            raise ValueError(f"method '{self.method}' is not for the engine fsdp1, nor for sharding.tensor_parallel")
        freezes = self.has_adapters or self.method == "bitfit"
        if self.has_adapters and engine == "deepspeed" and sharding.offload:
            raise ValueError(f"method '{self.method}' is not for deepspeed with sharding.offload")
        if freezes and engine == "deepspeed" and self.train.precision == "bf16":
            raise ValueError(
                f"method '{self.method}' needs train.precision = 'fp32' under deepspeed, which would round the frozen "
                "weights to bfloat16; or use the engine fsdp2"
            )
        if engine == "deepspeed" and self.method == "equal_displacement":
            raise ValueError("method 'equal_displacement' is not available for deepspeed")
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
            raise ValueError("data.transform is for images: it needs data.modality = 'image' or 'volume'")
        columns = self.data.input
        if isinstance(columns, list) and not 0 < len(columns) == len(set(columns)):
            raise ValueError(f"data.input is {columns}: give at least one column, each only once")
        if isinstance(columns, list) and self.data.modality != "volume":
            raise ValueError("several columns in data.input are the channels of a volume: set data.modality = 'volume'")
        if self.data.processor and (self.data.modality != "image" or self.task.name != "own"):
            raise ValueError("data.processor is for task.name = 'own' with data.modality = 'image'")
        if self.task.name == "own":
            if self.task.external_tests:
                raise ValueError("task.external_tests are for built-in tasks; name your files in data.external_tests")
            if not self.data.sources():
                raise ValueError(f"task.name = 'own' needs data: data.{'build' if self.data.format == 'python' else 'path'}")
            if self.task.kind == "segmentation" and self.data.modality != "volume":
                raise ValueError("task.kind = 'segmentation' needs data.modality = 'volume'")
            if self.data.modality == "volume" and (
                self.task.kind == "causal_lm" or self.data.format not in ("table", "python")
            ):
                raise ValueError(
                    "data.modality = 'volume' needs data.format = 'table' or 'python', and a label that is not a text"
                )
            if self.task.kind == "segmentation" and (self.data.format != "table" or len(self.data.classes) < 2):
                raise ValueError("segmentation needs data.format = 'table' and data.classes, the background first")
            if isinstance(self.data.label, list) != (self.task.kind == "multi_label"):
                raise ValueError("data.label is a list of columns for task.kind = 'multi_label', and one column otherwise")
            return self
        if self.data.folds:
            raise ValueError("data.folds are for task.name = 'own'")
        if self.data.sources():
            raise ValueError(
                f"task.name = '{self.task.name}' has data of its own, and [data] names others: set task.name = 'own', or "
                "leave out data.path, train, validation, test and build"
            )
        if self.task.kind != "single_label":
            raise ValueError(f"task.name = '{self.task.name}' needs task.kind = 'single_label'")
        if self.data.external_tests:
            raise ValueError("data.external_tests are for task.name = 'own'; built-in tasks have task.external_tests")
        if self.task.external_tests and self.task.name != "icd10cm_chapter":
            raise ValueError("task.external_tests = ['icd9'] is for task.name = 'icd10cm_chapter'")
        if self.model.name == "own":
            return self
        if (self.model.name == "dinov2_small") != (self.task.name in IMAGE_TASKS):
            raise ValueError(f"model.name = '{self.model.name}' cannot read the inputs of task.name = '{self.task.name}'")
        return self

    @model_validator(mode="after")
    def _varies_what_it_can(self) -> Config:
        if self.train.calibrate and self.task.kind not in ("single_label", "multi_label"):
            raise ValueError("train.calibrate is for task.kind = 'single_label' and 'multi_label'")
        steps = [key for key in ("ema", "mixup", "cutmix", "max_steps") if getattr(self.train, key)]
        if self.method == "linear_probe" and steps:
            raise ValueError(f"train.{steps[0]} is for fine-tuning, and method = 'linear_probe' has none")
        if self.train.mixup or self.train.cutmix:
            images = self.data.modality in ("image", "volume") if self.task.name == "own" else self.task.name in IMAGE_TASKS
            if not images or self.task.kind not in ("single_label", "multi_label"):
                raise ValueError("train.mixup and train.cutmix are for images or volumes with classes or findings")
        if self.data.packing and (self.task.kind != "causal_lm" or self.data.modality != "text" or self.task.loss):
            raise ValueError("data.packing is for task.kind = 'causal_lm' with texts, and without task.loss")
        if self.data.augment != "none" or self.data.flip:
            if self.data.transform:
                raise ValueError("data.transform stands in place of data.augment and data.flip: give one or the other")
            if self.data.modality not in ("image", "volume") or self.task.name != "own":
                raise ValueError("data.augment and data.flip are for your own images and volumes")
        return self

    @model_validator(mode="after")
    def _factor_can_change(self) -> Config:
        if self.penalty.schedule == "learned" and self.level != "update":
            raise ValueError("penalty.schedule = 'learned' is for the update level, which does not change the gradient")
        if self.penalty.schedule != "constant" and self.method not in ("dcft", "lora_dcft"):
            raise ValueError(f"penalty.schedule has no meaning for method = '{self.method}'")
        return self

    @model_validator(mode="after")
    def _pull_fits(self) -> Config:
        optimizer = self.optimizer
        changes = optimizer.pull_by_importance or optimizer.pull_levels != "scores" or optimizer.pull_selective
        if changes and not optimizer.pull_to_start:
            raise ValueError("optimizer.pull_* change the pull: set optimizer.pull_to_start too")
        if optimizer.pull_levels == "permuted" and not optimizer.pull_by_importance:
            raise ValueError("optimizer.pull_levels needs optimizer.pull_by_importance: without it there are no levels")
        if optimizer.pull_by_importance and self.method not in ("full", "dcft", "equal_displacement"):
            raise ValueError(
                f"optimizer.pull_by_importance is for methods full, dcft and equal_displacement, not for '{self.method}'"
            )
        rate = 1.0 if optimizer.pull_selective else optimizer.lr
        largest = rate * optimizer.pull_to_start * (1.0 + optimizer.pull_by_importance)
        if largest > 1.0:
            factors = "" if optimizer.pull_selective else "lr x "
            raise ValueError(
                f"optimizer.pull_to_start: {largest:.3g} of the way to the start at each step ({factors}pull_to_start x "
                "(1 + pull_by_importance)) throws weights past it: it must be at most 1"
            )
        return self

    @model_validator(mode="after")
    def _trains_beside_adapters(self) -> Config:
        if self.method == "lora_dcft" and not self.lora.beside:
            raise ValueError("method 'lora_dcft' needs lora.beside: adapters themselves are never scored")
        if self.method == "lora_dcft" and self.penalty.unscored_factor != 1.0:
            raise ValueError(
                "penalty.unscored_factor would slow down the adapters too: leave it at 1 for method = 'lora_dcft'"
            )
        if self.lora.beside and not self.has_adapters:
            raise ValueError(f"lora.beside has no meaning for method = '{self.method}'")
        return self

    @model_validator(mode="after")
    def _can_prune(self) -> Config:
        epochs, rounds = self.importance.after_epochs, self.importance.rounds
        if epochs % rounds:
            raise ValueError(f"importance.rounds = {rounds} does not divide importance.after_epochs = {epochs}")
        if epochs and self.engine == "deepspeed":
            raise ValueError("importance.after_epochs is not available for deepspeed")
        if rounds > 1 and (self.selection.fraction == "auto" or not epochs):
            raise ValueError("importance.rounds needs importance.after_epochs, and a number as selection.fraction")
        if rounds > 1 and self.importance.criterion in ("fisher", "removal", "random"):
            raise ValueError(
                f"importance.rounds prunes weights to zero, but the criterion '{self.importance.criterion}' does not rank "
                "zero weights last: use 'obs', 'taylor_squared', 'taylor' or 'magnitude'"
            )
        return self

    @model_validator(mode="after")
    def _has_phases(self) -> Config:
        if self.until != "train" and not self.uses_set:
            raise ValueError(
                f"until = '{self.until}' has no meaning for method = '{self.method}', which selects no weights: use 'train'"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        if self.importance.num_samples % self.importance.score_batch:
            raise ValueError(
                f"importance.num_samples = {self.importance.num_samples} is no multiple of importance.score_batch = "
                f"{self.importance.score_batch}"
            )
        return self


IMAGE_TASKS = ("mri_region", "shoulder_exercise")  # with grey images of their own

# Keys that say where something lies on this machine. What lies there is compared instead, between ranks and between starts.
LOCAL_PATHS: tuple[str, ...] = ("runs_dir", "start_from", "import_roots", "data.path", "data.train", "data.validation")
LOCAL_PATHS += ("data.test", "data.external_tests", "model.weights")


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Yields (key, class) for each section of the schema; the top level has the key ''."""
    yield "", Config
    for key, field in Config.model_fields.items():
        if is_section(field):
            yield key, field.annotation  # type: ignore[misc]


def is_section(field: FieldInfo) -> bool:
    """Whether a field of the schema is a section with its own keys."""
    return is_table(field.annotation)


def is_table(kind: Any) -> bool:
    """Whether a type is that of a table with its own keys."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)
