"""What is said of results: the sentences, the tables with a column for each method, the picture."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from test_compare import hand_made

from ood_fast import evaluation
from ood_fast.evaluation import tables
from ood_fast.evaluation import verdict as sentences_of
from ood_fast.evaluation.tables import compared
from ood_fast.evaluation.verdict import points, ranking, shows
from ood_fast.report import charts, evaluations, figures
from ood_fast.report.record import Evaluated
from ood_fast.report.tables import Cell, Section, Table, and_list, as_markdown

CLEAR = {"ce": [0.5, 0.6, 0.7], "elogitnorm": [0.71, 0.8, 0.89], "l2norm": [0.5, 0.62, 0.69]}


def results_of(values):
    results = hand_made(values)
    for run in results.runs:
        run.scores, run.settings = {"MSP": {}}, {"MSP": {}}
        run.measurements = [
            *run.measurements,
            *(m.__class__(m.metric, m.value, "MSP", "nearood", "near") for m in run.measurements),
        ]
    return results


def test_the_first_sentence_says_what_is_best_and_the_others_whether_it_shows():
    first, against, overall, last = sentences_of(results_of(CLEAR))
    assert first == "Best by AUROC (%): elogitnorm with MSP, near-OOD 80.0, mean of 3 seeds."
    assert (
        against == "elogitnorm with MSP against ce with MSP, each at its best: near-OOD +20.0 [+17.5, +22.5], better."
    )
    assert overall == (
        "Against ce, with the same detector: elogitnorm better in near-OOD; l2norm no difference that 3 seeds can show."
    )
    assert "Student's t over the seeds" in last


def test_methods_of_which_the_same_is_said_are_said_together():
    results = results_of({**CLEAR, "logitnorm": [0.5, 0.62, 0.69], "t2fnorm": [0.31, 0.4, 0.52]})
    overall = sentences_of(results)[2]
    assert "l2norm and logitnorm no difference that 3 seeds can show; t2fnorm worse in near-OOD." in overall
    table, *_ = compared(results)
    assert table.title == "Against ce, with the same detector: AUROC and accuracy (percentage points)"
    assert table.columns == ("near-OOD", "accuracy")
    cells = dict(table.sections[0].rows)["elogitnorm"]
    assert (cells[0].text, cells[0].bold) == ("+20.0 [+17.5, +22.5]", True)


def test_the_verdict_is_what_a_terminal_shows_first(capsys):
    results = results_of(CLEAR)
    evaluation.print_tables(results)
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(f"{' '.join(sentences_of(results))} Test images: {tables.test_images(results)}. ")
    assert "FPR95" not in told, "it is on the page"


def test_seeds_that_lack_a_number_are_not_counted():
    results = results_of(CLEAR)
    results.runs[-1].measurements = []
    assert "l2norm no difference that 2 seeds can show" in sentences_of(results)[2]


def test_a_baseline_that_alone_was_scored_is_the_best():
    results = results_of({"ce": [0.9, 0.91], "elogitnorm": [0.5, 0.51]})
    for run in results.runs[1:]:
        run.scores = {}
    assert sentences_of(results)[0] == "Best by AUROC (%): ce with MSP, near-OOD 90.0, one run."


def test_of_one_method_detectors_are_compared_by_their_names():
    results = results_of({"ce": [0.9, 0.91]})
    for run in results.runs:
        run.scores["NCI"] = {}
        run.measurements += [replace(m, detector="NCI", value=0.5) for m in run.measurements if m.detector]
    assert sentences_of(results)[1].startswith("MSP against NCI, each at its best: near-OOD +40.5")


def test_bars_in_names_stay_in_their_cells():
    text = as_markdown(Table("", "", ("a|b",), (Section("c|d", (("e|f", (Cell("1"),)),)),)))
    assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")} == {3}


def test_the_baseline_may_be_the_best():
    first, against, *_ = sentences_of(results_of({"ce": [0.9, 0.91], "elogitnorm": [0.5, 0.51]}))
    assert "ce with MSP" in first
    assert against.startswith("elogitnorm with MSP against ce with MSP")
    assert against.endswith("worse.")


def test_one_run_says_nothing_of_other_seeds():
    first, *_, last = sentences_of(results_of({"ce": [0.9], "elogitnorm": [0.8]}))
    assert first.endswith("one run.")
    assert last == "One run each: there are no intervals; these numbers say nothing of other seeds."
    assert sentences_of(hand_made({"ce": [0.9]})) == [], "nothing was scored"


def test_what_one_seed_of_several_says_has_no_interval():
    """Two seeds of cross-entropy, one of another loss: an interval over test images is none over the seeds."""
    results = results_of({"ce": [0.9, 0.91], "elogitnorm": [0.8]})
    for run in results.runs:
        run.draws = {m.key: torch.full((9,), m.value, dtype=torch.float64) for m in run.measurements}
    _, against, over, last = sentences_of(results)
    assert against.endswith("near-OOD −10.0, one seed in common.")
    assert "better with" not in over
    assert last == "There are no intervals: no two methods have two seeds in common."
    assert not any(
        cell.bold for table in compared(results) for part in table.sections for _, row in part.rows for cell in row
    )


def test_what_intervals_are_over_is_said():
    results = results_of({"ce": [0.9], "elogitnorm": [0.8]})
    for run in results.runs:
        run.draws = {m.key: torch.full((9,), m.value, dtype=torch.float64) for m in run.measurements}
    assert compared(results)[0].caption.startswith("One run each [95 % interval]: what a method has more; bold")
    assert compared(results_of(CLEAR))[0].caption.startswith("Mean over the seeds that both have [95 % interval]")


def test_runs_of_other_seeds_are_no_pair():
    results = results_of({"ce": [0.9], "elogitnorm": [0.8]})
    results.runs[1] = replace(results.runs[1], trained=replace(results.runs[1].trained, seed=3))
    assert all("not comparable, no seed in common" in told for told in sentences_of(results)[1:3])


def test_bold_is_what_is_above_every_other():
    _, auroc, difference, *_ = compared(results_of(CLEAR))
    (section,) = auroc.sections
    ((label, cells),) = section.rows
    assert (section.heading, label) == ("near-OOD", "MSP")
    assert [cell.text for cell in cells] == ["60.0 ± 10.0", "80.0 ± 9.0", "60.3 ± 9.6"]
    assert [cell.bold for cell in cells] == [False, True, False]
    assert [(cell.text, cell.bold) for cell in difference.sections[0].rows[0][1]] == [
        ("+20.0 [+17.5, +22.5]", True),
        ("+0.3 [−3.5, +4.1]", False),
    ]
    same = compared(results_of({"ce": [0.5, 0.5], "elogitnorm": [0.5, 0.5]}))
    assert not any(cell.bold for table in same for section in table.sections for _, row in section.rows for cell in row)


GAINS = [((0.1, 0.05, 0.15), 1), ((-0.1, -0.15, -0.05), -1), ((0.1, -0.1, 0.3), 0), ((0.1, None, None), 0)]


def test_a_bound_that_rounds_to_zero_tells_its_side():
    assert points(0.007, 0.0002, 0.013) == "+0.7 [+0.0, +1.3]"
    assert points(0.006, -0.0004, 0.012) == "+0.6 [−0.0, +1.2]"
    assert points(-0.0004, -0.01, 0.0) == "0.0 [−1.0, 0.0]"
    assert points(0.012, None, None) == "+1.2"


@pytest.mark.parametrize(("gain", "sign"), [*GAINS, ((1e-5, 1e-6, 2e-5), 0)])
def test_what_an_interval_shows(gain, sign):
    assert shows(*gain) == sign


def test_the_picture_has_a_dot_for_each_method_and_detector_with_its_interval():
    results = results_of(CLEAR)
    (chart,) = figures.dots(results)
    assert [series.name for series in chart.series] == ["ce", "elogitnorm", "l2norm"]
    low, high = chart.series[1].intervals[0]
    assert (round(low, 1), round(high, 1)) == (77.5, 82.5), "around its mean: from the baseline's, by the difference"
    assert chart.series[0].intervals == [None]
    root = ElementTree.fromstring(chart.as_svg())
    assert len(root.findall("circle")) == 3
    drawn = ElementTree.fromstring(charts.as_file([chart, chart]))
    svg = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f".//{svg}g//{svg}circle")) == 6
    assert {"ce", "elogitnorm", "l2norm"} < {text.text for text in drawn.findall(f"{svg}text")}, "the legend"
    header, *rows = chart.as_csv().splitlines()
    assert header == "series,row,AUROC (%),low,high"
    assert rows[:2] == ["ce,MSP,60", "elogitnorm,MSP,80,77.51586,82.48414"]
    assert and_list(["a", "b", "c"]) == "a, b and c"


def test_results_on_the_disk_say_the_same(tmp_path):
    """Also seeds that were evaluated one by one, and results that were written without a context."""
    results = results_of(CLEAR)
    evaluation.write(tmp_path / "all", results, {})
    together = Evaluated.read(tmp_path / "all")[:1]
    apart = []
    for index, run in enumerate(results.runs):
        folder = tmp_path / str(index)
        evaluation.write(folder, type(results)("digits", [run], 0, False), {})
        apart += Evaluated.read(folder)
    for found in (together, apart):
        stored = evaluations.StoredResults(found)
        assert sentences_of(stored) == sentences_of(results)
        assert evaluation.build(stored) == evaluation.build(results)
        assert [ranked.score for ranked in ranking(stored)] == [ranked.score for ranked in ranking(results)]
    twice = evaluations.StoredResults([*apart, apart[0]])
    assert len(twice.methods) == 4, "the same method and seed again is another one"
