"""``raydetr demo``: generated images, conversion, check, fine-tuning, predictions, a search and its confirmation, in a few minutes."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from raydetr.config import Config, asked_batch_size, load_config, to_dict
from raydetr.errors import UserError

_MARK = ".raydetr-demo"
TRIAL_EPOCHS = 6  # enough to tell trials apart
TEST_IMAGES = 40  # that judge what the search found


def demo(
    out: Path, workers: int = 2, epochs: int = 10, seed: int = 0, trials: int = 8, masks: bool = False, seeds: int = 3
) -> dict[str, float]:
    """Run every part of raydetr once on generated images of balloons.

    The steps are: generate images, convert and check them, evaluate the bundled ``detr_tiny``, fine-tune it, evaluate again, write a
    gallery, search for better settings, and confirm the best of them on new images.

    Args:
        out: folder for everything; an earlier demo in it is replaced.
        workers: number of Ray Train workers.
        epochs: epochs of the fine-tuning.
        seed: seed of the images and of the training.
        trials: number of trials of the search; 0 skips it.
        masks: whether to train masks as well, from the outlines of the balloons.
        seeds: number of trainings with the best settings, and as many with the default settings, that confirm the search.

    Returns:
        AP ``before`` and ``after`` fine-tuning, and the ``seconds`` in all; with a search also the AP of trial 0 (``default``) and of the
        ``best`` trial; with masks also their AP ``segm_before`` and ``segm_after``.

    Raises:
        UserError: ``out`` contains something other than a demo, or a step fails.
    """
    start = time.monotonic()
    _claim(out)
    photographs, coco, runs = out / "photographs", out / "coco", out / "runs"

    _say(1, "Generating images of balloons, labeled in the format of the VGG Image Annotator")
    from raydetr.demo import balloons

    balloons.generate(photographs, seed=seed)

    _say(2, f"raydetr data convert {photographs} {coco} --from via")
    from raydetr.data.formats.convert import convert

    click.echo(convert(photographs, coco).text())

    _say(3, f"raydetr data check {coco}")
    from raydetr.data.check.check import check

    config = load_config({"model.preset": "detr_tiny", "data.path": str(coco), "run.storage": str(runs), "run.name": "balloons"})
    batch_size = max(1, asked_batch_size(config) // workers)  # the same number of images in a step for any number of workers
    config = load_config(
        to_dict(config),
        {"optim.epochs": epochs, "optim.batch_size": batch_size, "run.workers": workers, "run.seed": seed, "model.masks": masks},
    )
    found = check(config.data, masks=masks)
    click.echo(found.text())
    if not found.ok:
        raise UserError(f"the generated images in {coco} do not pass the check")

    _say(4, "raydetr evaluate on the bundled detr_tiny, which has never seen a balloon")
    from raydetr.predict.score import metrics_table, score_checkpoint
    from raydetr.weights.official import BUNDLED, BUNDLED_MASKS

    untrained = BUNDLED_MASKS if masks else BUNDLED
    before = score_checkpoint(untrained, {"data.path": str(coco)})
    click.echo(metrics_table(before))

    flags = " --model.masks true" if masks else ""
    _say(5, f"raydetr train --preset detr_tiny --data {coco} --epochs {epochs} --workers {workers} --batch-size {batch_size}{flags}")
    from raydetr.launch.train import ray_session

    verdict = ""
    with ray_session(workers):
        after = _fine_tune(config, coco, out / "gallery", untrained)
        result = {"before": before["AP"], "after": after["AP"]}
        if masks:
            result |= {"segm_before": before["segm"]["AP"], "segm_after": after["segm"]["AP"]}
        if trials:
            result |= _search(coco, runs, trials, seed)
            verdict = _confirm(out, coco, runs / "search", seed, seeds)
    result["seconds"] = time.monotonic() - start
    _say_what_next(out, result, verdict)
    return result


def _fine_tune(config: Config, coco: Path, gallery: Path, untrained: Path) -> dict[str, Any]:
    from raydetr.launch.train import run_folder, train
    from raydetr.predict.predict import predict
    from raydetr.predict.score import metrics_table, score_checkpoint

    train(config)
    best = run_folder(config) / "best.pth"

    _say(6, f"raydetr evaluate {best} --data {coco}")
    after = score_checkpoint(best, {"data.path": str(coco)})
    click.echo(metrics_table(after))

    _say(7, f"raydetr predict {best} {coco} --compare {untrained.name} --out {gallery}")
    annotations = coco / "annotations" / "custom_val.json"
    click.echo(predict(best, [coco / "val2017"], gallery, compare=untrained, annotations=annotations).text())
    return after


def _search(coco: Path, runs: Path, trials: int, seed: int) -> dict[str, float]:
    base = {"model.preset": "detr_tiny", "data.path": str(coco), "optim.epochs": TRIAL_EPOCHS, "run.seed": seed}
    flags = f"--preset detr_tiny --data {coco} --space tiny --trials {trials} --max-epochs {TRIAL_EPOCHS} --seed {seed}"
    _say(8, f"raydetr tune {flags}")
    from raydetr.launch.tune import summary, tune
    from raydetr.search.record import objective

    config = load_config(base, {"run.storage": str(runs), "run.name": "search"})
    search = tune(config, "tiny", trials=trials)
    click.echo(summary(search))
    best = search.best()
    if not best:
        raise UserError(f"no trial of the search has finished; {search.folder} says why")
    return {"default": objective(search.frozen()[0]) or 0.0, "best": objective(best) or 0.0}


def _confirm(out: Path, coco: Path, search: Path, seed: int, seeds: int) -> str:
    """Confirm the best complete trial of the search on new images, write its report, and return the verdict, empty where none was."""
    from raydetr.launch.confirm import confirm, confirmed_text
    from raydetr.report.report import report
    from raydetr.search.study import Search

    sentence = ""
    if any(trial.number and trial.state.name == "COMPLETE" for trial in Search(search).ranked()):
        _say(9, f"raydetr confirm {search} --top 1 --seeds {seeds}, judged by {TEST_IMAGES} new images in {coco / 'test2017'}")
        _add_test_images(out, coco, seed)
        verdict = confirm(search, top=1, seeds=seeds)
        click.echo(confirmed_text(verdict, search))
        sentence = verdict["sentence"]
    report([search])
    return sentence


def _add_test_images(out: Path, coco: Path, seed: int) -> None:
    """Generate images that neither the training nor the search has seen as the test set of ``coco``."""
    from raydetr.data.formats.convert import convert
    from raydetr.demo import balloons

    with tempfile.TemporaryDirectory(dir=out) as folder:
        new = Path(folder)
        balloons.generate(new / "via", train=1, val=TEST_IMAGES, seed=seed + 1)
        convert(new / "via", new / "coco", copy=True)  # nothing may link to the folder that is about to go
        (new / "coco" / "val2017").rename(coco / "test2017")
        (new / "coco" / "annotations" / "custom_val.json").rename(coco / "annotations" / "custom_test.json")


def _claim(out: Path) -> None:
    if (out / _MARK).exists():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something other than a demo; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _say(step: int, what: str) -> None:
    click.secho(f"\n[{step}/9] {what}", bold=True)


def _say_what_next(out: Path, result: dict[str, float], verdict: str) -> None:
    lines = [f"AP {result['before']:.3f} before, {result['after']:.3f} after fine-tuning"]
    pages = f"""
  {out / "gallery" / "index.html"}    before and after beside the true boxes
  raydetr tensorboard {out / "runs"}    AP and losses, epoch by epoch; HPARAMS compares the trials"""
    if "segm_after" in result:
        lines.append(f"masks: AP {result['segm_before']:.3f} before, {result['segm_after']:.3f} after training")
    if "best" in result:
        lines.append(
            f"search: AP {result['default']:.3f} with the default settings, {result['best']:.3f} with the best found, luck included"
        )
        if verdict:
            lines.append(f"judged by new images: {verdict}")
        pages += f"""
  {out / "runs" / "search" / "report.html"}    what the search found"""
    click.secho("\n" + "\n".join([*lines, f"{result['seconds']:.0f} seconds in all"]), bold=True)
    click.echo(f"""
Look at{pages}

With photographs of your own
  raydetr data convert PHOTOGRAPHS DATA --from via    (COCO folders need no conversion)
  raydetr data check DATA
  raydetr train --data DATA --epochs 50    (downloads the official detr_resnet50, 160 MB)
  raydetr predict runs/.../best.pth PHOTOGRAPHS --out seen""")
