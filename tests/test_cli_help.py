"""What the command line answers at once: help with examples that hold, the version, and what was probably meant."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys

import pytest
from processes import TIMEOUT, environment, python

from ood_fast import cli, recipes
from ood_fast.commands import export, fit

PARSER, BY_NAME = cli._parser()


@pytest.mark.parametrize("name", BY_NAME)
def test_help_ends_with_two_examples_that_parse(name, capsys):
    assert cli.main([name, "--help"]) == 0
    _, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    examples = [line.removeprefix("  ") for line in examples.splitlines()]
    assert len(examples) == 2
    assert len(set(examples)) == 2
    assert callable(importlib.import_module(f"ood_fast.commands.{name}").run)
    for example in examples:
        words = shlex.split(example.partition(" > ")[0].rpartition("| ")[2])
        assert words[:2] == ["ood-fast", name]
        BY_NAME[name].refuse_unknown(words[2:])
        options = PARSER.parse_args(words[1:])
        assert options.command == name
        named = getattr(options, "recipe", None)
        assert named in (None, "list") or recipes.find(named)


def test_examples_pass_the_checks_of_their_commands(tmp_path, monkeypatch):
    """Beyond the parser: options that go together."""
    monkeypatch.chdir(tmp_path)
    for module, check in ((fit, "_check"), (export, "_checked_out")):
        for example in BY_NAME[module.__name__.rpartition(".")[2]].examples:
            getattr(module, check)(PARSER.parse_args(shlex.split(example)[1:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "unknown command 'fti'; did you mean fit? known: compare,"),
        (["scroe", "--out", "x"], "did you mean score?"),
        (["exprot"], "did you mean export?"),
        (["xyzzy"], "unknown command 'xyzzy'; known: compare,"),
        (["fit", "--detctors", "MSP"], "unknown option --detctors; did you mean --detectors?; see ood-fast fit --help"),
        (["fit", "--pretraned"], "did you mean --pretrained?"),
        (["score", "--detector=x", "--uot=y"], "unknown option --uot; did you mean --out?"),
        (["compare", "--qqqqqqqq"], "unknown option --qqqqqqqq; see ood-fast compare --help"),
        (["--versoin"], "unknown option --versoin; did you mean --version?; see ood-fast --help"),
        (["export", "d", "--interpolation", "bilinar", "--out", "x"], "invalid choice: 'bilinar'"),
    ],
)
def test_what_was_meant(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_no_option_is_left_alone():
    known = BY_NAME["score"]
    known.refuse_unknown(["--detec", "x", "--out=--y", "-", "-1", "--", "--anything"])
    PARSER.refuse_unknown(["-h"])


def test_answers_come_without_torch():
    """One process that asks all of it: what takes seconds to import is not there afterwards."""
    code = """
import sys
from ood_fast.cli import main
for asked in ("--help", "--version", "", "fti", "fit --help", "fit --detctors", "export", "score --help"):
    main(asked.split())
heavy = {"torch", "numpy", "scipy", "PIL", "importlib.metadata"}
print("loaded:", sorted(heavy & {*sys.modules} - BEFORE))
"""
    code = "import sys; BEFORE = {*sys.modules}\n" + code
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "loaded: []"


def test_streams_that_the_shell_closed(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert cli.main(["info"]) == 0
    assert cli.main(["inf"]) == 2


@pytest.mark.skipif(os.name != "posix", reason="a pipe whose reader is gone")
@pytest.mark.parametrize("how", ["print", "rich.get_console().print"])
def test_a_reader_that_is_gone_is_no_failure(how):
    """`ood-fast ... | head`, also where rich writes, which exits with 1 by itself."""
    code = f"import rich, sys; from ood_fast import cli; from ood_fast.commands import info; write = {how}\n"
    code += "info.run = lambda *_: [write('x' * 99) for _ in range(9999)]; sys.exit(cli.main(['info']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment())
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=TIMEOUT) == 0
