"""The kernel on a CPU, through triton's interpreter, and on a CUDA device where there is one.

Triton decides at its import whether kernels are interpreted, for a whole process. So one test runs this file again in
a process of its own, with TRITON_INTERPRET=1; there the same tests run on the CPU. To see them one by one:
``TRITON_INTERPRET=1 python -m pytest tests/kernels``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from gradalign.gramian import gramian as reference

triton = pytest.importorskip("triton", reason="the kernel needs triton, which is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gradalign.kernels import gramian as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process, not compiled")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ROUNDING = 2.0**-53  # of one float64 operation

# Parts of several blocks and pieces, whole and not, and parts of one element and of none.
SIZES = [2048, 0, 1, 5003, 7, 0]


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])])
def device(request):
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def whole(rows):
    """Return the rows as one (K, P) in float64."""
    return torch.stack([torch.cat([part.double().cpu() for part in row]) for row in rows])


def random_rows(K, sizes, dtype, device, scale=1.0):
    return [[(torch.randn(size) * scale).to(dtype).to(device) for size in sizes] for _ in range(K)]


def integer_rows(K, sizes, dtype, device):
    """Return rows whose products and sums are exact in float64, so that each element can be seen in the answer."""
    return [[torch.randint(-8, 9, (size,)).to(dtype).to(device) for size in sizes] for _ in range(K)]


def checked(rows):
    """Return the kernel's Gramian on the CPU, once it has the form that it must have."""
    G = kernels.gramian(rows)
    assert G.dtype == torch.float64
    assert G.device.type == rows[0][0].device.type
    assert G.shape == (len(rows), len(rows))
    G = G.cpu()
    assert torch.equal(G.isnan(), G.T.isnan())
    assert torch.equal(G.nan_to_num(), G.T.nan_to_num())
    return G


def assert_exact(rows):
    J = whole(rows)
    assert torch.equal(checked(rows), J @ J.T)


def error(G, J):
    """Return the largest error relative to the rows' lengths."""
    lower = torch.tensor(
        [[math.fsum(x * y) if j <= i else 0.0 for j, y in enumerate(J.numpy())] for i, x in enumerate(J.numpy())],
        dtype=torch.float64,
    )
    exact = lower + lower.tril(-1).T
    lengths = exact.diagonal().sqrt()
    return ((G.double() - exact).abs() / lengths / lengths[:, None]).max().item()


@pytest.mark.parametrize(
    ("K", "dtype"),
    [
        *((K, torch.float32) for K in (1, 2, 3, 7, 16, 32)),
        *((K, dtype) for K in (3, 16) for dtype in DTYPES[1:]),
    ],
)
def test_error_is_that_of_a_float64_sum(K, dtype, device):
    rows = random_rows(K, SIZES, dtype, device)
    J = whole(rows)
    # In whatever order P numbers are added, the sum is off by less than P roundings of sum |x y| <= |g_i| |g_j|. A
    # float64 product is rounded too, once.
    by_kernel = error(checked(rows), J)
    assert by_kernel <= (J.shape[1] + 1) * ROUNDING
    if dtype != torch.float64:
        # Plain products of these dtypes are worse by 2**29, the ratio of a float32's and a float64's rounding, or by
        # more; 2**12 allows for sums that come out well.
        narrow = J.to(dtype)
        assert by_kernel <= error(narrow @ narrow.T, J) / 2**12


@pytest.mark.parametrize("K", [3, 9])
@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [2047],
        [2048],
        [2049],
        [3 * 2048 + 1, 1, 1024],
        [40_001],
        [(7 * n) % 41 for n in range(37)],
        [0, 0, 3, 0],
    ],
    ids=lambda sizes: f"{len(sizes)}-parts-{sum(sizes)}",
)
def test_reads_each_element_once(K, sizes, device):
    assert_exact(integer_rows(K, sizes, torch.float32, device))


@pytest.mark.parametrize("K", [3, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_begin_at_any_element(K, dtype, device):
    sizes = [2500, 1, 1024]
    # What lies around a part is NaN: it must not be read, or not be used.
    memory = [torch.full((sum(sizes) + 30 + k,), math.nan, dtype=dtype, device=device) for k in range(K)]
    rows = []
    for k, (row, values) in enumerate(zip(memory, integer_rows(K, sizes, dtype, device), strict=True)):
        place, parts = 1 + k % 5, []
        for value in values:
            parts.append(row[place : place + value.numel()])
            parts[-1].copy_(value)
            place += value.numel() + 3
        rows.append(parts)
    assert_exact(rows)


@pytest.mark.skipif(not INTERPRETED, reason="a device faults by itself")
@pytest.mark.parametrize("K", [3, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_wide_load_where_addresses_are_not_aligned(K, dtype, monkeypatch):
    promised = []

    def set_attr(handle, name, values):  # the interpreter's multiple_of, which takes each promise on trust
        promised.append((handle.data % values[0] == 0).all())

    monkeypatch.setattr("triton.runtime.interpreter.TensorHandle.set_attr", set_attr)
    rows = integer_rows(K, [5000, 3, 4999], dtype, "cpu")
    kernels.gramian(rows)
    assert promised  # and kept, below
    for k in (0, K - 1):
        one = [list(row) for row in rows]
        one[k][0] = torch.cat([one[k][0][:1], one[k][0]])[1:]
        kernels.gramian(one)
    assert all(promised)


def test_one_misaligned_row_among_aligned_ones(device):
    for k in range(3):
        rows = integer_rows(3, [4096], torch.float32, device)
        rows[k][0] = torch.cat([torch.zeros(1, device=device), rows[k][0]])[1:]
        assert_exact(rows)


@pytest.mark.parametrize("K", [2, 10])
def test_parts_of_several_dtypes(K, device):
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.bfloat16]
    rows = [
        [part for parts in zip(*row, strict=True) for part in parts]
        for row in zip(*(integer_rows(K, [700, 0, 1500], dtype, device) for dtype in dtypes), strict=True)
    ]
    assert_exact(rows)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy's, of the rows of zeros that pad
@pytest.mark.parametrize("K", [2, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2050])
def test_what_is_not_finite_reaches_its_row_and_column_alone(K, value, place, device):
    rows = [[part.abs() + 1 for part in row] for row in integer_rows(K, [2051, 3], torch.float32, device)]
    expected = whole(rows) @ whole(rows).T
    rows[1][0][place] = value
    expected[1] = expected[:, 1] = value
    expected[1, 1] = abs(value)
    assert_close(checked(rows), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("K", [2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_have_equal_entries(K, dtype, device):
    (row,) = random_rows(1, SIZES, dtype, device)
    G = checked([[part.clone() for part in row] for _ in range(K)])
    assert torch.equal(G, G[0, 0].expand(K, K))


@pytest.mark.parametrize("K", [2, 9])
def test_orthogonal_rows_cancel(K, device):
    a, b = torch.randn(2, 3001) * 1e6
    pair = [torch.cat([a, b]), torch.cat([b, -a])]
    rows = [[pair[k % 2].to(device)] for k in range(K)]
    G = checked(rows)
    assert abs(G[0, 1]) <= 6002 * ROUNDING * G[0, 0]


@pytest.mark.parametrize("K", [2, 3, 9])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_agrees_with_the_torch_path_at_every_scale(K, scale, device):
    # Elements of 1e-20, whose squares are no float32 numbers, up to 1e9.
    rows = [
        [part * 10.0 ** -(3 + 5 * k / (K - 1)) for part in row]
        for k, row in enumerate(random_rows(K, SIZES, torch.float32, device, scale))
    ]
    G, expected = checked(rows), reference([torch.cat(row).cpu() for row in rows])
    lengths = expected.diagonal().sqrt()
    assert_close(G / lengths / lengths[:, None], expected / lengths / lengths[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("K", [2, 9])
def test_large_float32_values_do_not_overflow(K, device):
    rows = [[torch.full((10,), 2.0**100, device=device)] for _ in range(K)]
    assert torch.equal(checked(rows), torch.full((K, K), 10 * 2.0**200, dtype=torch.float64))


@pytest.mark.parametrize("K", [3, 16])
def test_repeats_itself_to_the_bit(K, device):
    rows = random_rows(K, [9001, 33], torch.float32, device)
    assert torch.equal(checked(rows), checked(rows))


@pytest.mark.parametrize("K", [2, 12])
def test_no_elements(K, device):
    rows = [[torch.zeros(0, device=device), torch.zeros(0, dtype=torch.float16, device=device)] for _ in range(K)]
    assert torch.equal(checked(rows), torch.zeros(K, K, dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 9])
def test_elements_beyond_two_to_the_31st(K, device):
    # A part of 2**31 + 100 elements of which only the last hundred exist: its address lies before them, and the only
    # piece that is asked for, the second, begins at 2**31.
    beyond, rows = 2**31, integer_rows(K, [100], torch.float32, device)
    addresses = [row[0].data_ptr() - 4 * beyond for row in rows]
    table = torch.tensor([1, 0, 1, beyond, *addresses, -1, beyond + 100], device=device)
    sums = torch.empty(1, K, K, dtype=torch.float64, device=device)
    form = {"kind": triton.language.float32, "K": K}
    if K > 8:
        kernels._by_product[(1,)](table, sums, **form, padded=16, columns=64, num_warps=1)
    else:
        kernels._by_element[(1,)](table, sums, **form, vectors=1, lanes=128, vector=4)
    J = whole(rows)
    assert torch.equal(sums[0].cpu(), J @ J.T)


@pytest.mark.parametrize("size", [1, 2**20 + 1, 2**33 + 7])
@pytest.mark.parametrize("K", [1, 2, 8, 32])
def test_pieces_cover_each_part_once(K, size):
    launch = kernels._Launch.of(K, torch.float32, (size, 3, size), torch.device("cpu"))
    assert launch.piece_numel % (launch.vectors * launch.lanes * launch.vector) == 0
    of_large = launch.begins[1]
    assert (of_large - 1) * launch.piece_numel < size <= of_large * launch.piece_numel
    assert launch.begins == (0, of_large, of_large + 1)
    assert launch.pieces == 2 * of_large + 1
    assert launch.programs <= launch.pieces <= 4 * 3 + 3  # four a program of three, and one more a part


def test_rows_that_do_not_match():
    rows = [[torch.zeros(3), torch.zeros(2)], [torch.zeros(3), torch.zeros(4)]]
    with pytest.raises(ValueError, match="parts of the same sizes, dtypes and devices, got others in row 1"):
        kernels.gramian(rows)
    with pytest.raises(ValueError, match="got others in row 1"):
        kernels.gramian([[torch.zeros(3)], [torch.zeros(3, dtype=torch.float16)]])
    with pytest.raises(ValueError, match="got others in row 1"):
        kernels.gramian([[torch.zeros(3)], [torch.zeros(3), torch.zeros(3)]])


def test_parts_with_gaps():
    with pytest.raises(ValueError, match=r"contiguous parts, got another in row 1; pass part\.contiguous\(\)"):
        kernels.gramian([[torch.zeros(3)], [torch.zeros(6)[::2]]])


def test_a_dtype_without_a_gramian():
    with pytest.raises(TypeError, match=r"float16, bfloat16, float32 or float64, got torch\.complex64"):
        kernels.gramian([[torch.zeros(3, dtype=torch.complex64)]] * 2)


def compiled(kernel, num_warps, **constants):
    """Return the PTX that an H100 would get; no device is needed."""
    types = {"table": "*i64", "partials": "*fp64"} | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, values)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@needs_compiler
@pytest.mark.parametrize(("K", "dtype"), [*((2, dtype) for dtype in DTYPES), (8, torch.bfloat16)])
def test_reads_by_element_as_wide_as_can_be(K, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = kernels._Launch.of(K, dtype, (10**6,), torch.device("cpu"))
    shape = {"vectors": launch.vectors, "lanes": launch.lanes, "vector": launch.vector}
    ptx = compiled(kernels._by_element, 4, kind=kernels._TYPES[dtype], K=K, **shape)
    # 16 bytes, or four elements of two bytes where more rows would not find registers.
    wide = {1: "ld.global.b64", 2: "ld.global.v2.b32", 4: "ld.global.v4.b32"}[launch.vector * dtype.itemsize // 4]
    wide = "ld.global.v2.b64" if dtype == torch.float64 else wide
    assert ptx.count(wide) == K * launch.vectors
    assert "mul.f32" not in ptx


@needs_compiler
@pytest.mark.parametrize("K", [9, 32])
def test_matrix_products_are_float64(K, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    columns = kernels._Launch.of(K, torch.float32, (10**6,), torch.device("cpu")).lanes
    padded = triton.next_power_of_2(K)
    ptx = compiled(kernels._by_product, 1, kind=triton.language.float32, K=K, padded=padded, columns=columns)
    assert "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64" in ptx
    assert "tf32" not in ptx


@pytest.mark.cuda
@needs_cuda
@needs_compiler
def test_never_waits_for_the_device():
    rows = integer_rows(3, SIZES, torch.float32, "cuda")
    kernels.gramian(rows)  # the first call compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        G = kernels.gramian(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    J = whole(rows)
    assert torch.equal(G.cpu(), J @ J.T)


@pytest.mark.cuda
@needs_cuda
@needs_compiler
@pytest.mark.parametrize("K", [2, 16])
def test_in_a_cuda_graph(K):
    rows = integer_rows(K, SIZES, torch.float32, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernels.gramian(rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        G = kernels.gramian(rows)
    # Calls outside take and give back pinned memory, which must not be the graph's.
    for sizes in ([5], [100, 1], SIZES):
        kernels.gramian(random_rows(K, sizes, torch.float32, "cuda"))
    for row in rows:
        for part in row:
            part.add_(1)
    graph.replay()
    J = whole(rows)
    assert torch.equal(G.cpu(), J @ J.T)
