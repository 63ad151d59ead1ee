"""Real weights and data laid out as a user has them: a folder of transformers, a table, a folder of images."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.tasks import load_task
from dcft_dist.packages import minilm_folder, nilearn_file

from .debian import apt_install


def minilm_copy(folder: Path, layers: int) -> Path:
    """The first layers of MiniLM with its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    options = {"num_hidden_layers": layers, "add_pooling_layer": False, "local_files_only": True}
    AutoModel.from_pretrained(minilm_folder(), **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True).save_pretrained(folder)
    return folder


def drug_table(file: Path, rows: int, split: str = "train") -> Path:
    """Reviews of drugs with their ratings as CSV."""
    many = ["--task.train_per_class", "999", "--task.test_per_class", "999"]
    data = getattr(load_task(load_config("icd.toml", ["--task.name", "drug_review", *many])), split)
    step = len(data) // rows
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["review", "rating", "drug"])
        for i in range(0, rows * step, step):
            writer.writerow([data.inputs[i], ["negative", "neutral", "positive"][data.labels[i]], data.groups[i]])
    return file


def install_atlas() -> None:
    """The atlas of the MRI task is a Debian package."""
    if not Path("/usr/share/mricron/templates/aal.nii.gz").exists():
        assert (problem := apt_install("mricron-data")) == "", problem


def mri_folder(folder: Path, per_class: int) -> Path:
    """MRI patches as PNG files, a folder for each region; the place is in the file's name."""
    install_atlas()
    data = load_task(load_config("mri.toml", ["--task.train_per_class", str(per_class)]))
    for i, (patch, label) in enumerate(zip(data.train.inputs, data.train.labels, strict=True)):
        place = folder / data.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(place / f"{data.train.groups[i]}_{i}.png")
    return folder


def word_tokenizer(folder: Path, words: int) -> int:
    """A tokenizer of whole words, trained on ICD descriptions and chapters; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    task = load_task(load_config("icd.toml"))
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    texts = [*task.train.inputs, *task.class_names * 99]
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=words, special_tokens=special))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return raw.get_vocab_size()


def tiny_decoder(folder: Path, words: int = 600, tied: bool = False) -> Path:
    """The architecture of Llama, small and with random weights, and a word tokenizer trained on ICD descriptions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = word_tokenizer(folder, words)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_encoder(folder: Path, words: int = 600) -> Path:
    """The architecture of BERT, small and with random weights: a step or a checkpoint of it takes milliseconds."""
    from transformers import BertConfig, BertModel

    vocabulary = word_tokenizer(folder, words)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=vocabulary, **sizes), add_pooling_layer=False).save_pretrained(folder)
    return folder


def instructions(file: Path, number: int) -> Path:
    """ICD descriptions and the categories of their codes as JSON lines."""
    task = load_task(load_config("icd.toml", ["--task.train_per_class", str(1 + number // 21)]))
    rows = [
        {"prompt": f"Chapter of: {text}", "answer": task.class_names[label], "code": group}
        for text, label, group in zip(task.train.inputs, task.train.labels, task.train.groups, strict=True)
    ]
    file.write_text("\n".join(map(json.dumps, rows[:number])))
    return file


def slabs(folder: Path, number: int = 6, side: int = 40) -> Path:
    """Slabs of the MNI152 brain with their tissues (0 none, 1 grey, 2 white) as NIfTI files, and their table."""
    import nibabel
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    names = {key: f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz" for key in ("t1", "gm", "wm")}
    t1, grey, white = (nibabel.load(nilearn_file(name)) for name in names.values())
    tissue = np.stack([np.full(t1.shape, 127.0), grey.get_fdata(), white.get_fdata()]).argmax(0)
    rows = []
    for i in range(number):
        middle = [t1.shape[0] // 2, t1.shape[1] // 2, 50 + 8 * i]
        place = tuple(slice(m - s // 2, m + s // 2) for m, s in zip(middle, (side + 4 * (i % 2), side, 8), strict=True))
        for kind, values in (("image", t1.get_fdata()), ("mask", tissue)):
            part = nibabel.Nifti1Image(values[place].astype(np.float32 if kind == "image" else np.uint8), t1.affine)
            nibabel.save(part, folder / f"{kind}{i}.nii.gz")
        split = ["train", "train", "train", "train", "val", "test"][i % 6]
        rows.append(f"image{i}.nii.gz,mask{i}.nii.gz,{split},slab{i}")
    (folder / "slabs.csv").write_text("\n".join(["image,mask,split,patient", *rows]) + "\n")
    return folder / "slabs.csv"


def dicom_series(folder: Path, volume: Path) -> Path:
    """A NIfTI volume (axes along those of the body) as a folder of DICOM slices, one for each step along its last axis."""
    import nibabel
    import numpy as np
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    image = nibabel.load(volume)
    values, affine, series = image.get_fdata(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine, generate_uid()
    for k in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, pydicom.uid.MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        slice_ = pydicom.Dataset()
        slice_.file_meta = meta
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.InstanceNumber, slice_.Modality = series, k + 1, "MR"
        slice_.ImagePositionPatient = (affine @ [0, 0, k, 1])[:3].tolist()
        slice_.ImageOrientationPatient = [*np.sign(affine[:3, 0]).tolist(), *np.sign(affine[:3, 1]).tolist()]
        slice_.PixelSpacing = [abs(affine[1, 1]), abs(affine[0, 0])]
        slice_.SliceThickness = abs(affine[2, 2])
        pixels = np.rint(values[:, :, k].T).astype(np.uint16)  # rows run along the second axis
        slice_.Rows, slice_.Columns = pixels.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit = 15
        slice_.PixelData = pixels.tobytes()
        slice_.save_as(folder / f"slice{k:03}.dcm", enforce_file_format=True)
    return folder
