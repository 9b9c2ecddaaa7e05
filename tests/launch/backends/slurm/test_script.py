from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.backends.slurm.script import Job, job_of, log_pattern, ranges, run_of, script
from launch.plan import log_name
from orchestrator.config.options import Config
from tests.launch.planning import config


def job(
    pool: dict[str, Any] | None = None, *, model: str = "m", folder: str = "/shared/run-1", **slurm: Any
) -> Job:
    pools = {"prefill": {"engine": "sim"}, "decode": pool or {"engine": "sim"}}
    made: Config = config(
        {"name": model, "path": "dir", **pools}, launch={"backend": "slurm", "slurm": slurm}
    )
    return job_of(
        made,
        model,
        "decode",
        [0, 1, 2],
        run="run-1",
        folder=Path(folder),
        python="/opt/venv/bin/python",
        imports={"PYTHONPATH": "/src it", "PYTHONSAFEPATH": "1"},
    )


def test_a_pool_is_a_job_array_with_a_task_for_each_worker() -> None:
    assert (
        script(job())
        == """#!/bin/bash
#SBATCH --job-name="baton m/decode run-1"
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="/shared/run-1/m-decode-%a.log"
#SBATCH --signal=B:TERM@630
export PYTHONPATH='/src it'
export PYTHONSAFEPATH=1
trap '' USR1 USR2
exec /opt/venv/bin/python -m launch.backends.slurm.task /shared/run-1 m/decode
"""
    )


def options(made: Job) -> list[str]:
    lines = script(made).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_the_config_says_where_and_for_how_long() -> None:
    found = options(job(partition="gpu,h100", time="2-12:00:00"))
    assert found[-2:] == ["--partition=gpu,h100", "--time=2-12:00:00"]


def test_workers_get_their_gpus() -> None:
    assert "--gres=gpu:4" in options(job({"engine": "vllm", "device": "cuda", "gpus_per_replica": 4}))
    assert not any("gres" in option for option in options(job({"engine": "vllm", "device": "cpu"})))


def test_options_of_the_user_come_last_as_sbatch_takes_the_last() -> None:
    found = options(
        job(
            {"engine": "vllm", "device": "cuda"},
            sbatch=["--gres=gpu:h100:1", "#SBATCH --account=lab", "-C a100"],
        )
    )
    assert found[-4:] == ["--gres=gpu:1", "--gres=gpu:h100:1", "--account=lab", "-C a100"]


def test_a_pool_may_ask_in_another_way_than_others() -> None:
    decode = {"pool": "m/decode", "partition": "h20", "sbatch": ["--mem=64G"]}
    pools = [{"pool": "m/prefill", "partition": "h100"}, decode]
    found = options(job(partition="gpu", time="1-0", sbatch=["--account=lab"], pools=pools))
    assert found[-4:] == ["--partition=h20", "--time=1-0", "--account=lab", "--mem=64G"]


@pytest.mark.parametrize(
    ("time", "notice_s"), [("90", 630), ("10", 300), ("0:40", 20), ("unlimited", 630), ("1-0", 630)]
)
def test_a_job_is_told_of_its_end_so_early_that_its_requests_can_end(time: str, notice_s: int) -> None:
    assert f"--signal=B:TERM@{notice_s}" in options(job(time=time))


def test_logs_are_where_the_run_has_them() -> None:
    made = job(model="org/a b%", folder="/shared/50%")
    pattern = log_pattern(made)
    assert pattern == "/shared/50%%/org+a%%20b%%25-decode-%a.log"
    assert pattern.replace("%%", "%").replace("%a", "2") == f"/shared/50%/{log_name('org/a b%/decode/2')}"
    assert made.file_name == "org+a%20b%25-decode.sbatch"


def test_a_folder_may_have_blanks() -> None:
    made = job(folder="/shared disk/run-1")
    assert '--output="/shared disk/run-1/m-decode-%a.log"' in options(made)
    assert script(made).splitlines()[-1].endswith("task '/shared disk/run-1' m/decode")


def test_a_job_is_known_by_its_name() -> None:
    assert run_of(job(model="a b").name) == ("a b/decode", "run-1")
    assert run_of("baton") is None
    assert run_of("train m/decode run-1") is None


@pytest.mark.parametrize(
    ("indexes", "told"), [([0], "0"), ([2, 0, 1], "0-2"), ([7, 0, 1, 3, 4], "0-1,3-4,7")]
)
def test_tasks_are_listed_in_short(indexes: list[int], told: str) -> None:
    assert ranges(indexes) == told
