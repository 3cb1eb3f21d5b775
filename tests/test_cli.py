import subprocess
import sys

import click
import pytest

from raydetr.cli import cli, main, setting_name
from raydetr.config import SETTINGS

COMMANDS = ["data convert", "data check", *(name for name in cli.commands if name != "data")]
HEAVY = ("torch", "ray", "optuna", "pandas", "tensorboard", "pyarrow", "PIL")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_that_takes_long(command):
    """So that it answers at once; importing torch alone takes seconds."""
    code = "import sys; from raydetr.cli import main; assert main(sys.argv[1:]) == 0; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(HEAVY).isdisjoint(done.stderr.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_and_argument_is_explained(command, capsys):
    known = cli
    for word in command.split():
        known = known.commands[word]
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    for param in known.params:
        if isinstance(param, click.Argument):
            assert param.make_metavar(click.Context(known)) in out.splitlines()[0]
        elif setting_name(param) not in SETTINGS:
            assert (param.help or "").endswith((".", "'.")), param.opts
    for line in out.splitlines():
        assert "None" not in line, line
    assert known.short_help, "the list of commands shows a whole sentence"


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
        (["train", "--data", "absent", "--name", " "], "run.name: is blank"),
        (["train", "--data", "absent", "--name", "x" * 300], "300 bytes long; it may have 200"),
        (["tune", "--space", "loss", "--data", "absent", "--name", "a\x07b"], "run.name: 'a\\x07b' is not the name of a folder"),
        (["train"], "data.path"),
        (["train", "--data", "absent"], "absent"),
        (["train", "--resume", "absent"], "there is no run in"),
        (["data", "check", "absent"], "absent"),
        (["data", "convert", "absent", "out"], "absent"),
        (["evaluate", "--data", "absent"], "either a CHECKPOINT or --predictions"),
        (["evaluate", "absent.pth", "--data", "absent"], "absent"),
        (["predict", "absent.pth", "absent.jpg", "--out", "seen"], "absent"),
        (["predict", "absent.pth", "absent.jpg"], "--out"),
        (["predict", "absent.pth", "absent.jpg", "--out", "seen", "--attention-at", "12;9"], "--attention-at 12;9: is not X,Y"),
        (["predict", "absent.pth", "absent.jpg", "--out", "seen", "--tiles", "2"], "--tiles 2: is not COLUMNSxROWS"),
        (["evaluate", "absent.pth", "--data", "absent", "--overlap", "0.1"], "--overlap: is for tiles"),
        (["evaluate", "absent.pth", "--data", "absent", "--tiles", "2x2", "--overlap", "0.95"], "it takes 0 to 0.9"),
        (["evaluate", "--predictions", "absent.json", "--data", "absent", "--tiles", "2x2"], "cannot be given with --predictions"),
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
    assert "holds something other than a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_shell_can_complete_settings_and_choices():
    from click.shell_completion import BashComplete

    completion = BashComplete(cli, {}, "raydetr", "_RAYDETR_COMPLETE")
    assert "--optim.lr_backbone" in [item.value for item in completion.get_completions(["train"], "--optim.lr")]
    assert [item.value for item in completion.get_completions(["train", "--preset"], "detr_t")] == ["detr_tiny"]


def test_a_run_whose_settings_are_gone_says_so(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert f"{tmp_path}/config.yaml: is empty, and it should hold the settings of the run" in capsys.readouterr().err
