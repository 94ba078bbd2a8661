"""`ood-fast report`: made files -> train -> evaluate -> page, its numbers against direct computation; in a browser."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import browser
import numpy as np
import pytest
import tiny_models
import torch
from test_data import (
    write_cifar10,
    write_cifar100,
    write_dtd,
    write_image,
    write_mnist,
    write_places,
    write_svhn,
    write_tiny_imagenet,
)

from ood_fast import cli, detectors, diagnostics, evaluation, files, intact, metrics
from ood_fast.report import charts, pages
from ood_fast.report import runs as report_runs
from ood_fast.training import load_run

DETECTORS = "MSP,Energy,FDBD,NCI,FeatureNorm"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with the runs ce and elogitnorm, evaluated, and the data."""
    folder = tmp_path_factory.mktemp("done")
    write_cifar10(folder / "data", n_train=80, n_test=60)
    for write in (write_cifar100, write_mnist, write_svhn, write_dtd, write_places, write_tiny_imagenet):
        write(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_models.registered(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("ce", "elogitnorm"):
            settings = [f"--set={text}" for text in ("model=tiny", "epochs=2", "batch_size=16", "lr=0.05")]
            data = ["--data-root=data", "--workers=0", "--quiet"]
            kept = ["--diagnostics", "--keep-every=1", f"--out={name}"]
            assert cli.main(["train", f"--recipe=cifar10-{name}", *settings, *data, *kept]) == 0
            assert cli.main(["evaluate", name, *data, f"--detectors={DETECTORS}", "--bootstrap=5"]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def runs(done, tmp_path, monkeypatch) -> Path:
    """A copy of it that may be changed, as the working directory."""
    for name in ("ce", "elogitnorm"):
        shutil.copytree(done / name, tmp_path / name)
        for file in tmp_path.glob(f"{name}/cache/*/diagnosis-*"):
            file.unlink()
        results = tmp_path / name / "eval/cifar10/results.json"
        results.write_text(results.read_text(encoding="utf-8").replace(str(done), str(tmp_path)), encoding="utf-8")
    (tmp_path / "data").symlink_to(done / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def page(done, tmp_path_factory) -> str:
    """The report of both."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch, tiny_models.registered():
        patch.chdir(done)
        assert cli.main(["report", "ce", "--feature-change", "--workers=0", "--quiet"]) == 0
        assert cli.main(["report", "ce", "elogitnorm", f"--out={file}", "--quiet"]) == 0
    return file.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Captions by the titles of their figures, tables of texts by theirs, files to be saved, all addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.files: dict[str, str] = {}
        self.addresses: list[str] = []
        self.captions: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.figure = self.caption = self.heading = None
        self.row: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("href", "src", "srcset") if name in given]
        if "download" in given:
            assert given["download"] not in self.files
            self.files[given["download"]] = unquote(given["href"].partition(",")[2])
        if tag == "figcaption":
            self.figure = ""
        if tag in ("h2", "summary"):
            self.heading = ""
        if tag == "p" and self.figure:
            self.caption = ""
        if tag == "table":
            self.tables[self.heading.strip()] = []
        if tag == "tr":
            self.row = []
        if tag in ("td", "th"):
            self.row.append("")

    def handle_data(self, data):
        if self.figure is not None and self.caption is None:
            self.figure += data
        elif self.caption is not None:
            self.caption += data
        elif self.row:
            self.row[-1] += data
        elif self.lasttag in ("h2", "summary"):
            self.heading += data

    def handle_endtag(self, tag):
        if tag == "a" and self.figure is not None:
            self.figure = self.figure.removesuffix("CSV")
            self.title = self.figure
        if tag == "p" and self.caption is not None:
            self.captions[self.title], self.figure, self.caption = self.caption, None, None
        if tag == "tr":
            self.tables[self.heading.strip()].append(self.row)
            self.row = None

    def numbers(self, file: str) -> dict[str, np.ndarray]:
        """series -> its rows of numbers."""
        found: dict[str, list] = {}
        for name, *row in list(csv.reader(io.StringIO(self.files[file])))[1:]:
            found.setdefault(name, []).append([float(value) for value in row])
        return {name: np.array(rows) for name, rows in found.items()}


@pytest.fixture(scope="module")
def parsed(page) -> Page:
    return Page(page)


def cached(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Features (float64) and logits of a set as the cache of ce holds them."""
    (path,) = folder.glob(f"ce/cache/*/{name}-*/features.npy")
    return {what: np.load(path.with_name(f"{what}.npy")) for what in ("features", "logits", "targets")}


# ---- the numbers


def test_page_asks_for_nothing_and_each_plot_can_be_saved(page, parsed):
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv", "", page)
    assert page.count("<svg") == len(parsed.files) == len(parsed.captions) > 40
    assert all(caption.strip() for caption in parsed.captions.values())
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_training_curves_are_the_log(done, parsed):
    for name in ("ce", "elogitnorm"):
        with open(done / name / "log.csv") as file:
            rows = list(csv.DictReader(file))
        wanted = [[float(row["epoch"]), float(row["loss"])] for row in rows]
        np.testing.assert_allclose(parsed.numbers("training-Training-loss.csv")[name], wanted, rtol=1e-6)
        drawn = parsed.numbers("training-Accuracy.csv")[f"{name} validation"]
        np.testing.assert_allclose(drawn[:, 1], [100 * float(row["validation_accuracy"]) for row in rows], rtol=1e-6)
        with open(done / name / "diagnostics.csv") as file:
            rows = list(csv.DictReader(file))
        for column, title in (("norm_cv", "CV-of-z-by-epoch"), ("pscore_auroc", "AUROC-of-pScore-by-epoch")):
            drawn = parsed.numbers(f"epochs-{title}.csv")[name]
            np.testing.assert_allclose(drawn[:, 1], [float(row[column]) for row in rows], rtol=1e-6)
    rows = {row[0]: row for row in parsed.tables["Runs"]}
    assert rows["ce"][1:6] == ["tiny", "ce", "0", "2 of 2", "complete"]
    settings = {row[0]: row[1:] for row in parsed.tables["Settings"]}
    assert settings["loss"] == ["ce", "elogitnorm"]
    assert settings["learning_rate"] == ["0.05", "0.05"]


def test_evaluation_is_that_of_its_files(done, parsed):
    found = {name: json.loads((done / name / "eval/cifar10/results.json").read_text()) for name in ("ce", "elogitnorm")}
    table = parsed.tables["AUROC (%)"]
    assert [len(row) for row in table[:1]] == [3], "a column for each run, whose methods differ"
    near = {row[0]: row[1:] for row in table[table.index(["near-OOD"]) + 1 : table.index(["far-OOD"])]}
    assert set(near) == {"MSP", "Energy", "fDBD", "NCI", "Feature norm"}
    for column, name in enumerate(found):
        for row in found[name]["runs"][0]["measurements"]:
            if (row["metric"], row["ood_set"]) == ("auroc", "nearood"):
                assert near[detectors.find(row["detector"]).label][column] == f"{100 * row['value']:.1f}"
    scores = np.load(done / "ce/eval/cifar10/scores/ce/NCI.npz")
    drawn = parsed.numbers("scores-NCI-ce.csv")
    edges = np.append(drawn["ID"][:, 0], drawn["ID"][-1, 1])
    inside = scores["id"].clip(edges[0], edges[-1])
    # the edges are written with 7 digits: a score at one may fall on the other side
    np.testing.assert_allclose(
        np.cumsum(drawn["ID"][:, 2]), [np.mean(inside <= edge) for edge in edges[1:]], atol=2.1 / len(inside)
    )
    assert drawn["ID"][:, 2].sum() == pytest.approx(1, abs=1e-6)


def test_roc_curves_and_images_are_of_the_scores(done, page, parsed):
    """Of the best detector: curves through the points of its scores, and the images where these are furthest off."""
    (title,) = {title for title in parsed.captions if title.startswith("ROC of ") and title.endswith(": ce")}
    label = title.removeprefix("ROC of ").removesuffix(": ce")
    detector = next(name for name in DETECTORS.split(",") if detectors.find(name).label == label)
    results = evaluation.read(done / "ce/eval/cifar10")
    scores = evaluation.read_scores(done / "ce/eval/cifar10", results["runs"][0])[detector]
    (file,) = (name for name in parsed.files if name.startswith("scores-ROC") and name.endswith("-ce.csv"))
    for (name, part), points in zip(list(results["sets"].items())[1:], parsed.numbers(file).values(), strict=True):
        for fpr, tpr in points:
            same = [
                abs((scores["id"] >= t).mean() - tpr) + abs((scores[name] >= t).mean() - fpr)
                for t in ([*scores["id"], *scores[name], math.inf])
            ]
            assert min(same) < 1e-5, part["title"]
    colours = set(re.findall(r'<span class="(k\d)[^"]*"><b>(.*?)</b>', page.partition('id="scores-on-cifar10"')[2]))
    assert len(colours) == len({name for _, name in colours}) > 2, "a set has one colour in curves and histograms"
    gallery = page.partition('id="images-of-cifar10"')[2].partition("</section>")[0]
    assert gallery.count("<img ") >= 16
    told = []  # of the best run
    for name in ("ce", "elogitnorm"):
        results = evaluation.read(done / name / "eval/cifar10")
        scores = evaluation.read_scores(done / name / "eval/cifar10", results["runs"][0])[detector]
        outside = np.sort(np.concatenate([scores[name] for name in list(results["sets"])[1:]]))
        told.append(all(f", {value:.4g}</p>" in gallery for value in (*np.sort(scores["id"])[:8], *outside[-8:])))
    assert sorted(told) == [False, True]
    assert "Wrong with the most confidence" in gallery


def test_images_that_changed_are_not_shown(runs, capsys):
    assert cli.main(["report", "ce", "--data-root", "elsewhere"]) == 0
    assert "images of cifar10: " in capsys.readouterr().err
    assert 'id="images-of-cifar10"' not in (runs / "ce/report.html").read_text(encoding="utf-8")


def test_images_are_shown_where_other_sets_of_the_benchmark_are_not_there(done, runs):
    (runs / "data").unlink()
    (runs / "data").mkdir()
    for name in ("cifar-10-batches-py", "svhn"):
        (runs / "data" / name).symlink_to(done / "data" / name)
    for seed in range(9):
        write_image(runs / f"photographs/{seed}.png", (32, 32), seed)
    given = ["--ood=svhn", "--ood-folder=photographs=photographs", "--detectors=MSP", "--workers=0", "--quiet"]
    with tiny_models.registered():
        assert cli.main(["compare", "ce", "elogitnorm", *given, "--data-root=data", "--out=compared"]) == 0
    for command, shown in (("compare", True), ("report", False)):  # the second does not know where they are
        if command == "report":
            assert cli.main(["report", "compared", "--data-root=data"]) == 0
        text = (runs / "compared/report.html").read_text(encoding="utf-8")
        gallery = text.partition('id="images-of-cifar10"')[2].partition("</section>")[0]
        assert gallery.count("<img ") >= 16
        assert ("photographs, " in gallery) == shown


def test_diagnostics_are_those_of_the_features(done, parsed):
    fit, test, far = (cached(done, name) for name in ("fit", "test", "svhn"))
    z = fit["features"].astype(np.float64)
    spectrum = np.linalg.svd((z - z.mean(0)) / math.sqrt(len(z)), compute_uv=False)[: min(z.shape)]
    drawn = parsed.numbers("features-Spectrum-of-the-features.csv")["ce"][:, 1]
    big = spectrum > 1e-5 * spectrum[0]
    np.testing.assert_allclose(drawn[big[: len(drawn)]], spectrum[big], rtol=1e-5)
    shares = spectrum / spectrum.sum()
    rank = math.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    row = dict(zip(*(r for r in parsed.tables["Numbers"] if r[0] in ("run", "ce")), strict=True))
    assert float(row["effective rank"]) == pytest.approx(rank, rel=1e-3)
    norms = np.linalg.norm(z, axis=1)
    assert float(row["CV of ‖z‖"]) == pytest.approx(norms.std() / norms.mean(), rel=1e-3)
    assert f"ce: {row['effective rank']}" in parsed.captions["Spectrum of the features"]

    points = parsed.numbers("images-D-against-z-ce.csv")
    wanted = np.linalg.norm(test["features"].astype(np.float64), axis=1)
    np.testing.assert_allclose(points["ID"][:, 0], wanted, rtol=1e-5)
    correlation = np.corrcoef(points["ID"].T)[0, 1]
    found = re.search(r"Pearson's r of all: ID: ([−\d.]+)", parsed.captions["D against ‖z‖: ce"])[1]
    assert float(found.replace("−", "-")) == pytest.approx(correlation, rel=1e-3)

    weight, _ = evaluation.read_head(next(done.glob("ce/cache/*/fit-*")))
    p = test["logits"].argmax(1), far["logits"].argmax(1)
    pscore = [
        ((weight.double().numpy()[index] * (of["features"] - z.mean(0))).sum(1))
        / np.linalg.norm(of["features"] - z.mean(0), axis=1)
        for index, of in zip(p, (test, far), strict=True)
    ]
    auroc = metrics.auroc(*map(torch.from_numpy, pscore))
    table = parsed.tables["Numbers by OOD set"]
    column = table[0].index("AUROC of pScore")
    first = next(row for row in table if row[0] == "SVHN")
    assert float(first[column]) == pytest.approx(auroc, abs=1e-4)
    accuracy = (p[0] == test["targets"]).mean()
    assert f"all images: {100 * accuracy:.2f} %" in parsed.captions["Accuracy by norm: ce"]
    runs_table = parsed.tables["Runs"]
    assert runs_table[1][runs_table[0].index("test accuracy on cifar10 (%)")] == f"{100 * accuracy:.2f}"


def test_every_diagnostic_of_the_papers_is_a_plot_with_its_number(parsed):
    for title, told in {
        "Spectrum of the features": "Effective rank",
        "D against ‖z‖: ce": "Pearson's r",
        "NC1: within- over between-class variance": "eq. 2",
        "EN: norms of the class means": "eq. 3",
        "EA: angles between the class means": "eq. 4",
        "NC3: weights along the class means": "NC3 =",
        "NC4: agreement with the nearest class mean": "argmin",
        "CV of ‖z‖ by epoch": "fig. 3",
        "AUROC of pScore by epoch": "CVPR 2025",
        "Feature change by norm group: ce": "eq. 8",
        "Features in the plane: ce": "decision regions",
        "Accuracy by norm: ce": "fig. 7",
        "‖z‖: ce": "AUROC",
        "MSP: elogitnorm": "AUROC",
        "Reliability: ce": "Expected calibration error",
    }.items():
        assert told in parsed.captions[title], title
        assert re.search(r"\d\.?\d*", parsed.captions[title].partition(told)[2]), title


def test_feature_change_is_equation_8_on_the_test_images(done, parsed):
    with tiny_models.registered():
        models = [load_run(done / "ce", f"epochs/{epoch:04d}.ckpt")[0] for epoch in (1, 2)]
        from ood_fast.data import open_benchmark

        images = torch.stack([x for x, _ in (open_benchmark("cifar10", done / "data").test[i] for i in range(54))])
    with torch.no_grad():
        first, last = (model[:-1](images).double() for model in models)
    norm, moved = last.norm(dim=1), (last - first).square().sum(dim=1)
    low = norm < torch.quantile(norm, 0.25)
    assert f"({low.sum()} images): {moved[low].mean():.4g}" in parsed.captions["Feature change by norm group: ce"]


# ---- what is there and what is not


def test_a_second_report_reads_what_the_first_found(runs, capsys):
    assert cli.main(["report", "ce"]) == 0
    first = capsys.readouterr()
    assert "diagnosing ce on cifar10" in first.err
    assert first.out == "The report is in ce/report.html\n"
    assert cli.main(["report", "ce"]) == 0
    assert "diagnosing" not in capsys.readouterr().err
    (kept,) = runs.glob("ce/cache/*/diagnosis-*.npz")
    kept.write_bytes(b"damaged")
    assert cli.main(["report", "ce"]) == 0
    assert "diagnosing" in capsys.readouterr().err
    assert diagnostics.Diagnosis.load(kept).numbers


def test_a_run_that_was_moved_is_known(runs, capsys):
    (runs / "elsewhere").mkdir()
    (runs / "ce").rename(runs / "elsewhere" / "moved")
    assert cli.main(["report", "elsewhere/moved"]) == 0
    page = Page((runs / "elsewhere/moved/report.html").read_text())
    assert "Spectrum of the features" in page.captions
    assert "MSP: moved" in page.captions


def test_an_evaluation_knows_its_run_from_anywhere(runs, monkeypatch):
    (runs / "elsewhere").mkdir()
    shutil.move("elogitnorm", "elsewhere/ce")  # called as the evaluation calls its run
    monkeypatch.chdir("elsewhere")
    assert cli.main(["report", str(runs / "ce/eval/cifar10"), "--out=report.html", "--quiet"]) == 0
    with (runs / "ce/log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    drawn = Page(Path("report.html").read_text()).numbers("training-Training-loss.csv")
    np.testing.assert_allclose(drawn["ce"][:, 1], losses, rtol=1e-6)


def test_what_is_missing_is_told_with_the_command_for_it(runs, capsys):
    shutil.rmtree("ce/eval")
    for name in ("diagnostics.csv", "epochs/0002.ckpt"):
        (runs / "ce" / name).unlink()
    assert cli.main(["report", "ce"]) == 0
    told = capsys.readouterr().err
    page = (runs / "ce/report.html").read_text()
    root = (runs / "data").resolve()
    for text in (
        f"run ood-fast evaluate ce --data-root {root}",
        "train with --diagnostics",
        "train with --keep-every 1, then ood-fast report ce --feature-change",
    ):
        assert text in told
        assert html.escape(text) in page
    assert "Training loss" in Page(page).captions
    assert "not evaluated yet" in page


def test_an_evaluation_from_before_the_training_went_on_is_told(runs, capsys):
    assert cli.main(["report", "ce"]) == 0
    assert "after the last epoch" not in capsys.readouterr().err
    info = json.loads((runs / "ce/run.json").read_text())
    (runs / "ce/run.json").write_text(json.dumps({**info, "epochs": 3}))
    assert cli.main(["report", "ce"]) == 0
    told = capsys.readouterr().err
    assert "evaluation on cifar10 after the last epoch: it is of epoch 2 of 3; run ood-fast evaluate ce" in told


def test_published_numbers_stand_beside_ours(runs):
    file = runs / "ce/eval/cifar10/results.json"
    results = json.loads(file.read_text())
    for row in results["summary"]:
        if (row["metric"], row["detector"], row["ood_set"]) == ("auroc", "MSP", "farood"):
            row["published"], ours = 0.5, row["mean"]
    file.write_text(json.dumps(results))
    assert cli.main(["report", "ce", "--quiet"]) == 0
    header, *rows = Page((runs / "ce/report.html").read_text()).tables["AUROC (%)"]
    assert header == ["detector", "near-OOD", "far-OOD", "far-OOD published", "difference"]
    msp = next(row for row in rows if row[0] == "MSP")
    assert msp[3:] == ["50.00", f"{100 * (ours - 0.5):+.2f}"]
    assert next(row for row in rows if row[0] == "NCI")[3:] == ["–", "–"]


def test_several_benchmarks_of_one_run(runs):
    shutil.copytree("ce/eval/cifar10", "ce/eval/mine")
    file = runs / "ce/eval/mine/results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"benchmark": "mine"}))
    assert cli.main(["report", "ce", "--quiet"]) == 0
    text = (runs / "ce/report.html").read_text()
    page = Page(text)
    assert {"cifar10-scores-MSP-ce.csv", "mine-scores-MSP-ce.csv"} < set(page.files)
    assert 'id="ood-detection-on-cifar10"' in text
    assert 'id="ood-detection-on-mine"' in text


def test_features_that_are_gone_leave_the_rest(runs, capsys):
    gone = next(runs.glob("ce/cache/*/svhn-*"))
    shutil.rmtree(gone)
    assert cli.main(["report", "ce", "--out=new/folder/x.html"]) == 0
    captions = Page((runs / "new/folder/x.html").read_text()).captions
    assert "MSP: ce" in captions
    assert "Spectrum of the features" not in captions
    told = capsys.readouterr().err
    assert f"the features of svhn are no longer in {gone}; to make them again: ood-fast evaluate ce" in told


def test_features_that_are_damaged_are_told(runs, capsys):
    (file,) = runs.glob("ce/cache/*/test-*/features.npy")
    file.write_bytes(file.read_bytes()[:-500])
    assert cli.main(["report", "ce"]) == 0
    assert "damaged" in capsys.readouterr().err
    file = next(runs.glob("elogitnorm/cache/*/fit-*/features.npy"))
    kept = np.load(file)
    kept[3, 2] = np.inf
    np.save(file, kept)
    intact.seal(file)
    assert cli.main(["report", "elogitnorm"]) == 0
    assert "diagnostics on cifar10: features: 1 rows hold NaN or infinity" in capsys.readouterr().err


def test_a_run_that_has_begun_and_one_that_diverged(runs, capsys):
    shutil.rmtree("ce/eval")
    (runs / "ce/log.csv").write_text("epoch,learning_rate,loss,train_accuracy,validation_accuracy,seconds\n")
    assert cli.main(["report", "ce"]) == 0
    assert "no epoch is complete" in capsys.readouterr().err
    with (runs / "elogitnorm/log.csv").open("a") as file:
        file.write("3,0.1,nan,,nan,100,1\n")
    assert cli.main(["report", "elogitnorm"]) == 0
    page = (runs / "elogitnorm/report.html").read_text()
    assert len(Page(page).numbers("training-Training-loss.csv")["elogitnorm"]) == 3
    assert re.search(r">NaN<|\bnan\b(?![^<]*\")", re.sub(r"data:[^\"]*", "", page)) is None


def test_seeds_in_one_folder_and_the_folder_of_an_evaluation(runs, capsys):
    (runs / "group").mkdir()
    for seed, name in enumerate(("ce", "elogitnorm")):
        (runs / name).rename(runs / "group" / f"s{seed}")
    assert cli.main(["report", "group", "--quiet"]) == 0
    page = Page((runs / "group/report.html").read_text())
    assert [row[0] for row in page.tables["Runs"][1:]] == ["group/s0", "group/s1"]
    assert cli.main(["report", "group/s0/eval/cifar10", "group/s1", "--out=both.html", "--quiet"]) == 0
    assert len(Page(Path("both.html").read_text()).tables["Runs"]) == 3


def test_an_evaluation_of_the_seeds_stands_in_the_report_of_one(runs, capsys):
    """`ood-fast evaluate group` leaves group/eval, which is about group/s0 and group/s1."""
    (runs / "group").mkdir()
    for seed, name in enumerate(("ce", "elogitnorm")):
        (runs / name).rename(runs / "group" / f"s{seed}")
    (runs / "group/s0/eval").rename(runs / "group/eval")
    file = runs / "group/eval/cifar10/results.json"
    results = json.loads(file.read_text())
    told = {"run": "group/s0", "folder": str(runs / "group/s0")}
    file.write_text(json.dumps({**results, "runs": [{**results["runs"][0], **told}]}))
    shutil.rmtree("group/s1/eval")
    assert cli.main(["report", "group/s0"]) == 0
    assert "evaluation and diagnostics" not in capsys.readouterr().err
    assert "AUROC (%)" in Page((runs / "group/s0/report.html").read_text()).tables
    assert cli.main(["report", "group/s1"]) == 0, "of which it tells nothing"
    assert "evaluation and diagnostics: run ood-fast evaluate group/s1" in capsys.readouterr().err
    file.write_text("damaged")
    assert cli.main(["report", "group/s1", "--quiet"]) == 0


def test_an_evaluation_is_one_however_its_folder_is_written(runs, capsys):
    assert cli.main(["report", str(Path("ce").resolve()), "ce/eval/cifar10", "--out=both.html"]) == 0
    assert "is shown, of the same benchmark" not in capsys.readouterr().err


def test_checkpoints_of_one_name_in_several_folders(runs, capsys):
    """Each is in the report; of one run without draws no difference has an interval, and none is said to have one."""
    for place, name in (("a", "ce"), ("b", "elogitnorm"), ("c", "ce"), ("a-again", "ce")):
        shutil.copytree(runs / name / "eval/cifar10", runs / place)
        told = json.loads(Path(place, "results.json").read_text())
        own = {"run": "best.th", "checkpoint": "best.th", "folder": str(runs / place[0]), "method": "best"}
        told["runs"] = [{**told["runs"][0], **own, "recipe": None, "seed": None, "id": None}]
        told["summary"] = [{**row, "method": "best"} for row in told["summary"]]
        Path(place, "results.json").write_text(json.dumps(told))
    assert cli.main(["report", "a", "b", "c", "a-again", "--out=all.html"]) == 0
    err = capsys.readouterr().err
    assert "a/best.th: the evaluation in a-again: that in a is shown, of the same benchmark; report it by itself" in err
    text = Path("all.html").read_text()
    page = Page(text)
    assert page.tables["AUROC (%)"][0][1:] == ["best", "best (best.th)", "best (c/best.th)"]
    assert [row[0] for row in page.tables["Runs"][1:]] == ["a/best.th", "b/best.th", "c/best.th"]
    assert "3 runs, evaluated on cifar10" in text
    assert "the interval excludes 0" not in text


def test_what_several_runs_lack_is_told_once(runs, capsys):
    for name in ("ce", "elogitnorm"):
        shutil.rmtree(f"{name}/eval")
        (runs / name / "diagnostics.csv").unlink()
    assert cli.main(["report", "ce", "elogitnorm", "--out=report.html"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not in the report")]
    assert len(lines) == 3
    assert lines[0] == "not in the report: ce, elogitnorm: diagnostics by epoch: train with --diagnostics"
    root = (runs / "data").resolve()
    assert f"ce, elogitnorm: evaluation and diagnostics: run ood-fast evaluate RUN --data-root {root}" in lines[1]
    page = (runs / "report.html").read_text()
    assert "<details open><summary>Not in this report (3)</summary>" in page
    (runs / "ce/log.csv").write_text("epoch,learning_rate,loss,train_accuracy,validation_accuracy,seconds\n")
    assert cli.main(["report", "ce", "elogitnorm", "--out=report.html", "--quiet"]) == 0
    assert "<details><summary>Not in this report (4)</summary>" in (runs / "report.html").read_text()


def test_requests_that_cannot_be_met(runs, capsys):
    def refused(*arguments: str) -> str:
        assert cli.main(["report", *arguments]) == 2
        return capsys.readouterr().err

    assert "nowhere: no such folder" in refused("nowhere")
    (runs / "empty").mkdir()
    assert "empty: neither a run of `ood-fast train` (run.json) nor evaluated" in refused("empty")
    (runs / "thesis.html").write_text("<html>")
    assert "thesis.html is there and is no report" in refused("ce", "--out=thesis.html")
    assert (runs / "thesis.html").read_text() == "<html>"
    assert "--out: got ''" in refused("ce", "--out=")
    assert "cannot be a folder" in refused("ce", "--out=thesis.html/x.html")
    (runs / "ce/eval/cifar10/scores/ce/MSP.npz").write_bytes(b"PK damaged")
    assert "eval/cifar10: cannot read its scores" in refused("ce")
    assert "--workers: got -1" in refused("ce", "--workers=-1")
    (runs / "ce/log.csv").write_text("epoch,loss\n1,many\n")
    assert "log.csv: cannot be read as a table of numbers" in refused("ce")
    shutil.rmtree("elogitnorm/epochs")
    assert "got 0 checkpoints, expected two or more" in refused("elogitnorm", "--feature-change")


def test_means_over_other_sets_are_not_compared(runs, capsys):
    file = runs / "ce/eval/cifar10/results.json"
    told = json.loads(file.read_text())
    told["sets"]["other"] = told["sets"].pop("svhn")
    file.write_text(json.dumps(told))
    assert cli.main(["report", "ce", "elogitnorm"]) == 2
    assert re.search(
        r"cifar10: evaluated on other far sets, .*other.* \(ce\) and .*svhn.* \(el", capsys.readouterr().err
    )


def test_a_report_is_whole_or_not_there(runs, monkeypatch, capsys):
    assert cli.main(["report", "ce", "--quiet"]) == 0
    before = (runs / "ce/report.html").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert cli.main(["report", "ce", "--quiet"]) == 1
    assert "cannot write ce/report.html: No space left on device" in capsys.readouterr().err
    assert (runs / "ce/report.html").read_text() == before
    assert not list(runs.glob("ce/.*part*"))


def test_names_of_runs_are_short_and_differ():
    names = report_runs._short_names
    assert names(["runs/a/s0", "runs/a/s1"]) == ["a/s0", "a/s1"]
    assert names(["x/ce", "x/elogitnorm/"]) == ["ce", "elogitnorm"]
    assert names(["x/ce", "y/ce"]) == ["x/ce", "y/ce"]


# ---- charts


def test_a_chart_leaves_out_what_is_no_number():
    chart = charts.Chart("t", "x", "y", [charts.Series("a", [1, 2, 3, 4, 5], [1.0, math.nan, 3.0, 2.0, math.inf])])
    lines = re.findall(r'<path class="line k0" d="([^"]*)"', chart.as_svg())
    assert len(re.findall("M", lines[0])) == 2
    assert chart.as_csv().splitlines() == ["series,x,y", "a,1,1", "a,2,nan", "a,3,3", "a,4,2", "a,5,inf"]
    empty = charts.Chart("t", "x", "y", [charts.Series("a", [], [])], y_log=True)
    assert "<svg" in empty.as_svg()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7), (1e-7, 3e-7), (99.5, 100), (0, 123456)])
def test_ticks_are_round_and_inside(low, high):
    ticks = charts.linear_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 11
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in ticks)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "1259"


def test_places_on_axes():
    axis = charts.Axis.of([0.01, 100], True, None, 5).between(0, 40)
    assert axis.at(1) == pytest.approx(20)
    assert not axis.takes(0)
    axis = charts.Axis.of([2, 2], False, None, 5).between(0, 10)
    assert axis.at(2) == pytest.approx(5)


def test_histograms_count_every_value():
    values = {"ID": np.array([*range(100), 1e9]), "OOD": np.array([3.0, np.nan, np.inf])}
    chart = charts.histogram("t", "x", values, "caption.")
    by_name = {series.name: series for series in chart.series}
    assert sum(by_name["ID"].ys) == pytest.approx(1)
    assert sum(by_name["OOD"].ys) == pytest.approx(1)
    assert chart.caption == "caption. 2 values that are not finite are left out."
    constant = charts.histogram("t", "x", {"ID": np.ones(3)}, "")
    assert sum(constant.series[0].ys) == 1


def test_a_script_stands_only_where_a_table_can_be_sorted():
    assert "<script>" not in pages.document("t", "<table>")
    assert "addEventListener" in pages.document("t", "<table class=sortable>")


# ---- in a browser

needs_browser = pytest.mark.skipif(browser.executable() is None, reason="no Chromium on the path (CHROMIUM names one)")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(page, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@needs_browser
def test_loads_without_complaint_and_fits_every_screen(chromium, file):
    for width in (320, 390, 768, 1280):
        for dark in (False, True):
            chromium.open(file, width, dark=dark)
            chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert chromium.run("document.documentElement.scrollWidth") <= width
            assert chromium.problems == []
            names = "[...document.querySelectorAll('th[scope=row]')].map(name => name.offsetWidth)"
            assert max(chromium.run(names)) <= (width / 2 if width < 600 else 600)


@needs_browser
def test_wide_tables_are_not_cut_at_1300_pixels(chromium, file):
    chromium.open(file, 1300)
    cut = (
        "[...document.querySelectorAll('.tables .scroll')].filter(s => s.scrollWidth > s.clientWidth + 1)"
        ".map(s => s.closest('section').querySelector('h2, summary').textContent)"
    )
    assert chromium.run(cut) == []
    shown = "[...document.querySelectorAll('.tables > section')].map(s => [s.offsetWidth, s.className])"
    widths = chromium.run(shown)
    assert all(width > 1200 for width, name in widths if name == "full")
    assert any(name == "full" for _, name in widths)


@needs_browser
def test_takes_the_colours_of_the_system(chromium, file):
    def brightness(of: str, what: str) -> float:
        colour = chromium.run(f"getComputedStyle(document.querySelector('{of}')).{what}")
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    chromium.open(file, dark=False)
    assert brightness("body", "backgroundColor") > 240 > 100 > brightness("body", "color")
    light = brightness("svg .line", "stroke")
    chromium.open(file, dark=True)
    assert brightness("body", "backgroundColor") < 40 < 180 < brightness("body", "color")
    assert brightness("svg text", "fill") > 130
    assert brightness("svg .line", "stroke") > light


@needs_browser
def test_a_click_sorts(chromium, file):
    chromium.open(file)
    table = "[...document.querySelectorAll('section')].find(s => s.querySelector('h2')?.textContent == 'AUROC (%)')"
    chromium.run(f"window.t = {table}.querySelector('table'); undefined")

    def column(section: int) -> list[str]:
        rows = f"[...t.tBodies[{section}].rows].filter(r => r.className != 'section')"
        return chromium.run(f"{rows}.map(r => r.cells[1].textContent)")

    before = [column(0), column(1)]
    chromium.run("t.tHead.rows[0].cells[1].querySelector('button').click()")
    assert [column(0), column(1)] == [sorted(of, key=float, reverse=True) for of in before]
    assert chromium.run("t.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
    chromium.run("t.tHead.rows[0].cells[1].querySelector('button').click()")
    assert [column(0), column(1)] == [sorted(of, key=float) for of in before]
    chromium.run("t.tHead.rows[0].cells[0].querySelector('button').click()")
    names = chromium.run("[...t.tBodies[0].rows].slice(1).map(r => r.cells[0].textContent)")
    assert names == ["Energy", "fDBD", "Feature norm", "MSP", "NCI"]
    assert chromium.run("t.tHead.rows[0].cells[0].getAttribute('aria-sort')") == "ascending"
    assert chromium.problems == []


@needs_browser
def test_each_number_can_be_saved_and_each_link_leads_somewhere(chromium, file):
    chromium.open(file)
    assert chromium.run("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    links = "[...document.querySelectorAll('a[download]')]"
    tables = chromium.run(f"{links}.map(a => decodeURIComponent(a.href.split(',').slice(1).join(',')))")
    assert any(text.startswith("series,epoch,loss\nce,1,") for text in tables)
    assert chromium.run("document.querySelectorAll('svg').length == document.querySelectorAll('a[download]').length")


def test_a_page_runs_its_own_script_and_loads_nothing():
    import base64
    import hashlib

    for body, scripts in (("<p>", 0), ("<table class=sortable></table>", 1)):
        page = pages.document("<script>alert(1)</script>", body)
        found = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
        assert len(found) == scripts
        policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
        assert policy.start() < page.index("<style>")
        rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
        assert rules["default-src"] == "'none'"
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in found]
        assert rules.get("script-src", "") == " ".join(hashes)
        assert not re.search(r"\son\w+=|javascript:", page.replace(found[0], "") if found else page)
