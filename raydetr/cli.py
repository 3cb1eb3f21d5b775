"""The command line: one short function per verb that parses, calls the API and prints."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from raydetr import __version__, config
from raydetr.errors import UserError
from raydetr.memory import without_collections
from raydetr.storage import check_place, fetched

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
    """Run one command; returns the exit code: 0 done, 1 findings or failure, 2 bad input, 130 interrupted."""
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
        way_on = str(error.__cause__ or error)  # click hides the interrupt behind an error of its own
        return _fail(f"interrupted; {way_on}" if way_on else "interrupted", 130, debug)
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
    """A command whose help shows the flags everyone sets first and the rest of the tree with ``--help-all``."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the common flags; name the sections of the others."""
        common = [param for param in self.get_params(ctx) if setting_name(param) not in config.SETTINGS or len(param.opts) > 1]
        with formatter.section("Options"):
            formatter.write_dl([record for record in (param.get_help_record(ctx) for param in common) if record])
        sections = sorted({setting_name(param).split(".")[0] for param in self.params if setting_name(param) in config.SETTINGS})
        with formatter.section("Settings"):
            formatter.write_text(
                f"Every knob of the sections {', '.join(sections)} is a flag too, such as --{sections[0]}.{_first_leaf(sections[0])}, and "
                "a key of the file given with --config. --help-all lists them with their defaults and bounds."
            )


def _first_leaf(section: str) -> str:
    return next(name for name in config.SETTINGS if name.startswith(f"{section}.")).split(".")[1]


def setting_name(param: click.Parameter) -> str:
    """The dotted name that a parameter's Python name stands for: ``optim__lr`` is ``optim.lr``."""
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
    """Decorator: ``--config`` and the flags of those sections of the tree."""

    def decorate(function):
        flags = [_flag(each) for each in config.SETTINGS.values() if each.name.split(".")[0] in sections]
        config_file = click.option(
            "--config", "config_file", type=click.Path(dir_okay=False), metavar="FILE", help="YAML file of settings; flags win over it."
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
        help=f"{each.meaning[0].upper()}{each.meaning[1:]} (default: {each.default}).",
        shell_complete=lambda _ctx, _param, typed: [CompletionItem(choice) for choice in choices if choice.startswith(typed)],
    )


def given_settings(options: dict) -> list[dict]:
    """The layers of settings that the command line gives: those of ``--config``, then the flags; takes them out of ``options``."""
    file = options.pop("config_file")
    flags = {name.replace("__", "."): options.pop(name) for name in list(options) if name.replace("__", ".") in config.SETTINGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    return [config.read_yaml(fetched(file)) if file else {}, flags]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raydetr")
def cli() -> None:
    """Fine-tune DETR on your own labelled photographs, on one machine or a Ray cluster.

    Start with `raydetr demo`. With photographs of your own: `raydetr data convert`, `raydetr data check`, `raydetr train`,
    `raydetr tensorboard`, `raydetr predict`. Add --debug to any command for the stack trace of an error.
    """


@cli.command(cls=SettingsCommand)
@click.option("--resume", metavar="RUN", help="Go on with the run in this folder; other settings than --epochs stay as they were.")
@settings_options("model", "loss", "matcher", "data", "optim", "speed", "run")
def train(resume: str | None, **options) -> None:
    """Fine-tune on a folder of photographs, with Ray Train.

    Example: raydetr train --data photographs --epochs 100 --workers 2
    """
    with without_collections():  # half a million objects of torch and Ray, which stay
        from raydetr.launch.train import resume_config, train

    given = given_settings(options)
    train(resume_config(resume, *given) if resume else config.load_config(*given), resume=bool(resume))


@cli.group()
def data() -> None:
    """Convert and check a folder of photographs."""


@data.command("convert")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--from", "source", type=click.Choice(["via", "voc", "yolo"]), default="via", show_default=True, help="Annotation format of SRC."
)
@click.option("--category", metavar="NAME", help="The category of every region that names none itself (VIA).")
@click.option("--attribute", metavar="NAME", help="The region attribute that holds the category, where there are several (VIA).")
@click.option("--copy", is_flag=True, help="Copy the images instead of linking them.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, True, True),
    default=0.2,
    show_default=True,
    help="Drawn for validation where SRC has no val.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of that draw.")
def data_convert(src: Path, dst: Path, source: str, **options) -> None:
    """Convert annotations in SRC to a COCO folder DST that `raydetr train` takes.

    Example: raydetr data convert balloon balloon-coco --from via --category balloon
    """
    from raydetr.data.formats.convert import convert

    click.echo(convert(src, dst, source=source, **options).text())


@data.command("check", cls=SettingsCommand)
@click.argument("folder", required=False, metavar="DIR", type=click.Path())
@click.option("--quick", is_flag=True, help="Leave out what needs every picture decoded.")
@settings_options("data", "model")
def data_check(folder: str | None, quick: bool, **options) -> int:
    """Report what is wrong with the photographs and annotations in DIR; exit code 1 where training would fail or lie."""
    from raydetr.data.check.check import check

    settings = config.load_config({"data.path": folder}, *given_settings(options))
    report = check(settings.data, quick=quick, num_queries=settings.model.num_queries)
    click.echo(report.text())
    return 0 if report.ok else 1


@cli.command(cls=SettingsCommand)
@click.argument("checkpoint", required=False, type=click.Path())
@click.option("--json", "json_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write the numbers to FILE.")
@click.option("--predictions", metavar="FILE", type=click.Path(dir_okay=False), help="Score a COCO results file instead of a model.")
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True, help="Which photographs.")
@settings_options("data", "optim", "speed")
def evaluate(checkpoint: str | None, json_file: str | None, predictions: str | None, split: str, **options) -> None:
    """COCO AP of a checkpoint (or of a results file) on labelled photographs.

    Example: raydetr evaluate runs/first/best.pth --data photographs
    """
    from raydetr.predict.score import metrics_table, score_checkpoint, score_predictions, write_metrics

    if bool(checkpoint) == bool(predictions):
        raise UserError("evaluate: give either a CHECKPOINT or --predictions FILE")
    given = given_settings(options)
    if predictions:
        metrics = score_predictions(predictions, config.load_config(*given).data, split)
    else:
        metrics = score_checkpoint(checkpoint, *given, split=split)
    click.echo(metrics_table(metrics))
    if json_file:
        write_metrics(metrics, json_file)


@cli.command(cls=SettingsCommand)
@click.option("--space", metavar="FILE", help="What is searched: a YAML file, or the name of a ready one (learning_rates, loss, ...).")
@click.option("--trials", type=int, metavar="N", help="Trials in all, the first with the default settings (default: 32).")
@click.option("--concurrent", type=click.IntRange(1), metavar="M", help="Trials at a time (default: as many as fit).")
@click.option("--workers-per-trial", type=click.IntRange(1), default=1, show_default=True, help="Ray Train workers of each trial.")
@click.option(
    "--gpus-per-trial", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Below 1 trials share a GPU."
)
@click.option(
    "--placement",
    type=click.Choice(["pack", "spread"]),
    default="pack",
    show_default=True,
    help="Trials on as few machines as hold them, or spread over all (pbt always does).",
)
@click.option("--max-epochs", metavar="E", help="Epochs of a trial that is not stopped early; --optim.epochs by another name.")
@click.option("--scheduler", default="asha", show_default=True, help="Which trials are stopped early: asha, median or none; or pbt.")
@click.option("--sampler", default="tpe", show_default=True, help="How settings are drawn: tpe, gp, random or cmaes.")
@click.option("--metric", default="AP", show_default=True, help="COCO number that is maximized.")
@click.option("--time-budget", metavar="TIME", help="Stop after that long: 90s, 30m, 2h.")
@click.option("--points", metavar="FILE", help="YAML or JSON list of settings to try first.")
@click.option("--warm-start", metavar="SEARCH", help="Folder of an earlier search whose best settings are tried first.")
@click.option("--resume", metavar="SEARCH", help="Go on with the search in this folder.")
@settings_options("model", "loss", "matcher", "data", "optim", "speed", "run")
def tune(**options) -> None:
    """Search settings with Ray Tune and Optuna; trial 0 has the defaults, so that the result says whether it paid.

    Example: raydetr tune --space loss --trials 32 --max-epochs 20 --data photographs
    """
    with without_collections():
        from raydetr.launch.command import tune_command

    if options["max_epochs"] is not None:
        options["optim__epochs"] = options["max_epochs"]
    del options["max_epochs"]
    layers = given_settings(options)
    click.echo(tune_command(layers, **options))


@cli.command()
@click.option(
    "--address", metavar="URL", help="The cluster's dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)."
)
@click.option("--name", help="What the job is called; the time is added.")
@click.option(
    "--working-dir", default=".", show_default=True, metavar="DIR", help="Folder that goes along; data/, runs/ and .venv/ in it do not."
)
@click.option("--exclude", "excludes", multiple=True, metavar="PATTERN", help="What else stays here, as in .gitignore; may be repeated.")
@click.option(
    "--entrypoint-num-cpus", type=float, metavar="N", help="CPUs of the command itself, beside its workers' (default: none, on the head)."
)
@click.option("--entrypoint-num-gpus", type=float, metavar="N", help="GPUs of the command itself.")
@click.option("--entrypoint-memory", type=int, metavar="BYTES", help="Memory of the command itself.")
@click.option("--entrypoint-resources", metavar="JSON", help="""Custom resources of the command itself, '{"trial_driver": 1}'.""")
@click.option("--no-wait", is_flag=True, help="Do not follow the job.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- train|tune ...")
def submit(command: tuple[str, ...], no_wait: bool, **options) -> int:
    """Run `raydetr train` or `raydetr tune` as a job on a Ray cluster: its output is shown here, its exit code is this one's.

    Photographs and runs are folders that all machines of the cluster see. A job that was stopped goes on when it is submitted again
    with --resume and its run's folder.

    Example: raydetr submit --address http://127.0.0.1:8265 -- train --data /shared/photographs --storage /shared/runs --workers 4
    """
    check_submitted(command)
    from raydetr.launch.submit import resources, submit

    options["entrypoint"] = {name: options.pop(name) for name in list(options) if name.startswith("entrypoint_")}
    options["entrypoint"]["entrypoint_resources"] = resources(options["entrypoint"]["entrypoint_resources"])
    return submit(command, wait=not no_wait, write=lambda line: click.echo(f"raydetr: {line}", err=True), **options)


def check_submitted(command: Sequence[str]) -> None:
    """Raises UserError where a command is none for a cluster, has a wrong flag, or names folders that the cluster cannot find."""
    if command[0] not in ("train", "tune"):
        raise UserError(f"submit: {command[0]!r} is no job for a cluster; it takes -- train ... or -- tune ...")
    options = cli.commands[command[0]].make_context(f"raydetr {command[0]}", list(command[1:])).params
    places = {"--resume": options["resume"]}
    if not options["resume"]:
        file = options["config_file"]
        # A file that is not here may be there.
        layers = given_settings(options | {"config_file": file if file and Path(file).exists() else None})
        known = {name: value for layer in layers for name, value in config.flatten(layer).items()}
        places = {"--data": known.get("data.path"), "--storage": known.get("run.storage")}
        if places["--storage"] is None and (not file or Path(file).exists()):
            raise UserError("submit: say where the run is kept, --storage and a folder that all machines of the cluster see")
    for flag, place in places.items():
        check_place(flag, place or "")
        if place and "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"submit: {flag} {place}: a job has another working folder; give the absolute path of a folder that all machines see"
            )


@cli.command()
@click.argument("searches", nargs=-1, required=True, type=click.Path(), metavar="SEARCH...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write (default: report.html in SEARCH, or here for several).",
)
def report(searches: tuple[str, ...], out: Path | None) -> None:
    """Pictures and tables of a search, or of several beside each other, in one HTML file."""
    from raydetr.search.report import report

    click.echo(f"look at {report(searches, out)}")


@cli.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER...")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for pictures, predictions and index.html."
)
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.7, show_default=True, help="Lowest score that is drawn.")
@click.option("--compare", metavar="OTHER_CHECKPOINT", type=click.Path(), help="Show another checkpoint's predictions beside these.")
@click.option(
    "--annotations", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="COCO file whose true boxes are drawn."
)
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Images at a time.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
def predict(checkpoint: str, sources: tuple[Path, ...], out: Path, **options) -> None:
    """Draw a checkpoint's predictions on photographs and collect them in OUT/index.html.

    Example: raydetr predict runs/first/best.pth holiday/ --out seen
    """
    from raydetr.predict.predict import predict

    click.echo(predict(checkpoint, list(sources), out, **options).text())


@cli.command("export", cls=SettingsCommand)
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
def export_command(checkpoint: str, out: Path, to: str, images: tuple[Path, ...], precision: str, quantize: str, **options) -> None:
    """Write a checkpoint's model as ONNX, for transformers, for the official DETR, as safetensors or as TorchScript.

    What was written is loaded again and compared with the checkpoint on real images; with another precision, AP on the validation
    set is printed before and after.

    Example: raydetr export runs/first/best.pth model.onnx --to onnx
    """
    from raydetr.export.export import export

    click.echo(export(checkpoint, out, to, *given_settings(options), images=images, precision=precision, quantize=quantize).text())


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option("--port", type=click.IntRange(0, 65535), default=6006, show_default=True, help="Port; 0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 opens it to the network.")
def tensorboard(runs: tuple[str, ...], port: int, host: str) -> None:
    """Open TensorBoard on runs, or on a folder of runs; also on those at s3:// and gs://."""
    from raydetr.tensorboard import serve_tensorboard

    serve_tensorboard(runs, host, port, click.echo)


@cli.command()
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for everything it makes."
)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Ray workers.")
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1), help="Epochs to fine-tune.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the pictures and of the training.")
@click.option("--trials", default=8, show_default=True, type=click.IntRange(0), help="Trials of the search at the end; 0: no search.")
def demo(out: Path, **options) -> None:
    """See it work in a few minutes: make pictures of balloons, fine-tune a small DETR on them, search for better settings."""
    from raydetr.demo.demo import demo

    demo(out, **options)


if __name__ == "__main__":
    sys.exit(main())
