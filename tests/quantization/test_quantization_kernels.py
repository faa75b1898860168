"""The compiled kernels against PyTorch, bit for bit; and how they come to run, or do not."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_samples import (
    large_weights,
    quantized_elsewhere,
    same,
    settings_of_quantizer,
    ties,
)

from arithmetic import arithmetic
from fedveil.errors import ConfigurationError
from fedveil.quantization import (
    BITS,
    QuantizedTensor,
    blockwise,
    kernels_in_use,
    part_layout,
    quantize,
)


@pytest.fixture(autouse=True, scope="module")
def way():
    """Tests of this module choose for themselves."""
    pytest.importorskip("numba", reason="kernels need numba")


def both(function):
    """The results on PyTorch and on the kernels."""
    results = []
    for name in ("torch", "numba"):
        with arithmetic(name):
            results.append(function())
    return results


def equal_bits(one, other):
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and one.double().numpy().tobytes() == other.double().numpy().tobytes()


@st.composite
def any_bytes(draw):
    """A quantized tensor that no quantizer made: any codes, and scales of any size."""
    shape = draw(st.lists(st.integers(1, 90), min_size=1, max_size=2))
    options = draw(settings_of_quantizer())
    axis = draw(st.integers(0, len(shape) - 1))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = {
        name: torch.from_numpy(
            generator.integers(0, 256, extents, np.uint8)
            if dtype == torch.uint8
            else generator.choice(np.array([0, 1e-3, 1, 1e-38, 3e38, 0.3], np.float32), extents)
        )
        for name, (dtype, extents) in part_layout(tuple(shape), axis=axis, **options).items()
    }
    return QuantizedTensor(options["bits"], options["block"], axis, tuple(shape), **parts)


@given(large_weights(), settings_of_quantizer())
@settings(max_examples=150)
def test_codes_and_scales_are_those_of_pytorch(case, options):
    weight, axis = case
    assert same(*both(lambda: quantize(weight, axis=axis, **options)))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_values_on_thresholds_get_the_codes_of_pytorch(bits, double):
    weight = ties(bits)
    for block in (1000, 64, 43):
        packed = both(lambda block=block: quantize(weight, bits=bits, block=block, double=double))
        assert same(*packed)


def test_processors_that_flush_subnormal_numbers_give_the_same_bits():
    weight = torch.tensor([[1e-45, -1e-39, 2.0**-100, 0.0] * 40, [1.0, 1e-40, -1e-45, 0.0] * 40])
    expected = quantize(weight)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        assert all(same(packed, expected) for packed in both(lambda: quantize(weight)))
    finally:
        torch.set_flush_denormal(False)


@given(any_bytes())
@settings(max_examples=150)
def test_decoded_numbers_are_those_of_pytorch(packed):
    assert equal_bits(*both(packed.dequantize))


@given(large_weights(), settings_of_quantizer(), st.data())
@settings(max_examples=100)
def test_decoding_into_any_memory_is_that_of_pytorch(case, options, data):
    weight, axis = case
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    packed = quantize(weight, axis=axis, **options)
    order = data.draw(st.permutations(range(weight.dim())))
    back = [order.index(place) for place in range(weight.dim())]

    def decode():
        out = torch.full_like(weight.permute(order), torch.nan, dtype=dtype).contiguous()
        return packed.dequantize(out.permute(back))

    assert equal_bits(*both(decode))


@given(large_weights(), settings_of_quantizer(), st.data())
@settings(max_examples=100)
def test_adding_to_some_units_is_that_of_pytorch(case, options, data):
    weight, axis = case
    units = weight.shape[axis]
    withheld = data.draw(st.integers(0, 40))
    chosen = torch.randperm(units + withheld, generator=torch.Generator().manual_seed(withheld))
    chosen = chosen[:units].sort().values
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    factor = data.draw(st.floats(1e-3, 1e3))
    packed = quantize(weight, axis=axis, **options)
    shape = list(weight.shape)
    shape[axis] = units + withheld
    before = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before[before.abs() < 0.1] = -0.0
    if data.draw(st.booleans()):
        before = before.transpose(0, -1).contiguous().transpose(0, -1)
    change = (packed.dequantize() * factor).to(dtype)
    expected = before.index_add(axis, chosen, change)

    def add():
        total = before.clone()
        packed.add_to(total, chosen, factor)
        return total

    for total in both(add):
        assert equal_bits(total, expected)


@given(large_weights(), settings_of_quantizer(), st.data())
@settings(max_examples=60)
def test_gathering_is_that_of_pytorch(case, options, data):
    weight, axis = case
    packed = quantize(weight, axis=axis, **options)
    units = st.integers(0, max(packed.units - 1, 0))
    chosen = torch.tensor(data.draw(st.lists(units, max_size=99 if packed.units else 0))).long()
    expected, gathered = both(lambda: packed.select(chosen))
    assert same(gathered, expected)
    buffer = packed.select(chosen)
    for part in (buffer.codes, buffer.scales):
        part.zero_()
    assert all(found is buffer for found in both(lambda: packed.select(chosen, out=buffer)))
    assert same(buffer, expected)


@pytest.mark.parametrize("bits", BITS)
def test_parts_that_lie_oddly_in_memory_are_read(bits):
    packed = quantize(torch.randn(70, 130), bits=bits, double=False)
    octets = torch.zeros(4 * packed.scales.numel() + 1, dtype=torch.uint8)
    octets[1:] = packed.scales.view(-1).view(torch.uint8)
    scales = torch.from_numpy(octets.numpy()[1:].view(np.float32)).view(packed.scales.shape)
    assert scales.data_ptr() % 4
    codes = packed.codes.t().contiguous().t()
    odd = QuantizedTensor(bits, 64, 0, packed.shape, codes, scales)
    for decoded in both(odd.dequantize):
        assert torch.equal(decoded, packed.dequantize())
    assert all(same(part, packed) for part in both(lambda: odd.select(torch.arange(70))))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (41, 63), (69, 129), (64, 128)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_value_that_is_not_finite_is_named_in_the_same_words(bad, place, axis):
    weight = torch.zeros(70, 130)
    weight[place] = bad
    weight = weight if axis == 0 else weight.t().contiguous()

    def refused():
        with pytest.raises(ConfigurationError, match=f"first in unit {place[0]}") as error:
            quantize(weight, axis=axis)
        return str(error.value)

    one, other = both(refused)
    assert one == other


@pytest.mark.parametrize("axis", [0, 1])
def test_as_many_threads_as_pytorch_may_use_and_the_same_bits(axis, monkeypatch):
    compiled = blockwise._load()
    started = []

    class Threads(compiled.ThreadPoolExecutor):  # type: ignore[name-defined]
        def __init__(self, count):
            started.append(count)
            super().__init__(count)

    monkeypatch.setattr(compiled, "ThreadPoolExecutor", Threads)
    weight = torch.randn(1000, 1100, generator=torch.Generator().manual_seed(0))
    packed = {}
    with arithmetic("numba"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                packed[threads] = quantize(weight, axis=axis)
                decoded = packed[threads].dequantize()
            finally:
                torch.set_num_threads(1)
            assert started == ([] if threads == 1 else [3, 3])
    assert same(packed[1], packed[3])
    assert torch.equal(decoded, packed[1].dequantize())


def test_no_shape_is_compiled_for():
    from fedveil.quantization.kernels import loops

    with arithmetic("numba"):
        for shape in ((3, 5), (1, 1), (200, 70), (2, 3, 4), (64, 64)):
            for axis in range(len(shape)):
                packed = quantize(torch.randn(shape).to(torch.float16), axis=axis, block=3)
                packed.select(torch.zeros(1, dtype=torch.int64)).dequantize()
    assert [loops.ENCODERS[4].signatures, loops.DECODERS[4].signatures] == [1, 1]
    assert loops.gather.signatures == 1


def test_worker_processes_get_the_same_bits():
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        found = pool.submit(quantized_elsewhere, weight, "numba").result()
    expected = quantized_elsewhere(weight, "torch")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_goes_on_after_threads_have_worked():
    code = """
        import os, torch
        from fedveil.quantization import kernels_in_use, quantize
        assert kernels_in_use() == "numba"
        torch.set_num_threads(2)
        weight = torch.randn(1024, 1024)
        packed = quantize(weight)
        child = os.fork()
        if not child:
            again = quantize(weight)
            os._exit(not torch.equal(again.codes, packed.codes))
        print(os.waitpid(child, 0)[1])
    """
    assert run(code) == "0"


@pytest.mark.parametrize("broken", ["ensure_cache_path", "_save_data"])
def test_without_a_folder_to_write_kernels_are_compiled_all_the_same(broken, monkeypatch):
    from numba.core import caching

    from fedveil.quantization.kernels import loops

    def refuse(*_):
        raise OSError(28, "No space left on device")

    for owner in vars(caching).values():
        if isinstance(owner, type) and broken in vars(owner):
            monkeypatch.setattr(owner, broken, refuse)
    monkeypatch.setattr(caching.IndexDataCacheFile, "load", lambda *_: None)
    kernel = loops.Kernel(loops.gather._function, loops.gather._signature)
    source, target = np.arange(30, dtype=np.uint8), np.zeros(20, np.uint8)
    kernel(source, 10, np.array([2, 0]), target, 0, 2)
    assert target.tolist() == [*range(20, 30), *range(10)]


def test_changes_of_the_instructions_reach_the_cache_of_kernels():
    from fedveil.quantization.kernels import loops, vectors

    with open(vectors.__file__, "rb") as source:
        digest = hashlib.blake2b(source.read(), digest_size=8).hexdigest()
    assert digest == loops.VECTORS, "note the digest of vectors.py in loops.py"


def run(code):
    script = [sys.executable, "-c", dedent(code)]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def afresh(monkeypatch):
    """Let this process make up its mind once more, and forget it afterwards."""
    blockwise._load.cache_clear()
    monkeypatch.setattr(blockwise._Work, "done", 0)
    yield monkeypatch
    blockwise._load.cache_clear()


def test_without_numba_pytorch_does_it(afresh):
    afresh.setitem(sys.modules, "numba", None)
    assert kernels_in_use() == "torch"
    assert quantize(torch.ones(2, 2)).dequantize().tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_numba_that_must_not_compile_is_left_aside(afresh):
    import numba

    afresh.setattr(numba.config, "DISABLE_JIT", 1)
    assert kernels_in_use() == "torch"


def test_numba_is_left_aside_if_asked_for(afresh):
    afresh.setenv("FEDVEIL_KERNELS", "torch")
    assert kernels_in_use() == "torch"


def test_numba_is_imported_only_when_there_is_enough_to_do():
    code = """
        import sys, torch
        import fedveil.cli, fedveil.schemes
        from fedveil.quantization import blockwise, quantize
        quantize(torch.ones(300, 400)).dequantize()
        print("numba" in sys.modules)
        blockwise._Work.done = blockwise._PAYS_OFF - 1
        quantize(torch.ones(1))
        print("numba" in sys.modules)
    """
    assert run(code).split() == ["False", "True"]


def test_which_arithmetic_runs_is_said():
    assert kernels_in_use() == "numba"
    assert kernels_in_use("cuda") == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@given(large_weights(), settings_of_quantizer())
@settings(max_examples=50)
def test_a_cuda_device_gives_the_same_bits(case, options):
    weight, axis = case
    expected = quantize(weight, axis=axis, **options)
    packed = quantize(weight.cuda(), axis=axis, **options)
    assert packed.codes.is_cuda
    for name in ("codes", "scales"):
        assert torch.equal(getattr(packed, name).cpu(), getattr(expected, name))
    assert equal_bits(packed.dequantize().cpu(), expected.dequantize())
