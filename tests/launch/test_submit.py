import pytest

from raydetr.cli import check_submitted
from raydetr.errors import UserError
from raydetr.launch.submit import resources, runtime_environment

pytestmark = pytest.mark.xdist_group("ray")

TINY = {
    "model.preset": "detr_tiny",
    "model.weights": "none",
    "optim.epochs": 1,
    "data.train_sizes": [48],
    "data.crop": 0.0,
    "data.val_size": 48,
    "data.num_workers": 0,
    "run.pictures": 0,
}


def test_what_goes_along_with_a_job(tmp_path):
    environment = runtime_environment(tmp_path, ["/big/"])
    assert environment["working_dir"] == str(tmp_path)
    assert {"/data/", "/runs/", "/.venv/", "/.git/", "/big/"} <= set(environment["excludes"])
    assert "pip" not in environment
    (tmp_path / "constraints.txt").write_text("optuna==5.0\n")
    assert any("constraints.txt" in line for line in runtime_environment(tmp_path)["pip"])


def test_resources_as_rays_own_commands_take_them():
    assert resources('{"trial_driver": 1}') == {"trial_driver": 1.0}
    assert resources(None) is None
    for text in ("trial_driver", "[1]", '{"a": "b"}'):
        with pytest.raises(UserError, match="--entrypoint-resources"):
            resources(text)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "best.pth"], "is no job for a cluster"),
        (["train", "--data", "photographs", "--storage", "/runs"], "--data photographs: .* absolute path"),
        (["train", "--data", "/photographs"], "--storage"),
        (["tune", "--resume", "runs/search"], "--resume runs/search: .* absolute path"),
    ],
)
def test_what_cannot_work_on_a_cluster_is_refused_here(command, message):
    with pytest.raises(UserError, match=message):
        check_submitted(command)
