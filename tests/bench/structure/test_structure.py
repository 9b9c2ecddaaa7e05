from __future__ import annotations

from pathlib import Path

import pytest

from bench.structure.__main__ import figures, imports, read_modules, request, rooms_of, side_by_side

pytestmark = pytest.mark.processes

FILES = {
    "__init__.py": "from shop.front import door",
    "front/__init__.py": "",
    "front/door.py": "import json\nfrom http import HTTPStatus\nfrom shop.back import shelf\n",
    "back/__init__.py": "",
    "back/shelf.py": "from shop.back.stock import Stock\ndef late():\n    from shop.front.door import open\n",
    "back/stock.py": '''
from shop.http import reply
class Stock:
    __slots__ = ("slot",)
    kind: str = "dry"
    def __init__(self):
        """Three lines without this one."""
        self.count, other = 0, 1
        self._by_name: dict = {}
    def take(self, other):
        other.count = 1
        self.late = 1
''',
    "http.py": "async def reply():\n" + "    await reply()\n" * 41,
    "alone.py": "",
}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write(tmp_path / "shop", FILES)


def test_arrows_lead_to_modules_of_the_package_only(shop: Path) -> None:
    graph = imports(read_modules(shop), "shop")
    assert graph == {
        "front": set(),
        "front.door": {"back.shelf"},
        "back": set(),
        "back.shelf": {"back.stock", "front.door"},
        "back.stock": {"http"},
        "http": set(),
        "alone": set(),
    }
    assert rooms_of(graph) == {"front": {"back"}, "back": {"front", "http"}, "http": set(), "alone": set()}


def test_figures(shop: Path) -> None:
    assert figures(shop, ["front", "back", "http"]) == {
        "rooms": ["4, 3 arrows"],
        "modules": ["7, 4 arrows"],
        "floors": ["2"],
        "circles of rooms": ["1", "back front"],
        "circles of modules": ["1", "back.shelf front.door"],
        "imports upward": ["1", "back.shelf imports front.door"],
        "functions": ["4, 1 over 40 lines"],
        "  lines": ["median 3, 90th percentile 42"],
        "most methods": ["2 Stock"],
        "most attributes": ["4 Stock"],
    }


def test_what_the_order_leaves_out_is_not_judged(shop: Path) -> None:
    assert figures(shop, ["back", "http"])["imports upward"] == ["0"]


CHECKOUT = {
    "orchestrator/front.py": """
from orchestrator.back import add, wait
async def serve():
    add()
    add()
    await wait()
""",
    "orchestrator/back.py": """
import asyncio
def add(): pass
async def wait(): await asyncio.sleep(0)
""",
    "tests/__init__.py": "",
    "tests/orchestrator/__init__.py": "",
    "tests/orchestrator/fakes.py": """
from types import SimpleNamespace
from orchestrator.front import serve
class FakeCluster:
    async def ask(self, document):
        await serve()
        return SimpleNamespace(status=200)
    async def aclose(self): pass
""",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_request_goes_from_file_to_file(tmp_path: Path) -> None:
    # Twice there and back for `add`, once for `wait`, and once more when it goes on.
    assert request(write(tmp_path, CHECKOUT)) == {"a request": ["2 files, 8 moves", "2 rooms, 8 moves"]}


def test_checkouts_stand_side_by_side() -> None:
    table = side_by_side(["a", "bbbb"], [{"x": ["1", "one"], "y": ["2"]}, {"x": ["3"], "y": ["4"]}])
    assert [line.split() for line in table] == [["a", "bbbb"], ["x", "1", "3"], ["one"], ["y", "2", "4"]]
