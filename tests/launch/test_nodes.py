import socket

import pytest
import ray
from ray.cluster_utils import Cluster

import raydetr
from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.launch.nodes import check_listening, check_nodes, judge, listed, look

pytestmark = pytest.mark.xdist_group("ray")


def answer(**changes):
    return {"version": raydetr.__version__, "lacking": [], "token": True, "wrote": "mine"} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": None}, "no raydetr on the cluster's machines: b"),
        ({"version": "0.0.1"}, r"raydetr is .* here and 0\.0\.1 on b"),
        ({"lacking": ["/photographs"]}, "/photographs is not on b"),
        ({"token": False}, "run.storage: /runs is another folder on b than here"),
        ({"wrote": "elsewhere"}, "run.storage: /runs is another folder on b than here"),
    ],
)
def test_what_a_machine_lacks_is_said_with_its_name(changes, message):
    judge([("a", answer()), ("c", answer())], {"mine"}, "/runs")
    with pytest.raises(UserError, match=message):
        judge([("a", answer()), ("b", answer(**changes))], {"mine"}, "/runs")


def test_names_in_words():
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdef")) == "a, b, c, d and 2 more"


def test_an_address_where_nothing_answers_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, and nobody listens
        with pytest.raises(UserError, match=f"RAY_ADDRESS 127.0.0.1:{port}: nothing answers there"):
            check_listening(f"RAY_ADDRESS 127.0.0.1:{port}", f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="no address of a Ray cluster"):
        check_listening("--address nowhere", "nowhere")
    check_listening("RAY_ADDRESS auto", "auto")


def lacks_the_photographs(paths, storage, token):
    return look(paths, storage, token) | {"lacking": paths}


@pytest.mark.slow
def test_every_machine_of_a_cluster_is_asked(tmp_path):
    (tmp_path / "data").mkdir()
    config = load_config({"data.path": str(tmp_path / "data"), "run.storage": str(tmp_path / "runs")})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        check_nodes(config)
        assert not list((tmp_path / "runs").iterdir())  # the probes are gone
        with pytest.raises(UserError, match=r"data is not on .*; the photographs belong in a folder that all machines see"):
            check_nodes(config, lacks_the_photographs)
    finally:
        ray.shutdown()
        cluster.shutdown()
