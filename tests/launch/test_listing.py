from __future__ import annotations

from launch.listing import plan_text
from launch.plan import Plan, ProcessSpec


def spec(name: str, **more: object) -> ProcessSpec:
    values: dict[str, object] = {
        "name": name,
        "role": "both",
        "argv": ("python", "-m", "x", "--port", "1", "--flag", "--json", '{"a": 1}'),
        "env": {},
        "ready_url": "http://h:1/health",
        "listens": (("h", 1), ("::1", 2)),
        "log_name": "x.log",
    }
    return ProcessSpec(**values | more)  # type: ignore[arg-type]


def test_a_plan_reads_like_a_script() -> None:
    worker = spec("w", env={"B": "two words", "HF_TOKEN": "hush"}, gpus=(0, 1))
    text = plan_text(Plan((worker,), spec("orchestrator", argv=("python",)), ("m/both/1",), "http://h"))
    assert (
        text
        == """\
# w
#   listens  h:1, [::1]:2
#   ready    http://h:1/health
#   log      x.log
#   gpus     0, 1
B='two words' \\
  HF_TOKEN=*** \\
  python -m x \\
  --port 1 \\
  --flag \\
  --json '{"a": 1}'

# orchestrator
#   listens  h:1, [::1]:2
#   ready    http://h:1/health
#   log      x.log
python

# on other machines, not started from here:
#   baton worker CONFIG m/both/1"""
    )


def test_overrides_of_environments_are_masked() -> None:
    overrides = [
        "models.0.decode.env.HF_TOKEN=hush",
        "models.0.decode.env={API_KEY: hush}",
        "models.0.decode.env.A=shown",
        "orchestrator.api_keys_file=keys",
    ]
    argv = ("python", *(part for override in overrides for part in ("--set", override)))
    text = plan_text(Plan((), spec("orchestrator", argv=argv), (), "http://h"))
    assert "hush" not in text
    assert "--set 'models.0.decode.env.HF_TOKEN=***'" in text
    assert "models.0.decode.env.A=shown" in text
    assert "orchestrator.api_keys_file=keys" in text


def test_secrets_are_masked_wherever_they_stand() -> None:
    env = {
        "AUTH": "hush",
        "AWS_CREDENTIALS": "hush",
        "PASSPHRASE": "hush",
        "OTEL_EXPORTER_OTLP_HEADERS": "x=hush",
        "PROXY": "http://u:hush@h:1",
        "EXTRA": "--api-key hush",
    }
    argv = ("python", "--ssl-keyfile-password", "hush", "--hf-token=hush", "--conf", '{"password": "hush"}')
    overrides = [
        "models.0.decode.args=[--ssl-keyfile-password, hush]",
        "models.0.decode.args.0=--auth=hush",
        "models.0.decode.workers.0.env.X_PASSPHRASE=hush",
        "models.0.decode.urls=['http://u:hush@h']",
    ]
    sets = tuple(part for override in overrides for part in ("--set", override))
    worker = spec("w", env=env, argv=argv, ready_url="http://u:hush@h/health")
    text = plan_text(Plan((worker,), spec("orchestrator", argv=("python", *sets)), (), "http://h"))
    assert "hush" not in text
    assert "EXTRA='--api-key ***'" in text


def test_what_comes_from_outside_steers_no_terminal() -> None:
    odd = "m\x1b[2J\r\nm/both/0"
    worker = spec(odd, env={"A\n": "b\x07c"}, argv=("python", odd), log_name=odd)
    text = plan_text(Plan((worker,), spec("orchestrator"), (odd,), "http://h"))
    assert not any(ord(char) < 32 and char != "\n" for char in text)
    assert r"# m\x1b[2J\r\nm/both/0" in text
    assert r"A\n=$'b\x07c'" in text


def test_pools_whose_workers_are_found_are_named() -> None:
    plan = Plan((), spec("orchestrator"), (), "http://h", discovered=("m/both by dns h:1",))
    *_, head, pool = plan_text(plan).splitlines()
    assert (head, pool) == ("# workers that the orchestrator finds while it runs:", "#   m/both by dns h:1")
