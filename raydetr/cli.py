"""The command line: one short function per command, which parses, calls the API and prints."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
from click.shell_completion import CompletionItem

from raydetr import __version__, config
from raydetr.errors import UserError
from raydetr.memory import without_collections
from raydetr.storage import check_path, fetched

SHORT_FLAGS = {
    "data.path": "--data",
    "model.preset": "--preset",
    "model.weights": "--weights",
    "optim.epochs": "--epochs",
    "optim.batch_size": "--batch-size",
    "run.workers": "--workers",
    "run.seed": "--seed",
    "run.name": "--name",
    "run.storage": "--storage",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 findings or failure, 2 bad input, 128 + N ended by signal N."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    try:
        return cli.main(argv, prog_name="raydetr", standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), 2, debug)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2, debug)
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ or error  # click hides the interrupt behind an error of its own
        return _fail(f"interrupted; {cause}" if str(cause) else "interrupted", getattr(cause, "exit_code", 130), debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    click.echo(f"raydetr: {' '.join(message.split())}", err=True)
    if debug:
        raise
    return code


class SettingsCommand(click.Command):
    """A command whose ``--help`` shows the common settings, and whose ``--help-all`` shows all of them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the common flags, and name the sections of the others."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        common = [param for param in options if setting_name(param) not in config.SETTINGS or len(param.opts) > 1]
        with formatter.section("Options"):
            formatter.write_dl([record for record in (param.get_help_record(ctx) for param in common) if record])
        sections = sorted({setting_name(param).split(".")[0] for param in self.params if setting_name(param) in config.SETTINGS})
        with formatter.section("Settings"):
            formatter.write_text(
                f"Every setting of the sections {', '.join(sections)} is also a flag, such as --{sections[0]}.{_first_leaf(sections[0])}, "
                "and a key of the file given with --config. --help-all lists them with their defaults and bounds."
            )


def _first_leaf(section: str) -> str:
    return next(name for name in config.SETTINGS if name.startswith(f"{section}.")).split(".")[1]


def setting_name(param: click.Parameter) -> str:
    """Return the dotted name of the setting that a parameter stands for: ``optim.lr`` for ``optim__lr``."""
    return param.name.replace("__", ".")


def _list_settings(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    click.echo(ctx.get_help() + "\n")
    for each in (config.SETTINGS[name] for name in map(setting_name, ctx.command.params) if name in config.SETTINGS):
        default = ",".join(map(str, each.default)) if each.is_list else each.default
        click.echo(f"  --{each.name} {default}\n      {each.meaning}{f' [{each.bounds()}]' if each.bounds() else ''}")
    ctx.exit()


def settings_options(*sections: str):
    """Return a decorator that adds ``--config`` and the flags of these sections of the settings to a command."""

    def decorate(function):
        flags = [_flag(each) for each in config.SETTINGS.values() if each.name.split(".")[0] in sections]
        config_file = click.option(
            "--config", "config_file", type=click.Path(dir_okay=False), metavar="FILE", help="YAML file of settings; flags override it."
        )
        help_all = click.option(
            "--help-all", is_flag=True, expose_value=False, is_eager=True, callback=_list_settings, help="List every setting."
        )
        for decorator in (*reversed(flags), help_all, config_file):
            function = decorator(function)
        return function

    return decorate


def _flag(each: config.Setting):
    names = [f"--{each.name}", *([SHORT_FLAGS[each.name]] if each.name in SHORT_FLAGS else [])]
    choices = [str(choice) for choice in each.choices or (["true", "false"] if each.type is bool else [])]
    return click.option(
        *reversed(names),
        each.name.replace(".", "__"),
        metavar="TEXT" if each.type is str else each.type.__name__.upper(),
        help=f"{each.meaning[0].upper()}{each.meaning[1:]}{'' if each.default is None else f' (default: {each.default})'}.",
        shell_complete=lambda _ctx, _param, typed: [CompletionItem(choice) for choice in choices if choice.startswith(typed)],
    )


def given_settings(options: dict) -> list[dict]:
    """Remove the settings from ``options`` and return them parsed, in two layers: those of ``--config``, and those of flags."""
    file = options.pop("config_file")
    flags = {name.replace("__", "."): options.pop(name) for name in list(options) if name.replace("__", ".") in config.SETTINGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    return [config.read_yaml(fetched(file)) if file else {}, config.parse_settings(flags)]


def tile_options(function):
    """Add ``--tiles`` and ``--overlap`` to a command."""
    overlap = click.option("--overlap", type=float, metavar="F", help="Overlap of neighboring tiles, a fraction of a tile (default: 0.2).")
    tiles = click.option(
        "--tiles", metavar="COLUMNSxROWS", help="Also predict on tiles of each image, enlarged, for small objects; such as 2x2."
    )
    return tiles(overlap(function))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raydetr")
def cli() -> None:
    """Fine-tune DETR on your own labeled images, on one computer or a Ray cluster.

    Start with `raydetr demo`. With your own images, run `raydetr data convert`, `raydetr data check`, `raydetr train`,
    `raydetr tensorboard` and `raydetr predict`. Add --debug to any command to see the stack trace of an error.
    """


@cli.command(cls=SettingsCommand, short_help="Fine-tune a model on your images.")
@click.option(
    "--resume",
    metavar="RUN",
    help="Resume the run in this folder, or from its best.pth. It keeps its settings, apart from those that may change, such as --epochs.",
)
@settings_options("model", "loss", "matcher", "data", "optim", "speed", "run")
def train(resume: str | None, **options) -> None:
    """Fine-tune a model on a data set folder, with Ray Train.

    Example: raydetr train --data photographs --epochs 100 --workers 2
    """
    with without_collections():  # importing torch and Ray makes half a million objects that stay
        from raydetr.launch.train import names_checkpoint, resume_config, train

    given = given_settings(options)
    if resume:
        train(resume_config(resume, *given), resume=True, from_best=names_checkpoint(resume, ["best.pth"]))
    else:
        train(config.with_settings(config.Config(), *given))


@cli.group()
def data() -> None:
    """Convert, export, check, mend, divide, join and describe data sets."""


@data.command("convert", short_help="Convert annotations to COCO.")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Choice(["via", "voc", "yolo", "coco", "labelme", "createml", "labelstudio", "csv"]),
    help="Annotation format of SRC; COCO is for exports of other tools (default: found out).",
)
@click.option("--category", metavar="NAME", help="One category for all objects; with --attribute, of regions without a value.")
@click.option("--attribute", metavar="NAME", help="The region attribute that holds the category, if there are several (VIA).")
@click.option(
    "--exif",
    type=click.Choice(["upright", "stored"]),
    default="upright",
    show_default=True,
    help="Which image the boxes refer to if an EXIF tag rotates it and no size tells.",
)
@click.option("--copy", is_flag=True, help="Copy the images instead of linking to them.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, True, True),
    default=0.2,
    show_default=True,
    help="Fraction of the images to draw for validation if SRC has no validation set.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of this draw.")
def data_convert(src: Path, dst: Path, source: str | None, **options) -> None:
    """Convert annotations in SRC, a folder or an annotation file, to a COCO folder DST, for `raydetr train`.

    Example: raydetr data convert balloon balloon-coco --category balloon
    """
    from raydetr.data.formats.convert import convert

    click.echo(convert(src, dst, source=source, **options).text())


@data.command("export", short_help="Write annotations in another format.")
@click.argument("src", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("dst", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["coco", "yolo", "voc", "labelme"]), required=True, help="Annotation format of OUT.")
@click.option("--copy", is_flag=True, help="Copy the images instead of linking to them.")
def data_export(src: Path, dst: Path, target: str, copy: bool) -> None:
    """Write the COCO folder DIR in the annotation format of another tool; `raydetr data convert` reads it back.

    Example: raydetr data export balloon-coco balloon-yolo --to yolo
    """
    from raydetr.data.formats.export import export

    click.echo(export(src, dst, target, copy).text())


@data.command("fetch", short_help="Download a data set to try.")
@click.argument("name", metavar="NAME", type=click.Choice(["balloon"]))
@click.argument("out", required=False, metavar="[OUT]", type=click.Path(path_type=Path))
def data_fetch(name: str, out: Path | None) -> None:
    """Download a data set, check it against its published hash, and convert it to a COCO folder OUT (default: its name).

    `balloon` has 74 photographs of balloons (39 MB), from the release of Mask R-CNN that made it known.

    Example: raydetr data fetch balloon
    """
    from raydetr.data.tools.fetch import fetch

    click.echo(fetch(name, out or Path(name)).text())


@data.command("split", short_help="Divide a data set into training, validation and test images.")
@click.argument("src", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("out", required=False, metavar="[OUT]", type=click.Path(path_type=Path))
@click.option("--val", type=float, default=0.2, show_default=True, help="Share of the validation images.")
@click.option("--test", type=float, default=0.1, show_default=True, help="Share of the test images; 0: no test set.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the division.")
@click.option("--copy", is_flag=True, help="Copy the images instead of linking to them.")
def data_split(src: Path, out: Path | None, **options) -> None:
    """Divide all images of the COCO folder DIR anew into training, validation and test images, in a new folder OUT (default: DIR-split).

    Each part gets its share of the boxes of every category, and images that look alike stay in one part.

    Example: raydetr data split photographs --val 0.2 --test 0.1
    """
    from raydetr.data.tools.split import split

    click.echo(split(src, out or src.with_name(f"{src.resolve().name}-split"), **options).text())


@data.command("merge", short_help="Put data sets together.")
@click.argument("sources", nargs=-1, required=True, metavar="DIR DIR...", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--copy", is_flag=True, help="Copy the images instead of linking to them.")
def data_merge(sources: tuple[Path, ...], out: Path, copy: bool) -> None:
    """Put the images and annotations of two or more COCO folders together in a new folder OUT. Categories are joined by their names.

    Example: raydetr data merge monday tuesday both-days
    """
    from raydetr.data.tools.merge import merge

    click.echo(merge(sources, out, copy).text())


@data.command("stats", short_help="Write a page that shows what is in a data set.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The file to write (default: DIR-stats.html).")
def data_stats(folder: Path, out: Path | None) -> None:
    """Show in one HTML file what is in the COCO folder DIR: boxes for each image, their sizes, shapes and positions, and samples.

    Example: raydetr data stats photographs
    """
    from raydetr.data.tools.stats import write_stats

    click.echo(f"statistics written to {write_stats(folder, out or folder.with_name(f'{folder.resolve().name}-stats.html'))}")


@data.command("check", cls=SettingsCommand, short_help="Report problems of a data set.")
@click.argument("folder", required=False, metavar="DIR", type=click.Path())
@click.option("--quick", is_flag=True, help="Skip the checks that decode every image.")
@click.option(
    "--fix",
    "mended",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Write a copy to OUT with what can be mended safely, and check that copy.",
)
@settings_options("data", "model")
def data_check(folder: str | None, quick: bool, mended: Path | None, **options) -> int:
    """Report problems of the images and annotations in DIR.

    The exit code is 1 if training would fail or its metrics would be wrong.
    """
    from raydetr.data.check.check import check

    settings = config.with_settings(config.Config(), config.parse_settings({"data.path": folder}), *given_settings(options))
    checked = settings.data
    if mended:
        from raydetr.data.tools.fix import fix

        click.echo(fix(checked, mended).text() + "\n")
        checked = config.Data(path=str(mended), exif=checked.exif, max_megapixels=checked.max_megapixels)
    report = check(checked, quick=quick, num_queries=settings.model.num_queries, test=True, masks=settings.model.masks)
    click.echo(report.text())
    return 0 if report.ok else 1


@cli.command(cls=SettingsCommand, short_help="Compute the COCO AP of a checkpoint.")
@click.argument("checkpoint", required=False, type=click.Path())
@click.option("--json", "json_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write the numbers to FILE as JSON.")
@click.option(
    "--predictions", metavar="FILE", type=click.Path(dir_okay=False), help="Evaluate a COCO results file instead of a checkpoint."
)
@click.option(
    "--against", metavar="OTHER", type=click.Path(), help="Compare with another checkpoint or results file (.json), image by image."
)
@click.option("--split", type=click.Choice(["val", "train", "test"]), default="val", show_default=True, help="The images to evaluate on.")
@click.option("--thresholds", is_flag=True, help="Choose a score threshold for each category and store them in the checkpoint.")
@click.option(
    "--threshold-goal",
    metavar="GOAL",
    default="f1",
    show_default=True,
    help="What thresholds are chosen for: f1, precision=P or recall=R, such as precision=0.9.",
)
@tile_options
@settings_options("data", "optim", "speed")
def evaluate(
    checkpoint: str | None,
    json_file: str | None,
    predictions: str | None,
    against: str | None,
    split: str,
    tiles: str | None,
    overlap: float | None,
    thresholds: bool,
    threshold_goal: str,
    **options,
) -> None:
    """Evaluate a checkpoint, or a results file, on labeled images: the COCO metrics with their 95 % intervals, in all and by category.

    Image sizes and batch size are those of the checkpoint's training unless they are given.

    Example: raydetr evaluate runs/first/best.pth --data photographs
    """
    from raydetr.predict.score import metrics_table, score_checkpoint, score_predictions, write_metrics
    from raydetr.predict.tiles import parse_tiles

    if bool(checkpoint) == bool(predictions):
        raise UserError("evaluate: give either a CHECKPOINT or --predictions FILE")
    tiling = parse_tiles(tiles, overlap)
    if tiling and (predictions or against or thresholds):
        raise UserError(f"--tiles: cannot be given with {'--predictions' if predictions else '--against' if against else '--thresholds'}")
    given, text = given_settings(options), ""
    source = checkpoint or predictions
    assert source is not None  # one of the two is given
    if thresholds:
        if predictions or against:
            raise UserError("evaluate: --thresholds takes a CHECKPOINT, without --predictions and --against")
        from raydetr.evaluate.thresholds import read_goal
        from raydetr.predict.thresholds import store_thresholds

        metrics, text = store_thresholds(source, read_goal(threshold_goal), *given, split=split)
    elif against:
        from raydetr.predict.against import against_table, score_against

        metrics = score_against(source, against, *given, split=split)
    elif tiling:
        from raydetr.predict.tiled_score import score_with_tiles

        metrics = score_with_tiles(source, tiling, *given, split=split)
    elif predictions:
        metrics = score_predictions(predictions, config.with_settings(config.Config(), *given).data, split)
    else:
        metrics = score_checkpoint(source, *given, split=split)
    click.echo(against_table(metrics) if against else metrics_table(metrics))
    if text:
        click.echo(f"\n{text}")
    if json_file:
        write_metrics(metrics, json_file)


@cli.command(cls=SettingsCommand, short_help="Show why a checkpoint misses objects.")
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for index.html, errors.json and suspect labels.",
)
@click.option("--split", type=click.Choice(["val", "train", "test"]), default="val", show_default=True, help="The images to look at.")
@settings_options("data", "optim", "speed")
def errors(checkpoint: str, out: Path, split: str, **options) -> None:
    """Show why CHECKPOINT, or a results file (.json), misses objects: AP lost to each kind of error, the worst images, and labels that
    look wrong or are missing, as files for a labeling tool.

    Example: raydetr errors runs/first/best.pth --data photographs --out why
    """
    from raydetr.predict.errors import explain_errors

    click.echo(explain_errors(checkpoint, out, *given_settings(options), split=split))


@cli.command(cls=SettingsCommand, short_help="Search for better settings.")
@click.option("--space", metavar="FILE", help="The search space: a YAML file, or the name of a bundled one (learning_rates, loss, ...).")
@click.option("--trials", type=int, metavar="N", help="Total number of trials; the first has the default settings (default: 32).")
@click.option(
    "--concurrent", type=click.IntRange(1), metavar="M", help="Number of trials that run at the same time (default: as many as fit)."
)
@click.option(
    "--workers-per-trial", type=click.IntRange(1), default=1, show_default=True, help="Number of Ray Train workers of each trial."
)
@click.option(
    "--gpus-per-trial",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="GPUs of each trial; below 1, trials share a GPU.",
)
@click.option(
    "--placement",
    type=click.Choice(["pack", "spread"]),
    default="pack",
    show_default=True,
    help="Pack trials on as few nodes as possible, or spread them over all nodes (pbt always spreads).",
)
@click.option("--max-epochs", metavar="E", help="Number of epochs of a trial that is not stopped early; the same as --optim.epochs.")
@click.option(
    "--scheduler",
    help="How trials are stopped early (promote, half, asha, evidence, median, none), or pbt for population-based training "
    "(default: promote with the sampler gp, none with --also, else asha).",
)
@click.option(
    "--sampler", help="How settings are drawn: tpe, gp, random or cmaes (default: gp; tpe with --also, pbt or over 128 trials at a time)."
)
@click.option("--metric", default="AP", show_default=True, help="The COCO metric to maximize; with masks also segm_AP, ....")
@click.option(
    "--also",
    multiple=True,
    metavar="OBJECTIVE",
    help="A further objective, such as latency (seconds for one image) or AP_small: find the best trade-offs. Can be given several times.",
)
@click.option("--time-budget", metavar="TIME", help="Stop after this time, such as 90s, 30m or 2h.")
@click.option("--points", metavar="FILE", help="YAML or JSON list of points to try first.")
@click.option(
    "--warm-start",
    metavar="SEARCH",
    multiple=True,
    help="Folder of an earlier search: its best settings are tried first, and draws begin near them. Can be given several times.",
)
@click.option("--resume", metavar="SEARCH", help="Resume the search in this folder.")
@click.option("--confirm", is_flag=True, help="Confirm the result at the end, as `raydetr confirm` does.")
@settings_options("model", "loss", "matcher", "data", "optim", "speed", "run")
def tune(**options) -> None:
    """Search for better settings, with Ray Tune and Optuna.

    Trial 0 has the default settings, so that the result shows what the search gained.

    Example: raydetr tune --space loss --trials 32 --max-epochs 20 --data photographs
    """
    with without_collections():
        from raydetr.launch.command import tune_command

    if options["max_epochs"] is not None:
        options["optim__epochs"] = options["max_epochs"]
    del options["max_epochs"]
    layers = given_settings(options)
    click.echo(tune_command(layers, **options))


@cli.command(short_help="Train the best settings of a search afresh.")
@click.argument("search", type=click.Path())
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Number of settings to train besides the defaults.")
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True, help="Number of trainings of each.")
@click.option("--budget", type=int, metavar="N", help="Number of trainings in all, instead of --top and --seeds.")
@click.option("--concurrent", type=click.IntRange(1), metavar="M", help="Number of trainings at the same time (default: as many as fit).")
@click.option("--workers-per-trial", type=click.IntRange(1), default=1, show_default=True, help="Number of workers of each training.")
@click.option("--gpus-per-trial", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="GPUs of each training.")
def confirm(search: str, **options) -> None:
    """Tell whether the best settings of SEARCH beat the defaults: train both afresh with common seeds and compare them on the test set.

    Without a test set the validation images judge, with a stricter correction. An interrupted confirmation resumes when the command is
    given again.

    Example: raydetr confirm runs/search --top 3 --seeds 5
    """
    with without_collections():
        from raydetr.launch.command import confirm_command

    click.echo(confirm_command(search, **options))


class LearningCurveCommand(SettingsCommand):
    """A command whose ``--fractions`` takes several values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the values after ``--fractions`` to one."""
        if "--fractions" in args:
            start = args.index("--fractions") + 1
            end = next((row for row in range(start, len(args)) if args[row].startswith("-")), len(args))
            args = [*args[:start], *([",".join(args[start:end])] if end > start else []), *args[end:]]
        return super().parse_args(ctx, args)


@cli.command("learning-curve", cls=LearningCurveCommand, short_help="Estimate what more images would bring.")
@click.option(
    "--fractions", default=".25,.5,.75,1", show_default=True, metavar="F...", help="Fractions of the training images to train on."
)
@click.option("--seeds", type=int, default=3, show_default=True, help="Number of trainings on each fraction.")
@settings_options("model", "loss", "matcher", "data", "optim", "speed", "run")
def learning_curve_command(fractions: str, seeds: int, **options) -> None:
    """Train on nested parts of the training set, fit a power law, and say what twice the images would bring, and to which category most.

    Every training takes as many optimizer steps as --epochs on all images. Give the same command again to resume.

    Example: raydetr learning-curve --data photographs --fractions .25 .5 .75 1 --seeds 3
    """
    with without_collections():
        from raydetr.launch.learning_curve import curve_text, learning_curve
        from raydetr.launch.train import run_root, with_absolute_paths

    settings = config.with_settings(config.Config(), {"run.name": "learning-curve"}, *given_settings(options))
    try:
        parts = [float(each) for each in fractions.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--fractions: {fractions!r} are not numbers such as .25 .5 1") from None
    click.echo(curve_text(learning_curve(settings, parts, seeds), run_root(with_absolute_paths(settings))))


@cli.command(short_help="Run train or tune on a Ray cluster.")
@click.option(
    "--address",
    metavar="URL",
    help="Address of the cluster's dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS).",
)
@click.option("--name", help="Name of the job; the time is added.")
@click.option(
    "--working-dir",
    default=".",
    show_default=True,
    metavar="DIR",
    help="Folder to send to the cluster, without data/, runs/ and .venv/ in it.",
)
@click.option(
    "--exclude", "excludes", multiple=True, metavar="PATTERN", help="Pattern of files not to send, as in .gitignore; may be repeated."
)
@click.option(
    "--entrypoint-num-cpus",
    type=float,
    metavar="N",
    help="CPUs of the command itself, in addition to its workers' (default: none; it runs on the head node).",
)
@click.option("--entrypoint-num-gpus", type=float, metavar="N", help="GPUs of the command itself.")
@click.option("--entrypoint-memory", type=int, metavar="BYTES", help="Memory of the command itself.")
@click.option("--entrypoint-resources", metavar="JSON", help="""Custom resources of the command itself, such as '{"trial_driver": 1}'.""")
@click.option("--no-wait", is_flag=True, help="Do not follow the output of the job.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- train|tune ...")
def submit(command: tuple[str, ...], no_wait: bool, **options) -> int:
    """Run `raydetr train` or `raydetr tune` as a job on a Ray cluster.

    The command shows the output of the job and ends with its exit code. Data and runs must be in folders that all nodes of the
    cluster see, or in an object store. To resume a stopped job, submit it again with --resume and the folder of its run.

    Example: raydetr submit --address http://127.0.0.1:8265 -- train --data /shared/photographs --storage /shared/runs --workers 4
    """
    check_submitted(command)
    from raydetr.launch.submit import resources, submit

    options["entrypoint"] = {name: options.pop(name) for name in list(options) if name.startswith("entrypoint_")}
    options["entrypoint"]["entrypoint_resources"] = resources(options["entrypoint"]["entrypoint_resources"])
    return submit(command, wait=not no_wait, write=lambda line: click.echo(f"raydetr: {line}", err=True), **options)


def check_submitted(command: Sequence[str]) -> None:
    """Check a command for a cluster.

    Raises:
        UserError: It is neither train nor tune, has a wrong flag, or names folders that the cluster cannot find.
    """
    if command[0] not in ("train", "tune"):
        raise UserError(f"submit: {command[0]!r} cannot run as a job; use -- train ... or -- tune ...")
    options = cli.commands[command[0]].make_context(f"raydetr {command[0]}", list(command[1:])).params
    paths = {"--resume": options["resume"]}
    if not options["resume"]:
        file = options["config_file"]
        # A file that does not exist here may exist on the cluster.
        layers = given_settings(options | {"config_file": file if file and Path(file).exists() else None})
        known = {name: value for layer in layers for name, value in config.flatten(layer).items()}
        paths = {"--data": known.get("data.path"), "--storage": known.get("run.storage")}
        if paths["--storage"] is None and (not file or Path(file).exists()):
            raise UserError("submit: say where to keep the run: --storage and a folder that all nodes of the cluster see")
    for flag, path in paths.items():
        check_path(flag, path or "")
        if path and "://" not in path and not Path(path).is_absolute():
            raise UserError(
                f"submit: {flag} {path}: a job has another working directory; give the absolute path of a folder that all nodes see"
            )


@cli.command(short_help="Write the report of a run or a search.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="RUN_OR_SEARCH...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write (default: report.html, in RUN_OR_SEARCH or, for several, in the current folder).",
)
@click.option("--data", metavar="FOLDER", help="Where the data set is now (default: where it was at the training).")
@click.option("--errors/--no-errors", default=True, show_default=True, help="Whether to show the errors of the best weights.")
def report(paths: tuple[str, ...], out: Path | None, data: str | None, errors: bool) -> None:
    """Write what a run or a search found, or several side by side, to one HTML file: curves, what they say, errors, charts, costs.

    Example: raydetr report runs/first runs/second --out compared.html
    """
    from raydetr.report.report import report

    click.echo(f"report written to {report(paths, out, data={'data.path': data} if data else None, errors=errors)}")


@cli.command(short_help="List runs and searches.")
@click.argument("storage", default="runs", type=click.Path())
@click.option(
    "--sort",
    type=click.Choice(["name", "kind", "state", "epochs", "best", "when", "size"]),
    default="when",
    show_default=True,
    help="Column to sort by.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def runs(storage: str, sort: str, as_json: bool) -> None:
    """List every run and search below STORAGE (default: runs), a path, s3://bucket/folder or gs://bucket/folder.

    Example: raydetr runs runs --sort best
    """
    from raydetr.search.runs import list_runs, runs_table, sort_runs

    rows = sort_runs(list_runs(storage), sort)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        click.echo(runs_table(rows) if rows else f"there is no run in {storage}")


@cli.command(short_help="Show how a search goes.")
@click.argument("search", type=click.Path())
def status(search: str) -> None:
    """Show the trials of SEARCH by state, the running ones and the best. Works from any computer that sees its folder or store.

    Example: raydetr status runs/search
    """
    from raydetr.search.runs import search_status

    click.echo(search_status(search))


@cli.command(short_help="Predict on images and draw the boxes.")
@click.argument("checkpoint", type=click.Path())
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER...")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for drawn images, predictions and index.html."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Lowest score of the boxes to draw (default: those that `evaluate --thresholds` stored in the checkpoint, else 0.7).",
)
@click.option("--compare", metavar="OTHER_CHECKPOINT", type=click.Path(), help="Also show the predictions of another checkpoint.")
@click.option(
    "--annotations", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="COCO file with the true boxes to draw."
)
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Number of images per batch.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Device to compute on.")
@click.option(
    "--attention", is_flag=True, help="Also show what the model looked at for each box (click it), and write it to OUT/attention/."
)
@click.option(
    "--attention-at", multiple=True, metavar="X,Y", help="Also show what this place of the images attends to, in pixels; may be repeated."
)
@tile_options
def predict(
    checkpoint: str,
    sources: tuple[Path, ...],
    out: Path,
    attention_at: tuple[str, ...],
    tiles: str | None,
    overlap: float | None,
    **options,
) -> None:
    """Predict on images, draw the boxes, and show all of them in OUT/index.html.

    Example: raydetr predict runs/first/best.pth holiday/ --out seen
    """
    from raydetr.predict.predict import predict
    from raydetr.predict.tiles import parse_tiles

    options["tiles"] = parse_tiles(tiles, overlap)
    options["attention_at"] = [_place(each) for each in attention_at]
    click.echo(predict(checkpoint, list(sources), out, **options).text())


def _place(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--attention-at {text}: is not X,Y, a place in pixels such as 320,200") from None
    return x, y


@cli.command("export", cls=SettingsCommand, short_help="Write a model in another format.")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["onnx", "transformers", "official", "safetensors", "torchscript"]),
    required=True,
    help="Format of OUT; transformers writes a folder.",
)
@click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Image to compare the export on; may be repeated (default: validation images).",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Type of the weights (ONNX).")
@click.option("--quantize", type=click.Choice(["none", "int8"]), default="none", show_default=True, help="Quantize the weights (ONNX).")
@settings_options("data", "optim")
def export_command(
    checkpoint: str,
    out: Path,
    to: str,
    images: tuple[Path, ...],
    precision: Literal["fp32", "fp16"],
    quantize: Literal["none", "int8"],
    **options,
) -> None:
    """Write a checkpoint's model as ONNX, for transformers, for the official DETR, as safetensors or as TorchScript.

    What was written is loaded again and compared with the checkpoint on real images; with another precision, AP on the validation
    set is printed before and after.

    Example: raydetr export runs/first/best.pth model.onnx --to onnx
    """
    from raydetr.export.export import export

    click.echo(export(checkpoint, out, to, *given_settings(options), images=images, precision=precision, quantize=quantize).text())


@cli.command(short_help="Serve predictions over HTTP.")
@click.argument("checkpoint", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 allows access from the network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0: any free one.")
@click.option("--replicas", type=click.IntRange(1), help="Number of processes that predict (default: one for each GPU, or one).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Device to compute on.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Largest number of images that are predicted at a time."
)
@click.option(
    "--queue", type=click.IntRange(0), default=32, show_default=True, help="Requests that may wait; further ones are answered with 503."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Lowest score of what is returned (default: those that `evaluate --thresholds` stored in the checkpoint, else 0.7).",
)
@click.option("--max-megabytes", type=click.IntRange(1), default=32, show_default=True, help="Largest upload.")
@click.option("--max-megapixels", type=click.IntRange(1), default=50, show_default=True, help="Largest image.")
@click.option("--max-images", type=click.IntRange(1), default=64, show_default=True, help="Largest number of images in a request or a zip.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an upload may take, and then its prediction.",
)
@tile_options
def serve(host: str, port: int, replicas: int | None, **options) -> None:
    """Serve predictions of CHECKPOINT over HTTP with Ray Serve (install 'raydetr[serve]'): POST /predict, and a page to drop an image on.

    Requests need the token of the environment variable RAYDETR_SERVE_TOKEN, if it is set.

    Example: raydetr serve runs/first/best.pth
    """
    with without_collections():
        from raydetr.launch.serve import Options, serve_checkpoint

    serve_checkpoint(Options(**options), host, port, click.echo, replicas)


@cli.command(short_help="Show runs in TensorBoard.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option("--port", type=click.IntRange(0, 65535), default=6006, show_default=True, help="Port to listen on; 0: any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 allows access from the network.")
def tensorboard(runs: tuple[str, ...], port: int, host: str) -> None:
    """Show runs, or a folder of runs, in TensorBoard. RUN may also be s3://bucket/folder or gs://bucket/folder."""
    from raydetr.tensorboard import serve_tensorboard

    serve_tensorboard(runs, host, port, click.echo)


@cli.command(short_help="Try everything in a few minutes.")
@click.option("--out", default="demo", show_default=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for all results.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Number of Ray workers.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1), help="Number of epochs.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the images and of the training.")
@click.option(
    "--trials", default=8, show_default=True, type=click.IntRange(0), help="Number of trials of the search at the end; 0: no search."
)
@click.option("--masks", is_flag=True, help="Train masks of the balloons besides their boxes.")
def demo(out: Path, **options) -> None:
    """Try everything in a few minutes: generate images of balloons, fine-tune a small DETR on them, search for better settings."""
    from raydetr.demo.demo import demo

    demo(out, **options)


if __name__ == "__main__":
    sys.exit(main())
