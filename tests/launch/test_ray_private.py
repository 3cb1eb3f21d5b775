import subprocess
import sys
import tomllib
from pathlib import Path

import optuna
import pytest
import ray
from packaging.requirements import Requirement
from ray.train.torch import TorchTrainer

from raydetr.launch import ray_private

KNOWN = {
    Requirement(each).name: Requirement(each)
    for each in tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
}


@pytest.mark.parametrize("name", ray_private.HOOKS)
def test_ray_has_what_raydetr_uses_of_its_private_parts(name):
    assert name not in ray_private.missing_hooks(), f"Ray {ray.__version__} has no {name}: {ray_private.HOOKS[name]}"


@pytest.mark.parametrize(
    "name", ["ray._private.gone.Thing", "ray._private.services.Gone", "ray._private.node.Node.gone", "no_such_package.thing"]
)
def test_what_a_version_lacks_is_named(monkeypatch, name):
    monkeypatch.setitem(ray_private.HOOKS, name, "for this test")
    assert ray_private.missing_hooks() == [name]


@pytest.mark.parametrize(("package", "version"), [("ray", ray_private.READ_IN), ("optuna", optuna.__version__)])
def test_the_versions_that_are_allowed_are_the_tested_ones(package, version):
    major, minor, _ = version.split(".")
    assert KNOWN[package].specifier.contains(version)
    assert not KNOWN[package].specifier.contains(f"{major}.{int(minor) + 1}.0")


def test_no_key_of_a_store_is_put_into_a_trials_runtime_environment(monkeypatch):
    from ray.tune.execution import class_cache

    # Ray lists this one itself; in this process an earlier test may have taken it out.
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {*class_cache.ENV_VARS_TO_PROPAGATE, "AWS_SECRET_ACCESS_KEY"})
    ray_private.keep_keys_out_of_logs()
    left = class_cache.ENV_VARS_TO_PROPAGATE
    assert not [name for name in left if "KEY" in name or "TOKEN" in name or "SECRET" in name]
    assert ray_private.TRAIN_POLL_INTERVAL in left


def test_a_search_imports_no_tracker_to_count_its_callbacks():
    code = """
import sys
import ray.tune.tune
from raydetr.launch import ray_private
ray_private.count_no_callbacks()
ray.tune.tune.air_usage.tag_callbacks([ray.tune.Callback()])
print("mlflow" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout == "False\n"


def test_a_trainer_starts_no_process_for_what_a_run_does_not_have():
    def names(trainer):
        return [type(each).__name__ for each in trainer._create_default_callbacks()]

    unneeded = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    before = names(TorchTrainer(print))
    assert unneeded < set(before)
    assert names(ray_private.without_idle_processes(TorchTrainer(print))) == [each for each in before if each not in unneeded]
