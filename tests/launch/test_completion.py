"""The script is run by bash itself."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cli import main
from launch.completion import SHELLS

pytestmark = pytest.mark.processes


def completed(
    capsys: pytest.CaptureFixture[str], *words: str, cwd: str = ".", running: Sequence[str] = ()
) -> list[str]:
    """What bash makes of these words, of which the last is completed; `baton ps` names what runs."""
    main(["completion", "bash"])
    given = " ".join(f"'{word}'" for word in ("baton", *words))
    ask = f"COMP_WORDS=({given}); COMP_CWORD={len(words)}; _baton; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ps = f"baton() {{ printf '%s\\n' {shlex.join(running)}; }}"
    done = subprocess.run(
        ["bash", "-c", f"{ps}\n{capsys.readouterr().out}\n{ask}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["doc"], ["doctor"]),
        (["c"], ["check", "completion"]),
        (["doctor", "--st"], ["--static"]),
        (["doctor", "-o", ""], ["text", "json"]),
        (["init", "--engine", "g"], ["gpu"]),
        (["completion", ""], list(SHELLS)),
        (["up", "--dry"], ["--dry-run"]),
        (["schema", ""], []),
        (["dr"], ["drain"]),
        (["restart", "--ro"], ["--rolling"]),
        (["ps", "-o", ""], ["text", "json", "names"]),
        (["drain", "-o", ""], ["text", "json"]),
        (["drain", ""], []),
        (["scale", ""], []),
    ],
)
def test_words(capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]) -> None:
    assert completed(capsys, *words) == expected


def test_files(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    for name in ("one.yaml", "two.yaml"):
        open(f"{tmp_path}/{name}", "w").close()
    assert completed(capsys, "up", "o", cwd=str(tmp_path)) == ["one.yaml"]
    assert completed(capsys, "ps", "--config", "t", cwd=str(tmp_path)) == ["two.yaml"]


RUNNING = ["sim/prefill/0", "sim/prefill/1", "sim/decode/0", "orchestrator"]


def test_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert completed(capsys, "drain", "sim/p", running=RUNNING) == ["sim/prefill/0", "sim/prefill/1"]
    assert completed(capsys, "logs", "-f", "o", running=RUNNING) == ["orchestrator"]
    assert completed(capsys, "restart", "sim/decode/0", "sim/d", running=RUNNING) == ["sim/decode/0"]
    assert completed(capsys, "scale", "", running=RUNNING) == ["sim/decode", "sim/prefill"]


def test_a_name_is_never_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hostile = f"$(touch {tmp_path}/run)/decode/0"
    assert completed(capsys, "drain", "$(", running=[hostile]) == hostile.split()
    assert completed(capsys, "scale", "`", "$", running=[hostile]) == hostile.removesuffix("/0").split()
    assert not (tmp_path / "run").exists()


def test_zsh_reads_it_as_bash_would(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "zsh"])
    script = capsys.readouterr().out
    assert "bashcompinit\n_baton_workers() {" in script
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


def test_another_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "bsh"])
    assert "did you mean 'bash'?" in capsys.readouterr().err
