"""``raydetr export``: write a checkpoint's model in another format, then load what was written and compare."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from raydetr import config as settings
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import coco_metrics, mask_metrics
from raydetr.export import huggingface, onnx, torch_files
from raydetr.export.checks import Forward, compare, sample_batches
from raydetr.model.detr import DETR
from raydetr.predict.score import detect_with, trained_with
from raydetr.weights.checkpoint import read_checkpoint
from raydetr.weights.fitting import load
from raydetr.weights.official import located

FORMATS = ("onnx", "transformers", "official", "safetensors", "torchscript")
TOLERANCE = {"onnx": 1e-4, "transformers": 1e-5, "official": 1e-6, "safetensors": 0.0, "torchscript": 1e-5}


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        path: The file or folder.
        difference: Largest difference of a class probability, a relative box coordinate or the probability of a pixel of a mask; None for
            a reduced precision.
        AP: AP of the checkpoint and of the export on the validation set, of ``boxes`` and, for a model and a data set with masks, of
            ``masks``; None for an exact export.
        notes: Lines for the user about how the checkpoint was read.
    """

    path: Path
    difference: float | None
    AP: Mapping[str, tuple[float | None, float | None]] | None
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return the result on one line, after the notes."""
        if self.AP:
            shown = {name: ["-" if each is None else f"{each:.4f}" for each in pair] for name, pair in self.AP.items()}
            costs = ", ".join(f"of {name} {after} ({before} before)" for name, (before, after) in shown.items())
            result = f"AP on the validation set {costs}"
        else:
            result = f"the same outputs as the checkpoint's, to {self.difference:.0e}"
        return "\n".join([*self.notes, f"{self.path}: {result}"])


def export(
    checkpoint: str | Path,
    out: str | Path,
    to: str,
    *layers: Mapping[str, Any],
    images: Sequence[Path] = (),
    precision: Literal["fp32", "fp16"] = "fp32",
    quantize: Literal["none", "int8"] = "none",
) -> Exported:
    """Export a checkpoint, load what was written, and compare it with the checkpoint on real images.

    Args:
        checkpoint: Path or URI of the checkpoint.
        out: File to write; a folder for ``transformers``.
        to: One of ``FORMATS``.
        layers: Settings (``data.*``) that override those that the checkpoint was trained with.
        images: Image files to compare on; default: the validation images.
        precision: ``fp16`` writes half-precision weights (ONNX only).
        quantize: ``int8`` quantizes the weights of matrix products (ONNX only).

    Returns:
        The path, and how much the export differs from the checkpoint.

    Raises:
        UserError: The format does not support this model, a package is missing, ``out`` exists, or the outputs differ.
    """
    out, reduced = Path(out), precision != "fp32" or quantize != "none"
    if to not in FORMATS:
        raise UserError(f"--to: {to!r} is not one of {', '.join(FORMATS)}")
    if reduced and to != "onnx":
        raise UserError(f"--precision and --quantize are for --to onnx, not {to}")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name")
    model = load(checkpoint)
    config = settings.load_config(trained_with(checkpoint, model), _data_set(checkpoint), *layers)
    batches = [] if reduced else sample_batches(config.data, images)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            written = Path(folder) / out.name
            forward = _write(model, written, to, config.data, precision, quantize)
            difference = None if reduced else compare(model, forward, batches, TOLERANCE[to], f"{to} export of {checkpoint}")
            scores = _scores(model, written, config) if reduced else None
            shutil.move(written, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror or error})") from None
    return Exported(out, difference, scores, model.notes)


def _data_set(checkpoint: str | Path) -> dict[str, Any]:
    """Return the paths of the data set that the checkpoint was trained on, by setting."""
    known = settings.flatten(read_checkpoint(located(checkpoint)).get("settings", {}))
    return {name: known[name] for name in settings.PATH_SETTINGS if name.startswith("data.") and known.get(name)}


def _write(model: DETR, file: Path, to: str, data: settings.Data, precision: Any, quantize: str) -> Forward:
    """Write the export and return the model that was loaded from it."""
    if to == "onnx":
        onnx.write_onnx(model, file, data, precision, quantize == "int8")
        return onnx.TensorsOnly(onnx.OnnxModel(file))
    if to == "transformers":
        huggingface.write_huggingface(model, file, data)
        return huggingface.HuggingFaceModel(file, model.settings["masks"])
    if to == "official":
        torch_files.write_official(model, file)
        return onnx.TensorsOnly(torch_files.read_official(file, model))
    if to == "safetensors":
        torch_files.write_safetensors(model, file, data)
        return onnx.TensorsOnly(torch_files.read_safetensors(file, model))
    torch_files.write_torchscript(model, file, data)
    return torch.jit.load(str(file))


def _scores(model: DETR, file: Path, config: settings.Config) -> dict[str, tuple[float | None, float | None]]:
    """Return the AP of a model and of its ONNX file on the validation set, as :class:`Exported` has it."""
    dataset = CocoImages(find_split(config.data, "val"), val_transforms(config.data), masks=model.settings["masks"])
    metrics = {"boxes": coco_metrics} | ({"masks": mask_metrics} if dataset.has_masks else {})

    def score(network: torch.nn.Module) -> list[float | None]:
        results, _, _ = detect_with(network, model, dataset, config, torch.device("cpu"))
        return [metric(dataset.coco, results)["AP"] for metric in metrics.values()]

    return dict(zip(metrics, zip(score(model), score(onnx.OnnxModel(file)), strict=True), strict=True))
