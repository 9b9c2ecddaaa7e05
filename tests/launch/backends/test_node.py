from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from launch.backends.node import FIRST_PORT, LAST_PORT, Reserved, gpus_of, spec_here
from launch.engines.base import PlanError
from orchestrator.config.options import Config
from tests.launch.planning import config, model, value_of

SIM = {"engine": "sim", "replicas": 2}
HOST = "127.0.0.1"


@pytest.fixture
def reserved() -> Iterator[Reserved]:
    with Reserved() as made:
        yield made


def of_sim() -> Config:
    return config(model(prefill=SIM, decode=SIM))


def test_a_worker_gets_free_ports_of_its_node(reserved: Reserved) -> None:
    spec = spec_here(of_sim(), "m/decode/7", HOST, reserved, {})
    assert (spec.name, spec.role, spec.log_name) == ("m/decode/7", "decode", "m-decode-7.log")
    assert all(FIRST_PORT <= port < LAST_PORT for _, port in spec.listens)
    assert spec.ready_url == f"http://{HOST}:{value_of('--port', spec)}/health"


def test_ports_are_kept_from_other_workers(reserved: Reserved) -> None:
    first = spec_here(of_sim(), "m/decode/0", HOST, reserved, {}, random.Random(1))
    with Reserved() as others:
        second = spec_here(of_sim(), "m/decode/1", HOST, others, {}, random.Random(1))
    assert not {*first.listens} & {*second.listens}


def test_ports_that_others_listen_at_are_left_out(reserved: Reserved) -> None:
    wanted = random.Random(1).randrange(FIRST_PORT, LAST_PORT)
    with socket.socket() as other:
        other.bind((HOST, wanted))
        other.listen()
        spec = spec_here(of_sim(), "m/decode/0", HOST, reserved, {}, random.Random(1))
    assert (HOST, wanted) not in spec.listens


def test_ports_are_free_again_once_they_are_closed() -> None:
    with Reserved() as one, Reserved() as other:
        assert one.take(HOST, FIRST_PORT)
        assert not other.take(HOST, FIRST_PORT)
        one.close()
        assert other.take(HOST, FIRST_PORT)


def test_gpus_are_those_that_the_node_shows(reserved: Reserved) -> None:
    pool = {"replicas": 1, "gpus_per_replica": 2}
    made = config(model(both=pool))
    spec = spec_here(made, "m/both/0", HOST, reserved, {"CUDA_VISIBLE_DEVICES": "5,7,6"})
    assert spec.env["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert gpus_of(made, "m/both/0") == 2
    assert gpus_of(of_sim(), "m/decode/0") == 0


def test_too_few_gpus_are_named(reserved: Reserved) -> None:
    made = config(model(both={"replicas": 1, "gpus_per_replica": 2}))
    with pytest.raises(PlanError, match="needs GPU 1, but CUDA_VISIBLE_DEVICES=5 shows only 1"):
        spec_here(made, "m/both/0", HOST, reserved, {"CUDA_VISIBLE_DEVICES": "5"})


def test_a_pool_that_there_is_not(reserved: Reserved) -> None:
    with pytest.raises(PlanError, match="m/both/0: the config has no such pool"):
        spec_here(of_sim(), "m/both/0", HOST, reserved, {})
