"""What a type checker tells users: the types of what they call most, none of them Any."""

import os
import subprocess
import sys

import pytest
from house import ROOT

SCRIPT = """\
import torch, ood_fast
from ood_fast.detectors import DetectorSet

z, y, head = torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.nn.Linear(3, 5)
reveal_type(ood_fast.elogitnorm(head(z), z, head.weight, head.bias, y, eps=1e-6))
reveal_type(ood_fast.elogitnorm(head(z), z, head.weight, head.bias, y, return_distance=True))
reveal_type(ood_fast.linear_elogitnorm(z, head.weight, head.bias, y))
def either(distance: bool) -> None:
    reveal_type(ood_fast.elogitnorm(head(z), z, head.weight, head.bias, y, return_distance=distance))
    reveal_type(ood_fast.linear_elogitnorm(z, head.weight, head.bias, y, return_distance=distance))
reveal_type(ood_fast.nci_score(z, head.weight, head.bias, z.mean(0)))
reveal_type(ood_fast.ELogitNormLoss(head))
reveal_type(DetectorSet(["MSP", "NCI"]).fit(head, [(z, y)]))
reveal_type(DetectorSet(["MSP", "NCI"]).score(head, z))
"""
TENSOR = "torch._tensor.Tensor"
BOTH = f"tuple[{TENSOR}, {TENSOR}]"
EITHER = f"{TENSOR} | {BOTH}"
REVEALED = [TENSOR, BOTH, TENSOR, EITHER, EITHER, TENSOR, "ood_fast.losses.ELogitNormLoss"]
REVEALED += ["ood_fast.detectors.sets.DetectorSet", f"dict[str, {TENSOR}]"]


@pytest.mark.slow
def test_users_get_types(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", ROOT / ".mypy_cache"]
    told = subprocess.run(
        [*mypy, "script.py"], cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True
    ).stdout.splitlines()
    assert [line.split('"')[1] for line in told if "Revealed type" in line] == REVEALED
    assert not [line for line in told if "error:" in line]
