"""A plan is shown as text: commands that can be copied to a shell, without their secrets."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from launch.plan import SECRET_NAME, Plan, ProcessSpec
from orchestrator.config.options import join_address

MASK = "***"


def plan_text(plan: Plan) -> str:
    """Return what `up` would start, in the order in which it starts."""
    blocks = [_block(spec) for spec in plan.processes]
    if plan.elsewhere:
        names = "\n".join(f"#   baton worker CONFIG {name}" for name in plan.elsewhere)
        blocks.append(f"# on other machines, not started from here:\n{names}")
    return "\n\n".join(blocks)


def _block(spec: ProcessSpec) -> str:
    return "\n".join([f"# {spec.name}", *_facts(spec), " \\\n  ".join(_words(spec))])


def _facts(spec: ProcessSpec) -> Iterator[str]:
    yield f"#   listens  {', '.join(join_address(*address) for address in spec.listens)}"
    yield f"#   ready    {spec.ready_url}"
    yield f"#   log      {spec.log_name}"
    if spec.gpus:
        yield f"#   gpus     {', '.join(map(str, spec.gpus))}"


def _words(spec: ProcessSpec) -> Iterator[str]:
    for name, value in sorted(spec.env.items()):
        yield f"{name}={MASK if name in spec.secret_env else shlex.quote(value)}"
    yield from _lines_of([*_masked(spec.argv)])


def _lines_of(argv: Sequence[str]) -> Iterator[str]:
    """Return the lines of a command; an option and its value share a line."""
    line: list[str] = []
    for word in argv:
        if word.startswith("--") and line:
            yield " ".join(line)
            line = []
        line.append(shlex.quote(word))
    yield " ".join(line)


def _masked(argv: Sequence[str]) -> Iterator[str]:
    """Return the text of an override without its secret: it may set one in a worker's environment."""
    for word in argv:
        key, equals, _ = word.partition("=")
        is_env = ".env." in key or key.endswith(".env")
        yield f"{key}={MASK}" if equals and is_env and SECRET_NAME.search(word) else word
