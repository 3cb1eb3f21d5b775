"""The one tree of settings: default, bounds and meaning of every knob, once.

A dotted name such as ``optim.lr`` is an attribute (``config.optim.lr``), a flag (``--optim.lr``), a key in a YAML file, a
dimension of a search space, a row of the HPARAMS page and a field of the saved checkpoint. Leaf names are those of the
official DETR's ``main.py`` where it has them.
"""

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
from raydetr.storage import check_place, is_uri


def setting(default, meaning: str, *, low=None, high=None, choices=None, span=False):
    """A field of the tree. ``low`` and ``high`` are inclusive; for a list they bound every entry, of a ``span`` MIN:MAX both ends."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices, "span": span}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# What a preset changes in the tree; the other defaults are those of detr_resnet50.
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
        "loss.eos_coef": 0.4,  # a quarter of DETR's queries: their no-object weighs as much as that of its 100 does at 0.1
        # The resolution that its weights were made at, and little else: its positions are sure of no other.
        "data.train_sizes": [96],
        "data.val_size": 96,
        "data.crop": 0.0,
        "optim.lr": 5e-4,
        "optim.lr_backbone": 5e-4,
        "optim.batch_size": 2,
        "optim.schedule": "cosine",
    },
}


@dataclasses.dataclass
class Model:
    """The network."""

    preset: str = setting("detr_resnet50", "a named network; sets the other model settings", choices=list(PRESETS))
    weights: str = setting(
        "coco",
        "what to start from: coco (official DETR), imagenet (backbone only), bundled (detr_tiny's own), none, a path or a URL",
    )
    backbone: str = setting("resnet50", "convolutional backbone", choices=["resnet50", "resnet101", "tiny"])
    dilation: bool = setting(False, "DC5: stride 16 instead of 32 in the backbone's last stage")
    position_embedding: str = setting("sine", "position encoding of the feature map", choices=["sine", "learned"])
    hidden_dim: int = setting(256, "width of the transformer", low=8, high=4096)
    nheads: int = setting(8, "attention heads", low=1, high=64)
    enc_layers: int = setting(6, "encoder layers", low=0, high=24)
    dec_layers: int = setting(6, "decoder layers", low=1, high=24)
    dim_feedforward: int = setting(2048, "width of the feed-forward layers", low=1, high=65536)
    dropout: float = setting(0.1, "drop-out in the transformer", low=0.0, high=0.9)
    num_queries: int = setting(100, "object queries: the most objects one image can have", low=1, high=2000)
    pre_norm: bool = setting(False, "normalize before attention instead of after")
    aux_loss: bool = setting(True, "losses after every decoder layer, not only the last")


@dataclasses.dataclass
class Loss:
    """Weights of the losses."""

    cls_loss_coef: float = setting(1.0, "weight of the classification loss", low=0.0, high=100.0)
    bbox_loss_coef: float = setting(5.0, "weight of the L1 box loss", low=0.0, high=100.0)
    giou_loss_coef: float = setting(2.0, "weight of the GIoU loss", low=0.0, high=100.0)
    eos_coef: float = setting(0.1, "weight of the no-object class in the classification loss", low=0.0, high=1.0)


@dataclasses.dataclass
class Matcher:
    """Weights of the matching cost."""

    set_cost_class: float = setting(1.0, "weight of the class probability in the matching cost", low=0.0, high=100.0)
    set_cost_bbox: float = setting(5.0, "weight of the L1 distance in the matching cost", low=0.0, high=100.0)
    set_cost_giou: float = setting(2.0, "weight of the GIoU in the matching cost", low=0.0, high=100.0)


@dataclasses.dataclass
class Data:
    """The photographs and what happens to them on the way in."""

    path: str | None = setting(None, "folder with annotations/, train2017/ and val2017/; also s3://bucket/folder and gs://bucket/folder")
    train_images: str | None = setting(None, "folder of training images, where it is not in data.path's layout")
    train_annotations: str | None = setting(None, "COCO file of the training set, where it is not in data.path's layout")
    val_images: str | None = setting(None, "folder of validation images, where it is not in data.path's layout")
    val_annotations: str | None = setting(None, "COCO file of the validation set, where it is not in data.path's layout")
    train_sizes: list[int] = setting(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], "short sides drawn from in training (pixels)", low=16, high=4096
    )
    val_size: int = setting(800, "short side in evaluation (pixels)", low=16, high=4096)
    max_size: int = setting(1333, "longest side (pixels)", low=16, high=8192)
    flip: float = setting(0.5, "probability of a horizontal flip in training", low=0.0, high=1.0)
    crop: float = setting(0.5, "probability of a random crop in training", low=0.0, high=1.0)
    crop_resize: list[int] = setting([400, 500, 600], "short sides drawn from before a crop (pixels)", low=16, high=4096)
    crop_min: int = setting(384, "shortest side of a crop (pixels)", low=8, high=4096)
    crop_max: int = setting(600, "longest side of a crop (pixels)", low=8, high=4096)
    group_sizes: bool = setting(
        False, "training batches of images that came out of their transforms alike in size: less is filled up, and they are less random"
    )
    val_batch_size: int | None = setting(
        None, "images per batch in evaluation: 8 on a GPU, else optim.batch_size when not given", low=1, high=1024
    )
    num_workers: int = setting(2, "processes that load images, per training worker", low=0, high=64)
    cache_gb: float | None = setting(
        None, "memory for decoded pictures on a machine (GB): a quarter of what it has when not given; 0 decodes them every time", low=0.0
    )


@dataclasses.dataclass
class Optim:
    """Optimizer, schedule and length of the training."""

    lr: float = setting(1e-4, "learning rate of the transformer", low=0.0, high=1.0)
    lr_backbone: float = setting(1e-5, "learning rate of the backbone", low=0.0, high=1.0)
    weight_decay: float = setting(1e-4, "AdamW's weight decay", low=0.0, high=1.0)
    batch_size: int = setting(2, "images per worker and step", low=1, high=1024)
    accumulate: int = setting(1, "batches whose gradients make one optimizer step", low=1, high=1024)
    epochs: int = setting(50, "epochs to train", low=1, high=100000)
    schedule: str = setting("step", "learning-rate schedule", choices=["step", "cosine", "constant"])
    lr_drop: float = setting(
        0.667, "how often the step schedule divides the rates by 10: below 1 a fraction of the run, else epochs; 0 is never", low=0.0
    )
    warmup: float = setting(0.0, "linear warm-up: below 1 a fraction of the run, else epochs", low=0.0)
    clip_max_norm: float = setting(0.1, "largest gradient norm; 0 turns clipping off", low=0.0)
    freeze_backbone: bool = setting(False, "train the transformer only")
    ema_decay: float = setting(
        0.0, "decay of the moving average of the weights that is evaluated and kept; 0 is off", low=0.0, high=0.99999
    )
    patience: int = setting(0, "stop after so many epochs without a better AP; 0 is off", low=0)


@dataclasses.dataclass
class Speed:
    """What makes it fast on a device."""

    device: str = setting("auto", "where to train: auto takes a GPU where there is one", choices=["auto", "cpu", "cuda"])
    precision: str = setting(
        "auto",
        "arithmetic of the forward pass; auto: bf16 on GPUs that have it, else fp32; tf32: fp32 with faster, less exact products on GPUs",
        choices=["auto", "fp32", "tf32", "bf16", "fp16"],
    )
    compile: str = setting(
        "auto",
        "torch.compile of the backbone, a minute at the start; auto: off until a device is known where it pays",
        choices=["auto", "on", "off"],
    )


@dataclasses.dataclass
class Run:
    """One training run: where it is kept and how it is spread."""

    name: str | None = setting(None, "name of the run's folder; made from preset and time when not given")
    storage: str = setting("runs", "folder that holds the runs; also s3://bucket/folder and gs://bucket/folder")
    seed: int = setting(42, "seed of everything that is drawn", low=0, high=2**31 - 1)
    workers: int | str = setting(
        1, "training processes, one per GPU where there are GPUs; 2:8 takes what there is from time to time", low=1, high=4096, span=True
    )
    wait_for_machines_min: float = setting(0.0, "minutes to wait for the machines that Ray's autoscaler brings", low=0.0, high=10080.0)
    max_failures: int = setting(3, "how often a lost worker is replaced before the run fails", low=0, high=1000)
    pictures: int = setting(8, "validation pictures shown in TensorBoard", low=0, high=100)


@dataclasses.dataclass
class Config:
    """The tree. Build it with :func:`load_config`."""

    model: Model = dataclasses.field(default_factory=Model)
    loss: Loss = dataclasses.field(default_factory=Loss)
    matcher: Matcher = dataclasses.field(default_factory=Matcher)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    speed: Speed = dataclasses.field(default_factory=Speed)
    run: Run = dataclasses.field(default_factory=Run)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one setting: its dotted name, type, default, bounds, choices and meaning."""

    name: str
    type: type  # bool, int, float or str; of a list, its entries' type
    is_list: bool
    optional: bool
    default: Any
    low: float | None
    high: float | None
    choices: list | None
    meaning: str
    span: bool  # a whole number, or text "MIN:MAX" of two

    def bounds(self) -> str:
        """The permitted values in words, e.g. ``0.0 to 1.0``; empty where every value is."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.low is not None and self.high is not None:
            return f"{self.low} to {self.high}"
        if self.low is not None:
            return f"{self.low} or more"
        return ""

    def parse(self, value: Any) -> Any:
        """``value`` (from Python, YAML or the command line) in this setting's type; raises UserError where it does not fit."""
        if self.optional and (value is None or (isinstance(value, str) and value.lower() in ("null", "~"))):
            return None
        if self.span and isinstance(value, str) and ":" in value:
            return self._parse_span(value)
        if not self.is_list:
            return self._parse_one(value)
        if isinstance(value, str):
            value = [part for part in value.strip("[]").replace(",", " ").split() if part]
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{self.name}: {value!r} is not a list of {self.type.__name__}")
        return [self._parse_one(entry) for entry in value]

    def _parse_span(self, text: str) -> int | str:
        least, most = map(self._parse_one, text.split(":", 1))
        if least > most:
            raise UserError(f"{self.name}: {text!r} counts down; the smaller number comes first")
        return least if least == most else f"{least}:{most}"

    def _parse_one(self, value: Any) -> Any:
        parsed = _as_type(value, self.type)
        if parsed is None:
            raise UserError(f"{self.name}: {value!r} is not {_ARTICLE[self.type]}")
        outside = (self.low is not None and parsed < self.low) or (self.high is not None and parsed > self.high)
        if outside or (self.choices and parsed not in self.choices):
            raise UserError(f"{self.name}: {value!r} is out of bounds; it takes {self.bounds()}")
        return parsed


_ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _as_type(value: Any, kind: type) -> Any:
    """``value`` as ``kind``, or None where it cannot be read as that (NaN and infinity are no numbers here)."""
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLEANS.get(str(value).lower())
    if kind is str:
        return value if isinstance(value, str) else str(value) if isinstance(value, (int, float, Path)) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
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
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return Setting(f"{section}.{field.name}", annotation, is_list, optional, default, **field.metadata)


def _describe_all() -> Iterator[Setting]:
    for section in dataclasses.fields(Config):
        annotations = typing.get_type_hints(section.type)
        for field in dataclasses.fields(section.type):
            yield _describe(section.name, field, annotations[field.name])


SETTINGS: dict[str, Setting] = {each.name: each for each in _describe_all()}


# Settings that say where something is: a path, or an address in an object store.
PLACES = ("data.path", "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations", "run.storage")

# What a preset goes back to before it is laid, so that nothing of another one stays.
_PRESET_DEFAULTS = {name: SETTINGS[name].default for changes in PRESETS.values() for name in changes}


def find_setting(name: str) -> Setting:
    """The setting of that dotted name; an unknown name is a UserError that names the nearest one."""
    if name in SETTINGS:
        return SETTINGS[name]
    by_leaf = {known.split(".")[1]: known for known in SETTINGS}
    leaf = name.split(".")[-1]
    near = by_leaf.get(leaf) or next(iter(difflib.get_close_matches(name, SETTINGS, 1, 0.5)), None)
    near = near or by_leaf.get(next(iter(difflib.get_close_matches(leaf, by_leaf, 1, 0.5)), ""))
    hint = f"; did you mean {near!r}?" if near else f"; the sections are {', '.join(f.name for f in dataclasses.fields(Config))}"
    raise UserError(f"unknown setting {name!r}{hint}")


def preset_settings(preset: str) -> dict[str, Any]:
    """Every setting (dotted name to value) of a preset: the defaults with what the preset changes."""
    preset = SETTINGS["model.preset"].parse(preset)
    defaults = {name: each.default for name, each in SETTINGS.items()}
    return {**defaults, "model.preset": preset, **PRESETS[preset]}


def load_config(*layers: Mapping[str, Any]) -> Config:
    """The tree with ``layers`` of dotted names (or nested sections) laid over the defaults, later ones winning.

    A layer that names ``model.preset`` first lays that preset, then its own values. Raises UserError for an unknown name or
    a value outside its bounds.
    """
    values = {name: each.default for name, each in SETTINGS.items()}
    for layer in layers:
        layer = {name: find_setting(name).parse(value) for name, value in flatten(layer).items()}
        if "model.preset" in layer:
            values.update(_PRESET_DEFAULTS | PRESETS[layer["model.preset"]])
        values.update(layer)
    config = Config()
    for name, value in values.items():
        section, leaf = name.split(".")
        setattr(getattr(config, section), leaf, list(value) if isinstance(value, list) else value)
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    model, data = config.model, config.data
    for name in PLACES:
        section, leaf = name.split(".")
        check_place(name, getattr(getattr(config, section), leaf) or "")
    if is_uri(model.weights):
        check_place("model.weights", model.weights)
    if model.hidden_dim % model.nheads:
        raise UserError(f"model.hidden_dim: {model.hidden_dim} is not a multiple of model.nheads ({model.nheads})")
    if model.hidden_dim % 4:
        raise UserError(f"model.hidden_dim: {model.hidden_dim} is not a multiple of 4, which the position encoding needs")
    if data.crop_min > data.crop_max:
        raise UserError(f"data.crop_min: {data.crop_min} is larger than data.crop_max ({data.crop_max})")
    if not any((config.matcher.set_cost_class, config.matcher.set_cost_bbox, config.matcher.set_cost_giou)):
        raise UserError("matcher: all three costs are 0; nothing would tell a good match from a bad one")


def least_and_most_workers(config: Config) -> tuple[int, int]:
    """The two ends of ``run.workers``, which are one where it is a plain number."""
    least, _, most = str(config.run.workers).partition(":")
    return int(least), int(most or least)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names: ``{"optim": {"lr": 1}}`` and ``{"optim.lr": 1}`` both give ``{"optim.lr": 1}``."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The tree as nested plain data: section, leaf, value."""
    return dataclasses.asdict(config)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A settings file as dotted names, each checked; errors name file and line."""
    values = {}
    for name, value, line in yaml_leaves(path):
        try:
            values[name] = find_setting(name).parse(value)
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    return values


def yaml_leaves(path: str | Path, depth: int | None = None) -> Iterator[tuple[str, Any, int]]:
    """Dotted name, value and line of every leaf of a YAML mapping; ``depth`` limits how many dots are unfolded.

    Raises UserError where the file cannot be read, is no YAML or no mapping, or says one name twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not a YAML file ({getattr(error, 'problem', None) or 'bad encoding'})") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line {root.start_mark.line + 1}: expected settings by name, found a {root.id}")
    seen: dict[str, int] = {}
    for name, value, line in _leaves_of(root, "", depth):
        if name in seen:
            raise UserError(f"{path}, line {line}: {name} stands twice (first on line {seen[name]})")
        seen[name] = line
        yield name, value, line


def _leaves_of(node: yaml.MappingNode, prefix: str, depth: int | None) -> Iterator[tuple[str, Any, int]]:
    constructor = yaml.SafeLoader("")
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and (depth is None or name.count(".") < depth):
            yield from _leaves_of(value, f"{name}.", depth)
        else:
            # YAML 1.1 reads 1:4 as 64, to the base of 60, which nobody means.
            based_on_60 = isinstance(value, yaml.ScalarNode) and value.tag.endswith((":int", ":float")) and ":" in value.value
            yield name, value.value if based_on_60 else constructor.construct_object(value, deep=True), key.start_mark.line + 1


def write_yaml(config: Config, path: str | Path) -> None:
    """The complete tree as YAML: starting from the file repeats the run."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
