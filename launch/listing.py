"""A plan is shown as text: commands that can be copied to a shell, without their secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from launch.plan import Plan, ProcessSpec
from orchestrator.config.options import join_address
from orchestrator.config.printing import (
    MASK,
    is_secret_option,
    is_secret_variable,
    masked,
    masked_value,
    masked_words,
    one_line,
    shell_word,
)


def plan_text(plan: Plan) -> str:
    """Return what `up` would start, in the order in which it starts."""
    blocks = [_block(spec) for spec in plan.processes]
    if plan.elsewhere:
        names = "\n".join(f"#   baton worker CONFIG {one_line(name)}" for name in plan.elsewhere)
        blocks.append(f"# on other machines, not started from here:\n{names}")
    if plan.discovered:
        pools = "\n".join(f"#   {one_line(masked(pool))}" for pool in plan.discovered)
        blocks.append(f"# workers that the orchestrator finds while it runs:\n{pools}")
    return "\n\n".join(blocks)


def _block(spec: ProcessSpec) -> str:
    facts = (one_line(masked(line)) for line in _facts(spec))
    return "\n".join([*facts, " \\\n  ".join(_words(spec))])


def _facts(spec: ProcessSpec) -> Iterator[str]:
    yield f"# {spec.name}"
    yield f"#   listens  {', '.join(join_address(*address) for address in spec.listens)}"
    yield f"#   ready    {spec.ready_url}"
    yield f"#   log      {spec.log_name}"
    if spec.gpus:
        yield f"#   gpus     {', '.join(map(str, spec.gpus))}"


def _words(spec: ProcessSpec) -> Iterator[str]:
    for name, value in sorted(spec.env.items()):
        yield f"{one_line(name)}={MASK if name in spec.secret_env else shell_word(masked_value(value))}"
    yield from _lines_of([*masked_words([*_without_secret_overrides(spec.argv)])])


def _lines_of(argv: Sequence[str]) -> Iterator[str]:
    """Return the lines of a command; an option and its value share a line."""
    line: list[str] = []
    for word in argv:
        if word.startswith("--") and line:
            yield " ".join(line)
            line = []
        line.append(shell_word(word))
    yield " ".join(line)


def _without_secret_overrides(argv: Sequence[str]) -> Iterator[str]:
    """Return the words without the secrets of overrides, which may set variables and arguments of workers."""
    before = ""
    for word in argv:
        yield _override(word) if before == "--set" else word
        before = word


def _override(word: str) -> str:
    key, equals, value = word.partition("=")
    return (
        f"{key}={MASK}"
        if equals and (_sets_secret_env(key, value) or _sets_secret_args(key, value))
        else word
    )


def _sets_secret_env(key: str, value: str) -> bool:
    _, is_one, name = key.rpartition(".env.")
    return is_secret_variable(name) if is_one else key.endswith(".env") and is_secret_variable(value)


def _sets_secret_args(key: str, value: str) -> bool:
    words = re.split(r"[\s=,'\"\[\]]+", value)
    return ".args" in key and any(word.startswith("-") and is_secret_option(word) for word in words)
