"""The pages of the docs and the README: every block of Python runs as it stands, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ood_fast import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *PAGES]
BLOCK = re.compile(r"^(<!-- not run: .* -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Net(nn.Module):
    """As small as a classifier can be."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU())
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def names_of_a_reader() -> dict[str, Any]:
    """What a reader has at hand: a model, loaders, a batch, and the names of DESIGN's notation."""
    import ood_fast

    torch.manual_seed(0)
    model = Net()

    def loader(n: int, shift: float = 0.0) -> DataLoader:
        images = torch.rand(n, 3, 3, 3) + shift
        return DataLoader(TensorDataset(images, torch.arange(n) % 4), batch_size=20)

    x, y = next(iter(loader(20)))
    z = model.body(x)
    given = {"ood_fast": ood_fast, "torch": torch, "nn": nn, "model": model, "x": x, "y": y, "z": z, "m": 16, "c": 4}
    given |= {"W": model.fc.weight, "b": model.fc.bias, "logits": model(x), "mean": z.detach().mean(0)}
    given |= {"outliers": torch.rand(8, 3, 3, 3), "epoch": 40}
    given |= {"train_loader": loader(120), "val_loader": loader(60), "test_loader": loader(60)}
    given |= {"model_a": Net(), "model_b": Net(), "dropout_model": nn.Sequential(Net().body, nn.Dropout(), model.fc)}
    return given | {"ood_loader": loader(40, 1.0), "near_loader": loader(40, 0.5), "far_loader": loader(40, 2.0)}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, tmp_path, monkeypatch, request, own_names):
    monkeypatch.chdir(tmp_path)
    if "pytorch_ood" in (text := (ROOT / page).read_text(encoding="utf-8")):
        pytest.importorskip("pytorch_ood")
    names = names_of_a_reader()
    if "W_shard" in text:  # a group of one process, which owns every class
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        request.addfinalizer(torch.distributed.destroy_process_group)
        names |= {"W_shard": names["W"], "b_shard": names["b"], "logits_shard": names["logits"]}
    for found in BLOCK.finditer(text):
        if not found[1] and not found[2].startswith(">>>"):
            line = text[: found.start()].count("\n") + 1
            exec(compile("\n" * line + found[2], page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and (not target.startswith("results/") or (ROOT / "docs/results").is_dir()):  # a link
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", sorted({*PAGES, "examples/cifar10/README.md"} - {"docs/reproduce.md"}))
def test_every_command_is_one(page):
    """The parsers take it; what `evaluate` asks for several runs is there. Of docs/reproduce.md: test_reproduce.py."""
    text = re.sub(r"\\\n *", " ", (ROOT / page).read_text(encoding="utf-8"))
    for line in re.findall(r"^ *(?:torchrun .* -m )?ood[-_]fast ((?!is\b).*)", text, re.MULTILINE):
        options = cli._parser()[0].parse_args(shlex.split(line, comments=True))
        assert len(getattr(options, "runs", None) or ()) < 2 or options.command != "evaluate" or options.out, line


def test_every_dependency_has_its_licence_listed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    run = re.search(r"^dependencies = \[(.*)\]", text, re.MULTILINE)[1]
    extras = re.findall(r"^(?:vision|timm|parquet|onnx) = \[(.*?)\]", text, re.MULTILINE)
    named = {re.match(r"[\w-]+", each)[0] for each in re.findall(r'"(.*?)"', " ".join([run, *extras]))}
    listed = set(re.findall(r"^\| ([\w-]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE))
    assert named <= listed, named - listed
