import subprocess
import sys
import time

import pytest

from raydetr.cli import main


def test_help_answers_at_once_and_without_torch_or_ray():
    code = "import sys; from raydetr.cli import main; main(['--help']); sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'optuna')))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # once to compile
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Start with `raydetr demo`" in done.stdout
    assert time.monotonic() - start < 1.0  # 0.13 s on an idle machine; tests share theirs


@pytest.mark.parametrize(
    "command", [["train"], ["evaluate"], ["predict"], ["tensorboard"], ["demo"], ["data", "convert"], ["data", "check"]]
)
def test_every_command_explains_itself(command, capsys):
    assert main([*command, "--help"]) == 0
    assert f"Usage: raydetr {' '.join(command)}" in capsys.readouterr().out


def test_help_all_lists_every_setting_with_its_bounds(capsys):
    assert main(["train", "--help-all"]) == 0
    out = capsys.readouterr().out
    assert "--loss.eos_coef 0.1" in out
    assert "[0.0 to 1.0]" in out
    assert "--data.train_sizes 480,512" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "trian"),
        (["train", "--optim.lrr", "1"], "--optim.lr"),
        (["train", "--loss.eos_coef", "2"], "loss.eos_coef: '2' is out of bounds; it takes 0.0 to 1.0"),
        (["train", "--epochs", "many"], "optim.epochs: 'many' is not a whole number"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train"], "data.path"),
        (["train", "--data", "absent"], "absent"),
        (["train", "--resume", "absent"], "there is no run in"),
        (["data", "check", "absent"], "absent"),
        (["data", "convert", "absent", "out"], "absent"),
        (["evaluate", "--data", "absent"], "either a CHECKPOINT or --predictions"),
        (["evaluate", "absent.pth", "--data", "absent"], "absent"),
        (["predict", "absent.pth", "absent.jpg", "--out", "seen"], "absent"),
        (["predict", "absent.pth", "absent.jpg"], "--out"),
        (["tensorboard", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("raydetr: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_debug_shows_where(capsys):
    with pytest.raises(Exception, match="out of bounds"):
        main(["train", "--loss.eos_coef", "2", "--debug"])


def test_the_demo_leaves_a_foreign_folder_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_shell_can_complete_settings_and_choices():
    from click.shell_completion import BashComplete

    from raydetr.cli import cli

    completion = BashComplete(cli, {}, "raydetr", "_RAYDETR_COMPLETE")
    assert "--optim.lr_backbone" in [item.value for item in completion.get_completions(["train"], "--optim.lr")]
    assert [item.value for item in completion.get_completions(["train", "--preset"], "detr_t")] == ["detr_tiny"]
