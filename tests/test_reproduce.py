"""docs/reproduce.md: the shell expands its commands, the parsers take them; its numbers are the published ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ood_fast import cli, published, recipes
from ood_fast.commands.common import detector_set
from ood_fast.data import benchmarks

PAGE = Path(__file__).parent.parent / "docs" / "reproduce.md"
TEXT = PAGE.read_text(encoding="utf-8")
END = "\x1e"

# What stands for the programs in the shell: each prints its arguments.
STUBS = r"""
set -euo pipefail
ood-fast() { printf '%s\037' "$@"; printf '\036'; }
torchrun() {
  while [ "$1" != ood_fast ]; do shift; done
  shift
  ood-fast "$@"
}
"""


def commands() -> list[list[str]]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("the commands are for bash")
    script = STUBS + "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
    finished = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
    return [line.split("\x1f")[:-1] for line in finished.stdout.split(END)[:-1]]


def test_every_command_is_one():
    parser, _ = cli._parser()
    trained, n_commands = {}, 0  # folder -> benchmark
    for arguments in commands():
        options = parser.parse_args(arguments)  # exits where it does not understand them
        n_commands += 1
        if arguments[0] == "train":
            recipe = recipes.override(recipes.find(options.recipe), options.set)
            trained[options.out or f"runs/{recipe.name}"] = recipe.benchmark
            continue
        for run in options.runs:
            assert run in trained or run.startswith(("pretrained:", "results/")), run
        if arguments[0] == "evaluate":
            detector_set(options.detectors or "all", options.set, on_features=False)
            spec = benchmarks.SPECS[options.benchmark or trained[options.runs[0]]]
            assert options.ood is None or {*options.ood.split(",")} <= {*spec.near, *spec.far}
            assert options.recipe is None or options.recipe in recipes.RECIPES
    assert n_commands > 300


def test_every_recipe_of_a_table_is_trained():
    trained = {arguments[arguments.index("--recipe") + 1] for arguments in commands() if arguments[0] == "train"}
    for _, method in published.PUBLISHED:
        assert method in trained or method.startswith("pretrained-"), method


def test_every_published_number_is_told():
    for (benchmark, method), numbers in published.PUBLISHED.items():
        for key, number in numbers.items():
            shown = {f"{number.value:.2f}", f"{number.value:.1f}"}
            assert any(re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", TEXT) for text in shown), (
                benchmark,
                method,
                key,
                number,
            )
