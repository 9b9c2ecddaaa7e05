"""This writes the files anew."""

from __future__ import annotations

from tests.launch.render.golden.files import FOLDER, NAMES, expected, made


def main() -> None:
    for name in NAMES:
        files = made(name)
        for file in expected(name).keys() - files.keys():
            (FOLDER / name / file).unlink()
        for file, text in files.items():
            path = FOLDER / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
