"""A compiled form is built once, beside the sources, and taken as long as they are what it was built from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.compile import KEPT, lacks
from orchestrator.compiled import MYPYC, ROOT
from tests.launch.tiny import Checkout, make_checkout
from tests.waiting import is_running, wait_for

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(lacks() is not None, reason="there is no C compiler"),
]

# Stands for the real one where the sources are those of `built`: it is quick, and notes that it ran.
QUICK = """
import shutil
from pathlib import Path
with open({runs!r}, "a") as runs:
    runs.write("x")
{before}
for file in Path({build!r}).glob("*.so"):
    name, suffix = file.name.split(".cpython")
    shutil.copy(file, Path(*name.split(".")).with_name(name.split(".")[-1] + ".cpython" + suffix))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a real build; it stays as it is."""
    checkout = make_checkout(tmp_path_factory.mktemp("tiny"))
    done = checkout.compile()
    assert done.returncode == 0, (done.stderr, [log.read_text() for log in checkout.builds.glob("*.log")])
    return checkout


@pytest.fixture
def checkout(built: Checkout, tmp_path: Path) -> Checkout:
    """A copy of it, with its build."""
    shutil.copytree(built.root, tmp_path / "checkout")
    shutil.copytree(built.builds, tmp_path / "builds")
    return Checkout(tmp_path / "checkout", tmp_path / "builds")


@pytest.fixture
def quick(built: Checkout, checkout: Checkout) -> Checkout:
    """The same without a build, which a stand-in makes at once."""
    shutil.rmtree(checkout.builds)
    stand_in(built, checkout)
    return checkout


def stand_in(built: Checkout, checkout: Checkout, before: str = "") -> None:
    build = str(built.all_builds()[0])
    checkout.write("setup.py", QUICK.format(runs=str(checkout.root / "runs"), before=before, build=build))


def runs(checkout: Checkout) -> int:
    """How often a build was made."""
    path = checkout.root / "runs"
    return len(path.read_text()) if path.exists() else 0


# --- which form runs ----------------------------------------------------------------------------


def test_what_is_built_runs(checkout: Checkout) -> None:
    folder = checkout.all_builds()[0]
    assert checkout.form() == (True, 8, f"built in {folder}")
    assert not list(checkout.root.rglob("*.so"))


def test_an_edit_wins_until_it_is_built(checkout: Checkout) -> None:
    """Also one of a module that is not compiled: its constants are compiled in."""
    source = checkout.root / "orchestrator/two.py"
    before = source.read_text()
    source.write_text(before.replace("2", "3"))
    assert checkout.form() == (False, 12, "no build of these sources is there")
    assert checkout.compile().returncode == 0
    assert checkout.form()[:2] == (True, 12)
    source.write_text(before)
    assert checkout.form()[:2] == (True, 8)


def test_an_edit_of_what_is_not_compiled_in_leaves_the_build(checkout: Checkout) -> None:
    checkout.write("orchestrator/run.py", "# above all\n")
    assert checkout.form()[0]


@pytest.mark.parametrize("name", ["setup.py", "orchestrator/one.py"])
def test_a_byte_makes_another_build(checkout: Checkout, name: str) -> None:
    with (checkout.root / name).open("a") as file:
        file.write("#")
    assert not checkout.form()[0]


def test_the_form_can_be_chosen(checkout: Checkout) -> None:
    assert checkout.form(BATON_FORM="pure") == (False, 8, "BATON_FORM=pure")
    assert checkout.form(BATON_FORM="compiled")[0]
    assert checkout.form(BATON_FORM="")[0]
    assert "must be one of auto, pure, compiled, not 'fast'" in refusal(checkout, "fast")


def test_the_compiled_form_is_refused_where_it_is_not(checkout: Checkout) -> None:
    shutil.rmtree(checkout.builds)
    message = "BATON_FORM=compiled, but no build of these sources is there: `make compile` builds it"
    assert message in refusal(checkout, "compiled")


def refusal(checkout: Checkout, wish: str) -> str:
    script = "import os; from orchestrator.form import take_form; take_form(os.environ)"
    done = checkout.run("-c", script, BATON_FORM=wish)
    assert done.returncode == 1
    return done.stderr


def test_a_process_has_one_form(checkout: Checkout) -> None:
    """What was imported first decides: nothing comes from a build afterwards."""
    script = (
        "import os, orchestrator.one as one\n"
        "from orchestrator.form import take_form\n"
        "print(take_form(os.environ), one.__file__)"
    )
    said = checkout.run("-c", script).stdout
    assert said.startswith("pure Python (imported before)")
    assert said.strip().endswith(".py")


def test_a_build_that_goes_away_is_not_mixed_with_sources(checkout: Checkout) -> None:
    script = (
        "import os, shutil\n"
        "from orchestrator.form import take_form\n"
        "take_form(os.environ)\n"
        "shutil.rmtree(os.environ['BATON_BUILDS'])\n"
        "import orchestrator.one"
    )
    done = checkout.run("-c", script)
    assert done.returncode == 1
    assert "ImportError" in done.stderr


def test_extensions_beside_the_sources_are_for_these_alone(built: Checkout, checkout: Checkout) -> None:
    """As an installation puts them there; BATON_FORM and an edit count there as well."""
    stand_in(built, checkout)
    assert checkout.run("setup.py").returncode == 0
    shutil.rmtree(checkout.builds)
    assert checkout.form() == (True, 8, "installed")
    assert checkout.form(BATON_FORM="pure")[:2] == (False, 8)
    source = checkout.root / "orchestrator/two.py"
    source.write_text(source.read_text().replace("2", "3"))
    assert checkout.form()[:2] == (False, 12)


# --- damage -------------------------------------------------------------------------------------


def flip(build: Path) -> None:
    file = next(build.glob("orchestrator.one.*.so"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # a process may have it mapped
    file.write_bytes(content)


def truncate(build: Path) -> None:
    file = next(build.glob("*__mypyc.*.so"))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:1000])


def lose_a_module(build: Path) -> None:
    next(build.glob("orchestrator.one.*.so")).unlink()


def lose_the_manifest(build: Path) -> None:
    (build / "manifest").unlink()


def empty_the_manifest(build: Path) -> None:
    (build / "manifest").write_text("")


def spoil_the_manifest(build: Path) -> None:
    (build / "manifest").write_bytes(b"\xff\x00 {")


DAMAGES = [flip, truncate, lose_a_module, lose_the_manifest, empty_the_manifest, spoil_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_build_is_left_alone_until_it_is_made_anew(quick: Checkout, damage: object) -> None:
    assert quick.compile().returncode == 0
    build = quick.all_builds()[0]
    assert callable(damage)
    damage(build)
    is_compiled, product, reason = quick.form()
    assert (is_compiled, product) == (False, 8)
    assert reason.startswith(f"the build in {build} is damaged: ")
    assert quick.compile().returncode == 0
    assert quick.form()[0]
    assert runs(quick) == 2


def test_what_the_machine_cannot_load_is_no_build(quick: Checkout) -> None:
    """A library of another machine, say, though it is as it was made."""
    assert quick.compile().returncode == 0
    build = quick.all_builds()[0]
    library = next(build.glob("*__mypyc.*.so"))
    library.unlink()
    library.write_bytes(b"\x7fELF of another kind")
    sums = ("sha256sum", *(file.name for file in build.glob("*.so")))
    (build / "manifest").write_text(subprocess.check_output(sums, cwd=build, text=True))
    assert quick.form()[2].startswith(f"the build in {build} cannot be loaded: ")


# --- builds -------------------------------------------------------------------------------------


def test_what_is_there_is_not_built_again(quick: Checkout) -> None:
    first, second = quick.compile(), quick.compile()
    assert [first.returncode, second.returncode] == [0, 0]
    assert second.stdout.startswith(f"the compiled form is in {quick.all_builds()[0]}")
    assert runs(quick) == 1


def test_of_two_builders_one_waits(built: Checkout, quick: Checkout) -> None:
    gate = quick.root / "gate"
    os.mkfifo(gate)
    stand_in(built, quick, before=f"open({str(gate)!r}).close()")
    builders = [quick.start("-m", "launch.compile") for _ in range(2)]
    with gate.open("w"):  # one builds; the other one begins to wait, or comes later
        pass
    said = [builder.communicate(timeout=100) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], said
    assert runs(quick) == 1
    assert {path.name for path in quick.builds.iterdir()} == {"lock", quick.all_builds()[0].name}


def test_a_failure_is_told_in_a_line_and_not_repeated(built: Checkout, quick: Checkout) -> None:
    stand_in(built, quick, before="raise SystemExit('gcc does not like it')")
    done = quick.compile()
    log = next(quick.builds.glob("*.log"))
    assert (done.returncode, log.read_text().strip()) == (1, "gcc does not like it")
    line = "pure Python runs, the compiled form is not built: "
    assert done.stderr == f"{line}it fails (log: {log})\n"
    again = quick.compile("--while", str(os.getpid()))
    assert again.stderr == f"{line}it has failed before (`make compile` tries again; log: {log})\n"
    assert runs(quick) == 1
    assert quick.form()[:2] == (False, 8)
    assert quick.compile().returncode == 1
    assert runs(quick) == 2
    assert not (quick.builds / "part").exists()


def test_what_cannot_be_imported_is_a_failure(built: Checkout, quick: Checkout) -> None:
    stand_in(built, quick, before="raise SystemExit(0)")  # nothing is made
    done = quick.compile()
    assert (done.returncode, quick.all_builds()) == (1, [])
    assert "FormError" in next(quick.builds.glob("*.log")).read_text()


@pytest.mark.parametrize("ends", ["itself", "other"])
def test_an_interrupted_build_leaves_nothing_in_the_way(built: Checkout, quick: Checkout, ends: str) -> None:
    """It ends with the process for which it builds, and the compiler with it."""
    here = quick.root / "here"
    hang = f"import os, time; open({str(here)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    stand_in(built, quick, before=hang)
    with waiting() as other:
        builder = quick.start("-m", "launch.compile", "--while", str(other.pid))
        wait_for(lambda: here.exists() and here.read_text().endswith(" "), "a build that is under way")
        compiler = int(here.read_text())
        assert os.getpriority(os.PRIO_PROCESS, compiler) == 19
        assert Path(f"/proc/{compiler}/oom_score_adj").read_text() == "1000\n"
        if ends == "itself":
            os.killpg(builder.pid, signal.SIGTERM)
        else:
            other.kill()
            other.wait()
        builder.communicate(timeout=100)
    wait_for(lambda: not is_running(compiler), "the end of what it started")
    assert not quick.form()[0]
    stand_in(built, quick)
    assert quick.compile().returncode == 0
    assert quick.form()[0]


class waiting:  # reads as a verb
    """A process that does nothing, for the block."""

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen((sys.executable, "-c", "input()"), stdin=subprocess.PIPE)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_only_the_latest_builds_are_kept(quick: Checkout) -> None:
    for age in range(KEPT + 2):
        (quick.builds / f"old{age}").mkdir(parents=True)
        for path in (quick.builds / f"old{age}/manifest", quick.builds / f"bad{age}.log"):
            path.touch()
        for path in (quick.builds / f"old{age}", quick.builds / f"bad{age}.log"):
            os.utime(path, (1000 - age, 1000 - age))
    assert quick.compile().returncode == 0
    names = {path.name for path in quick.builds.iterdir()}
    assert {name for name in names if name.startswith("old")} == {f"old{age}" for age in range(KEPT - 1)}
    assert {name for name in names if name.startswith("bad")} == {f"bad{age}.log" for age in range(KEPT)}
    assert quick.form()[0]


# --- where nothing can be built -----------------------------------------------------------------


def test_without_a_compiler_sources_run(quick: Checkout) -> None:
    done = quick.compile(CC="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr == (
        "pure Python runs, the compiled form is not built: "
        "there is no no-such-compiler (Debian: apt-get install gcc)\n"
    )
    assert quick.form() == (False, 8, "no build of these sources is there")


def test_where_no_build_can_be_kept_sources_run(quick: Checkout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    builds = str(tmp_path / "file/builds")
    done = quick.compile(BATON_BUILDS=builds)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Not a directory" in done.stderr
    assert quick.form(BATON_BUILDS=builds)[:2] == (False, 8)


def test_whoever_wants_no_build_gets_none(quick: Checkout) -> None:
    done = quick.compile(BATON_FORM="pure")
    assert (done.returncode, done.stdout) == (0, "nothing is built: BATON_FORM=pure\n")
    assert runs(quick) == 0


def test_mypyc_is_the_one_that_is_pinned() -> None:
    assert f"mypy=={MYPYC}" in (ROOT / "requirements/constraints.txt").read_text().splitlines()


# --- setup.py -----------------------------------------------------------------------------------


@pytest.fixture
def failing_compiler(tmp_path: Path) -> str:
    path = tmp_path / "failing-cc"
    path.write_text("#!/bin/sh\necho 'error: not today' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def install(checkout: Checkout, **env: str) -> subprocess.CompletedProcess[str]:
    """What pip has `setup.py` do for a wheel."""
    return checkout.run("setup.py", "--quiet", "build", "--build-base", "made", **env)


def made(checkout: Checkout, pattern: str) -> list[str]:
    return [path.name for path in (checkout.root / "made").glob(f"lib*/**/{pattern}")]


def test_an_installation_is_pure_where_the_compiler_fails(checkout: Checkout, failing_compiler: str) -> None:
    done = install(checkout, CC=failing_compiler)
    assert done.returncode == 0, done.stderr
    assert "stay Python: they cannot be built" in done.stderr
    assert (made(checkout, "one.py"), made(checkout, "*.so")) == (["one.py"], [])
    assert install(checkout, CC=failing_compiler, BATON_COMPILE="1").returncode == 1


def test_an_installation_is_pure_where_mypyc_refuses(checkout: Checkout) -> None:
    checkout.write("orchestrator/one.py", "def times(n: int) -> int:\n    return 'many'\n")
    done = install(checkout)
    assert done.returncode == 0, done.stderr
    assert "stay Python: mypyc refuses them" in done.stderr
    assert (made(checkout, "one.py"), made(checkout, "*.so")) == (["one.py"], [])
