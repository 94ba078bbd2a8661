"""A classifier, its detectors and the normalisation of its images as one ONNX file, with a JSON beside it.

    deployed = ood_fast.deploy(model, detector)
    onnx_export.write(deployed, "model.onnx", images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    inputs      images (n, channels, height, width) float32 in [0, 1]; threshold, which may be left out
    outputs     logits (n, c), score (n,), is_ood (n,) bool: not score >= threshold, or inf; of k detectors (n, k)

Without `threshold` that of the detector holds. `model.json` says all that a program in another language has to know.
Weights and features above 2 GiB stand in `model.onnx.data`, which `model.onnx` reads from its own folder.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, checks, files
from .deployment import Deployed
from .detectors import DetectorSet

FORMAT = "ood_fast onnx 1"
MOST = 2**31 - 2**20  # bytes of weights in one ONNX file, which is a protocol buffer; more stand beside it
TOLERANCE = 1e-3  # of logits and scores between PyTorch and onnxruntime, relative to the largest of each
OUTPUTS = ("logits", "score", "is_ood")


class ExportError(RuntimeError):
    """What PyTorch's exporter or onnxruntime cannot do, or do otherwise than PyTorch."""


def write(
    deployed: Deployed,
    path: str | os.PathLike[str],
    images: Tensor,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    described: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `path` (.onnx) and the JSON of the same name, after onnxruntime gave what PyTorch gives; what JSON says.

    The files appear whole, or none does.

    Args:
        deployed: what `ood_fast.deploy` gave, on the CPU.
        images: (n, channels, height, width), float32 in [0, 1], n >= 2: what both are compared on. The file takes
            others of this size, in any number.
        mean, std: a number for each channel, or one for all: the model is given (images − mean) / std.
        described: more for the JSON: how images come to be so, names of classes, ...

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the model or detector cannot be exported, or gives other numbers in onnxruntime.
        OSError: the files cannot be written.
    """
    checks.instance("deployed", deployed, Deployed, "what ood_fast.deploy gives")
    checks.float_tensor("images", images, 4, "(n, channels, height, width)")
    path = Path(path)
    if path.suffix != ".onnx" or len(images) < 2:
        raise ValueError(f"path, images: got {path} and {len(images)}, expected a name ending in .onnx and at least 2")
    require_onnx()
    module = Prepared(deployed, mean, std, images.shape[1]).eval()
    state = [*module.parameters(), *module.buffers()]
    if any(tensor.device.type != "cpu" for tensor in (images, *state)):
        raise ValueError("deployed, images: got them on another device, expected the CPU: deployed.cpu()")
    with torch.no_grad():
        expected = module(images, module.threshold)
    module.threshold = module.threshold.to(expected[1].dtype)  # float64 for scores that tie in float32
    said = _said(deployed, images, module) | dict(described or {})
    with files.staged(path.parent) as staging:
        file = staging / path.name
        _export(module, images, file)
        _check(file, module, images, expected)
        said |= {"file": file.name, "sha256": files.sha256(file)}
        beside = file.with_name(f"{file.name}.data")
        if beside.exists():
            said |= {"weights": beside.name, "weights_sha256": files.sha256(beside)}
        file.with_suffix(".json").write_text(json.dumps(said, indent=1, default=str) + "\n", "utf-8")
    if "weights" not in said:
        path.with_name(beside.name).unlink(missing_ok=True)  # of a larger one, which this replaced
    return said


def require_onnx() -> None:
    """UserError with the cure unless the three packages are there."""
    checks.optional_import("ONNX", "onnx", "onnxscript", "onnxruntime")


class Prepared(nn.Module):
    """images in [0, 1], threshold -> logits, score, is_ood: `deployed` with the normalisation before it."""

    pixel_mean: Tensor  # not "mean": the exporter would take it for the result of an operator of that name
    pixel_std: Tensor
    threshold: Tensor

    def __init__(self, deployed: Deployed, mean: Sequence[float], std: Sequence[float], n_channels: int) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            given = torch.tensor(tuple(values), dtype=torch.float32)
            wrong = len(given) not in (1, n_channels) or not given.isfinite().all()
            if wrong or (name == "std" and (given <= 0).any()):
                raise ValueError(f"{name}: got {tuple(values)}, expected a number for each of {n_channels} channels")
            self.register_buffer(f"pixel_{name}", given.view(-1, 1, 1))
        self.register_buffer("threshold", deployed.thresholds.detach().clone())
        self.deployed, self.normalisation = deployed, {"mean": list(mean), "std": list(std)}

    def forward(self, images: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, score, is_ood)."""
        logits, score, _ = self.deployed((images - self.pixel_mean) / self.pixel_std)
        return logits, score, ~(score >= threshold) | (score == torch.inf)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever goes wrong as an ExportError in a line; without the exporter's own warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ExportError, OSError):
        raise
    except Exception as error:  # the exporter and onnxruntime fail in every way
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = (str(root).strip() or type(root).__name__).splitlines()[0]
        raise ExportError(f"{what}: {reason}") from error
    finally:
        logging.disable(level)


def _export(module: Prepared, images: Tensor, file: Path) -> None:
    """The ONNX file, and one with the weights where they are many; `threshold` is an input with a value of its own."""
    with _told("PyTorch cannot export this model with its detectors to ONNX"):
        names: dict[str, Any] = {"input_names": ["images", "threshold"], "output_names": list(OUTPUTS)}
        names["dynamic_shapes"] = ({0: "batch"}, None)
        program = torch.onnx.export(module, (images, module.threshold.clone()), dynamo=True, verbose=False, **names)
        assert program is not None  # it is where dynamo=True
        from onnxscript import ir

        graph = program.model.graph
        (threshold,) = (given for given in graph.inputs if given.name == "threshold")
        threshold.const_value = ir.tensor(module.threshold.numpy(), name="threshold")
        graph.register_initializer(threshold)
        about = {"format": FORMAT, "ood_fast": __version__, "detectors": _names(module.deployed)}
        about["threshold"] = module.threshold.tolist()
        told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        program.model.metadata_props.update(told)
        held = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
        program.save(file, external_data=sum(held.values()) > MOST)


def _check(file: Path, module: Prepared, images: Tensor, expected: tuple[Tensor, ...]) -> None:
    """ExportError unless onnxruntime gives the same for all images, for one, and with another threshold."""
    import onnxruntime

    with _told("onnxruntime cannot run the exported model"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        def run(rows: Tensor, **more: Any) -> list[Tensor]:
            return [torch.from_numpy(found) for found in session.run(OUTPUTS, {"images": rows.numpy(), **more})]

        whole, first = run(images), run(images[:1])
        middle = expected[1].median(0).values
        moved = run(images, threshold=middle.numpy())
    alone = tuple(each[:1] for each in expected)
    compared = ((whole, expected, module.threshold), (first, alone, module.threshold), (moved, expected, middle))
    for found, wanted, threshold in compared:
        for name, one, other in zip(OUTPUTS, found[:2], wanted[:2], strict=False):
            if one.shape != other.shape or not (((one - other).abs() <= _allowed(name, other)) | (one == other)).all():
                raise ExportError(
                    f"onnxruntime gives another {name} than PyTorch: they differ by up to "
                    f"{float((one - other).abs().max()) if one.shape == other.shape else one.shape}"
                )
        sure = (wanted[1] - threshold).abs() > _allowed("score", wanted[1])
        if not torch.equal(found[2][sure], (wanted[1] < threshold)[sure]):
            raise ExportError("onnxruntime flags other images than PyTorch")


def _allowed(name: str, expected: Tensor) -> Tensor:
    """How far from this it may be: a share of the largest number, of scores of each detector."""
    sizes = expected.abs().masked_fill(expected.isinf(), 0.0)
    return TOLERANCE * ((sizes.amax() if name == "logits" else sizes.amax(0)) + 1e-6)


def _names(deployed: Deployed) -> list[str]:
    detector = deployed.detector
    return list(detector) if isinstance(detector, DetectorSet) else [type(detector).__name__]


def _said(deployed: Deployed, images: Tensor, module: Prepared) -> dict[str, Any]:
    """The JSON, as far as it follows from what is exported."""
    detector = deployed.detector
    named = dict(detector.items()) if isinstance(detector, DetectorSet) else {type(detector).__name__: detector}
    columns = ["batch", len(named)] if isinstance(detector, DetectorSet) else ["batch"]
    kind, default = str(module.threshold.dtype).removeprefix("torch."), module.threshold.tolist()
    said = {
        name: {
            "detector": str(single),
            "threshold": threshold,
            "calibration": single.calibration and single.calibration._asdict(),
        }
        for (name, single), threshold in zip(named.items(), module.threshold.flatten().tolist(), strict=True)
    }
    return {
        "format": FORMAT,
        "ood_fast": __version__,
        "torch": torch.__version__,
        "input": {
            "name": "images",
            "shape": ["batch", *images.shape[1:]],
            "dtype": "float32",
            "range": [0, 1],
            "colour": {1: "grey", 3: "RGB"}.get(images.shape[1], "as trained"),
            "normalisation": {"where": "in the file", **module.normalisation},
        },
        "optional_input": {"name": "threshold", "shape": columns[1:], "dtype": kind, "default": default},
        "outputs": {"logits": ["batch", "classes"], "score": columns, "is_ood": columns},
        "score": "higher = more in-distribution; is_ood: not score >= threshold, or an infinite score",
        "detectors": said,
        "classes": next((list(single.class_names) for single in named.values() if single.class_names), None),
    }
