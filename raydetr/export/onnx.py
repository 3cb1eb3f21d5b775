"""ONNX: a model that runs with onnxruntime on batches and images of any size."""

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from raydetr.config import Data
from raydetr.data.transforms import MEAN, STD
from raydetr.errors import UserError
from raydetr.model.detr import DETR
from raydetr.model.masks import MaskFeatures

OPSET = 18  # the oldest that torch.onnx writes without conversion; onnxruntime 1.14 and later read it
TRACED_SIZE = (192, 256)  # height and width in pixels while the graph is recorded; any other works as well
OUTPUTS = {"logits": "pred_logits", "boxes": "pred_boxes", "masks": "pred_masks"}  # names in the file, and those of DETR's outputs


class TensorsOnly(nn.Module):
    """A DETR whose outputs are a tuple of tensors instead of a dict.

    Args:
        model: A module with the outputs of :class:`raydetr.model.detr.DETR`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Predict the class and box, and for a model with masks the mask, of every object query.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded.

        Returns:
            Logits, float [B, Q, K + 1], boxes, float [B, Q, 4] (cxcywh, relative to the unpadded image) and, with masks, their logits,
            float [B, Q, H / 4, W / 4].
        """
        outputs = self.model(images, mask)
        return tuple(outputs[name] for name in OUTPUTS.values() if name in outputs)


class OnnxModel(nn.Module):
    """An ONNX file in onnxruntime, called like the DETR that it was exported from and with the same outputs.

    Args:
        file: The ONNX file.

    Raises:
        UserError: onnxruntime is not installed.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.session = _import("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Predict on the CPU.

        Args:
            images: Normalized images, float32 [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.

        Returns:
            ``pred_logits``, ``pred_boxes`` and, with masks, ``pred_masks``, as :class:`raydetr.model.detr.DETR` returns them.
        """
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool) if mask is None else mask
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, {"images": images.numpy(), "mask": mask.numpy()})
        return {OUTPUTS[name]: torch.from_numpy(np.asarray(each)) for name, each in zip(names, found, strict=True)}

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> tuple[dict[str, Tensor], MaskFeatures]:
        """Return the outputs without masks, and those of all queries as what :meth:`predict_masks` takes, for an evaluation of masks."""
        outputs = self(images, mask)
        masks = outputs.pop("pred_masks")
        return outputs, MaskFeatures(masks, masks, [])

    def predict_masks(self, features: MaskFeatures, image: Tensor, query: Tensor) -> Tensor:
        """Return the masks of M queries, as :meth:`raydetr.model.detr.DETR.predict_masks` does."""
        return features.attention[image, query]


def write_onnx(model: DETR, file: Path, data: Data, precision: Literal["fp32", "fp16"] = "fp32", quantize: bool = False) -> None:
    """Write a model as an ONNX file.

    Inputs are ``images`` float32 [batch, 3, height, width], normalized, and ``mask`` bool [batch, height, width], True where padded.
    Outputs are ``logits`` float32 [batch, Q, K + 1], whose last class is no-object, ``boxes`` float32 [batch, Q, 4], cxcywh relative to
    the unpadded image, and for a model with masks ``masks`` float32 [batch, Q, height / 4, width / 4], logits. The metadata of the file are
    those of :func:`metadata`.

    Args:
        model: The model, in eval mode on the CPU.
        file: File to write.
        data: Settings of the image size.
        precision: Type of the weights and of the arithmetic; inputs and outputs stay float32.
        quantize: Whether to store the weights of matrix products as 8-bit integers (onnxruntime's dynamic quantization).

    Raises:
        UserError: onnx, onnxscript or onnxruntime is missing.
    """
    onnx = _import("onnx")
    _import("onnxscript")
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        exported = Path(folder) / "model.onnx"
        _record(model, exported)
        if quantize:
            quantized = Path(folder) / "quantized.onnx"
            graph = onnx.load(exported).graph
            stored = {each.name for each in graph.initializer}
            # onnxruntime quantizes no convolution whose weights are computed, as in the segmentation head.
            computed = [node.name for node in graph.node if node.op_type == "Conv" and node.input[1] not in stored]
            quantize_dynamic = _import("onnxruntime.quantization").quantize_dynamic
            logging.disable(logging.WARNING)  # it advises to optimize the graph first, which torch's exporter has done
            try:
                quantize_dynamic(exported, quantized, nodes_to_exclude=computed)
            finally:
                logging.disable(logging.NOTSET)
            exported = quantized
        graph = onnx.load(exported)
        if precision == "fp16":
            graph = _import("onnxruntime.transformers.float16").convert_float_to_float16(graph, keep_io_types=True)
            # The converter appends its casts of the inputs at the end.
            _import("onnxruntime.transformers.onnx_model").OnnxModel(graph).topological_sort()
        for key, value in metadata(model, data).items():
            graph.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(graph)
        onnx.save(graph, exported)
        exported.replace(file)


def metadata(model: DETR, data: Data) -> dict[str, str]:
    """Return what a program needs to use an exported model without raydetr.

    Args:
        model: The model.
        data: Settings of the image size.

    Returns:
        As text: ``categories`` and ``thresholds`` (JSON, in label order), ``val_size`` and ``max_size`` (pixels of the shorter
        and the longer side after resizing), ``mean`` and ``std`` (JSON, of RGB values from 0 to 1).
    """
    return {
        "categories": json.dumps(model.categories),
        "thresholds": json.dumps(model.thresholds),
        "val_size": str(data.val_size),
        "max_size": str(data.max_size),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
    }


def _record(model: DETR, file: Path) -> None:
    images = torch.zeros(2, 3, *TRACED_SIZE)
    mask = torch.zeros(2, *TRACED_SIZE, dtype=torch.bool)
    mask[1, :, TRACED_SIZE[1] // 2 :] = True
    shapes = ({0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "height", 2: "width"})
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to developers of exporters
        program = torch.onnx.export(
            TensorsOnly(model).eval(),
            (images, mask),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images", "mask"],
            output_names=[name for name in OUTPUTS if name != "masks" or model.settings["masks"]],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None  # with dynamo=True torch returns the program
    program.save(file)


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"export --to onnx needs the package {error.name or name}: pip install 'raydetr[export]'") from None
