"""One house: the same thing once, in the room that its name tells. `python tests/house.py` prints what is counted."""

from __future__ import annotations

import re

import house
import pytest

FIGURES = house.figures()


@pytest.mark.parametrize("figure", house.LIMITS)
def test_figure_holds(figure):
    value, offenders = FIGURES[figure]
    assert value <= house.LIMITS[figure], "\n".join([f"{figure}: {value}, limit {house.LIMITS[figure]}", *offenders])


@pytest.mark.parametrize("name", house.ONCE)
def test_one_definition(name):
    assert len(house.definitions().get(name, ())) == 1, f"{name}, {house.ONCE[name]}: {house.definitions().get(name)}"


def test_no_name_says_what_another_says():
    """No second definition hides behind another name: the old ones stay away."""
    assert not {"fpr95_ood_positive", "_Targets", "Target"} & set(house.definitions())


def test_rooms_of_a_loss():
    assert len(house.rooms_of_a_loss()) <= 5


def test_public_names_have_docstrings():
    assert house.undocumented() == []


def test_picture_of_the_architecture():
    """docs/architecture.md lists the rooms in the order in which imports may run."""
    text = (house.ROOT / "docs/architecture.md").read_text()
    table = text.split("<!-- layers -->")[1]
    drawn = [
        tuple(re.findall(r"`([\w.]+)`", line.split("|")[1])) for line in table.splitlines() if line.startswith("| `")
    ]
    assert drawn == [tuple(rooms) for rooms in house.LAYERS]


class TestTheCounting:
    """What the figures rest on, on small sources of their own."""

    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        def write(**files: str) -> None:
            for name, text in files.items():
                path = tmp_path / "ood_fast" / f"{name.replace('__', '/')}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            (tmp_path / "ood_fast/__init__.py").touch()
            monkeypatch.setattr(house, "FOLDERS", {"ood_fast": tmp_path / "ood_fast"})
            for cached in (house.modules, house.packages, house.imports):
                cached.cache_clear()

        yield write
        monkeypatch.undo()
        for cached in (house.modules, house.packages, house.imports):
            cached.cache_clear()

    def test_circle(self, source):
        source(a="from . import b", b="def f():\n    from .a import x", c="from . import a")
        assert house.circles() == [["ood_fast.a", "ood_fast.b"]]

    def test_what_only_type_checkers_see_is_no_import(self, source):
        source(a="from . import b", b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a")
        assert house.circles() == []

    def test_upwards(self, source):
        source(checks="from . import losses", losses="")
        assert house.upwards() == ["ood_fast.checks -> ood_fast.losses"]

    def test_twins(self, source):
        source(losses="class Run: ...", metrics="class Run: ...", checks="def _f(): ...", heads="def _f(): ...")
        assert house.twins() == {"Run": ["ood_fast.losses", "ood_fast.metrics"]}

    def test_parameters(self, source):
        source(a="def f(self, a, b, c, d, e, f, g, *, h): ...\ndef g(a, b, c, d, e, f, g, *, h, i): ...")
        assert house.parameters() == {"ood_fast.a.g": 9}

    def test_private_names_of_torch(self, source):
        source(a="import torch\ntorch._C.f()\ntorch.nn.functional.relu", b="from torch._ops import x")
        assert house.private_torch() == ["ood_fast.a: torch._C", "ood_fast.a: torch._C.f", "ood_fast.b: torch._ops.x"]

    def test_undocumented(self, source):
        source(a='"""A."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self):\n        def h(): ...')
        assert house.undocumented() == ["ood_fast.a.A.f"]

    def test_lines_of_code(self, source):
        source(a='"""A."""\n\n# why\ndef f():\n    """F.\n\n    G.\n    """\n    return """x\n\ny"""  # z')
        assert house.lines_of_code() == 4
