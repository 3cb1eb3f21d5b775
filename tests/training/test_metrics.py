import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raydetr.config import load_config
from raydetr.tensorboard import PINNED
from raydetr.training.fit import LocalReporter, fit
from raydetr.training.metrics import LAST_EPOCH, REPORTED
from tests.helpers import add_outlines


class Recorder(LocalReporter):
    """Keeps the names of what a run reports."""

    def report(self, metrics, checkpoint=None):
        self.names = list(metrics)


@pytest.mark.parametrize("masks", [False, True])
def test_a_run_reports_the_metrics_that_are_listed(coco_folder, tmp_path, masks):
    """Searches keep these by name; one that is missing in the list would be missing in every report of a search."""
    tiny = {"model.preset": "detr_tiny", "model.weights": "none", "data.train_sizes": [48], "data.val_size": 48, "optim.epochs": 1}
    where = {
        "data.path": str(add_outlines(coco_folder())),
        "run.storage": str(tmp_path),
        "run.name": "run",
        "data.num_workers": 0,
        "run.pictures": 0,
    }
    recorder = Recorder()
    fit(load_config(tiny, where, {"model.masks": masks}), recorder)
    of_masks = ("segm_", "train_loss_mask", "train_loss_dice", "val_loss_mask", "val_loss_dice")
    assert recorder.names == ["epoch", *(name for name in REPORTED if masks or not name.startswith(of_masks)), LAST_EPOCH]
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    assert set(PINNED) <= set(events.Tags()["scalars"] + events.Tags()["tensors"])  # else the page of TensorBoard begins with nothing
