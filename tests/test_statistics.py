"""Row statistics through the public function, on every backend, against scalar loops in float64."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from support import assert_no_worse
from test_elogitnorm import DTYPES
from torch import Tensor

import ood_fast
from ood_fast import ops
from ood_fast.eager.statistics import row_dots
from ood_fast.statistics import FROM_FEATURES, FROM_LOGITS, STATISTICS, distance_table, row_statistics

INF, NAN = math.inf, math.nan
# What is NaN where a row of logits holds +inf or has no live class.
OF_GAPS = ("logsumexp", "confidence", "entropy", "gen", "distance")


def literal(logits: Tensor, features: Tensor, W: Tensor, mean: Tensor, gamma: float = 0.1) -> dict[str, Tensor]:
    """Every statistic by its definition, one number at a time."""
    rows = [
        literal_row(f, z, W.tolist(), mean.tolist(), gamma)
        for f, z in zip(logits.tolist(), features.tolist(), strict=True)
    ]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in STATISTICS}


def literal_row(f: list[float], z: list[float], W: list, mean: list[float], gamma: float) -> dict[str, float]:
    def norm(values) -> float:
        return math.sqrt(math.fsum(v * v for v in values))

    centred = [a - b for a, b in zip(z, mean, strict=True)]
    found = {"norm1": math.fsum(map(abs, z)), "norm2": norm(z), "centred_norm": norm(centred)}
    if any(map(math.isnan, f)):
        return found | dict.fromkeys([*FROM_LOGITS, "projection"], NAN) | {"predicted": -1}
    top = max(f)
    p = f.index(top)
    live = [j for j in range(len(f)) if f[j] != -INF]
    found["max"], found["predicted"] = top, p
    found["logit_norm1"], found["logit_norm2"] = math.fsum(abs(f[j]) for j in live), norm(f[j] for j in live)
    found["projection"] = math.fsum(a * b for a, b in zip(W[p], centred, strict=True))
    if not math.isfinite(top):
        return found | dict.fromkeys(OF_GAPS, NAN)
    gap = {j: top - f[j] for j in live}
    rest = math.fsum(math.exp(-gap[j]) for j in live if j != p)
    log_z = math.log1p(rest)
    found["logsumexp"] = top + log_z
    found["confidence"] = 1 / (1 + rest)
    found["entropy"] = log_z + math.fsum(math.exp(-gap[j]) * gap[j] for j in live) / (1 + rest)
    found["gen"] = 0.0
    for j in live:
        others = rest if j == p else 1 + rest - math.exp(-gap[j])
        if others > 0:
            found["gen"] += math.exp(gamma * (math.log(others) - gap[j] - 2 * log_z))
    length = {j: norm(a - b for a, b in zip(W[p], W[j], strict=True)) for j in live}
    to_boundary = [gap[j] / length[j] for j in live if length[j] > 0]
    found["distance"] = math.fsum(to_boundary) / max(1, len(to_boundary))
    return found


def problem(n: int, c: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, features, W, mean in float64; coincident rows in W where there are enough."""
    logits, features, W, mean = 4 * torch.randn(n, c), torch.randn(n, m), torch.randn(c, m), torch.randn(m)
    if c > 3:
        W[1] = W[0]
        logits[0, 0] = 20
    return logits.double(), features.double(), W.double(), mean.double()


def compute(backend, names, logits, features, W, mean, *, with_table: bool = True, **keywords) -> dict[str, Tensor]:
    """The statistics on the backend; the table comes from PyTorch, since the interpreter would take minutes for it."""
    with ops.use_backend("eager"):
        table = distance_table(W).to(backend.device) if with_table else None
    logits, features, W, mean = (t.to(backend.device) for t in (logits, features, W, mean))
    return row_statistics(names, logits, features, W=W, mean=mean, table=table, **keywords)


def assert_right(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in found.items():
        if name == "predicted":
            assert value.dtype == torch.int64
            known = truth[name] >= 0
            assert torch.equal(value.cpu()[known], truth[name][known].long()), name
        else:
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            assert_no_worse(value, truth[name], None, value.dtype, f"{name} {dtype}")


@pytest.fixture(params=["row in registers", "looped row"])
def row_form(request, monkeypatch) -> None:
    """Both forms of the kernel at few classes; the real limit is in kernels/launch.py."""
    if request.param == "looped row":
        launch = pytest.importorskip("ood_fast.kernels.launch")
        statistics = pytest.importorskip("ood_fast.kernels.statistics")
        monkeypatch.setattr(launch, "ROW_IN_REGISTERS", 16)
        monkeypatch.setattr(launch, "ROW_LOOP_BLOCK", 16)
        # Which keep what they have found.
        monkeypatch.setattr(launch, "loop_config", launch.loop_config.__wrapped__)
        monkeypatch.setattr(statistics, "row_config", launch.row_config.__wrapped__)


# (n, c, m): one of each; small; no block divides anything; rows of 1000; features in several turns
SHAPES = [(3, 1, 1), (7, 10, 6), (5, 37, 33), (2, 1000, 16), (2, 3, 2500)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_scalar_loop(shape, dtype, backend, row_form):
    tensors = [t.to(dtype) for t in problem(*shape)]
    found = compute(backend, STATISTICS, *tensors)
    assert [*found] == [*STATISTICS]
    assert_right(found, literal(*(t.double() for t in tensors)), dtype)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 5.0])
def test_corners(gamma, backend, row_form):
    """Ties, masks, NaN, infinities, certain and uniform predictions."""
    n, n_classes = 12, 40
    logits, features, W, mean = (t.float() for t in problem(n, n_classes, 5))
    logits[0, :] = 1.5  # all tied
    logits[1, [3, 7]] = 30.0  # tied maximum
    logits[2, 2:] = -INF
    logits[3, ::2] = -INF
    logits[4, 1:] = -INF  # one live class
    logits[5] = -INF
    logits[6, 5] = NAN
    logits[7, 5] = INF
    logits[8] = 0.0
    logits[8, -1] = 25.0  # certain: 1 - P_p is below the rounding of P_p
    logits[9] = torch.arange(n_classes) * -30.0
    logits[10, [4, 9]] = torch.tensor([NAN, -INF])
    logits[11] += 1e4
    features[0] = mean
    features[1] = 0
    features[2, 1] = NAN
    truth = literal(*(t.double() for t in (logits, features, W, mean)), gamma)
    found = compute(backend, STATISTICS, logits, features, W, mean, gamma=gamma)
    assert ((found["predicted"] >= 0) & (found["predicted"] < n_classes)).all()
    assert_right(found, truth, torch.float32)
    # Relative, too: no digit is lost where a prediction is certain.
    for name in ("entropy", "gen"):
        torch.testing.assert_close(
            found[name].cpu().double(), truth[name], rtol=3e-5, atol=1e-30, equal_nan=True, msg=f"{name}"
        )


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_nan_reaches_every_statistic_of_its_row_alone(name, backend):
    logits, features, W, mean = problem(3, 9, 4)
    logits[1, 8], logits[2, 3] = NAN, -INF
    found = compute(backend, [name], logits.float(), features.float(), W.float(), mean.float())[name]
    if name == "predicted":
        assert 0 <= found[1] < 9
    else:
        assert found.isnan().tolist() == [False, True, False]


def test_every_pair_of_statistics(backend):
    """Each alone and each pair gives what all together give, from the inputs that they need and no others.

    The same bits, but that the sum behind three of them is taken in another way where the prediction is known, or by
    a kernel that is compiled for them alone.
    """
    logits, features, W, mean = (t.to(backend.device, torch.float32) for t in problem(3, 11, 5))
    table = distance_table(W)
    needs = {"distance": {"table"}, "projection": {"W", "mean"}, "centred_norm": {"mean"}}
    everything = row_statistics(STATISTICS, logits, features, W=W, mean=mean, table=table)
    subsets = [*((name,) for name in STATISTICS), *itertools.combinations(STATISTICS, 2)]
    for names in subsets if backend.name == "eager" else subsets[::3]:
        wanted = set().union(*(needs.get(name, set()) for name in names))
        keywords = {k: v for k, v in {"W": W, "mean": mean, "table": table}.items() if k in wanted}
        found = row_statistics(
            names,
            logits if {*names} & {*FROM_LOGITS, "projection"} else None,
            features if {*names} & {*FROM_FEATURES} else None,
            **keywords,
        )
        assert [*found] == [name for name in STATISTICS if name in names]
        for name in names:
            if name in ("logsumexp", "entropy", "gen"):
                torch.testing.assert_close(found[name], everything[name], rtol=1e-6, atol=1e-12)
            else:
                assert torch.equal(found[name], everything[name]), names
    assert row_statistics([], logits) == {}


def test_distance_from_the_weights(backend):
    """Without a table: boundary_distance; the two agree, coincident rows and masked classes included."""
    logits, features, W, mean = (t.float() for t in problem(6, 9, 4))
    logits[1, 4] = -INF
    by_table = compute(backend, ["distance"], logits, features, W, mean)["distance"]
    by_weight = compute(backend, ["distance", "max"], logits, features, W, mean, with_table=False)
    torch.testing.assert_close(by_weight["distance"], by_table)
    on = backend.device
    assert torch.equal(by_weight["distance"], ood_fast.boundary_distance(logits.to(on), W.to(on)))
    assert torch.equal(by_weight["max"].cpu(), logits.amax(1))


@pytest.mark.parametrize("n_samples", [0, 3])
def test_distance_from_weights_in_float64_leaves_the_others_in_float32(backend, n_samples):
    logits, features, W, _ = (t.float().to(backend.device) for t in problem(3, 9, 4))
    found = row_statistics(["max", "distance", "norm1"], logits[:n_samples], features[:n_samples], W=W.double())
    assert {name: (len(each), each.dtype) for name, each in found.items()} == {
        "max": (n_samples, torch.float32),
        "distance": (n_samples, torch.float64),
        "norm1": (n_samples, torch.float32),
    }
    assert [*row_statistics(["norm1", "distance"], logits[:n_samples], features[:n_samples], W=W)] == [
        "distance",
        "norm1",
    ]


def test_boundaries_counted_before(backend):
    """The number of boundaries, given or counted anew: the same distance, where some classes have fewer or none."""
    for n_classes in (9, 1):
        logits, _, W, _ = (t.float().to(backend.device) for t in problem(6, n_classes, 4))
        if n_classes > 1:
            logits[1:3, -1] = torch.tensor([-INF, 50.0])
        table = distance_table(W)
        for kept in (table, table.bfloat16()):
            counted = kept.count_nonzero(1)
            given = row_statistics(["distance"], logits, table=kept, boundaries=counted)
            anew = row_statistics(["distance"], logits, table=kept)
            assert torch.equal(given["distance"], anew["distance"])
    # Counted in int64, so that no rounding of a low precision reaches the mean: 299 is no bfloat16 number.
    head = torch.randn(300, 8, device=backend.device), None
    detector = ood_fast.detectors.BoundaryDistance().fit_features(None, None, None, head)
    assert detector.bfloat16().boundaries.unique().tolist() == [299]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", [None, torch.tensor([6, 0, 0, 3, 6])], ids=["in order", "chosen rows"])
def test_row_dots(dtype, chosen):
    left, right = torch.randn(5, 300, dtype=dtype), torch.randn(7 if chosen is not None else 5, 300, dtype=dtype)
    left[4] = 0
    rows = torch.arange(5) if chosen is None else chosen
    truth = (left.double() * right.double()[rows]).sum(1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            row_dots(left, right, chosen),
            row_dots(left.t().contiguous().t(), right.repeat_interleave(2, 1)[:, ::2], chosen),
        ]
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for value in found:
        assert value.shape == (5,)
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=300 * torch.finfo(dtype).eps)
    right[rows[2], 7] = INF
    left[4, 7], left[0, 7], left[2, 7] = 0, NAN, 1
    assert row_dots(left, right, chosen)[[0, 2]].tolist() == pytest.approx([NAN, INF], nan_ok=True)


def test_fake_tensors_are_not_kept():
    """What is made under a mode that makes no plain tensors must not reach a later call."""
    logits = torch.randn(5, 29)
    expected = logits.argmax(1)
    with ops.use_backend("eager"):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(Exception):
            row_statistics(["predicted", "entropy"], logits)
        assert torch.equal(row_statistics(["predicted", "entropy"], logits)["predicted"], expected)


def test_no_look_at_the_numbers_but_on_a_cpu():
    """Meta tensors have none to look at, and a GPU would wait."""
    logits, features = torch.empty(4, 6, device="meta"), torch.empty(4, 3, device="meta")
    W, mean, table = (torch.empty(shape, device="meta") for shape in ((6, 3), (3,), (6, 6)))
    with ops.use_backend("eager"):
        found = row_statistics(STATISTICS, logits, features, W=W, mean=mean, table=table)
    assert all(value.shape == (4,) for value in found.values())


def test_distance_table(backend):
    W = torch.randn(7, 5)
    W[3] = W[6]
    length = torch.cdist(W.double(), W.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = torch.where(length > 0, 1 / length, 0.0)
    torch.testing.assert_close(distance_table(W.to(backend.device)).cpu().double(), expected, rtol=1e-5, atol=0)


def test_non_contiguous_and_mixed_dtypes(backend):
    logits, features, W, mean = problem(6, 10, 8)
    truth = literal(logits.bfloat16().double(), features.half().double(), W.float().double(), mean.float().double())
    on = backend.device
    logits = torch.empty(12, 20, dtype=torch.bfloat16, device=on)[::2, ::2].copy_(logits)
    features = features.half().to(on).t().contiguous().t()
    W = W.float().to(on).t().contiguous().t()
    mean = mean.float().repeat_interleave(2).to(on)[::2]
    table = distance_table(W).t().contiguous().t()
    assert_right(row_statistics(STATISTICS, logits, features, W=W, mean=mean, table=table), truth, torch.float32)


def test_many_chunks_and_shared_programs(backend, monkeypatch):
    """More rows than a chunk of the CPU has; on a GPU (and here), short rows that share a program."""
    monkeypatch.setattr("ood_fast.eager.statistics.CHUNK_ELEMENTS", 64)
    if ops.has_triton():
        monkeypatch.setattr("ood_fast.kernels.statistics.SHARED_PROGRAMS", 2)
    logits, features, W, mean = (t.float() for t in problem(150, 6, 5))
    truth = literal(*(t.double() for t in (logits, features, W, mean)))
    assert_right(compute(backend, FROM_LOGITS, logits, features, W, mean), truth, torch.float32)
    if backend.name == "eager":
        assert_right(compute(backend, STATISTICS, logits, features, W, mean), truth, torch.float32)


def test_two_runs_give_the_same_bits(backend):
    tensors = [t.float() for t in problem(8, 300, 8)]
    first, second = (compute(backend, STATISTICS, *tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)


def test_empty_batch(backend):
    found = row_statistics(
        STATISTICS,
        *(torch.empty(0, k, device=backend.device) for k in (3, 4)),
        W=torch.randn(3, 4, device=backend.device),
        mean=torch.zeros(4, device=backend.device),
    )
    assert all(value.shape == (0,) for value in found.values())
    assert found["predicted"].dtype == torch.int64


def test_the_kernel_runs_once(backend):
    if not ops.has_triton():
        pytest.skip("triton is not installed")
    from ood_fast.kernels import launch

    tensors = [t.float() for t in problem(3, 5, 4)]
    table = distance_table(tensors[2].to(backend.device))
    launch.launches.clear()
    on = [t.to(backend.device) for t in tensors]
    row_statistics(STATISTICS, on[0], on[1], W=on[2], mean=on[3], table=table)
    assert dict(launch.launches) == ({} if backend.name == "eager" else {"row_statistics_kernel": 1})


# ----------------------------------------------------------------------------------------------------------------------
# As torch.library, torch.compile and torch.export see it
# ----------------------------------------------------------------------------------------------------------------------


class Statistics(torch.nn.Module):
    def __init__(self, W: Tensor, mean: Tensor, names=STATISTICS, with_table: bool = True):
        super().__init__()
        self.register_buffer("W", W)
        self.register_buffer("mean", mean)
        self.table = distance_table(W) if with_table else None
        self.names = names

    def forward(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        return row_statistics(self.names, logits, features, W=self.W, mean=self.mean, table=self.table)


def test_opcheck(backend):
    logits, features, W, mean = (t.to(backend.device, torch.float32) for t in problem(4, 6, 5))
    for names in (["max"], [*STATISTICS], ["norm1", "norm2"]):
        torch.library.opcheck(
            torch.ops.ood_fast.row_statistics.default, (names, logits, features, W, mean, distance_table(W), 0.1)
        )


@pytest.mark.parametrize("with_table", [True, False])
def test_compile_fullgraph(with_table, backend):
    torch.compiler.reset()
    logits, features, W, mean = (t.to(backend.device, torch.float32) for t in problem(5, 6, 4))
    module = Statistics(W, mean, with_table=with_table)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 3):
        expected = module(logits[:n], features[:n])
        found = compiled(logits[:n], features[:n])
        assert [*found] == [*STATISTICS]
        for name in STATISTICS:
            torch.testing.assert_close(found[name], expected[name])


def masked(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[1, 2] = -INF
    logits[2, 3] = NAN
    return logits


def corners(logits: Tensor) -> Tensor:
    logits = masked(logits)
    logits[0] = 1.0  # all tied
    logits[3] = -INF
    logits[4, 1] = INF
    logits[5, 0] = logits[5].amax() + 90  # certain: the others have e_j below the smallest float
    return logits


def test_a_compiler_for_the_cpu_sees_plain_operators():
    """One opaque operator would keep it from fusing the passes."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    logits, features, W, mean = (t.float() for t in problem(6, 6, 4))
    module = Statistics(W, mean)
    found = torch.compile(module, fullgraph=True, backend=keep)(corners(logits), features)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op != "placeholder"]
    assert targets
    assert not [target for target in targets if "ood_fast" in target]
    expected = module(corners(logits), features)
    live = [0, 1, 5]  # the prediction of the others is some class
    assert torch.equal(found.pop("predicted")[live], expected.pop("predicted")[live])
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [3, 50, 1000])  # the widths of a vector register, and remainders
def test_inductor_against_the_literal_definition(n_classes):
    torch.compiler.reset()
    logits, features, W, mean = (t.float() for t in problem(6, n_classes, 40))
    logits = corners(logits) if n_classes > 3 else logits
    found = torch.compile(Statistics(W, mean), fullgraph=True, dynamic=False)(logits, features)
    truth = literal(logits.double(), features.double(), W.double(), mean.double())
    del found["predicted"], truth["predicted"]
    close = {"rtol": 2e-6, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close({name: values.double() for name, values in found.items()}, truth, **close)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("with_table", [True, False])
def test_export_holds_aten_operators_only(with_table, strict):
    logits, features, W, mean = (t.float() for t in problem(5, 6, 4))
    module = Statistics(W, mean, with_table=with_table)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (logits, features), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "ood_fast" in name]
    for rows in (slice(0, 5), slice(0, 3)):
        inputs = masked(logits)[rows], features[rows]
        found, expected = program.module()(*inputs), module(*inputs)
        for name in STATISTICS:
            if name != "predicted":
                torch.testing.assert_close(found[name], expected[name], equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logits, features, W, mean = (t.float() for t in problem(5, 6, 4))
    module = Statistics(W, mean)
    path = tmp_path / "statistics.onnx"
    torch.onnx.export(
        module, (logits, features), path, dynamo=True, dynamic_shapes=({0: "batch"}, {0: "batch"}), verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    inputs = masked(logits)[:4], features[:4]
    feed = {argument.name: t.numpy() for argument, t in zip(session.get_inputs(), inputs, strict=True)}
    expected = module(*inputs)
    for name, value in zip(STATISTICS, session.run(None, feed), strict=True):
        if name != "predicted":
            torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_results_are_constants_to_autograd(backend):
    logits, features, W, mean = (t.to(backend.device, torch.float32).requires_grad_() for t in problem(3, 5, 4))
    found = row_statistics(STATISTICS, logits, features, W=W, mean=mean)
    assert not any(value.requires_grad for value in found.values())


def test_vmap(backend):
    logits = torch.randn(2, 3, 5, device=backend.device)
    found = torch.func.vmap(lambda f: row_statistics(["max", "entropy"], f))(logits)
    assert torch.equal(found["max"], logits.amax(2))


def test_inputs_are_left_alone(backend):
    tensors = [t.to(backend.device, torch.float32) for t in problem(3, 5, 4)]
    tensors[0][1, 1] = -INF
    table = distance_table(tensors[2])
    before = [t.clone() for t in (*tensors, table)]
    row_statistics(STATISTICS, tensors[0], tensors[1], W=tensors[2], mean=tensors[3], table=table)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, table), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------

GOOD = {"logits": torch.zeros(3, 5), "features": torch.zeros(3, 4), "W": torch.zeros(5, 4), "mean": torch.zeros(4)}
TABLE = torch.zeros(4, 5)
BOUNDARIES = [{"table": torch.zeros(5, 5), "boundaries": given} for given in ([1], torch.ones(5), torch.ones(4).long())]


@pytest.mark.parametrize(
    ("error", "message", "names", "changed"),
    [
        (TypeError, "names: got 'max', expected a collection", "max", {}),
        (ValueError, "unknown statistic 'entrpy'.*did you mean 'entropy'", ["entrpy"], {}),
        (ValueError, "logits: got None, .* by 'max' and 'gen'; pass the logits", ["max", "gen"], {"logits": None}),
        (ValueError, "features: got None, .* by 'norm1'", ["norm1"], {"features": None}),
        (ValueError, "mean: got None, .* by 'projection'; pass the mean of", ["projection"], {"mean": None}),
        (ValueError, "W: got None, .* by 'projection'", ["projection"], {"W": None}),
        (ValueError, "W: got None, .* by 'distance'; .* or table", ["distance"], {"W": None}),
        (ValueError, "logits: got None, .* by 'projection'", ["projection"], {"logits": None}),
        (ValueError, r"table: got shape \(4, 5\), expected \(5, 5\)", ["distance"], {"table": TABLE}),
        (TypeError, "table: got list", ["distance"], {"table": [[0.0]]}),
        (TypeError, "boundaries: got dtype torch.float32, expected int64", ["distance"], BOUNDARIES[1]),
        (TypeError, "boundaries: got list, expected", ["distance"], BOUNDARIES[0]),
        (ValueError, r"boundaries: got .* \(4,\), expected \(5,\)", ["distance"], BOUNDARIES[2]),
        (ValueError, "features: got 2 rows, expected 3", ["max", "norm1"], {"features": torch.zeros(2, 4)}),
        (ValueError, r"mean: got shape \(5,\), expected \(4,\)", ["centred_norm"], {"mean": torch.zeros(5)}),
        (ValueError, r"W: got shape \(4, 4\)", ["projection"], {"W": torch.zeros(4, 4)}),
        (ValueError, r"features: got .* \(3, 4\), expected \(n, 7\)", ["projection"], {"W": torch.zeros(5, 7)}),
        (TypeError, "logits: got dtype torch.int64", ["max"], {"logits": torch.zeros(3, 5).long()}),
        (ValueError, "gamma: got 0", ["gen"], {"gamma": 0.0}),
    ],
)
def test_bad_input(error, message, names, changed):
    with pytest.raises(error, match=message):
        row_statistics(names, **{**GOOD, **changed})
