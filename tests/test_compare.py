"""The comparison from end to end with few epochs, and its parts: training, evaluation, statistics, files."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import ood_fast.report
from ood_fast import (
    L2NormLinear,
    checks,
    compare,
    data,
    detectors,
    diagnostics,
    evaluate,
    metrics,
    recipes,
)
from ood_fast.compare import Comparison, Row, Settings
from ood_fast.report import comparison as report
from ood_fast.report import tables
from ood_fast.train import DivergedError, criterion_for, model_for, train

SETTINGS = Settings(seeds=(0, 3), recipe=recipes.Recipe(epochs=2))
CONTEXT = {"command": "ood-fast compare <test>", "started": "then", "seconds": 1.0, "versions": {}, "machine": {}}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare.compare(SETTINGS)


@pytest.fixture(scope="module")
def small() -> Comparison:
    """The least that has every kind of table and plot."""
    return compare.compare(
        Settings(losses=("ce", "l2norm"), detectors=("MSP",), seeds=(0,), recipe=recipes.Recipe(epochs=1))
    )


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "new" / "folder"
    report.write(path, comparison, CONTEXT)
    return path


@pytest.fixture(scope="module")
def digits() -> data.Benchmark:
    return data.load("digits", 0)


# ---- training


@pytest.mark.parametrize("loss", recipes.LOSSES)
def test_every_loss_starts_from_the_same_weights_and_learns(loss, digits):
    model = model_for(loss, 6, seed=5)
    for name, value in model_for("ce", 6, seed=5).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert isinstance(model.fc, L2NormLinear) == (loss == "l2norm")
    history = train(model, criterion_for(loss, model), digits.train, recipes.Recipe(epochs=6), seed=5)
    assert len(history) == 6
    assert history[-1] < history[0]
    assert not model.training


def test_the_criterion_of_each_name(digits):
    model = model_for("ce", 6, seed=0)
    x, y = digits.train.images[:16], digits.train.targets[:16]
    logits = model(x)
    distances = [
        np.mean(
            [
                abs((row[row.argmax()] - row[j]).item())
                / (model.fc.weight[row.argmax()] - model.fc.weight[j]).norm().item()
                for j in range(6)
                if j != row.argmax()
            ]
        )
        for row in logits
    ]
    temperatures = {
        "ce": torch.ones(16),
        "l2norm": torch.ones(16),
        "logitnorm": 0.04 * logits.norm(dim=1),
        "elogitnorm": torch.tensor(distances),
    }
    assert set(temperatures) == set(recipes.LOSSES)
    for loss, temperature in temperatures.items():
        expected = nn.functional.cross_entropy(logits / temperature.unsqueeze(1), y)
        torch.testing.assert_close(criterion_for(loss, model)(logits, y), expected.float(), rtol=1e-4, atol=1e-4)


def test_random_numbers_elsewhere_do_not_change_a_model_nor_are_they_changed():
    torch.manual_seed(1)
    expected_next = torch.rand(3)
    torch.manual_seed(1)
    first = model_for("ce", 6, seed=0)
    assert torch.equal(torch.rand(3), expected_next)
    assert torch.equal(model_for("ce", 6, seed=0).fc.weight, first.fc.weight)


def test_training_goes_through_full_batches_in_the_order_of_the_seed(digits):
    seen: list[torch.Tensor] = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            seen.append(x)
            return x.flatten(1) * self.weight

    def run(seed):
        seen.clear()
        train(Recorder(), lambda logits, y: logits.sum(), digits.train, recipes.Recipe(epochs=2), seed)
        return list(seen)

    first, again, other = run(0), run(0), run(1)
    n_full = len(digits.train.images) // 128
    assert [len(batch) for batch in first] == [128] * (2 * n_full)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    epoch = torch.cat(first[:n_full]).flatten(1)
    assert len(torch.unique(epoch, dim=0)) == len(epoch), "an image came twice in one epoch"


def test_the_learning_rate_falls_along_a_cosine(digits):
    rates = []
    model = model_for("ce", 6, seed=0)

    class Recording(torch.optim.SGD):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Recording)
        train(model, nn.CrossEntropyLoss(), digits.train, recipes.Recipe(epochs=4), seed=0)
    steps = np.arange(len(rates)) / len(rates)
    np.testing.assert_allclose(rates, 1e-6 + (0.1 - 1e-6) * (1 + np.cos(np.pi * steps)) / 2)


def test_a_loss_that_is_no_number_stops_the_training(digits):
    model = model_for("ce", 6, seed=0)
    with pytest.raises(DivergedError, match="the training loss became nan in epoch 1"):
        train(model, lambda logits, y: logits.sum() * float("nan"), digits.train, recipes.Recipe(epochs=3), seed=0)


# ---- evaluation


def test_temperatures_are_one_scaled_norm_and_distance():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[6.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    temperatures = evaluate.temperatures(logits, weight)
    distance = (5 / 5 + 4 / 3) / 2  # gaps 5 and 4, rows 5 and 3 apart
    assert temperatures["ece_softmax"].tolist() == [1, 1]
    assert temperatures["ece_scaled_by_norm"].tolist() == pytest.approx([0.04 * math.sqrt(41), 0], abs=1e-8)
    assert temperatures["ece_scaled_by_distance"].tolist() == pytest.approx([distance, 1])


def test_scrambled_images_keep_their_pixels_and_lose_their_order():
    images = torch.randn(20, 2, 8, 8)
    scrambled = evaluate.scramble_pixels(images, seed=0)
    assert torch.equal(scrambled, evaluate.scramble_pixels(images, seed=0))
    assert torch.equal(scrambled[:, 0].flatten(1).sort().values, images[:, 0].flatten(1).sort().values)
    moved = (scrambled != images).float().mean(dim=(1, 2, 3))
    assert (moved > 0.9).all()
    # The channels of a pixel stay together, and each image has an order of its own.
    one_order = evaluate.scramble_pixels(torch.arange(64.0).view(1, 1, 8, 8).expand(2, 2, 8, 8), seed=0)
    assert torch.equal(one_order[:, 0], one_order[:, 1])
    assert not torch.equal(one_order[0], one_order[1])


def test_alpha_is_chosen_without_any_ood_image(digits):
    model = model_for("ce", 6, seed=0)

    def chosen(benchmark):
        result = evaluate.evaluate(model, benchmark, {"NCI": detectors.NCI()})
        return result.settings, result.trials

    altered = data.Benchmark(
        **{**vars(digits), "ood": {"other": data.OODSet("other", "far", 7 * torch.randn(9, 1, 8, 8))}}
    )
    assert chosen(digits) == chosen(altered)


def test_singular_values_and_effective_rank():
    # Variances 9, 4 and 0 along three orthogonal directions, and a mean that must not count.
    directions = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    features = signs @ torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)) @ directions[:2] + 100
    values = diagnostics.singular_values(features)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 0, 0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert diagnostics.effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert diagnostics.effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert diagnostics.effective_rank(torch.zeros(4)) == 0


# ---- the comparison


def test_every_number_is_there_and_finite(comparison):
    rows = {(row.loss, row.seed, row.detector, row.ood_set, row.metric): row.value for row in comparison.rows}
    assert len(rows) == len(comparison.rows)
    assert all(math.isfinite(value) for value in rows.values())
    for loss in recipes.LOSSES:
        for seed in SETTINGS.seeds:
            for metric in ("accuracy", "ece_softmax", "ece_scaled_by_norm", "ece_scaled_by_distance", "effective_rank"):
                assert (loss, seed, "", "", metric) in rows
            assert rows[loss, seed, "NCI", "", "alpha"] in detectors.NCI.grid["alpha"]
            for detector in recipes.DETECTORS:
                for ood_set in ("near", "photographs", "noise"):
                    for metric in evaluate.DETECTION:
                        assert 0 <= rows[loss, seed, detector, ood_set, metric] <= 1


def test_numbers_are_those_of_the_scores(comparison):
    scores = comparison.scores["elogitnorm"]["KNN"]
    rows = {(row.loss, row.seed, row.detector, row.ood_set, row.metric): row.value for row in comparison.rows}
    for ood_set in ("near", "photographs", "noise"):
        expected = metrics.auroc(scores[evaluate.ID], scores[ood_set])
        assert rows["elogitnorm", 0, "KNN", ood_set, "auroc"] == expected


def test_the_same_settings_give_the_same_numbers_and_a_part_gives_its_part(comparison):
    part = compare.compare(Settings(losses=("l2norm", "elogitnorm"), seeds=(3,), recipe=recipes.Recipe(epochs=2)))
    expected = [row for row in comparison.rows if row.seed == 3 and row.loss in ("elogitnorm", "l2norm")]
    assert set(part.rows) == set(expected)
    assert len(part.rows) == len(expected)


def test_the_number_of_threads_does_not_change_the_numbers(comparison):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before != 2 else 3)
    try:
        part = compare.compare(Settings(losses=("ce",), seeds=(0,), recipe=recipes.Recipe(epochs=2)))
        assert torch.get_num_threads() == (2 if before != 2 else 3)
    finally:
        torch.set_num_threads(before)
    assert part.rows == [row for row in comparison.rows if row.seed == 0 and row.loss == "ce"]


def hand_made(differences_to_ce: dict[str, list[float]]) -> Comparison:
    result = Comparison(Settings(losses=("ce", *differences_to_ce), detectors=("MSP",), seeds=(0, 1, 2)))
    for seed, ce in enumerate([0.5, 0.6, 0.7]):
        result.rows.append(Row("ce", seed, "MSP", "near", "auroc", ce))
        for loss, differences in differences_to_ce.items():
            result.rows.append(Row(loss, seed, "MSP", "near", "auroc", ce + differences[seed]))
    return result


def test_summaries_pair_the_seeds():
    ce, other = hand_made({"elogitnorm": [0.1, 0.2, 0.3]}).summaries()
    assert (ce.mean, ce.std, ce.n_seeds) == pytest.approx((0.6, 0.1, 3))
    assert (ce.difference, ce.low, ce.high) == (None, None, None)
    assert other.mean == pytest.approx(0.8)
    assert other.difference == pytest.approx(0.2)
    half_width = 4.302652729911275 * 0.1 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) from a table
    assert (other.low, other.high) == pytest.approx((0.2 - half_width, 0.2 + half_width))


def test_one_seed_has_a_difference_without_interval():
    comparison = hand_made({"l2norm": [0.1, 0.2, 0.3]})
    comparison.rows = [row for row in comparison.rows if row.seed == 0]
    summary = comparison.summaries()[1]
    assert summary.difference == pytest.approx(0.1)
    assert (summary.low, summary.high, summary.std) == (None, None, None)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    covered = [low <= 3.0 <= high for low, high in (compare.mean_interval(list(values)) for values in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_roc_curves_on_the_grid_have_the_area_of_the_metric(comparison):
    auroc = {(r.loss, r.detector, r.ood_set): r.value for r in comparison.rows if r.metric == "auroc" and r.seed == 0}
    for key, value in auroc.items():
        curve = comparison.roc_curves[key][0]
        assert curve[-1] == 1
        assert torch.trapezoid(torch.tensor(curve), torch.tensor(compare.ROC_GRID)) == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": ("ce", "elogitnrm")}, r"unknown loss 'elogitnrm'; known: .*; did you mean 'elogitnorm'\?"),
        ({"detectors": ("MPS",)}, r"unknown detector 'MPS'; did you mean 'MSP'\? known: "),
        ({"data": "cifar10"}, r"unknown data set 'cifar10'; known: digits"),
        ({"losses": ()}, "losses: got none"),
        ({"detectors": ("msp", "MSP")}, "detectors: got MSP, MSP, expected each only once"),
        ({"seeds": (1, 1)}, "seeds: got 1, 1"),
        ({"seeds": (0, -1)}, "seeds: got -1"),
        ({"recipe": recipes.Recipe(epochs=0)}, "epochs: got 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(checks.UserError, match=message):
        Settings(**settings)


def test_names_are_known_in_any_case_and_by_label():
    settings = Settings(losses=("CE", "ELogitNorm"), detectors=("feature Norm", "fDBD", "msp"))
    assert settings.losses == ("ce", "elogitnorm")
    assert settings.detectors == ("FeatureNorm", "FDBD", "MSP")
    with pytest.raises(checks.UserError, match="losses: got ce, ce, expected each only once"):
        Settings(losses=("ce", "CE"))


# ---- tables


def cells(table: tables.Table) -> dict[tuple[str, str, str], tables.Cell]:
    return {
        (section.heading, name, column): cell
        for section in table.sections
        for name, row in section.rows
        for column, cell in zip(table.columns, row, strict=True)
    }


def test_tables_hold_the_summaries(comparison):
    summaries = {(s.loss, s.detector, s.ood_set, s.metric): s for s in comparison.summaries()}
    auroc, fpr95, auroc_difference, fpr95_difference, calibration, *folded = report.tables_of(comparison)
    summary = summaries["elogitnorm", "FDBD", "near", "auroc"]
    where = ("near-OOD: other digits", "fDBD", "elogitnorm")
    assert cells(auroc)[where].text == f"{100 * summary.mean:.1f} ± {100 * summary.std:.1f}"
    assert cells(auroc_difference)[where].text == (
        f"{100 * summary.difference:+.1f} [{100 * summary.low:+.1f}, {100 * summary.high:+.1f}]"
    )
    assert f"{100 * summaries['ce', 'MSP', 'noise', 'fpr95_ood_positive'].mean:.1f}" in (
        cells(fpr95)["far-OOD: uniform noise", "MSP", "ce"].text
    )
    assert "OpenOOD" in fpr95.caption
    assert ("far-OOD: photographs", "KNN", "logitnorm") in cells(fpr95_difference)
    accuracy = 100 * summaries["l2norm", "", "", "accuracy"].mean
    assert cells(calibration)["", "l2norm", "accuracy"].text.startswith(f"{accuracy:.1f}")
    for table, metric in zip(folded, ("fpr95_id_positive", "aupr_in", "aupr_out"), strict=True):
        assert table.folded
        assert not table.on_terminal
        mean = 100 * summaries["ce", "KNN", "near", metric].mean
        assert cells(table)["near-OOD: other digits", "KNN", "ce"].text.startswith(f"{mean:.1f}")


@pytest.mark.parametrize("width", [24, 50, 80, 100])
def test_every_column_is_printed_at_every_width(width, comparison, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    tables.show(report.tables_of(comparison))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert width < 40 or max(map(len, printed.splitlines())) <= width
    rows = [re.split(r" {2,}", line.strip()) for line in printed.splitlines()]
    for table in report.tables_of(comparison):
        if table.on_terminal:
            for column in table.columns:
                assert any(column in row for row in rows), column
            for (_, name, _), cell in cells(table).items():
                assert any(row[0] == name and cell.text.lstrip("*") in [c.rstrip("*") for c in row] for row in rows)


def test_a_name_that_would_leave_no_room_has_a_line_of_its_own(capsys):
    name = "cifar10-elogitnorm epochs=2 batch_size=16 learning_rate=0.05 model=tiny"
    row = (name, tuple(tables.Cell(text) for text in ("9.26 [5.74, 16.11]", "47.24", "90.74")))
    tables.show([tables.Table("T", "c", ("accuracy", "ECE f", "ECE f/D"), (tables.Section("", (row,)),))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:1] + lines[2:4]] == [
        ["T"],
        name.split(),
        ["9.26", "[5.74,", "16.11]", "47.24", "90.74"],
    ]
    tables.show([tables.Table("T", "no rows", ("a",), ())])
    assert "no rows" in capsys.readouterr().out


def test_columns_are_grouped_to_fit():
    assert tables._blocks([10, 10, 10], room=36) == [[0, 1, 2]]
    assert tables._blocks([10, 10, 10], room=35) == [[0, 1], [2]]
    assert tables._blocks([10, 40, 10], room=20) == [[0], [1], [2]]


def test_the_best_is_bold_in_its_direction():
    row = [compare.PairedSummary("", "", "", "", mean, 0.01, 5) for mean in (0.91, 0.95, 0.9501, 0.2)]
    assert [cell.bold for cell in report._values(row, best=max)] == [False, True, True, False]  # 95.0 twice, as printed
    assert [cell.bold for cell in report._values(row, best=min)] == [False, False, False, True]
    assert [cell.bold for cell in report._values(row[:1], best=max)] == [False]


@pytest.mark.parametrize(
    ("low", "high", "better", "bold", "worse"),
    [
        (0.01, 0.05, 1, True, False),
        (-0.05, -0.01, 1, True, True),
        (-0.05, -0.01, -1, True, False),
        (-1, 1, 1, False, False),
    ],
)
def test_a_difference_is_bold_where_the_interval_excludes_zero(low, high, better, bold, worse):
    summary = compare.PairedSummary("", "", "", "", 0.5, 0.1, 5, (low + high) / 2, low, high)
    cell = report._difference(summary, better)
    assert (cell.bold, cell.worse) == (bold, worse)


def test_without_the_baseline_there_are_no_differences():
    comparison = compare.compare(
        Settings(losses=("elogitnorm",), detectors=("MSP",), seeds=(0,), recipe=recipes.Recipe(epochs=1))
    )
    assert [table.title for table in report.tables_of(comparison)] == [
        "AUROC (%)",
        "FPR95 (%), lower is better",
        "Accuracy and expected calibration error (%)",
        "FPR95 (%), ID positive, lower is better",
        "AUPR (%), ID positive",
        "AUPR (%), OOD positive",
    ]


# ---- files


def test_all_files_are_there_and_nothing_else(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.FILES)


def test_plots_are_files_that_need_no_page(folder, comparison):
    """Well-formed, every colour by its value, every detector, loss and set named, every curve drawn."""
    name = "{http://www.w3.org/2000/svg}"
    labels = {detectors.find(detector).label for detector in SETTINGS.detectors}
    sets = {part for title in comparison.ood_titles.values() for part in title.split(": ")}
    n_losses, n_detectors, n_sets = map(len, (SETTINGS.losses, SETTINGS.detectors, comparison.ood_titles))
    for file, told, lines in (
        ("histograms", labels | {*SETTINGS.losses, "ID test images", *comparison.ood_titles.values()}, n_losses * 4),
        ("roc", labels | {*SETTINGS.losses, *sets, "share of ID images rejected"}, n_losses * n_sets),
        ("spectrum", {*SETTINGS.losses, "index", "σ / largest σ"}, n_losses),
    ):
        text = (folder / f"{file}.svg").read_text(encoding="utf-8")
        assert "var(" not in text
        root = ElementTree.fromstring(text)
        assert told <= {element.text for element in root.iter(f"{name}text")}
        drawn = [path for path in root.iter(f"{name}path") if path.get("class").startswith("line")]
        legend = n_losses if file != "histograms" else 4
        assert len(drawn) == legend + lines * (1 if file == "spectrum" else n_detectors)
        assert "nan" not in text


def test_plots_draw_the_numbers(comparison):
    histogram = report._histogram(comparison, "ce", "MSP", "MSP")
    for series in histogram.series:
        assert sum(y * y for y in series.ys) == pytest.approx(1)
    curve = report._roc(comparison, "MSP", "near", "MSP").series[0]
    wanted = np.mean(comparison.roc_curves["ce", "MSP", "near"], axis=0)
    assert curve.ys == pytest.approx(wanted)
    assert (curve.xs[0], curve.xs[-1], curve.ys[-1]) == (0, 1, 1)
    spectrum = report._spectrum(comparison).series[1]
    assert spectrum.ys[0] == 1
    assert min(spectrum.ys) >= report.SPECTRUM_FLOOR
    assert [report._color((5, 1), index) for index in range(5)] == [5, 1, 13, 9, 21], "never two alike"


def test_json_holds_every_number(folder, comparison):
    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=no_constants)
    assert [Row(**row) for row in results["results"]] == comparison.rows
    assert [compare.PairedSummary(**summary) for summary in results["summary"]] == comparison.summaries()
    assert results["command"] == CONTEXT["command"]
    assert results["settings"]["seeds"] == [0, 3]
    assert results["settings"]["recipe"]["epochs"] == 2
    assert results["settings"]["detectors"]["KNN"] == {"k": 10}
    assert [len(run["epoch_losses"]) for run in results["runs"]] == [2] * 8


def test_csv_holds_every_number(folder, comparison):
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = [Row(**{**row, "seed": int(row["seed"]), "value": float(row["value"])}) for row in csv.DictReader(file)]
    assert rows == comparison.rows


def test_markdown_holds_the_tables(folder, comparison):
    text = (folder / "results.md").read_text(encoding="utf-8")
    for table in report.tables_of(comparison):
        assert f"**{table.title}**" in text
    for (_, name, _), cell in cells(report.tables_of(comparison)[0]).items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |") and cell.text in line)
        assert (f"**{cell.text}**" in row) or not cell.bold


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed in order."""

    void = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.references, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        self.references += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_and_shows_everything(folder, comparison):
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.references == []
    assert not re.search(r"url\(|@import|http:", source)
    for plot in report.plots_of(comparison):
        assert plot.svg in source
        assert plot.caption in page.text
    assert source.count("<svg") == 3
    for table in report.tables_of(comparison):
        assert table.title in page.text
        for cell in cells(table).values():
            assert cell.text in page.text
    assert source.count("<details>") == sum(table.folded for table in report.tables_of(comparison)) == 3
    assert "ood-fast compare <test>" in page.text  # escaped in the source


def test_a_new_comparison_replaces_the_earlier_one_and_keeps_other_files(small, tmp_path):
    report.write(tmp_path, small, CONTEXT)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "roc.png").write_text("of an earlier version")
    assert report.free_folder(tmp_path) == tmp_path
    report.write(tmp_path, small, {**CONTEXT, "command": "the second"})
    assert json.loads((tmp_path / "results.json").read_text())["command"] == "the second"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*report.FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_writing_that_fails_leaves_nothing(small, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(report, "_page", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        report.write(tmp_path / "a" / "b", small, CONTEXT)
    assert list(tmp_path.iterdir()) == []


def test_writing_that_fails_leaves_the_earlier_comparison(small, folder, tmp_path, monkeypatch):
    report.write(tmp_path, small, CONTEXT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report, "_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path, small, {**CONTEXT, "command": "the second"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_package_offers_the_names_of_a_comparison():
    for name in ood_fast.report.__all__:
        assert getattr(ood_fast.report, name) is getattr(report, "free_folder" if name == "check_folder" else name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ood_fast.report.nothing


def test_check_folder_tries_and_leaves_nothing(tmp_path):
    assert report.free_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    assert report.free_folder(tmp_path) == tmp_path  # an empty folder will do


def test_check_folder_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(checks.UserError, match=r"is not empty and holds no earlier comparison \(found thesis\.tex\)"):
        report.free_folder(tmp_path)
    with pytest.raises(checks.UserError, match=r"thesis\.tex is a file"):
        report.free_folder(tmp_path / "thesis.tex" / "results")
    # Someone else's file by one of our names does not make a folder ours.
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, text in (
        ("results.csv", "a,b"),
        ("results.json", '{"format": "something else"}'),
        ("results.json", "[1]"),
    ):
        (theirs / name).write_text(text)
        with pytest.raises(checks.UserError, match="holds no earlier comparison"):
            report.free_folder(theirs)


def test_check_folder_finds_a_file_system_that_cannot_be_written():
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, which nobody can write to, not even root")
    with pytest.raises(checks.UserError, match="--out: cannot write to /proc/results"):
        report.free_folder("/proc/results")
