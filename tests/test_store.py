"""Fitted detectors as safetensors files: what comes back is what was written, and what is damaged is refused."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from detector_cases import sizes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ood_fast import detectors, registry
from ood_fast.detectors import MSP, NCI, Detector, DetectorSet, FeatureNorm, load, register, store, streaming

N, M, C = 60, 12, 4
SETTINGS = sizes(k=3, dim=3)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(M, C)
    features = torch.rand(N, M, generator=generator) + 0.01  # as after a ReLU
    logits = head(features).detach()
    return features, logits, torch.arange(N) % C, head


def fitted(name: str, data) -> Detector:
    features, logits, targets, head = data
    return detectors.create(name, **SETTINGS.get(name, {})).fit_features(features, logits, targets, head)


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, metadata=None, **tensors) -> None:
    """The file with other metadata or tensors (None: without); not as `save` writes, which makes the checksums fit."""
    tensors = {key: tensor for key, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(tensors, path, {**metadata_of(path), **(metadata or {})})


@pytest.mark.parametrize("name", [name for name in detectors.known() if not detectors.find(name).needs_model])
def test_every_detector_comes_back(name, data, tmp_path):
    """Same class, settings, buffers bit by bit, and scores."""
    features, logits, *_ = data
    detector = fitted(name, data)
    detector.calibrate(detector.score_features(features, logits), alpha=0.1)
    detector.save(tmp_path / "it.safetensors", [f"class {i}" for i in range(C)])
    back = load(tmp_path / "it.safetensors")
    assert type(back) is type(detector)
    assert back.settings() == detector.settings()
    assert back.calibration == detector.calibration
    assert back.calibration.by == "alpha"
    assert back.class_names == ("class 0", "class 1", "class 2", "class 3")
    before, after = detector.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for buffer in before:
        assert torch.equal(before[buffer], after[buffer])
        assert before[buffer].dtype == after[buffer].dtype
    assert torch.equal(back.score_features(features, logits), detector.score_features(features, logits))
    assert torch.equal(back.predict(features, logits), detector.predict(features, logits))
    back.save(tmp_path / "again.safetensors")
    assert metadata_of(tmp_path / "again.safetensors") == metadata_of(tmp_path / "it.safetensors")


def test_detectors_that_score_inputs_come_back(tmp_path):
    for name in detectors.known():
        detector = detectors.create(name)
        if detector.needs_model and not detector.needs_fit:
            detector.save(tmp_path / "it")
            assert load(tmp_path / "it").settings() == detector.settings()


def test_metadata_say_what_it_is(data, tmp_path):
    detector = fitted("NCI", data).calibrate(torch.randn(100), tpr=0.9)
    detector.save(tmp_path / "nci.safetensors", ["a", "b", "c", "d"])
    metadata = metadata_of(tmp_path / "nci.safetensors")
    assert metadata["format"] == "ood_fast detectors"
    assert metadata["format_version"] == "1"
    assert metadata["torch"] == torch.__version__
    assert metadata["ood_fast"] == __import__("ood_fast").__version__
    assert json.loads(metadata["class_names"]) == ["a", "b", "c", "d"]
    entry = json.loads(metadata["detectors"])["NCI"]
    assert entry["method"] == "NCI"
    assert entry["settings"] == detector.settings()
    assert entry["calibration"] == {"by": "tpr", "level": 0.9, "n_samples": 100, "threshold": detector.threshold.item()}


def test_a_set_is_one_file_that_holds_shared_buffers_once(odd, data, tmp_path):
    features, logits, targets, head = data
    written = DetectorSet({"a": NCI(), "b": NCI(alpha=0.1), "msp": MSP(), "centre": Odd()})
    written.fit_features(features, logits, targets, head)
    written["b"].calibrate(torch.randn(30))
    written.save(tmp_path / "set.safetensors", ["w", "x", "y", "z"])
    assert sorted(load_file(tmp_path / "set.safetensors")) == [
        "a/head_bias",
        "a/head_weight",
        "a/mean",
        "b/threshold",
        "centre/kept",
    ]
    back = load(tmp_path / "set.safetensors")
    assert isinstance(back, DetectorSet)
    assert back.names == written.names
    assert back["a"].head_weight is back["b"].head_weight
    assert back["a"].threshold is None
    assert back["b"].calibration == written["b"].calibration
    assert back["msp"].class_names == ("w", "x", "y", "z")
    expected = written.score_features(features, logits)
    for name, scores in back.score_features(features, logits).items():
        assert torch.equal(scores, expected[name])


def test_views_and_empty_buffers(data, tmp_path):
    """Buffers that are windows on one tensor, transposed, or empty: the format itself refuses the first two."""
    features, logits, *_ = data
    head = torch.randn(M, C + 3)
    detector = NCI().fit_features(features, logits, head=(head.T[:C], head[0, :C]))
    both = torch.randn(2 * M)
    detector.mean = both[:M]
    detector.head_bias = both[M : M + C]
    detector.threshold = both[0]
    detector.save(tmp_path / "it")
    back = load(tmp_path / "it")
    assert torch.equal(back.head_weight, head.T[:C])
    assert torch.equal(back.mean, both[:M])
    assert torch.equal(back.head_bias, both[M : M + C])
    assert back.calibration is None
    detector.mean, detector.head_bias = torch.zeros(0, M), torch.zeros(0)
    detector.save(tmp_path / "empty")
    buffers = store.read_file(tmp_path / "empty").detectors["NCI"].buffers
    assert buffers["mean"].shape == (0, M)
    assert buffers["head_bias"].shape == (0,)
    with pytest.raises(ValueError, match="empty: the NCI in the file cannot score: mean"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, data, tmp_path):
    detector = fitted("NCI", data).to(dtype)
    detector.save(tmp_path / "it")
    assert torch.equal(load(tmp_path / "it").mean, detector.mean)
    assert load(tmp_path / "it", device="meta").mean.device.type == "meta"


def test_a_threshold_set_by_hand_has_no_calibration(tmp_path):
    detector = MSP().calibrate(torch.randn(50))
    detector.threshold = torch.tensor(0.25)
    detector.save(tmp_path / "it")
    assert load(tmp_path / "it").threshold == 0.25
    assert load(tmp_path / "it").calibration is None


class Odd(Detector):
    """A detector of a user, with settings of every kind."""

    needs_features = True
    state = ("kept",)

    def __init__(self, dtype=torch.float16, sizes=(1, (2, 3)), table=None, p=float("inf"), name="ä", on=True) -> None:
        super().__init__()
        self.dtype, self.sizes, self.table, self.p, self.name, self.on = dtype, sizes, table, p, name, on

    def gathers(self):
        return {"mean": streaming.FeatureMean()}

    def _finish(self, mean) -> None:
        self.kept = mean.value()

    def _score(self, features, logits):
        return features @ self.kept


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setitem(registry._ADDED, "detector", dict(registry.added("detector")))
    return register(Odd)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": None, "sizes": [1, 2.5], "table": {"a": (1,), "b": [torch.int64]}, "p": -float("inf"), "on": False}],
)
def test_settings_of_every_kind(settings, odd, data, tmp_path):
    detector = odd(**settings).fit_features(data[0])
    detector.save(tmp_path / "it")
    assert load(tmp_path / "it").settings() == detector.settings()
    json.loads(metadata_of(tmp_path / "it")["detectors"], parse_constant=pytest.fail)  # JSON as others read it


def test_a_setting_that_no_file_can_hold(odd, data, tmp_path):
    for value in (nn.ReLU(), torch.ones(2), {1: 2}):
        with pytest.raises(TypeError, match=r"Odd: table: got .*, which no file can hold"):
            odd(table=value).fit_features(data[0]).save(tmp_path / "it")
    assert os.listdir(tmp_path) == []


def test_a_class_has_to_be_registered(odd, data, tmp_path, monkeypatch):
    odd().fit_features(data[0]).save(tmp_path / "it")
    monkeypatch.delitem(registry.added("detector"), "Odd")
    with pytest.raises(ValueError, match=r"it: unknown detector 'Odd'; .*--plugin MODULE, or .*@ood_fast\.register"):
        load(tmp_path / "it")
    with pytest.raises(ValueError, match=r"Odd: is not registered.*@ood_fast\.register\(.detector.\)"):
        odd().fit_features(data[0]).save(tmp_path / "other")


def test_a_class_that_has_changed(odd, data, tmp_path):
    odd().fit_features(data[0]).save(tmp_path / "it")

    class Odd(Detector):
        needs_features = True

    registry.added("detector").pop("Odd")
    register(Odd)
    with pytest.raises(ValueError, match=r"it: the Odd of this ood_fast cannot be made from the file: .*'dtype'"):
        load(tmp_path / "it")


def test_save_refuses(data, tmp_path):
    with pytest.raises(RuntimeError, match="NCI is not fitted"):
        NCI().save(tmp_path / "it")
    detector = fitted("NCI", data)
    with pytest.raises(ValueError, match="class_names: got 2, expected 4, the classes of the head"):
        detector.save(tmp_path / "it", ["a", "b"])
    with pytest.raises(TypeError, match="class_names: got the string 'abcd'"):
        detector.save(tmp_path / "it", "abcd")
    with pytest.raises(TypeError, match="class_names: got int 1, expected one string a class"):
        detector.save(tmp_path / "it", ["a", 1, "c", "d"])
    for path in (tmp_path, tmp_path / "no folder" / "it"):
        with pytest.raises(OSError, match="expected the path of a file in a folder that exists"):
            detector.save(path)
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_file_and_nothing_else(data, tmp_path, monkeypatch):
    MSP().save(tmp_path / "it")
    before = (tmp_path / "it").read_bytes()

    def fails(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        fitted("KNN", data).save(tmp_path / "it")
    assert os.listdir(tmp_path) == ["it"]
    assert (tmp_path / "it").read_bytes() == before


def test_a_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    MSP().save(tmp_path / "it")
    (tmp_path / "plain").touch()
    assert (tmp_path / "it").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_was_loaded_does_not_hang_on_the_file(data, tmp_path):
    detector = fitted("KNN", data)
    detector.save(tmp_path / "it")
    back = load(tmp_path / "it")
    with open(tmp_path / "it", "r+b") as file:
        file.truncate(10)
    assert torch.equal(back.bank, detector.bank)


# ---- what is refused


@pytest.mark.parametrize(
    "content",
    [b"", b"12345678", b"not safetensors, but long enough to be read as a header", pickle.dumps({"bank": [0.0]})],
)
def test_another_kind_of_file(content, tmp_path):
    (tmp_path / "it").write_bytes(content)
    with pytest.raises(ValueError, match="it: cannot be read as safetensors, truncated or another kind of file"):
        load(tmp_path / "it")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_a_pickle_is_not_run(tmp_path):
    torch.save({"x": Trap()}, tmp_path / "it")
    with pytest.raises(ValueError, match="it: cannot be read as safetensors"):
        load(tmp_path / "it")


def test_a_foreign_safetensors_file(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "it")
    with pytest.raises(ValueError, match="it: is a safetensors file, but not one that"):
        load(tmp_path / "it")
    save_file({"weight": torch.ones(3)}, tmp_path / "it", {"format": "pt"})
    with pytest.raises(ValueError, match="it: is a safetensors file, but not one that"):
        load(tmp_path / "it")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load(tmp_path)


def test_a_newer_format(data, tmp_path):
    fitted("NCI", data).save(tmp_path / "it")
    rewrite(tmp_path / "it", {"format_version": "2", "ood_fast": "9.0"})
    with pytest.raises(ValueError, match=r"it: has format version '2', written by ood_fast 9\.0; .* install a newer"):
        load(tmp_path / "it")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"NCI/mean": None}, "the tensor NCI/mean is missing"),
        ({"NCI/bank": torch.ones(1)}, "it has the tensor NCI/bank of no detector"),
        ({"NCI/mean": torch.ones(M + 1)}, r"the tensor NCI/mean is float32 \(13,\), expected float32 \(12,\)"),
        ({"NCI/mean": torch.ones(M).half()}, r"the tensor NCI/mean is float16 \(12,\), expected float32 \(12,\)"),
        ({"NCI/mean": torch.ones(M)}, "the tensor NCI/mean does not match its checksum"),
    ],
)
def test_other_tensors_than_were_written(tensors, message, data, tmp_path):
    fitted("NCI", data).save(tmp_path / "it")
    rewrite(tmp_path / "it", **tensors)
    with pytest.raises(ValueError, match=f"it: the file is damaged: {message}"):
        load(tmp_path / "it")


def test_other_metadata_than_were_written(data, tmp_path):
    fitted("NCI", data).save(tmp_path / "it")
    rewrite(tmp_path / "it", {"detectors": metadata_of(tmp_path / "it")["detectors"].replace("0.0001", "0.0002")})
    with pytest.raises(ValueError, match="it: the file is damaged: its metadata do not match their checksum"):
        load(tmp_path / "it")


def test_a_detector_without_its_state(data, tmp_path, monkeypatch):
    """A file that is whole, of a class that keeps more than it did."""
    fitted("NCI", data).save(tmp_path / "it")
    monkeypatch.setattr(NCI, "state", ("mean", "scale"))
    with pytest.raises(ValueError, match="it: the file holds a NCI without what it was fitted on"):
        load(tmp_path / "it")


def test_every_byte_counts(tmp_path):
    """Each byte of a small file turned round, and the file cut anywhere: ValueError that names it, never a detector."""
    detector = FeatureNorm().calibrate(torch.randn(20), alpha=0.2)
    detector.save(tmp_path / "it")
    whole = (tmp_path / "it").read_bytes()
    path = tmp_path / "damaged"
    for position in range(len(whole)):
        for damaged in (whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :], whole[:position]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged: "):
                load(path)


def changed(path, change) -> None:
    """The file with other metadata and right checksums."""
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    entries = json.loads(metadata["detectors"])
    result = change(entries, metadata)
    metadata["detectors"] = result if isinstance(result, str) else json.dumps(entries)
    metadata["crc32"] = store._checksum_of_text(metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries, _: "[]",
        lambda entries, _: "{}",
        lambda entries, _: "null",
        lambda entries, _: "[" * 100_000,
        lambda entries, _: entries["KNN"].pop("method") and None,
        lambda entries, _: entries["KNN"].pop("tensors") and None,
        lambda entries, _: entries["KNN"].update(method=5),
        lambda entries, _: entries["KNN"].update(method=["KNN"]),
        lambda entries, _: entries["KNN"].update(method="FDBD"),
        lambda entries, _: entries["KNN"].update(calibration={"x": 1}),
        lambda entries, _: entries["KNN"].update(settings=None),
        lambda entries, _: entries["KNN"].update(settings={"k": {"tuple": 3}}),
        lambda entries, _: entries["KNN"].update(settings={"k": {"a": 1, "b": 2}}),
        lambda entries, _: entries["KNN"]["settings"].update(k=N + 1),
        lambda entries, _: entries["KNN"]["tensors"].pop("mean") and None,
        lambda entries, _: entries["KNN"]["tensors"].update(mean=entries["KNN"]["tensors"]["bank"]),
        lambda entries, metadata: metadata.update(kind="zoo"),
        lambda entries, metadata: metadata.update(class_names="3"),
        lambda entries, metadata: metadata.update(class_names="[1]"),
        lambda entries, metadata: metadata.update(notes="[1]"),
        lambda entries, metadata: metadata.update(notes="{"),
    ],
)
def test_crafted_files_with_right_checksums_are_refused(change, data, tmp_path):
    fitted("KNN", data).save(tmp_path / "it")
    changed(tmp_path / "it", change)
    with pytest.raises(ValueError, match="it: "):
        load(tmp_path / "it")


def test_an_older_file_with_but_the_largest_number_of_the_images_is_read(data, tmp_path):
    fitted("KNN", data).save(tmp_path / "it")
    changed(tmp_path / "it", lambda entries, _: entries["KNN"].update(input_range=2.5))
    assert load(tmp_path / "it").input_range == (0.0, 2.5)


def test_scripts_of_earlier_versions_save_by_the_store(tmp_path):
    store.save(MSP(), tmp_path / "d.safetensors", class_names=["a", "b"], notes={"size": 8})
    assert load(tmp_path / "d.safetensors").class_names == ("a", "b")
    assert store.notes(tmp_path / "d.safetensors") == {"size": 8}
