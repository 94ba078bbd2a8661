"""The table of detectors in the docs is the one that the code gives."""

from __future__ import annotations

from pathlib import Path

import catalogue
import pytest

from ood_fast import detectors

PAGE = Path(__file__).parents[1] / "docs/detectors.md"


def test_the_page_has_the_table_of_this_code():
    assert catalogue.table() in PAGE.read_text(encoding="utf-8"), (
        "run python tests/catalogue.py and paste its output into docs/detectors.md"
    )


def test_every_detector_has_its_paper_and_its_cost():
    built_in = [name for name in detectors.known() if detectors.find(name).__module__.startswith("ood_fast.")]
    assert set(catalogue.ABOUT) == set(built_in)
    assert f"{len(built_in)} post-hoc detectors" in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    for line in catalogue.table().splitlines()[2:]:
        _, name, paper, fitted_on, keeps, cost, *_ = (cell.strip() for cell in line.split("|"))
        assert paper, name
        assert (fitted_on == "–") == (keeps == "–"), name
        assert cost, name


@pytest.mark.parametrize("name", catalogue.ABOUT)
def test_the_forms_of_others_are_ones_that_can_be_made(name):
    sizes = {"N": 50, "L": 3, "reg": 1e-6, "m": 7, "tr": float, "Σ": 2.0}
    for form in (catalogue.ABOUT[name].openood, catalogue.ABOUT[name].pytorch_ood):
        made = form and eval(form.replace("·", "*").replace("1, ..., 1", "1, 1"), {**vars(detectors), **sizes})
        assert not form or made.settings() != detectors.create(name).settings(), "another than the default"


def test_what_is_kept_is_read_off_a_fit():
    rows = {line.split("|")[1].strip(" `"): line for line in catalogue.table().splitlines()[2:]}
    assert "| features, head | m, c·m | c + m |" in rows["NCI"]
    assert "N·m" in rows["KNN"]
