from __future__ import annotations

from pathlib import Path

from worker.revision import revision_of

SIZE = 300_000  # more than is read of both ends


def model(folder: Path, weights: bytes = b"w" * SIZE, config: bytes = b"{}") -> str:
    folder.mkdir()
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def test_copies_of_a_directory_have_one_revision(tmp_path: Path) -> None:
    first, second = (model(tmp_path / name) for name in ("a", "b"))
    (tmp_path / "b" / "README.md").write_text("a copy")
    assert revision_of(first, None) == revision_of(second, "main")
    assert (revision_of(first, None) or "").startswith("files:")


def test_other_weights_or_another_config_are_another_revision(tmp_path: Path) -> None:
    directories = [
        model(tmp_path / "a"),
        model(tmp_path / "longer", b"w" * (SIZE + 1)),
        model(tmp_path / "begins", b"x" + b"w" * (SIZE - 1)),
        model(tmp_path / "ends", b"w" * (SIZE - 1) + b"x"),
        model(tmp_path / "config", config=b'{"a": 1}'),
    ]
    assert len({revision_of(directory, None) for directory in directories}) == len(directories)


def test_a_small_file_is_read_once(tmp_path: Path) -> None:
    assert revision_of(model(tmp_path / "a", b"12"), None) != revision_of(model(tmp_path / "b", b"21"), None)


def test_a_model_of_the_hub_has_the_hubs_revision(tmp_path: Path) -> None:
    assert revision_of("org/model", "0123abcd") == "0123abcd"
    assert revision_of("org/model", None) is None
    assert revision_of(str(tmp_path), None) is None  # a directory without a model
