"""What the config names is read if it is a file, and never waited for."""

from __future__ import annotations

import logging
import os
import socket
from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.config.file import ConfigErrors, load_config
from orchestrator.config.files import MAX_BYTES, read_file
from orchestrator.config.keys import KeyRing, load_keys, worker_key
from orchestrator.config.options import OrchestratorConfig
from orchestrator.control.reload import ConfigRefused, ConfigSource, Reloader
from orchestrator.errors import SettingError, StartError

LINE = f"me {sha256(b'k').hexdigest()}\n"
MODELS = "models: [{name: m, both: {urls: ['http://h:1']}}]\n"


@pytest.fixture(params=["a FIFO", "a directory", "a device", "a socket", "more than"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "odd"
    if request.param == "a FIFO":
        os.mkfifo(path)
    elif request.param == "a directory":
        path.mkdir()
    elif request.param == "a device":
        path = Path("/dev/zero")
    elif request.param == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
        return str(path), "Is a socket, not a file"
    else:
        with path.open("wb") as file:
            file.truncate(100 * MAX_BYTES)
    return str(path), request.param


def test_what_is_no_file_is_refused(odd: tuple[str, str]) -> None:
    path, why = odd
    with pytest.raises(OSError, match=why):
        read_file(path)
    with pytest.raises(StartError, match=f"api_keys_file: .*{why}"):
        load_keys(OrchestratorConfig(api_keys_file=path))


@pytest.mark.parametrize("option", ["api_keys_file: {}", "tls: {{cert: {}, key: {}}}"])
def test_check_and_reload_say_so(odd: tuple[str, str], option: str, tmp_path: Path) -> None:
    path, why = odd
    config = tmp_path / "config.yaml"
    config.write_text(f"orchestrator: {{{option.format(path, path)}}}\n{MODELS}")
    with pytest.raises(ConfigErrors, match=f"config.yaml:1:.*cannot read {path}: .*{why}"):
        load_config(str(config))
    with pytest.raises(ConfigRefused, match=why):
        Reloader(ConfigSource(str(config)), None)._read()  # type: ignore[arg-type]


def test_a_config_that_came_through_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigRefused, match="not a file that can be read again"):
        Reloader(ConfigSource(str(tmp_path / "config.yaml")), None)._read()  # type: ignore[arg-type]


def test_a_file_may_begin_with_a_bom(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbf" + LINE.replace("\n", "\r\n").encode())
    assert [key.name for key in KeyRing.load(tmp_path / "keys")] == ["me"]


def test_keys_that_everybody_may_write_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(LINE)
    options = OrchestratorConfig(api_keys_file=str(path))
    path.chmod(0o664)
    load_keys(options)
    assert caplog.records == []
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        load_keys(options)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} can be written by everybody on this machine: chmod o-w"
    ]


@pytest.mark.parametrize(
    ("given", "key"), [("k1", "k1"), ("k1\n", "k1"), (" k1\r\n", "k1"), ("", None), ("\n", None)]
)
def test_a_workers_key_may_come_out_of_a_file(given: str, key: str | None) -> None:
    assert worker_key({"BATON_WORKER_API_KEY": given}) == key


@pytest.mark.parametrize("given", ["a\nb", "a b", "a\x1bb", "a\x7fb", "é", "a\u2028b", "a\udcffb"])
def test_what_can_be_no_key_is_named(given: str) -> None:
    with pytest.raises(SettingError, match="BATON_WORKER_API_KEY holds") as caught:
        worker_key({"BATON_WORKER_API_KEY": given})
    assert "\n" not in str(caught.value)
