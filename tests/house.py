"""The figures of the house: what keeps it one house, counted from the source.

    python tests/house.py           # each figure beside its limit, and what is above it
    python tests/house.py --all     # with every offender

`tests/test_house.py` holds the limits. Nothing is imported here but what the figures need: the source is parsed.
"""

from __future__ import annotations

import ast
import functools
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"ood_fast": ROOT / "ood_fast", "ood_fast.kernels": ROOT / "kernels"}

LIMITS = {
    "lines": 37_501,  # of Python in ood_fast/ and kernels/
    "lines of code": 25_568,  # of these, without blank lines, comments and docstrings
    "longest file": 450,
    "parameters": 8,  # of a function, `self` left out; the kernels' own signatures and the operators' are flat
    "import circles": 0,
    "imports upwards": 0,
    "private names of torch outside ops/registration.py": 0,
    "names defined twice": 0,
}

# Imports run down this list: a line may use the lines before it. A file that breaks it is in the wrong room.
LAYERS = (
    ("records", "registry", "values", "errors"),
    ("kernels", "reference", "checks", "files", "intact", "processes", "spreadsheet"),
    ("ops.registration",),
    ("eager",),
    ("ops",),
    ("functional", "statistics", "metrics", "agreement"),
    ("distributed",),
    ("capturing",),
    ("heads", "models.inputs", "models.outputs", "models.running", "models.layers", "models.weights"),
    ("losses", "features", "text"),
    ("detectors",),
    ("dense", "deployment", "monitor", "onnx_export", "interop", "published"),
    ("data", "models", "recipes"),
    ("bundle", "serving"),
    ("diagnostics", "report.tables", "report.pages"),  # what `evaluation` prints with
    ("training",),
    ("evaluation", "interop.training"),
    ("compare",),
    ("report",),
    ("train", "evaluate"),
    ("commands", "cli", "__main__"),
)

# What must be defined once, wherever it is: the name, and what it is. `tests/test_house.py` looks for each.
ONCE = {
    "fpr_at_tpr": "the false-positive rate at a true-positive rate",
    "temperatures": "the temperatures of the calibration",
    "temperature_of": "the temperature where D <= eps",
    "Measurement": "a metric of a detector on a set",
    "Summary": "mean and deviation over seeds",
    "is_traced": "whether something looks at the operators instead of running them",
    "replacing": "the atomic writer of a file",
    "staged": "the atomic writer of a folder",
}

# The same name on purpose. One call has its name on its whole way: public function, operator, backend; the reference is
# its oracle, `distributed` has it for a head in shards.
BACKENDS = ("ood_fast.eager", "ood_fast.kernels")
ONE_WAY = (
    "ood_fast.functional",
    "ood_fast.statistics",
    "ood_fast.ops",
    "ood_fast.reference",
    "ood_fast.distributed",
    *BACKENDS,
)
# Public signatures that are given: the keywords of `F.cross_entropy` and of the loss; the reference is called alike.
GIVEN_SIGNATURES = ("elogitnorm", "linear_elogitnorm", "logitnorm", "ELogitNormLoss.__init__", "LogitNormLoss.__init__")
GIVEN_SIGNATURES += (
    "nci_score",
    "row_statistics",
    "communication_bytes",
)  # the same with `group`, `shards` and `check`
GIVEN_IN = ("ood_fast.functional", "ood_fast.losses", "ood_fast.reference", "ood_fast.distributed")
# What every module of a kind has; called with its module's name before it.
CONVENTIONS = {"add", "run", "create", "find", "known", "load", "write"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The parsed source of every module by its dotted name; that of a package is the package's."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = ast.parse(path.read_text(), filename=str(path))
    return found


@functools.cache
def packages() -> frozenset[str]:
    """The modules that are packages."""
    inits = FOLDERS.items()
    return frozenset(
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in inits
        for path in folder.rglob("__init__.py")
    )


def files() -> Iterator[Path]:
    """Every Python file of the package."""
    for folder in FOLDERS.values():
        yield from sorted(folder.rglob("*.py"))


def lines() -> dict[str, int]:
    """Lines of each file, longest first."""
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)


def lines_of_code() -> int:
    """Lines of all files that are neither blank nor a comment nor of a docstring."""
    total = 0
    for path in files():
        held: set[int] = set()
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type not in NO_CODE and token.string:
                    held.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                held.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        total += len(held)
    return total


# ---- functions


def _is_kernel(function: ast.AST) -> bool:
    """Whether it is decorated as `triton.jit` or is an operator's implementation, both of which are flat by nature."""
    names = {ast.unparse(d).split("(")[0] for d in getattr(function, "decorator_list", ())}
    return bool(names & {"triton.jit", "operator", "registration.operator", "custom_op"})


def _functions(scope: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function and method, by its dotted name in the module."""
    for node in ast.iter_child_nodes(scope):
        name = f"{prefix}{node.name}" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else prefix.removesuffix(".")
        if isinstance(node, ast.FunctionDef):
            yield name, node
        yield from _functions(node, f"{name}." if name else "")


def parameters() -> dict[str, int]:
    """Number of parameters of each function that has more than allowed."""
    found = {}
    for module, tree in modules().items():
        given = GIVEN_SIGNATURES if module.startswith(GIVEN_IN) else ()
        for name, node in _functions(tree):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([argument for argument in names if argument not in ("self", "cls", "ctx")])
            if count > LIMITS["parameters"] and name not in given and not _is_kernel(node):
                found[f"{module}.{name}"] = count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# ---- imports


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _import_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(tree):
        if _is_type_checking(child):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from _import_nodes(child)


@functools.cache
def imports() -> dict[str, frozenset[str]]:
    """What each module imports of the package, also inside functions; not what only type checkers see."""
    known = modules()
    edges: dict[str, set[str]] = {name: set() for name in known}
    for module, tree in known.items():
        for node in _import_nodes(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = node.module or ""
                if node.level:
                    above = module.split(".") if module in packages() else module.split(".")[:-1]
                    above = above[: len(above) - node.level + 1]
                    base = ".".join((*above, *([base] if base else [])))
                targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
            edges[module] |= {target for target in targets if target in known and target != module}
    return {module: frozenset(targets) for module, targets in edges.items()}


def circles() -> list[list[str]]:
    """The import circles: groups of modules of which each imports the others in the end."""
    edges, index, low, stack, found = imports(), {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def layer_of(module: str) -> int | None:
    """The line of `LAYERS` that a module stands on; None for the package itself, whose job is to gather names."""
    name = module.removeprefix("ood_fast").lstrip(".")
    best, at = -1, None
    for i, rooms in enumerate(LAYERS):
        for room in rooms:
            if (name == room or name.startswith(room + ".")) and len(room) > best:
                best, at = len(room), i
    return at


def upwards() -> list[str]:
    """Imports that run up the layers, and modules that stand on none."""
    found = [f"{m} stands on no layer" for m in imports() if layer_of(m) is None and m != "ood_fast"]
    for module, targets in imports().items():
        for target in targets:
            here, there = layer_of(module), layer_of(target)
            if here is not None and there is not None and there > here:
                found.append(f"{module} -> {target}")
    return sorted(found)


# ---- names


def _dotted(node: ast.AST) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join((node.id, *reversed(parts)))


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_torch() -> list[str]:
    """Private names of torch outside `ops/registration.py`."""
    found = set()
    for module, tree in modules().items():
        if module == "ood_fast.ops.registration":
            continue
        for node in ast.walk(tree):
            names: Iterable[str | None] = ()
            if isinstance(node, ast.Attribute):
                names = [_dotted(node)]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name and name.split(".")[0] == "torch" and _is_private(name):
                    found.add(f"{module}: {name}")
    return sorted(found)


def definitions() -> dict[str, list[str]]:
    """The modules that define each public class or function at their top level."""
    found = defaultdict(list)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found[node.name].append(module)
    return found


def _room(module: str) -> str:
    """Where a definition counts: a call has one name on its way through both backends."""
    return "one way of a call" if module.startswith(ONE_WAY) else module


def twins() -> dict[str, list[str]]:
    """Public names that more than one room defines: the same thing twice, or two things that one cannot tell apart."""
    found = {name: sorted({_room(module) for module in where}) for name, where in definitions().items()}
    return {name: rooms for name, rooms in sorted(found.items()) if len(rooms) > 1 and name not in CONVENTIONS}


@functools.cache
def documented_by_bases(name: str) -> set[str]:
    """The methods that the bases of a class of that name have docstrings of, in the package; `nn.Module`'s own."""
    found = {"extra_repr"}
    for node in (node for tree in modules().values() for node in tree.body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in (ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases):
                found |= _documented(base) | documented_by_bases(base)
    return found


def _documented(name: str) -> set[str]:
    classes = [node for tree in modules().values() for node in tree.body if getattr(node, "name", "") == name]
    return {node.name for of in classes for node in of.body if hasattr(node, "args") and ast.get_docstring(node)}


def undocumented() -> list[str]:
    """Public modules, classes, functions and methods without a docstring, their own or that of a base class."""
    found = []
    for module, tree in modules().items():
        scopes: list[tuple[str, ast.AST]] = [(module, tree)]
        while scopes:
            where, scope = scopes.pop()
            if not ast.get_docstring(scope) and scope.body:
                found.append(where)
            for node in scope.body:
                public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
                overload = any("overload" in ast.unparse(by) for by in getattr(node, "decorator_list", ()))
                inherits = public and isinstance(scope, ast.ClassDef) and node.name in documented_by_bases(scope.name)
                if public and not overload and not inherits and isinstance(scope, (ast.Module, ast.ClassDef)):
                    scopes.append((f"{where}.{node.name}", node))
    return sorted(found)


def rooms_of_a_loss() -> list[str]:
    """The rooms whose code a step with `elogitnorm` runs on the CPU, forward and backward."""
    import torch

    import ood_fast

    seen = set()
    inside = str(ROOT / "ood_fast")

    def note(frame: object, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(inside):
            seen.add(Path(name).relative_to(ROOT / "ood_fast").parts[0].removesuffix(".py"))

    z, W, b = torch.randn(8, 16), torch.randn(6, 16, requires_grad=True), torch.randn(6)
    logits = (z @ W.t() + b).detach().requires_grad_()
    y = torch.randint(0, 6, (8,))
    ood_fast.elogitnorm(logits, z, W, b, y).backward()
    sys.setprofile(note)
    try:
        loss = ood_fast.elogitnorm(logits, z, W, b, y)
    finally:
        sys.setprofile(None)
    sys.setprofile(note)
    try:
        loss.backward()
    finally:
        sys.setprofile(None)
    return sorted(seen)


def figures() -> dict[str, tuple[int, list[str]]]:
    """Each figure of `LIMITS` with what is above it."""
    counts = lines()
    long = {name: n for name, n in counts.items() if n > LIMITS["longest file"]}
    many = parameters()
    return {
        "lines": (sum(counts.values()), []),
        "lines of code": (lines_of_code(), []),
        "longest file": (max(counts.values()), [f"{name}: {n}" for name, n in long.items()]),
        "parameters": (max(many.values(), default=LIMITS["parameters"]), [f"{name}: {n}" for name, n in many.items()]),
        "import circles": (len(circles()), [" <-> ".join(group) for group in circles()]),
        "imports upwards": (len(upwards()), upwards()),
        "private names of torch outside ops/registration.py": (len(private_torch()), private_torch()),
        "names defined twice": (len(twins()), [f"{name}: {', '.join(where)}" for name, where in twins().items()]),
    }


if __name__ == "__main__":
    show = None if "--all" in sys.argv else 8
    for name, (value, offenders) in figures().items():
        print(f"{name:<55} {value:>7}   limit {LIMITS[name]}{'' if value <= LIMITS[name] else '   ABOVE'}")
        for offender in offenders[:show]:
            print(f"    {offender}")
        if show and len(offenders) > show:
            print(f"    ... {len(offenders) - show} more")
    print(f"{'public names without a docstring':<55} {len(undocumented()):>7}")
    print(f"rooms of a loss: {', '.join(rooms_of_a_loss())}")
