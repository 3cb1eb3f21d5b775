import io
import re

import pytest
from rich.console import Console

from raydetr.training import console
from raydetr.training.console import Display

METRICS = {"train_loss": 3.25, "val_loss": 2.5, "AP": 0.123456, "AP50": 0.4, "AP75": None, "AR100": 0.5, "images_per_second": 21.5}


def events(epochs=2, steps=3, done=0):
    yield {"kind": "message", "text": "weights: [bundled] 208 of 208 entries"}
    yield {"kind": "start", "epochs": epochs, "steps": steps, "done": done}
    for epoch in range(done + 1, epochs + 1):
        for step in range(1, steps + 1):
            yield {"kind": "step", "epoch": epoch, "step": step, "loss": 4.5 / step, "images_per_second": 20.0}
        yield {"kind": "evaluate", "epoch": epoch}
        yield {"kind": "epoch", "epoch": epoch, "metrics": METRICS, "seconds": 75.0, "best": epoch == 1}
    yield {"kind": "end", "epochs": epochs, "best_AP": 0.123456, "best_epoch": 1, "checkpoint": "runs/a/best.pth"}


def shown(terminal, **settings):
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=terminal, width=120, highlight=False)) as display:
        for event in events(**settings):
            display.show(event)
    return file.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    lines = shown(terminal=False).splitlines()
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert lines[0] == "weights: [bundled] 208 of 208 entries"
    assert re.fullmatch(r"epoch 1/2, step 2/3: loss 2\.250, 20\.0 images/s, \d+:\d\d left", lines[2])
    assert re.fullmatch(
        r"epoch 1/2: train loss 3\.250, val loss 2\.500, AP 0\.123, AP50 0\.400, AP75 -, AR100 0\.500 \(best so far\), "
        r"21\.5 images/s, 1:15, \d+:\d\d left",
        lines[4],
    )
    assert "best so far" not in lines[8]
    assert lines[-1] == "2 epochs finished, best AP 0.123 in epoch 1: runs/a/best.pth"
    assert len(lines) == 10


def test_plain_lines_do_not_come_for_every_step():
    assert "step" not in shown(terminal=False)


def test_a_terminal_gets_a_bar_and_a_table_per_epoch():
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(terminal=True))
    assert "epoch 1/2" in text
    assert "loss 4.500, 20.0 images/s" in text or "loss 1.500, 20.0 images/s" in text
    assert re.search(r"1/2 \*\s+3\.250\s+2\.500\s+0\.123\s+0\.400\s+-\s+0\.500\s+21\.5\s+1:15", text)
    assert re.search(r"2/2  \s+3\.250", text)
    assert "images/s" in text
    assert "left" in text


def test_a_run_that_goes_on_counts_from_where_it_was():
    lines = shown(terminal=False, epochs=5, done=3).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 4/5", "epoch 5/5"]


def test_the_terminal_is_given_back_after_an_error():
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=120)

    def interrupted():
        with Display(terminal) as display:
            display.show({"kind": "start", "epochs": 1, "steps": 3, "done": 0})
            assert "\x1b[?25l" in file.getvalue()  # the cursor is hidden
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().count("\x1b[?25h") == 1


def test_a_lost_worker_that_starts_again_gets_a_new_bar():
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=True, width=120)) as display:
        display.show({"kind": "start", "epochs": 2, "steps": 3, "done": 0})
        display.show({"kind": "start", "epochs": 2, "steps": 3, "done": 1})
        display.show({"kind": "step", "epoch": 2, "step": 1, "loss": 1.0, "images_per_second": 1.0})
    assert file.getvalue().rindex("epoch 2/2") > file.getvalue().rindex("epoch 1/2")
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 2


def test_an_exit_that_is_not_the_terminals_own_ends_the_process():
    class Leaving(io.StringIO):
        def write(self, _):
            raise SystemExit(3)

    with pytest.raises(SystemExit), Display(Console(file=Leaving())) as display:
        display.show({"kind": "message", "text": "hello"})
