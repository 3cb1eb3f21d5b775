"""transformers: a folder that ``DetrForObjectDetection``, ``AutoImageProcessor`` and ``pipeline("object-detection")`` load.

A model with masks becomes a ``DetrForSegmentation``.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raydetr.config import Data
from raydetr.data.transforms import MEAN, STD
from raydetr.errors import UserError
from raydetr.model.backbone import RESNET_BLOCKS
from raydetr.model.detr import DETR
from raydetr.weights.huggingface import to_huggingface


class HuggingFaceModel(nn.Module):
    """A model that transformers loads from a folder, called with the padding mask of raydetr.

    Args:
        folder: What :func:`write_huggingface` wrote.
        masks: Whether it is of a model with masks.

    Raises:
        UserError: transformers is not installed.
    """

    def __init__(self, folder: Path, masks: bool = False):
        super().__init__()
        self.model = _class(masks).from_pretrained(folder).eval()

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Predict the class and box, and for a model with masks the mask, of every object query.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded.

        Returns:
            The outputs of :class:`raydetr.export.onnx.TensorsOnly`.
        """
        outputs = self.model(pixel_values=images, pixel_mask=(~mask).long())
        return outputs.logits, outputs.pred_boxes, *([outputs.pred_masks] if "pred_masks" in outputs else [])


def write_huggingface(model: DETR, folder: Path, data: Data) -> None:
    """Write a model as a folder of transformers' DETR, with its image processor.

    The labels keep their order (``id2label``); the original category ids are in ``config.json`` under ``category_ids``,
    and the score thresholds, where the checkpoint has any, under ``score_thresholds``.

    Args:
        model: The model, in eval mode on the CPU.
        folder: Folder to write.
        data: Settings of the image size.

    Raises:
        UserError: transformers is missing, or does not support the network: it has only ResNets without dilation, and post-norm layers.
    """
    transformers = _import()
    _check_known(model.settings)
    config = transformers.DetrConfig(**_config(transformers, model))
    exported = _class(model.settings["masks"])(config)
    missing, unexpected = exported.load_state_dict(to_huggingface(model.state_dict()), strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    transformers.utils.logging.disable_progress_bar()
    exported.save_pretrained(folder)
    size = {"shortest_edge": data.val_size, "longest_edge": data.max_size}
    processor = transformers.DetrImageProcessor(size=size, image_mean=list(MEAN), image_std=list(STD), do_pad=True)
    processor.save_pretrained(folder)


def _check_known(settings: dict[str, Any]) -> None:
    problems = {
        "model.backbone": settings["backbone"] not in RESNET_BLOCKS and settings["backbone"],
        "model.dilation": settings["dilation"] and "true (with timm's backbone only)",
        "model.pre_norm": settings["pre_norm"] and "true",
    }
    for name, value in problems.items():
        if value:
            raise UserError(f"export --to transformers: transformers has no DETR with {name} {value}; export --to onnx takes every network")


def _config(transformers: Any, model: DETR) -> dict[str, Any]:
    settings = model.settings
    backbone = transformers.ResNetConfig(
        depths=list(RESNET_BLOCKS[settings["backbone"]]),
        out_features=[f"stage{number}" for number in ((1, 2, 3, 4) if settings["masks"] else (4,))],
        downsample_in_bottleneck=False,  # the stride is in the 3x3 convolution, as in torchvision's ResNets
    )
    names = [category["name"] for category in model.categories]
    return {
        "use_timm_backbone": False,
        "backbone_config": backbone,
        "num_queries": settings["num_queries"],
        "d_model": settings["hidden_dim"],
        "encoder_layers": settings["enc_layers"],
        "decoder_layers": settings["dec_layers"],
        "encoder_attention_heads": settings["nheads"],
        "decoder_attention_heads": settings["nheads"],
        "encoder_ffn_dim": settings["dim_feedforward"],
        "decoder_ffn_dim": settings["dim_feedforward"],
        "dropout": settings["dropout"],
        "attention_dropout": settings["dropout"],
        "activation_dropout": settings["dropout"],
        "position_embedding_type": settings["position_embedding"],
        # With auxiliary losses transformers 5 hands each decoder layer the normalized state of the one before, which DETR does not.
        "auxiliary_loss": False,
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
        "category_ids": [category["id"] for category in model.categories],
        **({"score_thresholds": list(model.thresholds)} if model.thresholds else {}),
        "dtype": "float32",
    }


def _class(masks: bool) -> Any:
    return _import().DetrForSegmentation if masks else _import().DetrForObjectDetection


def _import() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("export --to transformers needs the package transformers: pip install 'raydetr[export]'") from None
    return transformers
