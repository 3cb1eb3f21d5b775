"""The Kubernetes files, by the schemas of Kubernetes and KubeRay; and the search of rayjob-tune.yaml, really run."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import start

from raydetr.launch import serve
from raydetr.launch.session import DRIVER

FOLDER = Path(__file__).parents[2] / "cluster" / "kuberay"
KUBERNETES = "1.33"
OBJECTS = [each for path in sorted(FOLDER.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]
RAY_OBJECTS = [each for each in OBJECTS if each["apiVersion"] == "ray.io/v1"]


def named(each):
    return f"{each['kind']}-{each['metadata']['name']}"


def cluster_of(each):
    spec = each["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(each):
    """The Pods of an object, as Kubernetes would be given them."""
    spec = cluster_of(each) if each in RAY_OBJECTS else each["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if each in RAY_OBJECTS else [spec]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        for group in groups
        if "template" in group
    ]


@pytest.mark.parametrize("each", [each for each in OBJECTS if each not in RAY_OBJECTS], ids=named)
def test_kubernetes_takes_its_own_objects(each):
    kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("each", RAY_OBJECTS, ids=named)
def test_kuberay_takes_its_objects_and_kubernetes_their_pods(each):
    schema = json.loads((Path(__file__).parents[1] / "fixtures" / "kuberay_v1.json").read_text())
    jsonschema.validate(each, schema)
    for pod in pods(each):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(each | {"spec": each["spec"] | {"workerGroups": []}}, schema)


@pytest.mark.parametrize("each", RAY_OBJECTS, ids=named)
def test_loading_processes_have_shared_memory(each):
    for pod in pods(each):
        (container,) = pod["spec"]["containers"]
        (volume,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (memory,) = [each["emptyDir"] for each in pod["spec"]["volumes"] if each["name"] == volume]
        assert memory["medium"] == "Memory"
        assert 2 * int(memory["sizeLimit"].removesuffix("Gi")) == int(container["resources"]["limits"]["memory"].removesuffix("Gi"))


@pytest.mark.parametrize("each", RAY_OBJECTS, ids=named)
def test_a_cluster_asks_for_its_token_and_trains_on_its_workers_only(each):
    cluster = cluster_of(each)
    assert cluster["authOptions"]["mode"] == "token"
    head = cluster["headGroupSpec"]["rayStartParams"]
    words = [word for name, value in head.items() for word in (f"--{name}", *shlex.split(value))]
    options = start.make_context("ray start", ["--head", *words]).params  # KubeRay writes them behind `ray start` in a shell
    assert options["num_cpus"] == options["num_gpus"] == 0
    assert each["kind"] == "RayService" or json.loads(json.loads(head["resources"])) == {DRIVER: 64}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("each", [each for each in OBJECTS if pods(each)], ids=named)
def test_pods_are_not_root_and_share_what_is_shared(each):
    claims = {claim["metadata"]["name"] for claim in OBJECTS if claim["kind"] == "PersistentVolumeClaim"}
    for pod in pods(each):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] > 0
        kept = [volume for volume in pod["spec"].get("volumes", ()) if "emptyDir" not in volume]
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in kept}
        assert set(volumes.values()) <= claims
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            if "raydetr" in container["image"]:
                mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
                assert mounts == (["/shared", "/dev/shm"] if each in RAY_OBJECTS else ["/shared"])


def test_the_cluster_that_stays_grows_and_survives_its_head():
    cluster = next(each["spec"] for each in RAY_OBJECTS if each["kind"] == "RayCluster")
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] > cluster["workerGroupSpecs"][0]["minReplicas"]
    service = next(each for each in OBJECTS if each["kind"] == "Service" and "redis" in each["metadata"]["name"])
    redis = next(each for each in OBJECTS if each["kind"] == "StatefulSet")
    options = cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()
    password = redis["spec"]["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == password


def test_the_service_is_what_ray_serve_takes_and_asks_for_its_token(monkeypatch):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    (service,) = [each for each in RAY_OBJECTS if each["kind"] == "RayService"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    monkeypatch.setenv(serve.TOKEN, "secret")
    bound = call_user_app_builder_with_args_if_necessary(getattr(importlib.import_module(module), name), application.args)
    model, options, digest = bound._bound_deployment.init_args
    assert digest == serve.token_digest("secret")
    wanted = model._bound_deployment.ray_actor_options
    (group,) = cluster_of(service)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert model._bound_deployment.num_replicas == options.replicas <= group["replicas"]
    assert wanted["num_gpus"] <= limits["nvidia.com/gpu"]
    assert wanted["num_cpus"] <= int(limits["cpu"])
    for pod in pods(service):
        (container,) = pod["spec"]["containers"]
        assert {each["name"] for each in container["env"]} == {serve.TOKEN}
        assert {"name": "serve", "containerPort": config.http_options.port} in container["ports"]
    with pytest.raises(ValueError, match="batches"):
        call_user_app_builder_with_args_if_necessary(serve.application, application.args | {"batches": 1})


def test_tensorboards_service_finds_it():
    board = next(each for each in OBJECTS if each["kind"] == "Deployment")
    service = next(each for each in OBJECTS if each["kind"] == "Service" and each["metadata"]["name"] == board["metadata"]["name"])
    (container,) = board["spec"]["template"]["spec"]["containers"]
    assert service["spec"]["selector"].items() <= board["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert f"--host 0.0.0.0 --port {container['ports'][0]['containerPort']}" in container["args"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "says", "leaves"),
    [
        ("train", "--epochs 1 --workers 1", "1 epoch finished", {"first/best.pth", "first/last.pth", "first/log.txt"}),
        (
            "tune",
            "--trials 1 --max-epochs 1 --concurrent 1",
            "best settings: raydetr train",
            {"loss/best.yaml", "loss/best.pth", "loss/trials.csv"},
        ),
    ],
    ids=["train", "tune"],
)
def test_the_entrypoint_of_a_job_runs(coco_folder, tmp_path, name, flags, says, leaves):
    job = next(each["spec"] for each in RAY_OBJECTS if each["metadata"]["name"] == f"raydetr-{name}")
    small = f"--preset detr_tiny --data.num_workers 0 --data.val_size 48 --data.train_sizes 48 {flags}"
    places = {"/shared/photographs": str(coco_folder()), "/shared/runs": str(tmp_path / "runs")}
    command = f"{job['entrypoint']} {small}"
    for there, here in places.items():
        command = command.replace(there, here)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert all((tmp_path / "runs" / file).exists() for file in leaves)
