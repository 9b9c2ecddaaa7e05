"""The script is run by bash itself."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from launch.cli import main
from launch.completion import SHELLS

pytestmark = pytest.mark.processes


def completed(capsys: pytest.CaptureFixture[str], *words: str, cwd: str = ".") -> list[str]:
    """What bash makes of these words, of which the last is completed."""
    main(["completion", "bash"])
    given = " ".join(f"'{word}'" for word in ("baton", *words))
    ask = f"COMP_WORDS=({given}); COMP_CWORD={len(words)}; _baton; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f"{capsys.readouterr().out}\n{ask}"],
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
        (["ps", "-o", ""], ["text", "json"]),
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


def test_zsh_reads_it_as_bash_would(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "zsh"])
    script = capsys.readouterr().out
    assert "bashcompinit\n_baton() {" in script
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n"], input=script, text=True, check=True)


def test_another_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "bsh"])
    assert "did you mean 'bash'?" in capsys.readouterr().err
