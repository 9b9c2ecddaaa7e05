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
