"""The command: what it compares, how it advises and calibrates, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from launch import cli
from launch.bench.results import FORMAT, ClientLoad, Load, Result, Setup, Step, Unit, spread
from launch.bench.sample import Slo
from launch.simulate.calibration import calibrate
from launch.simulate.experiment import Experiment
from launch.simulate.figures import handoff_s, prefill_s, tpot_s, ttft_s
from launch.simulate.formats import read_trace
from launch.simulate.network import Network
from launch.simulate.site import Conditions, Site
from launch.simulate.trace import Arrival, Trace
from launch.simulate.variants import own_name, routing_of
from orchestrator.config.options import Config, RoutingConfig
from tests.launch.simulate.sites import SLOW_PREFILL, STEPS, config_of, conversations, row, trace_file
from worker.sim.latency import Latency


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw_config(4, 4)))
    return path


def raw_config(
    prefill: int, decode: int, routing: dict[str, Any] | None = None, sim: dict[str, Any] | None = None
) -> dict[str, Any]:
    pools = {"prefill": prefill, "decode": decode}
    model = {role: {"engine": "sim", "replicas": count, "sim": sim or {}} for role, count in pools.items()}
    return {"models": [{"name": "m", "path": "x", **model}], "routing": routing or {}}


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["simulate", *arguments, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- comparing ----------------------------------------------------------------------------------


def test_policies_side_by_side(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(tmp_path, conversations(1500, rate=4.0))
    result = found(capsys, str(site), "--trace", trace, "--policies", "least_loaded,prefix+least_tokens")
    assert list(result) == ["least_loaded", "prefix+least_tokens"]
    least, prefix = result.values()
    for figures in result.values():
        for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "cached_ratio", "good"):
            assert isinstance(figures[name], float)
    assert prefix["cached_ratio"] > 1.3 * least["cached_ratio"]
    assert prefix["ttft_p50_s"] < least["ttft_p50_s"]
    assert prefix["requests"] == least["requests"] < 1500  # those of the beginning are not counted


def test_a_seed_is_a_run(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(tmp_path, conversations(300, rate=4.0))
    arguments = str(site), "--trace", trace, "--policies", "prefix,random"
    assert found(capsys, *arguments) == found(capsys, *arguments)


def test_several_seeds_have_a_spread(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(tmp_path, conversations(300, rate=4.0))
    arguments = str(site), "--trace", trace, "--policies", "prefix"
    one, three = found(capsys, *arguments)["prefix"], found(capsys, *arguments, "--seeds", "3")["prefix"]
    assert not any(name.endswith("_spread") for name in one)
    assert 0 < three["ttft_p50_s_spread"] < three["ttft_p50_s"]
    assert three["ttft_p50_s"] != one["ttft_p50_s"]
    assert set(three) == {*one, *(f"{name}_spread" for name in one)}


def test_a_higher_rate_is_a_higher_load(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = str(site), "--trace", trace_file(tmp_path, conversations(500, rate=3.0))
    slow, fast = (found(capsys, *arguments, "--rate", rate) for rate in ("1", "3"))
    (name,) = slow
    assert name == own_name(RoutingConfig())
    assert fast[name]["ttft_p50_s"] > 2 * slow[name]["ttft_p50_s"]
    assert fast[name]["good"] < slow[name]["good"]


def test_other_numbers_of_workers(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = str(site), "--trace", trace_file(tmp_path, conversations(500, rate=4.0))
    four = found(capsys, *arguments, "--policies", "least_loaded")["least_loaded"]
    one = found(capsys, *arguments, "--policies", "least_loaded", "--prefill", "1")["least_loaded"]
    none = found(capsys, *arguments, "--policies", "least_loaded", "--prefill", "0", "--decode", "8")
    assert one["ttft_p50_s"] > 5 * four["ttft_p50_s"]
    assert (four["whole"], none["least_loaded"]["whole"]) == (0.0, 1.0)


def test_workers_that_are_discovered_are_as_many_as_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = {"engine": "sim", "discover": {"dns": "h:1"}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"models": [{"name": "m", "prefill": pool, "decode": pool}]}))
    trace = trace_file(tmp_path, conversations(100, rate=4.0))
    assert cli.main(["simulate", str(path), "--trace", trace, "--prefill", "2"]) == 2
    assert "the workers of m/decode are discovered: say how many with --decode" in capsys.readouterr().err
    assert found(capsys, str(path), "--trace", trace, "--prefill", "2", "--decode", "2")


def test_a_slow_worker(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = str(site), "--trace", trace_file(tmp_path, conversations(500, rate=3.0))
    policy = "--policies", "round_robin"
    fast = found(capsys, *arguments, *policy)["round_robin"]
    slow = found(capsys, *arguments, *policy, "--slow", "m/prefill/3=5")["round_robin"]
    assert slow["ttft_p99_s"] > 2 * fast["ttft_p99_s"]


def test_the_table_for_people(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(tmp_path, conversations(200, rate=3.0))
    assert cli.main(["simulate", str(site), "--trace", trace, "--policies", "prefix,random@never"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["TTFT", "p50", "s"]
    assert [line.split()[0] for line in rows] == ["prefix", "random@never"]


def test_processes_that_tell_each_other_are_as_good_as_one(tmp_path: Path) -> None:
    rows = conversations(1500, rate=4.0)
    path = trace_file(tmp_path, rows)
    config = Config.model_validate(raw_config(4, 4, {"prefill": "prefix"}))
    many = config.model_copy(update={"orchestrator": config.orchestrator.model_copy(update={"processes": 4})})
    one, told, alone = (
        cached(site, path, Conditions(noise=0.0, shares=shares))
        for site, shares in ((config, True), (many, True), (many, False))
    )
    assert told > 0.9 * one
    assert alone < 0.8 * one


def test_a_restart_that_nobody_is_told_of_empties_a_cache(tmp_path: Path) -> None:
    config = config_of(routing={"prefill": "prefix"})
    path = trace_file(tmp_path, [row(0, 1024, 1, (1, 2)), row(60_000, 1024, 1, (1, 2))])
    restart = Conditions(noise=0.0, restarts=[(30.0, "m/prefill/0")])
    assert cached(config, path, Conditions(noise=0.0)) > 0.49
    assert cached(config, path, restart) == 0.0


def cached(config: Config, path: str, conditions: Conditions) -> float:
    trace = read_trace(path, "m")
    experiment = Experiment(config, config.models[0], trace, warm_up=0.0, conditions=conditions)
    return experiment.figures(config.routing)["cached_ratio"]


@pytest.mark.timeout(120)
def test_thousands_of_workers(tmp_path: Path) -> None:
    config = Config.model_validate(raw_config(2000, 1000, {"prefill": "prefix", "decode": "least_tokens"}))
    arrivals = [Arrival(index, index / 2000, 8000, 50, (0, 1 + index % 500)) for index in range(2_000)]
    figures = Experiment(config, config.models[0], Trace(arrivals, 512)).figures(config.routing)
    assert figures["good"] > 0.9


# --- names of variants --------------------------------------------------------------------------


def test_a_variant_changes_what_it_names() -> None:
    routing = RoutingConfig.model_validate({"prefill": {"policy": "prefix", "kept": 2.0}, "decode": "random"})
    same = routing_of("prefix", routing)
    assert (same.prefill.arguments["kept"], same.decode.policy) == (2.0, "random")
    assert routing_of("prefix+least_tokens", routing).decode.policy == "least_tokens"
    assert routing_of("@never", routing).disaggregate == "never"
    other = routing_of("session@strict", routing)
    assert (other.prefill.policy, other.decode.policy, other.disaggregate) == ("session", "random", "strict")


# --- advice -------------------------------------------------------------------------------------


def test_advice_is_the_cheapest_site_that_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw_config(1, 1)))
    # A prompt takes 0.93 s, five come in each second: five prefill workers are busy, six do.
    trace = trace_file(tmp_path, [row(200 * index, 10_000, 20) for index in range(300)])
    arguments = str(path), "--trace", trace, "--policies", "least_loaded", "--noise", "0", "--advise"
    advice = found(capsys, *arguments, "--slo-ttft", "1.5", "--slo-share", "0.99")["least_loaded"]
    assert (advice["prefill"], advice["decode"], advice["gpus"]) == (5, 1, 6)
    assert advice["good"] >= 0.99
    assert cli.main(["simulate", *arguments, "--slo-ttft", "1.5"]) == 0
    assert "5 prefill and 1 decode workers (6 GPUs)" in capsys.readouterr().out


def test_advice_says_when_no_site_does(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = trace_file(tmp_path, [row(0, 100_000, 2), row(1000, 100_000, 2)])
    arguments = ["simulate", str(site), "--trace", trace, "--advise", "--slo-ttft", "1", "--warm-up", "0"]
    assert cli.main(arguments) == 1
    assert "the SLO is out of reach" in capsys.readouterr().err


# --- zones --------------------------------------------------------------------------------------

FAR = {**SLOW_PREFILL, **STEPS, "prefill_us_per_token": 1_000, "transfer_us_per_token": 200}


def far_file(folder: Path) -> str:
    return trace_file(folder, [row(700 * index, 500, 20) for index in range(300)])


def test_hand_offs_between_zones_take_longer(tmp_path: Path) -> None:
    for zones, network, expected in (
        (("a", "b"), Network(), 0.1),
        (("a", "b"), Network((), 4.0), 0.4),
        (("a", "b"), Network((), 4.0, {frozenset("ab"): 2.0}), 0.2),
        (("a", "a"), Network((), 4.0), 0.1),
        ((), Network(("a", "b"), 4.0), 0.4),
    ):
        site = zoned_site(tmp_path, zones, network)
        (far,) = [job for job in site.jobs if job.plan is not None and job.plan.decode.name == "m/decode/1"]
        assert handoff_s(far) == pytest.approx(expected + 0.1)


def zoned_site(folder: Path, zones: tuple[str, ...], network: Network) -> Site:
    """A site that has served two requests: the later one went to the second decode worker."""
    raw = raw_config(1, 2, sim=FAR)
    if zones:
        raw["models"][0]["prefill"]["zone"] = zones[0]
        del raw["models"][0]["decode"]["replicas"]
        raw["models"][0]["decode"]["workers"] = [{"zone": zone} for zone in zones]
    config = Config.model_validate(raw)
    trace = read_trace(trace_file(folder, [row(0, 500, 100), row(10, 500, 100)]), "m")
    conditions = Conditions(noise=0.0, network=network)
    return Experiment(config, config.models[0], trace, conditions=conditions).site(0, config.routing)


def test_pairs_are_chosen_by_what_their_link_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw_config(2, 2, sim=FAR)))
    options = [str(path), "--trace", far_file(tmp_path), "--zones", "a,b", "--between-zones", "20"]
    together = found(capsys, *options, "--policies", "prefix+least_tokens,prefix+random")
    pair, apart = together["prefix+least_tokens"], together["prefix+random"]
    assert pair["ttft_p50_s"] < apart["ttft_p50_s"] / 2
    near = found(capsys, *options[:-2], "--policies", "prefix+least_tokens")["prefix+least_tokens"]
    assert pair["handoff_p50_s"] == pytest.approx(near["handoff_p50_s"], rel=0.1)


# --- calibration --------------------------------------------------------------------------------

TRUE = Latency(
    prefill_ms=5,
    prefill_us_per_token=200,
    decode_ms_per_token=12,
    decode_ms_per_running=0.5,
    transfer_ms=4,
    transfer_us_per_token=50,
)


def bench_file(folder: Path, config: Config, *, has_stages: bool = True) -> str:
    """What `baton bench` would have found in front of engines with these times."""
    steps = [
        step_of(config, "chat", 4.0, 256, 128, 200, has_stages=has_stages),
        step_of(config, "chat", 16.0, 256, 128, 400, has_stages=has_stages),
        step_of(config, "long-prompt", 1.0, 8000, 128, 60, has_stages=has_stages),
    ]
    slo = Slo(1000, 100, 0.95)
    setup = Setup(model="m", profile="full", seed=0, slo=slo, tokens_per_word=1.3, fixed_length=True)
    result = Result(format=FORMAT, created="", url="", salt="", setup=setup, steps=steps)
    path = folder / "bench.json"
    path.write_bytes(msgspec.json.encode(result))
    return str(path)


def step_of(
    config: Config,
    workload: str,
    rate: float,
    prompt: int,
    answer: int,
    count: int,
    *,
    has_stages: bool = True,
) -> Step:
    random = Random(workload)
    spread_of = random.uniform if workload == "chat" else lambda low, high: 1.0
    arrivals = [
        Arrival(
            index,
            random.uniform(0, count / rate),
            int(prompt * spread_of(0.5, 1.5)),
            int(answer * spread_of(0.5, 1.5)),
        )
        for index in range(count)
    ]
    conditions = Conditions(noise=0.0)
    trace = Trace(arrivals, 512)
    experiment = Experiment(config, config.models[0], trace, latency=TRUE, conditions=conditions)
    jobs = experiment.site(7, config.routing).jobs
    times = {
        "ttft": [ttft_s(job) * 1e3 for job in jobs],
        "tpot": [tpot_s(job) * 1e3 for job in jobs],
        "e2e": [(job.ended_at - job.received_at) * 1e3 for job in jobs],
    }
    stages = {
        "prefill": [prefill_s(job) * 1e3 for job in jobs],
        "decode": [handoff_s(job) * 1e3 for job in jobs],
    }
    told = {name: spread(values) for name, values in stages.items() if has_stages}
    found = {name: spread(values) for name, values in times.items()}
    return Step(
        workload=workload,
        load=Load(rate, Unit.RATE),
        seconds=max(job.ended_at for job in jobs) - min(job.received_at for job in jobs),
        requests=count,
        ok=count,
        good=count,
        errors={},
        error_details={},
        prompt_tokens=sum(arrival.prompt_tokens for arrival in arrivals),
        cached_tokens=0,
        output_tokens=sum(arrival.output_tokens for arrival in arrivals),
        times={name: value for name, value in found.items() if value is not None},
        stages={name: value for name, value in told.items() if value is not None},
        paths={},
        client=ClientLoad(0.0, 0, 0),
    )


def test_calibration_finds_the_times_again(tmp_path: Path) -> None:
    config = config_of(2, 2)
    found = calibrate(bench_file(tmp_path, config), config, config.models[0])
    latency = found.latency
    assert latency.prefill_us_per_token == pytest.approx(200, rel=0.1)
    assert latency.decode_ms_per_token == pytest.approx(12, rel=0.1)
    assert latency.transfer_s(8000) == pytest.approx(TRUE.transfer_s(8000), rel=0.1)
    assert latency.transfer_s(256) == pytest.approx(TRUE.transfer_s(256), rel=0.25)
    assert found.error < 0.1
    assert {figure for _, figure, _, _ in found.rows} == {
        *("ttft p10", "ttft p50", "ttft p99", "tpot p50", "prefill p10", "hand-off p10")
    }


def test_without_stages_what_a_transfer_takes_counts_as_prefill(tmp_path: Path) -> None:
    config = config_of(2, 2)
    found = calibrate(bench_file(tmp_path, config, has_stages=False), config, config.models[0])
    assert found.latency.transfer_s(8000) == 0.0
    true = TRUE.prefill_s(8000) + TRUE.transfer_s(8000)
    assert found.latency.prefill_s(8000) == pytest.approx(true, rel=0.1)
    assert {figure for _, figure, _, _ in found.rows} == {"ttft p10", "ttft p50", "ttft p99", "tpot p50"}


def test_calibration_says_how_far_off_it_is(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench_file(tmp_path, config_of(2, 2))
    assert cli.main(["simulate", str(site), "--calibrate", path]) == 0
    text = capsys.readouterr().out
    assert "prefill_us_per_token: " in text
    assert "on average" in text
    result = found(
        capsys, str(site), "--calibrate", path, "--trace", trace_file(tmp_path, [row(0, 1000)] * 3)
    )
    assert result["calibration"]["sim"]["prefill_us_per_token"] > 0
    assert result[own_name(RoutingConfig())]["ttft_p50_s"] < 3  # with the fitted times


def test_a_model_may_be_named_by_its_alias(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**raw_config(2, 2), "aliases": {"gpt-4": "m"}}))
    trace = trace_file(tmp_path, [row(0, 100)] * 3)
    assert found(capsys, str(path), "--trace", trace, "--model", "gpt-4")


# --- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "an unknown policy": (["--policies", "prefix,best"], "there is no policy 'best'; there is: round_robin"),
    "an unknown policy of decode": (["--policies", "prefix+best"], "there is no policy 'best'"),
    "an unknown mode": (["--policies", "prefix@often"], "the mode 'often' is wrong: .*'always'"),
    "nonsense": (["--policies", "prefix+a+b"], r"is not PREFILL, PREFILL\+DECODE"),
    "no policy at all": (["--policies", ""], "'' is not PREFILL"),
    "an unknown model": (["--model", "n"], "there is no model 'n'; there is: m"),
    "an unknown worker": (["--slow", "m/prefill/9=2"], "there is no worker 'm/prefill/9'"),
    "an unknown zone": (["--zones", "a,b", "--link", "a:c=2"], "there is no zone 'c'; there is: a, b"),
    "a link without zones": (["--link", "a:b=2"], "there is no zone 'a'; there is: none: see --zones"),
    "a zone without a name": (["--zones", "a,"], "--zones: a zone has no name"),
    "no result of a bench": (["--calibrate", "CONFIG"], "is no result of baton bench"),
    "advice with numbers": (
        ["--advise", "--prefill", "0"],
        "--advise looks for the numbers of workers itself",
    ),
    "no file": (["--calibrate", "/gone"], "/gone: No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options, message = REFUSED[name]
    trace = trace_file(tmp_path, [row(0, 10)])
    options = [str(site) if option == "CONFIG" else option for option in options]
    assert cli.main(["simulate", str(site), "--trace", trace, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_malformed_trace_is_named_by_file_and_line(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(row(0, 10)) + "\n" + json.dumps(row(0, 0)) + "\n")
    assert cli.main(["simulate", str(site), "--trace", str(path)]) == 2
    assert f"{path}:2: " in capsys.readouterr().err


def test_a_trace_is_needed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(site)]) == 2
    assert "--trace FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *("--rate=0", "--rate=x", "--seeds=0", "--seeds=1.5", "--warm-up=1", "--noise=-1", "--prefill=-1"),
        *("--decode=0", "--slow=5", "--slo-ttft=nan", "--slo-share=2", "-o=xml", "--between-zones=0"),
        *("--link=a:b", "--link=a:a=2", "--link=a=2", "--link=a:b:c=2", "--link=a:b=x"),
    ],
)
def test_wrong_values_of_options(site: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["simulate", str(site), "--trace", "x", option])
    assert capsys.readouterr().err
