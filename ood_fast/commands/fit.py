"""`ood-fast fit`: fit detectors on image folders or stored features, and write them to one file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checks, features
from ..agreement import ORDER, ROWS, confusion, refuse_disagreement, told_accuracy
from ..checks import UserError
from ..detectors import DetectorSet, store
from ..detectors.fitting import DoesNotFit
from ..detectors.gradient import on_images
from ..detectors.search import Search
from ..models import own_preparation, weight_fingerprint
from ..processes import Processes
from . import RunError, images, quality
from .agreement import Agreement, check_sample, class_order
from .code import import_plugins
from .common import detector_set, device, processes, read_head_file, refuse_given, say, warn
from .model import OF_IMAGES, REMEMBERED, cannot_take, is_callable, load_model, named_head, preparation_of, text_of
from .progress import Bar

OTHER_FORMATS = (".pt", ".pth", ".ckpt", ".npz", ".npy", ".pkl", ".onnx", ".json", ".csv", ".parquet")


def run(options: argparse.Namespace, command: str) -> None:
    """Carry out the command."""
    _check(options)
    import_plugins(options)
    detectors = detector_set(options.detectors, options.set, bool(options.features))
    out = _checked_out(options.out)
    where = device(options.device)
    with processes(where, options) as process:
        open_data = _open_features(options) if options.features else _open_images(options, where)
        detectors = DetectorSet({name: on_images(d, open_data.notes.get("std")) for name, d in detectors.items()})
        try:
            fitted = _fit(detectors, open_data, options, process)
        except RuntimeError as error:  # what the model says of the images
            raise RunError(cannot_take(open_data.notes, error)) from error
        except ValueError as error:  # what the detectors say of the data: too few rows for k, NaN, a missing target
            raise UserError(_with_flag(error, detectors, options.tune)) from error
        if process.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            fitted.save(out, open_data.class_names, notes=open_data.notes)
            if not options.quiet:
                _tell(fitted, out, options)


def _check(options: argparse.Namespace) -> None:
    if bool(options.data) == bool(options.features):
        raise UserError("--data, --features: expected one of them, training images or training features")
    if options.features:
        refuse_given(options, "not used with --features", *OF_IMAGES, "classes")
    else:
        refuse_given(options, "only used with --features", "head_file")
    if options.tune and not (options.validation and options.ood_validation):
        raise UserError("--tune: needs --validation and --ood-validation")
    if options.ood_validation and not options.tune:
        raise UserError("--ood-validation: only used with --tune")
    if (options.tpr is not None or options.alpha is not None) and not options.validation:
        raise UserError("--tpr, --alpha: need --validation, in-distribution data that was not trained on")
    trained_on = options.data or options.features
    if options.validation and Path(options.validation).resolve() == Path(trained_on).resolve():
        warn(
            f"--validation: {options.validation} is what the detectors are fitted on; thresholds of data that was "
            "trained on flag more of new data than they say"
        )
    inside = {Path(path).resolve() for path in (trained_on, options.validation) if path}
    if both := [path for path in options.ood_validation if Path(path).resolve() in inside]:
        raise UserError(
            f"--ood-validation: {both[0]} is in-distribution data by --data or --validation, expected other"
        )
    if options.tune:
        for path in [options.validation, *options.ood_validation]:
            if Path(path).name.lower() == "test":
                warn(
                    f"--tune: {path} is called like test data; parameters that were chosen on it make its results "
                    "worthless, choose on validation data"
                )


def _checked_out(name: str) -> Path:
    """The file to write, before an hour of work: its folder can be written, and its ending does not lie."""
    out = Path(name).expanduser()
    checks.writable_folder("--out", out.parent)
    if out.exists() and not out.is_file():
        what = "a folder" if out.is_dir() else "no regular file"
        raise UserError(f"--out: {out} is {what}, expected the name of a file, as in detectors.safetensors")
    checks.utf8_path("--out", out)
    if out.is_file():
        try:
            store.notes(out)
        except (OSError, ValueError) as error:
            raise UserError(f"--out: {out} is there and holds no detectors ({error}); choose another name") from error
    if out.suffix.lower() in OTHER_FORMATS:
        raise UserError(
            f"--out: got {out}, but what is written is safetensors; expected a name as detectors.safetensors"
        )
    return out


# ---- one interface to images and to features


class _ImageData:
    """Fitting and scoring on image folders. `class_names` and `notes` go into the file."""

    def __init__(
        self, model: torch.nn.Module, prepared: dict[str, Any], options: argparse.Namespace, order: Any, names: Any
    ) -> None:
        self.model, self.prepared, self.options, self.class_order = model, prepared, options, order
        self.class_names = names
        self.notes = {name: getattr(options, name) for name in REMEMBERED} | {
            **prepared,
            "fingerprint": weight_fingerprint(model, named_head(model, options.head)),
        }

    def _batches(self, source: Any, process: Processes, bar: Bar) -> images.Images:
        rows = process.share(len(source))
        bar.expect(len(rows))
        return images.Images(source, self.prepared, rows, self.options, bar.advance)

    def fit(self, detectors: DetectorSet, path: str, process: Processes) -> None:
        source = images.read_images(path, with_classes=True, classes=self.class_order)
        if source.classes is None:
            self._without_classes(detectors, path)
        if not _reads_data(detectors):
            say(self.options, f"no pass over {path}: nothing has to be fitted")
            detectors.fit(self.model, [], self.options.head, process.group)  # copies the head where it is needed
            return
        if source.classes and self.class_order and not self.class_names and path == self.options.data:
            dataset = images.dataset_of(source, self.prepared)  # early: a pass may take hours
            check_sample(self.model, dataset, self.class_order, path, self.options.any_accuracy)
        agreement = Agreement() if source.classes and path == self.options.data else None
        fitting = detectors if agreement is None else DetectorSet({"": agreement, **dict(detectors.items())})
        fitting.failures = detectors.failures
        with Bar(f"fitting on {path}", None, self.options.quiet) as bar:
            batches = self._batches(source, process, bar)
            try:
                with batches.named():
                    fitting.fit(self.model, batches, self.options.head, process.group)
            except ValueError:  # what a detector refuses may come of classes in another order
                if agreement is not None and agreement.counts is not None:
                    refuse_disagreement(agreement.counts, source.classes or (), path, self.options.any_accuracy)
                raise
        if agreement is not None and agreement.counts is not None:
            refuse_disagreement(agreement.counts, source.classes or (), path, self.options.any_accuracy)
            say(self.options, f"accuracy on {path}: {told_accuracy(agreement.counts)}")

    def _without_classes(self, detectors: DetectorSet, path: str) -> None:
        """Refuse what needs classes; else say what their absence means."""
        reading = {d.label: {name for part in d.gathers().values() for name in part.reads} for d in detectors.detectors}
        needing = [label for label, reads in reading.items() if "targets" in reads]
        if needing:
            raise UserError(
                f"no class folders in {path}: {', '.join(needing)} {'needs' if len(needing) == 1 else 'need'} classes, "
                "expected a folder of images for each class"
            )
        if path == self.options.data:
            say(self.options, f"no class folders in {path}: fitting without classes, predictions will be numbers")

    def scores(self, detectors: DetectorSet, path: str, process: Processes) -> Generator[dict[str, Tensor], None, None]:
        with Bar(f"scoring {path}", None, self.options.quiet) as bar:
            batches = self._batches(images.read_images(path), process, bar)
            with batches.named():
                for _, scores in detectors.score_loader(self.model, batches, self.options.head):
                    yield scores

    def quality(self, detectors: DetectorSet, path: str) -> list[str]:
        """Lines that say whether the detectors work."""
        try:
            source = images.read_images(path, with_classes=self.class_order is not None, classes=self.class_order)
        except UserError:  # folders of other names
            source = images.read_images(path)
        return quality.told(detectors, self.model, source, self.prepared, self.options)


class _FeatureData:
    """The same on stored features."""

    class_names = None

    def __init__(self, head: tuple[Any, ...] | None, options: argparse.Namespace) -> None:
        self.head, self.options = head, options
        self.notes: dict[str, Any] = {}

    def _batches(self, path: str, process: Processes, bar: Bar) -> Iterable[Any]:
        for index, stored in enumerate(features.batches(path)):
            if index % process.size == process.rank:
                yield stored.with_logits(self.head)
                bar.advance(len(stored))

    def fit(self, detectors: DetectorSet, path: str, process: Processes) -> None:
        what = "fitting on" if _reads_data(detectors) else "nothing has to be fitted, checked"
        counts = None
        with Bar(f"{what} {path}", None, self.options.quiet) as bar:
            for stored in self._batches(path, process, bar):
                with stored.named():
                    detectors.partial_fit(stored.features, stored.logits, stored.targets)
                if stored.logits is not None and stored.targets is not None:
                    counted = confusion(stored.logits, stored.targets)
                    counts = counted if counts is None else counts + counted
            if counts is not None:
                names = [str(index) for index in range(counts.shape[1])]
                refuse_disagreement(counts, names, path, self.options.any_accuracy, ORDER, "target", ROWS)
            detectors.finalize(self.head, process.group)
        if counts is not None and process.size == 1:  # else these are the rows of one process
            say(self.options, f"accuracy on {path}: {told_accuracy(counts)}")

    def scores(self, detectors: DetectorSet, path: str, process: Processes) -> Generator[dict[str, Tensor], None, None]:
        with Bar(f"scoring {path}", None, self.options.quiet) as bar:
            for stored in self._batches(path, process, bar):
                with stored.named():
                    scores = detectors.score_features(stored.features, stored.logits)
                yield scores


def _reads_data(detectors: DetectorSet) -> bool:
    """Whether any of them is fitted on data; others need nothing, or the head only."""
    return any(detector.gathers() for detector in detectors.detectors)


def _open_images(options: argparse.Namespace, where: str) -> _ImageData:
    source = images.read_images(options.data, with_classes=True)
    n_classes = None if source.classes is None else len(source.classes)
    model = load_model(options, n_classes, where)
    prepared = preparation_of(options, model)
    guessed = [f"--{name}" for name in ("size", "mean", "std") if getattr(options, name) is None]
    told = f"; the model does not say: give {', '.join(guessed)} if it was trained otherwise" if guessed else ""
    unsaid = own_preparation(model, options.model, options.pretrained) is None
    say(options, f"images: {text_of(prepared)}{told * unsaid}")
    names = None
    if source.classes or options.classes:
        names = class_order(model, images.dataset_of(source, prepared), options)
    head = named_head(model, options.head)
    n_outputs = None if head is None else head.out_features
    if names and n_outputs not in (None, len(names)):
        if options.classes:
            raise UserError(f"--classes {options.classes}: {len(names)} names, but the model has {n_outputs} outputs")
        say(options, f"{len(names)} class folders, but the model has {n_outputs} outputs: predictions are numbers")
    return _ImageData(model, prepared, options, names, names if names and len(names) == n_outputs else None)


def _open_features(options: argparse.Namespace) -> _FeatureData:
    if options.head_file:
        return _FeatureData(read_head_file(options.head_file), options)
    return _FeatureData(features.load_head(features.files(options.features)[0]), options)


# ---- what is done with it


def _fit(
    detectors: DetectorSet, data: _ImageData | _FeatureData, options: argparse.Namespace, process: Processes
) -> DetectorSet:
    fitting = Search(detectors) if options.tune else detectors
    on_validation = [name for name, d in fitting.items() if options.validation and d.fits_on == "validation"]
    on_train = [name for name in fitting if name not in on_validation]
    if on_train:
        data.fit(fitting.only(on_train), options.data or options.features, process)
    if on_validation:
        data.fit(fitting.only(on_validation), options.validation, process)
    if not options.validation:
        return fitting
    inside = _joined(data.scores(fitting, options.validation, process), process)
    if isinstance(fitting, Search):
        outside = {path: _joined(data.scores(fitting, path, process), process) for path in options.ood_validation}
        for path, others in outside.items():
            pairs = [(scores.sort().values, others[name].sort().values) for name, scores in inside.items()]
            if all(len(a) == len(b) and a[0] < a[-1] and torch.allclose(a, b) for a, b in pairs):
                raise UserError(f"--ood-validation: {path} scores as --validation does, expected other data, no copy")
        chosen, trials = fitting.choose(inside, outside)
        kept = {name: next(n for n, d in fitting.items() if d is detector) for name, detector in chosen.items()}
        inside = {name: inside[candidate] for name, candidate in kept.items()}
        fitting = chosen
        if not options.quiet:
            for name, tried in trials.items():
                if tried:
                    best = max(tried, key=lambda trial: trial.auroc)
                    found = ", ".join(f"{key}={value}" for key, value in best.settings.items())
                    print(f"{name}: {found} (AUROC {100 * best.auroc:.2f} %, best of {len(tried)})")
    for name, detector in fitting.items():
        detector.calibrate(inside[name], tpr=options.tpr, alpha=options.alpha)
    if isinstance(data, _ImageData) and process.rank == 0 and not options.quiet:
        print("\n".join(data.quality(fitting, options.validation)))
    return fitting


def _with_flag(error: ValueError, detectors: DetectorSet, tuned: bool) -> str:
    """The message; with the flag for a parameter that the data are too few for."""
    if isinstance(error, DoesNotFit):
        for name, detector in detectors.items():
            searched = tuned and error.parameter in detector.grid  # --set does not reach it
            if error.detector in (name, detector.label) and not searched:
                setting = f"{error.parameter}={error.advice}" if error.advice else "PARAMETER=VALUE"
                return f"{error}; --set {name}.{setting}"
    return str(error)


def _joined(batches: Generator[dict[str, Tensor], None, None], process: Processes) -> dict[str, Tensor]:
    """The scores of all batches, and of all processes, in the order of the ranks."""
    with closing(batches):
        parts = [{name: scores.cpu() for name, scores in batch.items()} for batch in batches]
    parts = [part for of_rank in process.everyone(parts) for part in of_rank]
    if not parts:
        raise UserError("--validation, --ood-validation: got no samples")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tell(fitted: DetectorSet, out: Path, options: argparse.Namespace) -> None:
    for name, detector in fitted.items():
        threshold = "none" if detector.threshold is None else f"{float(detector.threshold):.6g}"
        print(f"{name}: {detector}, threshold {threshold}")
    if all(detector.threshold is None for detector in fitted.detectors):
        print("no thresholds: pass --validation (in-distribution data that was not trained on) to set them")
    code = [word for name in options.plugin for word in ("--plugin", name)]  # which no file may name
    code += ["--model", options.model] if is_callable(options.model or "") else []
    data = ["--features", "FILE"] if options.features else ["--data", "FOLDER"]
    command = shlex.join(["ood-fast", "score", *code, "--detectors", str(out), *data, "--out", "scores.csv"])
    print(f"Wrote {out}; score with: {command}")
