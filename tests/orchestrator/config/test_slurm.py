from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestrator.config.slurm import SlurmConfig, seconds_of


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("7-0", 604800),
        ("1-2:03", 93780),
        ("1-2:03:04", 93784),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times_are_as_slurm_reads_them(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds
    assert SlurmConfig(time=time).time == time


@pytest.mark.parametrize("time", ["", "7d", "1:2:3:4", "-1", "0", "0:00", "soon", "٣"])
def test_another_time_is_refused(time: str) -> None:
    with pytest.raises(ValidationError):
        SlurmConfig(time=time)


def test_options_of_sbatch_are_taken_as_they_stand() -> None:
    given = ["--account=lab", "#SBATCH --mem=64G", "-C a100", "--comment=two words"]
    assert SlurmConfig(sbatch=given).sbatch == [
        "--account=lab",
        "--mem=64G",
        "-C a100",
        "--comment=two words",
    ]


@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("--array=0-3", "--array"),
        ("-a 0-3", "--array"),
        ("-a0-3", "--array"),
        ("--no-requeue", "--requeue"),
        ("#SBATCH --output=x", "--output"),
        ("-N2", "--nodes"),
    ],
)
def test_what_baton_gives_itself_cannot_be_given(option: str, ours: str) -> None:
    with pytest.raises(ValidationError, match=f"Baton gives {ours} itself"):
        SlurmConfig(sbatch=[option])


@pytest.mark.parametrize("option", ["account=lab", "", "--x\nrm -rf /", "#SBATCH"])
def test_what_is_no_option_is_refused(option: str) -> None:
    with pytest.raises(ValidationError, match="expected one option of sbatch"):
        SlurmConfig(sbatch=[option])


@pytest.mark.parametrize(
    "given",
    [{"partition": "a b"}, {"partition": ""}, {"folder": ""}, {"folder": 'a"b'}, {"network": "10.0.0"}],
)
def test_other_mistakes_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        SlurmConfig(**given)  # type: ignore[arg-type]
