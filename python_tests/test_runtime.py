"""The torch-free runtime: instruction sets, the thread pool, counters, and how the module is loaded."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from cases import Gemm

import quicksilver_ext
from quicksilver_ext import _C
from quicksilver_ext.kernels import ops, testing


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_instruction_sets():
    known = ["baseline", "avx2", "avx512", "avx512vnni"]
    have = _C.supported_isas()
    assert have and have == known[: len(have)]
    backends = ["reference", *(f"cpu-{isa}" for isa in have)]
    assert testing.backends()[: len(backends)] == backends
    assert ("cuda-emulated" in testing.backends()) == hasattr(_C, "emulated")


def test_every_instruction_set_the_cpu_has_is_built():
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        pytest.skip("no x86 /proc/cpuinfo to compare with")
    wanted = {"avx2", "fma", "f16c", "bmi2"} <= set(flags)
    assert ("avx2" in _C.supported_isas()) == wanted
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags)
    assert ("avx512" in _C.supported_isas()) == wide
    assert ("avx512vnni" in _C.supported_isas()) == (wide and "avx512_vnni" in flags)


def test_environment_chooses_the_instruction_set():
    for isa in _C.supported_isas():
        done = python("from quicksilver_ext import _C; print(_C.isa())", QUICKSILVER_ISA=isa)
        assert done.stdout.strip() == isa, done.stderr


def test_environment_is_refused_when_it_cannot_be():
    bad = ["avx9000", *({"baseline", "avx2", "avx512", "avx512vnni"} - set(_C.supported_isas()))]
    for isa in bad:
        done = python("from quicksilver_ext import ops", QUICKSILVER_ISA=isa)
        assert done.returncode == 1
        assert "ImportError" in done.stderr and "QUICKSILVER_ISA" in done.stderr and isa in done.stderr


def test_use_backend_puts_the_former_one_back():
    before = ops.current_backend()
    for name in testing.backends():
        with testing.use_backend(name):
            assert ops.current_backend() == name
        assert ops.current_backend() == before
    with pytest.raises(RuntimeError, match="on purpose"), testing.use_backend("reference"):
        raise RuntimeError("on purpose")
    assert ops.current_backend() == before
    with testing.use_backend("reference"), testing.use_backend("cpu-baseline"):
        assert ops.current_backend() == "cpu-baseline"
    assert ops.current_backend() == before


@pytest.mark.parametrize("name", ["cuda-imaginary", "cpu-avx9000", ""])
def test_unknown_backend(name):
    with pytest.raises(ValueError):
        ops.set_backend(name)


def test_a_python_backend_can_be_added():
    from quicksilver_ext.kernels import reference

    calls = []

    def entropy(hidden):
        calls.append(hidden.shape)
        return reference.softmax_entropy(hidden)

    table = {name: getattr(reference, name) for name in ops.compiled("quicksilver")}
    ops.register_python_backend("counting", {**table, "softmax_entropy": entropy})
    with testing.use_backend("counting"):
        ops.softmax_entropy(torch.zeros(2, 3))
    assert calls == [(2, 3)]
    with pytest.raises(ValueError, match="lacks kv_merge"):
        ops.register_python_backend("partial", {name: f for name, f in table.items() if name != "kv_merge"})


def test_threads():
    before = _C.threads()
    try:
        for count in (1, 4, 2):
            _C.set_threads(count)
            assert _C.threads() == count
        for bad in (0, -1):
            with pytest.raises(ValueError, match="threads must be at least 1"):
                _C.set_threads(bad)
    finally:
        _C.set_threads(before)


def gemm():
    x, w, bits, _ = Gemm(16, 400, 512, 64).make()
    return ops.matryoshka_gemm(x, w.hi, w.lo, w.scale, bits)


def test_calls_from_many_threads_at_once():
    want = gemm()
    wrong = []

    def work():
        wrong.extend(not torch.equal(gemm(), want) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(wrong) == 80 and not any(wrong)


def test_more_threads_than_cores():
    want = gemm()
    before = _C.threads()
    try:
        _C.set_threads(9)
        for _ in range(20):
            testing.assert_equal(gemm(), want)
    finally:
        _C.set_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own():
    code = """
        import os, torch
        from quicksilver_ext import _C
        from quicksilver_ext.kernels import ops
        _C.set_threads(3)
        x = torch.randn(8, 256)
        q = ops.quantize_rows(x, 64)
        ops.softmax_entropy(x.repeat(50, 1))
        child = os.fork()
        if child == 0:
            same = all(torch.equal(a, b) for a, b in zip(ops.quantize_rows(x, 64), q))
            ops.softmax_entropy(x.repeat(50, 1))
            os._exit(0 if same and _C.threads() == 3 else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = python(code, OMP_NUM_THREADS="1")
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_children_forked_while_others_compute():
    code = """
        import os, signal, threading, torch
        from quicksilver_ext import _C, ops
        x = torch.randn(400, 512)  # enough work for all threads of the pool
        done = False

        def entropies():
            while not done:
                ops.softmax_entropy(x)

        def forked():
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs is killed
                os._exit(0 if torch.equal(ops.softmax_entropy(x), want) and _C.threads() == 3 else 7)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        _C.start_threads(3)
        others = [threading.Thread(target=entropies) for _ in range(2)]
        for other in others:
            other.start()  # the first to compute makes the pool, perhaps while we fork
        want = ops.softmax_entropy(x)
        codes = [forked() for _ in range(20)]
        done = True
        for other in others:
            other.join()
        print(codes)
    """
    done = python(code, OMP_NUM_THREADS="1")
    assert done.stdout.strip() == str([0] * 20), done.stderr + done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_the_pool_is_made():
    code = """
        import os, signal, threading, torch
        from quicksilver_ext import _C, ops
        x = torch.randn(400, 512)
        _C.start_threads(3)
        other = threading.Thread(target=ops.softmax_entropy, args=(x,))
        other.start()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            ops.softmax_entropy(x)
            os._exit(0 if _C.threads() == 3 else 7)
        other.join()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    for _ in range(3):
        done = python(code, OMP_NUM_THREADS="1")
        assert done.stdout.strip() == "0", done.stderr


def test_the_first_to_say_the_size_of_the_pool_is_heard():
    code = """
        from quicksilver_ext import _C
        try:
            _C.start_threads(0)
        except ValueError as error:
            print(error)
        _C.start_threads(3)
        _C.start_threads(4)
        print(_C.threads())
        _C.start_threads(5)
        print(_C.threads())
        _C.set_threads(2)
        _C.start_threads(5)
        print(_C.threads())
    """
    done = python(code)
    assert done.stdout.splitlines() == ["threads must be at least 1, not 0", "3", "3", "2"], done.stderr


def test_counters_start_from_zero():
    gemm()
    _C.reset_counters()
    counted = _C.counters()
    assert (counted.gemm_macs, counted.attention_pairs, counted.weight_bytes_read, counted.kv_bytes_read) == (
        0,
        0,
        0,
        0,
    )


def test_addresses_and_names_of_the_stage_structs():
    rows, cache, layer = _C.Rows(), _C.KvCache(), _C.Layer()
    for name in ("hidden", "active", "positions", "sequence", "bits", "slots"):
        assert getattr(rows, name) == 0
        setattr(rows, name, 2**40 + 64)
        assert getattr(rows, name) == 2**40 + 64
    for kind in ("f32", "f16", "bf16"):
        cache.type = kind
        assert cache.type == kind
    with pytest.raises(ValueError, match="KV cache type must be one of 'f32', 'f16', 'bf16', 'i8', not 'f64'"):
        cache.type = "f64"
    for name in ("free_blocks", "overflow"):
        setattr(cache, name, 2**40 + 64)
        assert getattr(cache, name) == 2**40 + 64
    for name in ("silu_gated", "gelu_tanh", "gelu", "relu"):
        layer.activation = name
        assert layer.activation == name
    with pytest.raises(ValueError, match="norm kind"):
        _C.Norm(kind="batch", weight=64)
    with pytest.raises(ValueError, match="group must be"):
        _C.MatryoshkaWeight(hi=64, lo=0, scale=64, offset=64, n=1, k=1, group=48)


def test_argmax_agrees_with_torch():
    g = torch.Generator().manual_seed(0)
    for n in (1, 7, 16, 1000, 49152):
        x = torch.randn(n, generator=g)
        assert _C.argmax(x.data_ptr(), n) == int(x.argmax())
        x[n // 2 :] = x.max()  # the first of equals
        assert _C.argmax(x.data_ptr(), n) == int((x == x.max()).nonzero()[0])
        x[n // 3] = float("nan")
        assert _C.argmax(x.data_ptr(), n) == n // 3
    x = torch.full((40,), -float("inf"))
    assert _C.argmax(x.data_ptr(), 40) == 0
    with pytest.raises(ValueError):
        _C.argmax(x.data_ptr(), 0)


def test_importing_the_package_is_cheap():
    done = python("import quicksilver_ext, sys; print('torch' in sys.modules, len(quicksilver_ext.__all__))")
    assert done.stdout.split() == ["False", str(len(quicksilver_ext.__all__))], done.stderr


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quicksilver_ext.nonsense  # noqa: B018


@pytest.mark.parametrize("content, message", [(None, "is missing: quicksilver_ext was not"), (b"?", "doesn't load")])
def test_a_module_that_cannot_be_loaded_says_which_why_and_what_to_do(tmp_path, content, message):
    package = tmp_path / "quicksilver_ext"
    home = Path(quicksilver_ext.__file__).parent
    shutil.copytree(home, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (package / Path(_C.__file__).name).write_bytes(content)
    done = python(f"""
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # knows another _C
        sys.path.insert(0, {str(tmp_path)!r})
        from quicksilver_ext.kernels import ops
    """)
    last = done.stderr.strip().splitlines()[-1]
    assert message in last and str(package) in last and "pip install ." in last
