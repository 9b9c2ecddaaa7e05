"""What the pages show can be used as it stands: configs load, commands are understood, programs run."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.shared.processes import free_port
from orchestrator.compiled import ROOT
from orchestrator.config.file import load_config
from tests.baton import baton
from tests.docs.commands import commands_in, fault, fault_in_prose
from tests.docs.pages import PAGES, Block, Page

BLOCKS = [block for path in PAGES for block in Page(path).blocks]
SHELL = ("sh", "bash", "console")
# What a block may be, beside code: pictures and listings; what Baton or a worker shows; others' files.
OTHER_KINDS = {"", "text"}
COMMAND = re.compile(r"^ *(?:\$ )?(?:\.venv/bin/)?(?:baton|make|python -m) ")
INLINE = re.compile(r"`baton ([^`]+)`")
PLACE = re.compile(r"at ([\w.]+)")
BASE = {
    "models": [
        {
            "name": "m",
            "prefill": {"urls": ["http://127.0.0.1:8100"]},
            "decode": {"urls": ["http://127.0.0.1:8200"]},
        }
    ]
}


def of_kind(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


def test_every_block_is_of_a_known_kind() -> None:
    known = {"yaml", "python", *SHELL, *OTHER_KINDS}
    assert [str(block) for block in BLOCKS if block.kind not in known] == []


# --- configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_configs_load(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a config stands in a whole one, at the place that the comment above it names."""
    monkeypatch.chdir(ROOT)
    document = yaml.safe_load(block.text)
    (tmp_path / "c.yaml").write_text(block.text if "models" in document else json.dumps(whole(block)))
    (tmp_path / "keys").write_text(f"alice {'0' * 64}\n")
    load_config(str(tmp_path / "c.yaml"))


def whole(block: Block) -> Any:
    """A config that has this part."""
    part, config = yaml.safe_load(block.text), copy.deepcopy(BASE)
    found = PLACE.fullmatch(block.note)
    at: Any = config
    for key in found[1].split(".") if found else ():
        at = at[int(key)] if key.isdigit() else at.setdefault(key, {})
    at.update(part)
    return config


# --- commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of_kind(*SHELL), ids=str)
def test_commands_are_understood(block: Block) -> None:
    faults = [fault(words) for words in commands_in(block.text) if words[0] != "curl"]
    assert list(filter(None, faults)) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_listings_are_understood(path: Path) -> None:
    """Those of ours; such a listing may show more than commands."""
    page = Page(path)
    listings = [block.text for block in page.blocks if block.kind == ""]
    listings += re.findall(r"(?:^ {4}.*\n)+", "\n".join(page._prose) + "\n", re.MULTILINE)
    lines = [
        line
        for text in listings
        for line in re.sub(r"\\\n", " ", text).splitlines()
        if COMMAND.match(line) and "..." not in line
    ]
    faults = [fault(words) for line in lines for words in commands_in(line)]
    assert list(filter(None, faults)) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_sentences_are_ours(path: Path) -> None:
    found = INLINE.findall(" ".join(Page(path)._prose))
    faults = [(words, fault_in_prose(_plain(words))) for words in found]
    assert [known for known in faults if known[1]] == []


def _plain(words: str) -> list[str]:
    """Without placeholders and what may be left out."""
    plain = re.sub(r"\[[^\]]*\]", "", words.partition(" > ")[0])
    return [
        word
        for word in plain.replace("\\|", " ").split()
        if word.strip(".,") and not re.match(r"^[A-Z<\"'$/]|\.\.\.", word)
    ]


# --- programs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A simulated cluster with the models of the pages, and where it is in place of their addresses."""
    directory = tmp_path_factory.mktemp("cluster")
    listen, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))

    def pool() -> dict[str, Any]:
        return {"engine": "sim", "workers": [{"port": free_port(), "side_channel_port": free_port()}]}

    models = [{"name": name, "prefill": pool(), "decode": pool()} for name in ("tiny-chat", "sim")]
    models.append({"name": "tiny-embed", "both": pool()})
    config = {"orchestrator": {"listen": listen, "admin": admin}, "models": models}
    (directory / "c.yaml").write_text(json.dumps(config))
    with baton("up", "c.yaml", cwd=directory, transport="orjson"):
        yield {"127.0.0.1:8000": listen, "127.0.0.1:8001": admin}


def placed(text: str, cluster: dict[str, str]) -> str:
    for there, here in cluster.items():
        text = text.replace(there, here)
    return text


@pytest.mark.processes
@pytest.mark.parametrize("block", of_kind("python"), ids=str)
def test_programs_run(block: Block, cluster: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", placed(block.text, cluster)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


CURLS = [
    (block, words) for block in of_kind(*SHELL) for words in commands_in(block.text) if words[0] == "curl"
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("block", "words"), CURLS, ids=lambda value: str(value) if isinstance(value, Block) else ""
)
def test_what_curl_asks_is_answered(block: Block, words: list[str], cluster: dict[str, str]) -> None:
    answer = curl([placed(word, cluster) for word in words])
    assert answer.status_code == 200, answer.text
    if '"stream": true' in shlex.join(words):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.headers["x-baton-path"] == "disaggregated"


def curl(words: list[str]) -> httpx.Response:
    """What curl would be answered; it fails for an option that it does not know here."""
    url, method, headers, body = "", None, {}, None
    rest = iter(words[1:])
    for word in rest:
        if word in ("-H", "-d", "-X"):
            value = next(rest)
            if word == "-H":
                name, _, text = value.partition(": ")
                headers[name] = text
            elif word == "-d":
                body = value
            else:
                method = value
        elif word not in ("-N", "-i", "-s"):
            assert word.startswith("http"), f"curl's {word} is not known here"
            url = word
    method = method or ("GET" if body is None else "POST")
    return httpx.request(method, url, headers=headers, content=body, timeout=60, trust_env=False)
