"""What gets installed: `kernels/` as `ood_fast.kernels`, every file, nothing imported that is not needed.

Each check runs in a fresh process whose working directory is not the checkout: in this one, pytest has put the checkout
on the path, and other tests have imported what an `import ood_fast` must not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = {"ood_fast": CHECKOUT / "ood_fast", "ood_fast/kernels": CHECKOUT / "kernels"}
HEAVY = ("triton", "sklearn", "scipy", "torchvision", "matplotlib", "rich", "ood_fast.kernels", "ood_fast.cli")


def run(code: str, cwd: Path, *, path: Path | None = None) -> str:
    """Standard output of a fresh Python that runs `code` in `cwd`, with `path` in front of its search path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OOD_FAST_BACKEND")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Where both packages come from, and whether `kernels` exists under a second name.
WHERE = """
import json, sys
import ood_fast, ood_fast.kernels
print(json.dumps([ood_fast.__file__, ood_fast.kernels.__file__, "kernels" in sys.modules, ood_fast.__version__]))
"""


def test_editable_install_imports_from_outside_the_checkout(tmp_path):
    package, kernels, twice, _ = json.loads(run(WHERE, tmp_path))
    if Path(package).parent != SOURCES["ood_fast"]:
        pytest.skip(f"ood_fast is installed from {Path(package).parent}, not editable from this checkout")
    assert Path(kernels).parent == SOURCES["ood_fast/kernels"]
    assert not twice


def test_editable_install_imports_beside_the_checkout(tmp_path):
    """`git clone` makes a folder called ood_fast: beside it, Python must not take that for a namespace package."""
    (tmp_path / "ood_fast").mkdir()
    package, kernels, *_ = json.loads(run(WHERE, tmp_path))
    assert Path(package).name == Path(kernels).name == "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: a build in the checkout leaves build/ there, its files get into the next one."""
    for tool in ("pip", "setuptools", "wheel"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("ood_fast", "kernels"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", output, source, cwd=output)
    (built,) = output.glob("*.whl")
    return built


def test_wheel_holds_every_file(wheel):
    packed = set(ZipFile(wheel).namelist())
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for file in folder.rglob("*")
        if file.suffix in (".py", ".md", ".css", ".js") or file.name == "py.typed"
    }
    assert {"ood_fast/report/style.css", "ood_fast/report/page.js"} < expected <= packed
    # and nothing besides: no tests, no bench, no second copy of kernels
    assert {name for name in packed - expected if ".dist-info/" not in name} == set()


def test_wheel_names_the_command(wheel):
    with ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "ood-fast = ood_fast.cli:main" in archive.read(entry_points).decode()


def test_wheel_installed_elsewhere_imports(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    package, kernels, twice, version = json.loads(run(WHERE, elsewhere, path=target))
    assert Path(package) == target / "ood_fast" / "__init__.py"
    assert Path(kernels) == target / "ood_fast" / "kernels" / "__init__.py"
    assert not twice
    assert wheel.name.startswith(f"ood_fast-{version}-")
    every_module = sorted(
        ".".join(file.relative_to(target).with_suffix("").parts).removesuffix(".__init__")
        for file in (target / "ood_fast").rglob("*.py")
        if file.name != "__main__.py"
        and ("kernels" not in file.parts or importlib.util.find_spec("triton") is not None)
    )
    run(f"import importlib\nfor name in {every_module!r}: importlib.import_module(name)", elsewhere, path=target)


def test_import_needs_torch_and_numpy_only(tmp_path):
    """No module of HEAVY is imported by a function of `ood_fast`, beyond what torch itself imports."""
    code = "import json, sys, torch\nbefore = set(sys.modules)\nimport ood_fast\nood_fast.elogitnorm\n"
    added = json.loads(run(code + "print(json.dumps(sorted(set(sys.modules) - before)))", tmp_path))
    assert "ood_fast.functional" in added
    assert [name for name in added for heavy in HEAVY if name == heavy or name.startswith(heavy + ".")] == []
    # Nor anything else that is not part of Python, torch or numpy: a new dependency at import time is a decision.
    known = sys.stdlib_module_names | {"ood_fast", "torch", "numpy"}
    assert {name.partition(".")[0] for name in added} <= known


@pytest.mark.parametrize("missing", ["triton", "sklearn", "torchvision", "rich"])
def test_works_without(missing, tmp_path):
    """With the module unimportable: the package imports, and loss and score run on the CPU."""
    run(
        f"""
import sys
sys.modules[{missing!r}] = None
import torch, ood_fast
z, W, b, y = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.randn(5), torch.tensor([0, 1, 2, 3])
ood_fast.elogitnorm(torch.nn.functional.linear(z, W, b), z, W, b, y).backward()
assert z.grad.isfinite().all()
assert ood_fast.nci_score(z, W, b, torch.zeros(3)).isfinite().all()
""",
        tmp_path,
    )


ONLY_DECLARED = """
import re, sys
from importlib import metadata

declared, waiting = set(), ["ood_fast"]
while waiting:
    name = re.split(r"[^\\w.-]", waiting.pop())[0].lower().replace("_", "-")
    if name not in declared:
        declared.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [line for line in wanted if "extra ==" not in line]
held = {top: {name.lower().replace("_", "-") for name in of} for top, of in metadata.packages_distributions().items()}


class Declared:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def find_spec(self, name, path=None, target=None):
        of = held.get(name.partition(".")[0])
        return None if of and not of & (declared | {"setuptools"}) else self.inner.find_spec(name, path, target)


sys.meta_path[:] = map(Declared, sys.meta_path)
"""


@pytest.mark.slow
def test_the_default_command_needs_what_is_declared(tmp_path):
    """`pip install ood_fast` and nothing else: no package counts that another one brings, or the extras do."""
    code = f"{ONLY_DECLARED}\nfrom ood_fast import cli\nsys.exit(cli.main(%r))"
    short = ["compare", "--losses", "ce", "--seeds", "1", "--epochs", "1", "--quiet", "--out", "it"]
    run(code % short, tmp_path)
    assert (tmp_path / "it/report.html").is_file()
    with pytest.raises(AssertionError, match="No module named 'torchvision'"):  # 3.10 does not know all by their files
        run(f"{ONLY_DECLARED}\nimport torchvision", tmp_path)
