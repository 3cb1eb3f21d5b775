"""aws.yaml and gcp.yaml, as Ray's cluster launcher reads them."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from raydetr.launch.session import DRIVER

FOLDER = Path(__file__).parents[2] / "cluster"


@pytest.fixture(params=["aws.yaml", "gcp.yaml"])
def cloud(request):
    return yaml.safe_load((FOLDER / request.param).read_text())


def test_rays_launcher_takes_the_file(cloud):
    prepared = prepare_config(cloud)
    validate_config(prepared)
    assert prepared["head_setup_commands"] == []  # the defaults would install another Ray
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"idle_timeout": 5})


def test_the_head_is_there_to_stay_and_the_workers_are_spot(cloud):
    kinds = cloud["available_node_types"]
    head = kinds.pop(cloud["head_node_type"])
    assert head["resources"] == {"CPU": 0, DRIVER: 64}
    assert "spot" not in json.dumps(head["node_config"]).lower()
    for worker in kinds.values():
        assert worker["resources"]["GPU"] == 1
        assert "spot" in json.dumps(worker["node_config"]).lower()
        assert worker["max_workers"] <= cloud["max_workers"]


def test_every_machine_asks_for_the_token_and_sees_the_shared_disk(cloud):
    assert "--env RAY_AUTH_MODE=token" in cloud["docker"]["run_options"]
    assert cloud["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--volume /shared:/shared" in cloud["docker"]["run_options"]
    assert "--shm-size=16g" in [option.split(" #")[0] for option in cloud["docker"]["run_options"]]
    assert any(re.search(r"mount -t nfs.* /shared$", command) for command in cloud["initialization_commands"])


def test_ray_takes_the_commands_that_start_it(cloud):
    commands = [command.split("; ")[-1] for name in ("head", "worker") for command in cloud[f"{name}_start_ray_commands"]]
    started = [shlex.split(command)[2:] for command in commands if command.startswith("ray start")]
    head, worker = (start.make_context("ray start", words).params for words in started)
    assert (head["head"], head["port"], head["dashboard_host"]) == (True, 6379, "127.0.0.1")
    assert head["autoscaling_config"]
    assert worker["address"].endswith(":6379")
