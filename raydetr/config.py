"""The tree of settings: the default, the bounds and the meaning of every setting, defined once.

A dotted name such as ``optim.lr`` is an attribute (``config.optim.lr``), a flag (``--optim.lr``), a key in a YAML file, a dimension of a
search space, a row of the HPARAMS page and a field of the saved checkpoint. Leaf names are those of the official DETR's ``main.py`` where
it has them.

Values are parsed and checked against their bounds once, where they enter the program: :func:`load_config` takes unchecked values from
Python, :func:`read_yaml` those of a file, :func:`parse_settings` those of the command line. All other functions take the tree itself, and
:func:`with_settings` returns a changed copy of it.
"""

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from raydetr.errors import UserError
from raydetr.files import atomic_write_text
from raydetr.storage import check_path, is_uri
from raydetr.yaml_files import yaml_leaves

MOST_QUERIES = 10_000  # in training, over all groups: more take gigabytes for each image
LONGEST_NAME = 200  # bytes of a run's name: file systems allow 255, and locks add an ending to it


def setting(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: list | None = None,
    span=False,
    auto=False,
    auto_number=False,
) -> Any:
    """Declare a field of the tree of settings.

    Args:
        default: The value if nothing else is given.
        meaning: One line for ``--help`` and the documentation.
        low: The smallest allowed value; for a list, of each entry.
        high: The largest allowed value; for a list, of each entry.
        choices: The allowed values, if they can be listed.
        span: Whether the setting also takes the text ``MIN:MAX``, with both ends within the bounds.
        auto: Whether the setting also takes the text ``auto``.
        auto_number: Whether the setting also takes the text ``auto:N``; N is within the bounds.

    Returns:
        A dataclass field.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    metadata |= {"span": span, "auto": auto, "auto_number": auto_number}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# What each preset changes; all other defaults are those of detr_resnet50.
PRESETS: dict[str, dict[str, Any]] = {
    "detr_resnet50": {},
    "detr_resnet50_dc5": {"model.dilation": True},
    "detr_resnet101": {"model.backbone": "resnet101"},
    "detr_resnet101_dc5": {"model.backbone": "resnet101", "model.dilation": True},
    "detr_tiny": {
        "model.weights": "bundled",
        "model.backbone": "tiny",
        "model.hidden_dim": 128,
        "model.enc_layers": 2,
        "model.dec_layers": 3,
        "model.nheads": 4,
        "model.dim_feedforward": 256,
        "model.num_queries": 25,
        "model.dropout": 0.0,
        "loss.eos_coef": 0.4,  # with a quarter of DETR's queries, no-object weighs as much in total as 0.1 does with 100
        # The resolution of its pre-training; at others its position encoding is less accurate.
        "data.train_sizes": [96],
        "data.val_size": 96,
        "data.crop": 0.0,
        "optim.lr": 5e-4,
        "optim.lr_backbone": 5e-4,
        "optim.batch_size": 2,
        "optim.schedule": "cosine",
    },
}


@dataclasses.dataclass(slots=True)
class Model:
    """The architecture of the network and the weights it starts from."""

    preset: str = setting("detr_resnet50", "a named model; sets the settings that define it", choices=list(PRESETS))
    weights: str = setting(
        "coco",
        "initial weights: coco (official DETR), coco-panoptic (with its segmentation head), imagenet (backbone only), bundled (for "
        "detr_tiny), none, a path or a URL",
    )
    backbone: str = setting("resnet50", "convolutional backbone", choices=["resnet50", "resnet101", "tiny"])
    dilation: bool = setting(False, "DC5: dilated convolutions in the last stage of the backbone, for stride 16 instead of 32")
    position_embedding: str = setting("sine", "position encoding of the feature map", choices=["sine", "learned"])
    hidden_dim: int = setting(256, "embedding dimension of the transformer", low=8, high=4096)
    nheads: int = setting(8, "number of attention heads", low=1, high=64)
    enc_layers: int = setting(6, "number of encoder layers", low=0, high=24)
    dec_layers: int = setting(6, "number of decoder layers", low=1, high=24)
    dim_feedforward: int = setting(2048, "hidden dimension of the feed-forward layers", low=1, high=65536)
    dropout: float = setting(0.1, "dropout probability in the transformer", low=0.0, high=0.9)
    num_queries: int = setting(100, "number of object queries, which is the largest number of objects found in one image", low=1, high=2000)
    pre_norm: bool = setting(False, "apply layer normalization before attention instead of after it")
    aux_loss: bool = setting(True, "auxiliary losses: compute the losses after every decoder layer, not only after the last")
    masks: bool = setting(False, "predict a mask of every object besides its box: adds DETR's segmentation head")


@dataclasses.dataclass(slots=True)
class Loss:
    """Weights of the terms of the loss."""

    cls_loss_coef: float = setting(1.0, "weight of the classification loss", low=0.0, high=100.0)
    bbox_loss_coef: float = setting(5.0, "weight of the L1 box loss", low=0.0, high=100.0)
    giou_loss_coef: float = setting(2.0, "weight of the GIoU loss", low=0.0, high=100.0)
    eos_coef: float = setting(0.1, "weight of the no-object class in the classification loss", low=0.0, high=1.0)
    mask_loss_coef: float = setting(1.0, "weight of the focal loss of masks (with model.masks)", low=0.0, high=100.0)
    dice_loss_coef: float = setting(1.0, "weight of the Dice loss of masks (with model.masks)", low=0.0, high=100.0)
    query_groups: int = setting(
        1, "groups of object queries in training, each matched with all objects; one of them remains in the model", low=1, high=50
    )


@dataclasses.dataclass(slots=True)
class Matcher:
    """Weights of the terms of the matching cost."""

    set_cost_class: float = setting(1.0, "weight of the class probability in the matching cost", low=0.0, high=100.0)
    set_cost_bbox: float = setting(5.0, "weight of the L1 distance in the matching cost", low=0.0, high=100.0)
    set_cost_giou: float = setting(2.0, "weight of the GIoU in the matching cost", low=0.0, high=100.0)


@dataclasses.dataclass(slots=True)
class Data:
    """The data set, and how its images are loaded and transformed."""

    path: str | None = setting(
        None, "data set folder with annotations/, train2017/ and val2017/; a path, s3://bucket/folder or gs://bucket/folder"
    )
    train_images: str | None = setting(None, "folder of the training images (default: train2017 in data.path)")
    train_annotations: str | None = setting(None, "COCO annotation file of the training set (default: found in annotations/ of data.path)")
    val_images: str | None = setting(None, "folder of the validation images (default: val2017 in data.path)")
    val_annotations: str | None = setting(None, "COCO annotation file of the validation set (default: found in annotations/ of data.path)")
    test_images: str | None = setting(None, "folder of the test images, which training never reads (default: test2017 in data.path)")
    test_annotations: str | None = setting(None, "COCO annotation file of the test set (default: found in annotations/ of data.path)")
    folds: int | None = setting(
        None,
        "cross-validation: divide the training set into so many folds, train and score with each held out in turn; a search stays on the "
        "validation set, and its confirmation uses them",
        low=2,
        high=100,
    )
    fold: int | None = setting(None, "the fold, from 1, that is held out and scored (default: each of data.folds in turn)", low=1, high=100)
    reshuffle: bool = setting(
        False, "draw another training and validation set from the images of both; in a search, another one for each trial"
    )
    reshuffle_seed: int = setting(0, "seed of the division that data.reshuffle draws; a search sets it to the trial's number", low=0)
    fraction: float = setting(
        1.0, "fraction of the training images to train on, with their share of every category; drawn by run.seed", low=0.001, high=1.0
    )
    train_sizes: list[int] = setting(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "lengths of the short side after resizing in training, one drawn per image (pixels)",
        low=16,
        high=4096,
    )
    val_size: int = setting(800, "length of the short side after resizing in evaluation (pixels)", low=16, high=4096)
    max_size: int = setting(1333, "upper limit of the long side after resizing (pixels)", low=16, high=8192)
    flip: float = setting(0.5, "probability of a horizontal flip in training", low=0.0, high=1.0)
    crop: float = setting(0.5, "probability of a random crop in training", low=0.0, high=1.0)
    color: float = setting(
        0.0, "probability of a photometric distortion in training: brightness, contrast, saturation, hue", low=0.0, high=1.0
    )
    zoom_out: float = setting(
        0.0,
        "probability that a training image is put on a gray canvas of up to twice its sides, so that objects are smaller",
        low=0.0,
        high=1.0,
    )
    copy_paste: float = setting(
        0.0,
        "probability that objects of another training image are cut out along their masks and pasted into an image in training",
        low=0.0,
        high=1.0,
    )
    balance: float = setting(
        0.0, "draw training images of categories that are on fewer than this fraction of the images more often; 0: off", low=0.0, high=1.0
    )
    crop_resize: list[int] = setting(
        [400, 500, 600],
        "lengths of the short side after the resizing that precedes a crop, one drawn per image (pixels)",
        low=16,
        high=4096,
    )
    crop_min: int = setting(384, "smallest side of a crop (pixels)", low=8, high=4096)
    crop_max: int = setting(600, "largest side of a crop (pixels)", low=8, high=4096)
    group_sizes: bool = setting(False, "group images of similar size into training batches: less padding, but batches are less random")
    exif: str = setting(
        "upright",
        "the image that boxes refer to if its EXIF rotation keeps its size: the upright image or the stored pixels",
        choices=["upright", "stored"],
    )
    max_megapixels: int = setting(178, "largest image that is decoded (millions of pixels)", low=1, high=10000)
    val_batch_size: int | None = setting(
        None, "images per batch in evaluation (default: 8 on a GPU, optim.batch_size on a CPU)", low=1, high=1024
    )
    num_workers: int | None = setting(
        None,
        "processes that load images, for each training worker (default: on a GPU as many as the worker has CPU cores, at most 8; "
        "2 on a CPU)",
        low=0,
        high=64,
    )
    batch_timeout_s: float = setting(
        600.0, "longest wait for a batch from the processes that load images (seconds); 0 waits forever", low=0.0, high=86400.0
    )
    cache_gb: float | None = setting(
        None, "memory for decoded images on each node (GB; default: a quarter of its memory); 0 decodes images every time", low=0.0
    )


@dataclasses.dataclass(slots=True)
class Optim:
    """The optimizer, its schedule, and the length of the training."""

    lr: float = setting(1e-4, "learning rate of the transformer", low=0.0, high=1.0)
    lr_backbone: float = setting(1e-5, "learning rate of the backbone", low=0.0, high=1.0)
    weight_decay: float = setting(1e-4, "weight decay of AdamW", low=0.0, high=1.0)
    batch_size: int | str = setting(
        2,
        "images per worker and batch; auto:N, such as auto:16, makes the same steps in batches as large as the GPU's memory holds; "
        "auto: with the preset's N",
        low=1,
        high=1024,
        auto=True,
        auto_number=True,
    )
    accumulate: int = setting(1, "number of batches whose gradients are accumulated for one optimizer step", low=1, high=1024)
    batch_total: int | None = setting(
        None,
        "images of one optimizer step over all workers; batches of at most optim.batch_size images and their number follow from it, so "
        "that a run is the same on any number of workers (default: optim.batch_size for each worker, times optim.accumulate)",
        low=1,
        high=1048576,
    )
    scale_lr: str = setting(
        "none",
        "scale the learning rates by the images of one optimizer step: linearly, or by the square root, relative to a batch of 16",
        choices=["none", "linear", "sqrt"],
    )
    epochs: int = setting(50, "number of epochs", low=1, high=100000)
    schedule: str = setting("step", "learning-rate schedule", choices=["step", "cosine", "constant"])
    lr_drop: float = setting(
        0.667,
        "when the step schedule divides learning rates by 10: below 1 after each such fraction of the run, else in epochs; 0: never",
        low=0.0,
    )
    warmup: float = setting(0.0, "length of the linear warm-up: below 1 a fraction of the run, else epochs", low=0.0)
    clip_max_norm: float = setting(0.1, "gradient norm above which gradients are clipped; 0: no clipping", low=0.0)
    freeze_backbone: bool = setting(False, "keep the backbone fixed and train the rest")
    freeze_detr: bool = setting(False, "keep boxes and classes fixed and train the segmentation head alone (with model.masks)")
    freeze_layers: int = setting(
        0, "keep the first layers fixed: the trained stages of the backbone from the image on, then those of the encoder", low=0, high=30
    )
    layer_decay: float = setting(
        1.0,
        "learning rate of each layer relative to the one above it; the heads and the last stage of the backbone have the whole rate",
        low=0.1,
        high=1.0,
    )
    ema_decay: float = setting(
        0.0, "decay of the exponential moving average of the weights, which is evaluated and saved; 0: no averaging", low=0.0, high=0.99999
    )
    patience: int = setting(0, "early stopping: end the run after so many epochs without a better AP; 0: off", low=0)


@dataclasses.dataclass(slots=True)
class Speed:
    """The device, and what makes training fast on it."""

    device: str = setting("auto", "device to train on; auto: a GPU where there is one", choices=["auto", "cpu", "cuda"])
    precision: str = setting(
        "auto",
        "precision of the forward pass; auto: bf16 on GPUs that support it, else fp32; tf32: fp32 with faster, less exact products on GPUs",
        choices=["auto", "fp32", "tf32", "bf16", "fp16"],
    )
    pad_to: int | None = setting(
        None,
        "pad the sides of training batches to multiples of this, for fewer shapes (pixels; default: 64 on a GPU, 1 on a CPU)",
        low=1,
        high=1024,
    )
    compile: str = setting(
        "auto",
        "compile the repeated blocks of the network with torch.compile, which takes minutes at the start; auto: off",
        choices=["auto", "on", "off"],
    )
    graphs: bool = setting(
        False, "on a GPU with one worker, replay the network's kernels as CUDA graphs, one for each shape of a batch that comes often"
    )


@dataclasses.dataclass(slots=True)
class Run:
    """One training run: its name, where it is stored, and its workers."""

    name: str | None = setting(None, "name of the run folder (default: preset and time)")
    storage: str = setting("runs", "folder that holds the runs; a path, s3://bucket/folder or gs://bucket/folder")
    seed: int = setting(42, "seed of all random numbers", low=0, high=2**31 - 1)
    workers: int | str = setting(
        1,
        "number of training workers, one per GPU where there are GPUs; MIN:MAX, such as 2:8, follows the size of the cluster; "
        "auto: as many as there are GPUs at the start",
        low=1,
        high=4096,
        span=True,
        auto=True,
    )
    wait_for_machines_min: float = setting(0.0, "how long to wait for nodes that Ray's autoscaler starts (minutes)", low=0.0, high=10080.0)
    max_failures: int = setting(3, "how often lost workers are replaced before the run fails", low=0, high=1000)
    pictures: int = setting(8, "number of validation images shown in TensorBoard", low=0, high=100)
    tracker: str = setting(
        "none",
        "where the run is tracked beside TensorBoard; each tracker's environment variables say where it keeps its data",
        choices=["none", "mlflow", "wandb", "trackio"],
    )


@dataclasses.dataclass(slots=True)
class Config:
    """All settings, by section. Make one with :func:`load_config`."""

    model: Model = dataclasses.field(default_factory=Model)
    loss: Loss = dataclasses.field(default_factory=Loss)
    matcher: Matcher = dataclasses.field(default_factory=Matcher)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    speed: Speed = dataclasses.field(default_factory=Speed)
    run: Run = dataclasses.field(default_factory=Run)


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """The description of one setting.

    Attributes:
        name: The dotted name.
        type: ``bool``, ``int``, ``float`` or ``str``; for a list, the type of its entries.
        is_list: Whether the value is a list.
        optional: Whether the value may be None.
        default: The default.
        low: The smallest allowed value, or None.
        high: The largest allowed value, or None.
        choices: The allowed values if they can be listed, or None.
        meaning: One line for ``--help`` and the documentation.
        span: Whether the value may also be the text ``MIN:MAX`` with two integers.
        auto: Whether the value may also be the text ``auto``.
        auto_number: Whether the value may also be text ``auto:N`` with an integer N.
    """

    name: str
    type: Any
    is_list: bool
    optional: bool
    default: Any
    low: float | None
    high: float | None
    choices: list | None
    meaning: str
    span: bool
    auto: bool
    auto_number: bool

    def bounds(self) -> str:
        """Return the allowed values in words, such as ``0.0 to 1.0``; empty if every value is allowed."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.low is not None and self.high is not None:
            return f"{self.low} to {self.high}"
        if self.low is not None:
            return f"{self.low} or more"
        return ""

    def parse(self, value: Any) -> Any:
        """Convert a value from Python, YAML or the command line to this setting's type, and check it against the bounds.

        Args:
            value: A value of the setting's type, or its text.

        Returns:
            The value in the form in which the tree of settings keeps it.

        Raises:
            UserError: The value has another type or is out of bounds.
        """
        if self.optional and (value is None or (isinstance(value, str) and value.lower() in ("null", "~"))):
            return None
        if self.auto and value == "auto":
            return value
        if self.auto_number and isinstance(value, str) and value.startswith("auto:"):
            return f"auto:{self._parse_one(value.removeprefix('auto:'))}"
        if self.span and isinstance(value, str) and ":" in value:
            return self._parse_span(value)
        if not self.is_list:
            return self._parse_one(value)
        if isinstance(value, str):
            value = [part for part in value.strip("[]").replace(",", " ").split() if part]
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{self.name}: {_shown(value)} is not a list of {self.type.__name__}")
        return [self._parse_one(entry) for entry in value]

    def _parse_span(self, text: str) -> int | str:
        least, most = map(self._parse_one, text.split(":", 1))
        if least > most:
            raise UserError(f"{self.name}: {text!r} counts down; the smaller number comes first")
        return least if least == most else f"{least}:{most}"

    def _parse_one(self, value: Any) -> Any:
        parsed = _as_type(value, self.type)
        if parsed is None:
            raise UserError(f"{self.name}: {_shown(value)} is not {_ARTICLE[self.type]}")
        outside = (self.low is not None and parsed < self.low) or (self.high is not None and parsed > self.high)
        if outside or (self.choices and parsed not in self.choices):
            raise UserError(f"{self.name}: {_shown(value)} is out of bounds; it takes {self.bounds()}")
        return parsed


_ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _as_type(value: Any, kind: type) -> Any:
    """Return ``value`` as ``kind``, or None if it cannot be read as that. NaN and infinity do not count as numbers."""
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLEANS.get(str(value).lower())
    if kind is str:
        return value if isinstance(value, str) else str(value) if isinstance(value, (int, float, Path)) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if kind is float:
        return number
    return int(value) if isinstance(value, int) else int(number) if number.is_integer() else None


def _describe(section: str, field: dataclasses.Field, annotation: Any) -> Setting:
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    optional = types.NoneType in parts
    if parts:
        annotation = next(part for part in parts if part is not types.NoneType)
    is_list = typing.get_origin(annotation) is list
    if is_list:
        (annotation,) = typing.get_args(annotation)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Setting(f"{section}.{field.name}", annotation, is_list, optional, default, **field.metadata)


def _describe_all() -> Iterator[Setting]:
    sections = typing.get_type_hints(Config)
    for section, kind in sections.items():
        annotations = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield _describe(section, field, annotations[field.name])


SETTINGS: dict[str, Setting] = {each.name: each for each in _describe_all()}


# Settings whose values are paths or URIs.
SPLITS = ("train", "val", "test")
PATH_SETTINGS = (
    "data.path",
    *(f"data.{split}_{what}" for split in SPLITS for what in ("images", "annotations")),
    "run.storage",
)

# Applied before a preset, so that no value of an earlier preset remains.
_PRESET_DEFAULTS = {name: SETTINGS[name].default for changes in PRESETS.values() for name in changes}


def find_setting(name: str) -> Setting:
    """Return the setting with a dotted name.

    Args:
        name: The name, such as ``optim.lr``.

    Raises:
        UserError: There is no such setting; the message suggests the nearest name.
    """
    if name in SETTINGS:
        return SETTINGS[name]
    by_leaf = {known.split(".")[1]: known for known in SETTINGS}
    leaf = name.split(".")[-1]
    near = by_leaf.get(leaf) or next(iter(difflib.get_close_matches(name, SETTINGS, 1, 0.5)), None)
    near = near or by_leaf.get(next(iter(difflib.get_close_matches(leaf, by_leaf, 1, 0.5)), ""))
    hint = f"; did you mean {near!r}?" if near else f"; the sections are {', '.join(f.name for f in dataclasses.fields(Config))}"
    raise UserError(f"unknown setting {_shown(name)}{hint}")


def preset_settings(preset: str) -> dict[str, Any]:
    """Return the values that a preset starts from: the defaults with the preset's changes.

    Args:
        preset: Name of the preset, a key of ``PRESETS``.

    Returns:
        The value of every setting by dotted name.

    Raises:
        UserError: There is no such preset.
    """
    preset = SETTINGS["model.preset"].parse(preset)
    defaults = {name: each.default for name, each in SETTINGS.items()}
    return {**defaults, "model.preset": preset, **PRESETS[preset]}


def parse_settings(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Parse and check values that come from outside, each on its own.

    Args:
        layer: A mapping from dotted names, or from nested sections, to unchecked values.

    Returns:
        The parsed values by dotted name, as :func:`with_settings` takes them.

    Raises:
        UserError: A name is unknown, or a value has the wrong type or is out of bounds.
    """
    return {name: find_setting(name).parse(value) for name, value in flatten(layer).items()}


def load_config(*layers: Mapping[str, Any]) -> Config:
    """Return the default settings with ``layers`` applied one after the other.

    Args:
        layers: Mappings from dotted names (or nested sections) to values, which are parsed and checked. Later layers override
            earlier ones. A layer that names ``model.preset`` applies the preset before its own values.

    Raises:
        UserError: A name is unknown, a value has the wrong type or is out of bounds, or two values contradict each other.
    """
    return with_settings(Config(), *map(parse_settings, layers))


def with_settings(config: Config, *layers: Mapping[str, Any]) -> Config:
    """Return a copy of ``config`` with ``layers`` applied one after the other.

    Args:
        config: The settings to start from; they are not changed.
        layers: Mappings from dotted names to values of the settings' own types: from :func:`parse_settings`, :func:`read_yaml` or
            another tree. They are not parsed again.

    Raises:
        UserError: Two values contradict each other.
    """
    changed = copy.deepcopy(config)
    for layer in layers:
        values = {**_PRESET_DEFAULTS, **PRESETS[layer["model.preset"]], **layer} if "model.preset" in layer else layer
        for name, value in values.items():
            section, leaf = name.split(".")
            setattr(getattr(changed, section), leaf, list(value) if isinstance(value, list) else value)
    _check_together(changed)
    return changed


def _check_together(config: Config) -> None:
    model, data = config.model, config.data
    for name in PATH_SETTINGS:
        section, leaf = name.split(".")
        check_path(name, getattr(getattr(config, section), leaf) or "")
    if is_uri(model.weights):
        check_path("model.weights", model.weights)
    if model.backbone == "tiny" and model.dilation:
        raise UserError("model.dilation: the tiny backbone has no dilated stage; its stride is 16 without it")
    if model.hidden_dim % model.nheads:
        raise UserError(f"model.hidden_dim: {model.hidden_dim} is not a multiple of model.nheads ({model.nheads})")
    if model.hidden_dim % 4:
        raise UserError(f"model.hidden_dim: {model.hidden_dim} is not a multiple of 4, which the position encoding requires")
    if config.optim.freeze_detr and not model.masks:
        raise UserError("optim.freeze_detr: without model.masks nothing is left to train; set --model.masks true as well")
    if data.fold is not None and data.fold > (data.folds or 0):
        raise UserError(f"data.fold: {data.fold} is not one of the folds; data.folds is {data.folds or 'not set'}")
    if data.folds and data.reshuffle:
        raise UserError("data.reshuffle: the folds of data.folds take the place of the validation set; leave one of the two out")
    if data.crop_min > data.crop_max:
        raise UserError(f"data.crop_min: {data.crop_min} is larger than data.crop_max ({data.crop_max})")
    if config.speed.graphs and config.speed.compile == "on":
        raise UserError("speed.graphs: goes with speed.compile off or auto")
    if config.speed.graphs and model.masks:
        raise UserError("speed.graphs: does not go with model.masks, whose work differs from batch to batch; turn one of them off")
    if config.speed.graphs and isinstance(config.optim.batch_size, str):
        raise UserError(f"optim.batch_size {config.optim.batch_size}: cannot tell what speed.graphs takes of the memory; give a number")
    groups, queries = config.loss.query_groups, model.num_queries
    if groups > 1 and model.masks:
        raise UserError(f"loss.query_groups: {groups} groups train boxes only; leave it at 1, or set model.masks false")
    if groups * queries > MOST_QUERIES:
        raise UserError(
            f"loss.query_groups: {groups} groups of {queries} queries (model.num_queries) are {groups * queries} in training, at most "
            f"{MOST_QUERIES} fit; lower one of them"
        )
    if not any((config.matcher.set_cost_class, config.matcher.set_cost_bbox, config.matcher.set_cost_giou)):
        raise UserError("matcher: all three costs are 0; nothing would tell a good match from a bad one")
    if config.run.name is not None:
        check_run_name(config.run.name)
    if config.run.workers != "auto":
        check_batch_total(config.optim, *least_and_most_workers(config))


def check_batch_total(optim: Optim, least: int, most: int) -> None:
    """Check that ``optim.batch_total`` images can be divided among the workers.

    Args:
        optim: The ``optim`` section of the settings.
        least: The smallest number of workers.
        most: The largest number.

    Raises:
        UserError: They cannot; the message has the nearest numbers that can.
    """
    if optim.batch_total is None:
        return
    if isinstance(optim.batch_size, str):
        raise UserError(f"optim.batch_size {optim.batch_size}: give a number with optim.batch_total, whose images are the step's")
    if optim.accumulate != 1:
        raise UserError("optim.accumulate: follows from optim.batch_total; leave one of the two out")
    for workers in range(least, most + 1):
        if optim.batch_total % workers:
            among = f"{workers} workers" if least == most else f"{workers} workers (run.workers {least}:{most})"
            multiple = math.lcm(*range(least, most + 1))
            nearest = [each for each in (optim.batch_total // multiple * multiple, (optim.batch_total // multiple + 1) * multiple) if each]
            can = " or ".join(map(str, nearest))
            raise UserError(f"optim.batch_total: {optim.batch_total} images cannot be divided among {among}; the nearest that can: {can}")


def check_run_name(name: str) -> None:
    """Check that ``run.name`` can be the name of a folder.

    Args:
        name: The name.

    Raises:
        UserError: The name is blank, longer than ``LONGEST_NAME`` bytes in UTF-8, ``.`` or ``..``, or has a slash, a backslash or an
            unprintable character in it.
    """
    if not name.strip():
        raise UserError("run.name: is blank; give the run a name, or leave the setting out for a name made from preset and time")
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"run.name: {_shown(name)} is not the name of a folder; use letters, digits, '-', '_' and '.'")
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"run.name: {name[:20]!r}... is {len(name.encode())} bytes long; it may have {LONGEST_NAME}")


def least_and_most_workers(config: Config) -> tuple[int, int]:
    """Return both ends of ``run.workers``; they are equal if it is a plain number.

    Args:
        config: Settings without ``auto`` in ``run.workers``, as :func:`with_workers` returns them.

    Returns:
        The smallest and the largest number of workers.
    """
    least, _, most = str(config.run.workers).partition(":")
    return int(least), int(most or least)


def images_per_step(optim: Optim, workers: int) -> int:
    """Return the number of images of one optimizer step over all workers.

    Args:
        optim: The ``optim`` section of the settings, with a number in ``batch_size``.
        workers: The number of workers.
    """
    return optim.batch_total or int(optim.batch_size) * optim.accumulate * workers


def batches_per_step(optim: Optim, workers: int) -> int:
    """Return the number of batches whose gradients a worker accumulates for one optimizer step.

    It is ``accumulate``, or with ``batch_total`` the fewest batches of at most ``batch_size`` images that make up a worker's share.

    Args:
        optim: The ``optim`` section of the settings, with a number in ``batch_size``.
        workers: The number of workers.
    """
    return math.ceil(optim.batch_total / workers / int(optim.batch_size)) if optim.batch_total else optim.accumulate


def with_workers(config: Config, gpus: int) -> Config:
    """Return the settings with a number in place of ``auto`` in ``run.workers``: one worker for each GPU, or one worker on CPUs.

    Args:
        config: The settings; they are not changed.
        gpus: Number of GPUs of this machine or of the cluster.
    """
    if config.run.workers != "auto":
        return config
    return with_settings(config, {"run.workers": max(1, gpus) if config.speed.device != "cpu" else 1})


def asked_batch_size(config: Config) -> int:
    """Return the number in ``optim.batch_size``: N of ``auto:N``, and of ``auto`` the preset's."""
    asked = config.optim.batch_size
    if asked == "auto":
        asked = preset_settings(config.model.preset)["optim.batch_size"]
    return int(str(asked).removeprefix("auto:"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name.

    ``{"optim": {"lr": 1}}`` and ``{"optim.lr": 1}`` both become ``{"optim.lr": 1}``.

    Args:
        tree: The mapping.
        prefix: Text before every name.
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings as nested dicts of plain values: section, leaf, value.

    Args:
        config: The settings.
    """
    return dataclasses.asdict(config)


def by_name(config: Config) -> dict[str, Any]:
    """Return the value of every setting by its dotted name.

    Args:
        config: The settings.
    """
    return flatten(to_dict(config))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a settings file.

    Args:
        path: The YAML file.

    Returns:
        The parsed values of the settings in the file, by dotted name; empty if the file is empty.

    Raises:
        UserError: The file cannot be read, is not a YAML mapping, or has an unknown setting or a bad value. The message names the file and
            the line.
    """
    values = {}
    for name, value, line in yaml_leaves(path):
        try:
            values[name] = find_setting(name).parse(value)
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    return values


def read_config(path: str | Path) -> Config:
    """Read the ``config.yaml`` of a run or a search, which :func:`write_yaml` wrote.

    Settings that the file does not have, because an earlier version wrote it, get their defaults.

    Args:
        path: The file.

    Raises:
        UserError: As for :func:`read_yaml`, and if the file is empty, which a run's file never is.
    """
    values = read_yaml(path)
    if not values:
        raise UserError(f"{path}: is empty, and it should hold the settings of the run; restore the file or start a new run")
    return with_settings(Config(), values)


def write_yaml(config: Config, path: str | Path) -> None:
    """Write all settings as YAML, atomically. A run that is started from the file repeats the run with these settings.

    Args:
        config: The settings.
        path: The file to create or replace.

    Raises:
        OSError: The file cannot be written.
    """
    atomic_write_text(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))
