"""tools/cuda_report.py and tools/ncu_table.py, and that quicksilver_profile counts as they do."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_report  # noqa: E402
import cuda_roofline  # noqa: E402
import cuda_table  # noqa: E402
import ncu_table  # noqa: E402

# --- what the compiler says ------------------------------------------------------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_80'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers, 504 bytes cmem[0]
ptxas info    : Compile time = 117.065 ms
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_80'
ptxas info    : Function properties for _Z3twoPf
    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 4096 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 1.4 ms
"""


def test_ptxas_output():
    assert cuda_report.parse_ptxas(PTXAS) == {
        "_Z3onePf": cuda_report.Resources(registers=58, stack=0, spill=0, static_shared=0),
        "_Z3twoPf": cuda_report.Resources(registers=255, stack=48, spill=84, static_shared=4096),
    }
    assert cuda_report.parse_ptxas("nothing\n") == {}


DISASSEMBLY = """\
//--------------------- .nv.info._Z3onePf --------------------------
	.section	.nv.info._Z3onePf,"",@"SHT_CUDA_INFO"
	//----- nvinfo : EIATTR_CUDA_API_VERSION
        /*0000*/ 	.word	0x00000082
	//----- nvinfo : EIATTR_MAX_THREADS
	.align		4
.L_31:
        /*00c4*/ 	.byte	0x04, 0x05
        /*00c6*/ 	.short	(.L_33 - .L_32)
.L_32:
        /*00c8*/ 	.word	0x00000100
        /*00cc*/ 	.word	0x00000001
        /*00d0*/ 	.word	0x00000001
	//----- nvinfo : EIATTR_CRS_STACK_SIZE
        /*00d8*/ 	.word	0x00000000
//--------------------- .text._Z3onePf --------------------------
	.section	.text._Z3onePf,"ax",@progbits
.text._Z3onePf:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/                   LDG.E R4, [R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R11], [R8.64] ;
        /*0040*/                   LDS.U.128 R4, [R3] ;
        /*0050*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0060*/              @UP1 IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R8 ;
        /*0070*/                   HMMA.16816.F32 R4, R4, R6, R8 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, [R4.64], R7 ;
        /*00a0*/                   RED.E.ADD.STRONG.GPU [R4.64], R7 ;
        /*00b0*/                   REDUX.SUM UR4, R7 ;
        /*00c0*/                   MEMBAR.SC.GPU ;
        /*00d0*/                   STG.E.128 [R4.64], R8 ;
        /*00e0*/                   STL [R1], R8 ;
        /*00f0*/                   EXIT ;
.L_x_0:
//--------------------- .nv.constant0._Z3onePf --------------------------
        /*0000*/ 	.word	0x00000082
"""


def test_disassembly():
    code = cuda_report.parse_disassembly(DISASSEMBLY)["_Z3onePf"]
    assert code.threads == 256
    assert code.instructions == {
        "all": 16,
        "IMMA": 1,
        "HMMA": 1,
        "LDGSTS": 1,
        "LDSM": 1,
        "LDG.128": 1,
        "STG.128": 1,
        "LDS.128": 1,
        "BAR": 1,
        "atomics": 2,
        "local": 1,
    }


# A loop in a loop, each with two ways back, and one that doesn't multiply.
LOOPS = """\
//--------------------- .text._Z3twoPf --------------------------
.L_x_4:
        /*0000*/                   MOV R1, R2 ;
.L_x_3:
        /*0010*/                   LDG.E.NA.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.NA.U16.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R8 ;
        /*0060*/                   IMMA.16832.U8.S8 R4, R4.ROW, R6.COL, R8 ;
        /*0070*/              @!P0 BRA `(.L_x_3) ;
        /*0080*/               @P2 BRA `(.L_x_5) ;
        /*0090*/                   HMMA.16816.F32 R4, R4, R6, R8 ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00b0*/                   LDG.E.CONSTANT R8, desc[UR4][R2.64] ;
        /*00c0*/                   BRA.U `(.L_x_5) ;
"""


def test_loops_that_multiply():
    (loop,) = cuda_report.parse_disassembly(LOOPS)["_Z3twoPf"].loops
    assert (loop.instructions, loop.mmas, loop.integer) == (7, 2, True)
    assert loop.kib == 32 * (16 + 2) / 1024
    assert (loop.slots_per_mma, loop.slots_per_kib) == (3.5, 7 / loop.kib)
    assert cuda_report.parse_disassembly(DISASSEMBLY)["_Z3onePf"].loops == ()


HERE = "quicksilver::cuda::(anonymous namespace)::"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (f"{HERE}foo_kernel({HERE}Foo)", "foo_kernel"),
        (f"void {HERE}foo_kernel<(quicksilver::KvType)1, 64>(int const*)", "foo_kernel<f16, 64>"),
        (f"void {HERE}foo_kernel<{HERE}Single<false>, (int)4>({HERE}Single<false>)", "foo_kernel<Single<false>, 4>"),
    ],
)
def test_short_name(name, short):
    assert cuda_table.short_name(name) == short


# Block counts by the toolkit's own cuda_occupancy.h.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limit"),
    [
        (80, 256, 32, 0, 8, "threads"),
        (80, 256, 128, 0, 2, "registers"),
        (80, 256, 65, 0, 3, "registers"),  # a warp's registers come in units of 256
        (80, 128, 32, 48 * 1024, 3, "shared memory"),  # 1 KiB of each block is the system's
        (80, 32, 16, 0, 32, "blocks"),
        (75, 256, 64, 40_000, 1, "shared memory"),
        (86, 32, 16, 0, 16, "blocks"),
        (89, 32, 16, 0, 24, "blocks"),
        (90, 256, 80, 100_000, 2, "shared memory"),
        (120, 1024, 80, 0, 0, "registers"),
        (120, 256, 64, 102_000, 0, "shared memory"),  # more than a block may have
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks, limit):
    bound = cuda_table.occupancy(arch, threads, registers, shared)
    assert (bound.blocks, bound.limit) == (blocks, limit)
    assert bound.warps == blocks * threads // 32


# --- budgets ---------------------------------------------------------------------------------------------------------

KERNEL = cuda_report.Kernel("a.cu", "foo_kernel<1>", 80, registers=64, stack=0, spill=0, static_shared=0, threads=256)
BUDGET = cuda_report.Budget(
    "foo_*",
    registers=64,
    dynamic_shared=1024,
    blocks_per_sm={"75": 2, "other": 4},
    launch="foo",
    slots_per_mma={"75": 20, "other": 10},
    slots_per_kib={"other": 50},
)
LOOP = cuda_report.Loop(instructions=100, mmas=10, integer=True, kib=2)


def test_a_budget_that_holds():
    kernel = replace(KERNEL, loops=(LOOP, replace(LOOP, kib=0)))
    assert cuda_report.apply_budgets([kernel], [BUDGET]) == []
    assert (kernel.blocks_per_sm, kernel.warps_per_sm, kernel.limited_by) == (4, 32, "registers")
    assert kernel.dynamic_shared == 1024
    smaller = replace(KERNEL, arch=75, threads=512, loops=(replace(LOOP, mmas=5),))
    assert cuda_report.apply_budgets([smaller], [BUDGET]) == []
    assert smaller.blocks_per_sm == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spill": 8}, "foo_kernel<1> on sm_80: 8 bytes of spills and 0 of stack, budget 0 and 0"),
        ({"stack": 16}, "foo_kernel<1> on sm_80: 0 bytes of spills and 16 of stack, budget 0 and 0"),
        ({"static_shared": 4}, "foo_kernel<1> on sm_80: 4 bytes of static shared memory, wanted none"),
        ({"registers": 65}, "foo_kernel<1> on sm_80: 65 registers, budget 64"),
        ({"threads": 512}, "foo_kernel<1> on sm_80: 2 blocks per SM (limited by registers), wanted 4"),
        (
            {"loops": (LOOP, replace(LOOP, mmas=9))},
            "foo_kernel<1> on sm_80: 11.1 issue slots per MMA in a loop, budget 10",
        ),
        (
            {"loops": (replace(LOOP, kib=1), LOOP)},
            "foo_kernel<1> on sm_80: 100.0 issue slots per KiB in a loop, budget 50",
        ),
        ({"name": "bar"}, "bar on sm_80: no budget in cuda_budgets.toml"),
    ],
)
def test_a_broken_budget_is_named(change, complaint):
    assert complaint in cuda_report.apply_budgets([replace(KERNEL, **change)], [BUDGET])


def test_launches_with_more_shared_memory_than_the_budget():
    launches = [{"name": "foo", "shared_bytes": 1024}, {"name": "foo", "shared_bytes": 1025}, {"name": "bar"}]
    assert cuda_report.check_launches(launches, [BUDGET]) == [
        "foo: launched with 1025 bytes of shared memory, budget 1024"
    ]


def test_check_exits_1(monkeypatch, capsys):
    monkeypatch.setattr(cuda_report, "compile_all", lambda *_: [replace(KERNEL, name="kv_merge_kernel", spill=8)])
    monkeypatch.setattr(cuda_report, "find_toolkit", lambda: cuda_report.Toolkit(Path(sys.executable), None))
    arguments = ["--part", "kernels", "--arch", "80"]
    assert cuda_report.main(arguments) == 0
    assert "not counted" in capsys.readouterr().out
    assert cuda_report.main([*arguments, "--check"]) == 1
    assert "8 bytes of spills" in capsys.readouterr().err
    assert cuda_report.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"][0]["registers"] == 64


@pytest.mark.parametrize("arguments", [["--arch", "81"], ["--part", "all"], ["--source", "nothing.cu"], ["--nonsense"]])
def test_a_mistake_is_one_line(arguments, capsys):
    assert cuda_report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("cuda_report: ") and error.count("\n") == 1


# --- finding the tools -----------------------------------------------------------------------------------------------


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_compiler_of_the_wheels(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(cuda_report, "TOOLKIT", tmp_path / "none")
    with pytest.raises(cuda_report.ReportError, match="pip install nvidia-cuda-nvcc"):
        cuda_report.find_toolkit([str(tmp_path)])
    nvcc = _program(tmp_path / "nvidia/cu13/bin/nvcc")
    assert cuda_report.find_toolkit([str(tmp_path)]) == cuda_report.Toolkit(nvcc, None)
    nvdisasm = _program(tmp_path / "nvidia/cu13/bin/nvdisasm")
    assert cuda_report.find_toolkit([str(tmp_path)]) == cuda_report.Toolkit(nvcc, nvdisasm)
    named = _program(tmp_path / "mine/nvcc")
    monkeypatch.setenv("CUDACXX", str(named))
    assert cuda_report.find_toolkit([str(tmp_path)]).nvcc == named
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere"))
    with pytest.raises(cuda_report.ReportError, match="CUDACXX="):
        cuda_report.find_toolkit([str(tmp_path)])


@pytest.mark.slow
def test_a_real_kernel(tmp_path):
    try:
        toolkit = cuda_report.find_toolkit()
    except cuda_report.ReportError as error:
        pytest.skip(str(error))
    kernels = cuda_report.compile_file(toolkit, ROOT / "csrc/cuda/halting.cu", 80, tmp_path)
    by_name = {kernel.name: kernel for kernel in kernels}
    halting = by_name["halting_update_kernel"]
    assert 16 <= halting.registers <= 255
    assert (halting.spill, halting.stack, halting.static_shared) == (0, 0, 0)
    if toolkit.nvdisasm is not None:
        assert halting.threads == 256
        assert halting.instructions is not None and halting.instructions["all"] > 100
    assert cuda_report.apply_budgets(kernels, cuda_report.read_budgets(cuda_report.BUDGETS)) == []


# --- roofline --------------------------------------------------------------------------------------------------------


def test_roofline_by_hand():
    shape, batch = cuda_roofline.Shape(), cuda_roofline.Batch(1, 1, 1023)
    down = cuda_roofline.stage_work("mlp_output", shape, batch)
    assert down.bytes == 4096 * 11008 + 4096 * 172 * 4 + (11008 + 2 * 4096) * 4
    assert down.multiply_adds == 4096 * 11008
    down = cuda_roofline.stage_work("mlp_output", shape, replace(batch, bits=4))
    assert down.bytes == 4096 * 11008 // 2 + 4096 * 172 * 4 + (11008 + 2 * 4096) * 4
    attention = cuda_roofline.stage_work("attention", shape, batch)
    assert attention.bytes == 2 * 4096 * 4 + 1024 * (2 * 4096 * 2 + 4)
    assert attention.multiply_adds == 32 * 1024 * 2 * 128
    a100 = cuda_roofline.GPUS[0]
    assert cuda_roofline.seconds(attention, a100) == (attention.bytes / 2.0e12, "memory")
    # 108 SMs with four schedulers at 1.41 GHz
    assert a100.issue_slots == pytest.approx(609.12e9)
    for slots, integer, kib, share, of in (
        (40, True, None, 609.12e9 / 40 * 8192 / 624e12, "tensor cores"),
        (10, False, None, 609.12e9 / 10 * 4096 / 312e12, "tensor cores"),
        (10, True, 500, 609.12e9 / 500 * 1024 / 2e12, "bandwidth"),
        (10, True, 50, 1, "bandwidth"),
    ):
        assert cuda_roofline.issue_bound(a100, slots, integer, kib) == (pytest.approx(share), of)
    rows = cuda_roofline.roofline()
    assert {row["case"] for row in rows} == set(cuda_roofline.CASES)
    assert "step" in cuda_roofline.table(rows)


@pytest.fixture(scope="module")
def profiler() -> Path:
    found = cuda_report.find_profiler()
    if found is None:
        pytest.skip("quicksilver_profile isn't built")
    return found


def _profile(profiler: Path, command: str) -> dict:
    done = subprocess.run([profiler, *command.split(), "--json", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SMALL = "--d 256 --heads 4 --kv-heads 2 --head-size 64 --ffn 512 --vocab 512 --warmup 0 --repeat 1"


@pytest.mark.parametrize("stage", cuda_report.STAGES)
@pytest.mark.parametrize(("rows", "sequences"), [(3, 3), (10, 2)])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_profiler_counts_the_same_work(profiler, stage, rows, sequences, bits):
    shape = cuda_roofline.Shape(d=256, heads=4, kv_heads=2, head_size=64, ffn=512, vocab=512)
    want = cuda_roofline.stage_work(stage, shape, cuda_roofline.Batch(rows, sequences, 70, bits))
    command = f"{stage} {SMALL} --rows {rows} --sequences {sequences} --context 70 --kv-type f16 --precision int{bits}"
    got = _profile(profiler, command)
    assert (got["bytes"], got["multiply_adds"]) == (want.bytes, want.multiply_adds)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "command",
    [
        "quantize_rows --rows 5 --halting-ratio 0.5",
        "matryoshka_gemm --rows 5 --precision adaptive --matrix down",
        "kv_scatter --rows 6 --kv-type i8",
        "halting_update --rows 20 --halting-ratio 0.5",
        "fusion_groups --rows 33 --fusion-ratio 0.75",
        "fusion_reduce --fusion-ratio 0.3",
        "attention --rows 12 --sequences 3 --halting-ratio 0.5 --kv-type bf16",
        "mlp_output --rows 12 --halting-ratio 0.5",
        "decode --layers 2 --rows 4 --halting-ratio 0.5 --precision adaptive",
        "prefill --layers 2 --rows 40 --fusion-ratio 0.6",
    ],
)
def test_the_profiler_checks_its_answers(profiler, command, family):
    got = _profile(profiler, f"{command} {SMALL} --family {family}")
    assert got["checks"] and all(check["ok"] for check in got["checks"])
    assert got["median_us"] > 0


def test_a_mistake_in_the_profilers_options(profiler):
    for command in ("", "nonsense", "decode --rows 0", "decode --fusion-ratio 0.5", "decode --nonsense 1"):
        done = subprocess.run([profiler, *command.split()], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("quicksilver_profile: ") and done.stderr.count("\n") == 1


def test_figures_of_the_emulator():
    counts = dict.fromkeys(("launches", "blocks"), 1) | {
        "name": "foo",
        "global_load_requests": 10,
        "global_load_sectors": 40,
        "global_store_requests": 0,
        "global_store_sectors": 0,
        "cp_async_sectors": 60,
        "shared_requests": 8,
        "shared_conflicts": 2,
        "active_lanes": 64,
        "instructions": 4,
        "mma_u8s8": 3,
        "mma_f16": 0,
        "mma_bf16": 0,
    }
    got = cuda_report.figures({"counts": [counts, counts], "bytes": 1600})
    assert got["sectors per load"] == 4
    assert got["sectors per store"] is None
    assert got["conflicts per shared access"] == 0.25
    assert got["active lanes"] == 16
    assert got["MMAs"] == 6
    assert got["moved over least"] == 4


# --- Nsight Compute --------------------------------------------------------------------------------------------------

NCU = """\
==PROF== Connected to process 12345
decode on cuda
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","launch__occupancy_limit_blocks",\
"launch__occupancy_limit_registers","launch__occupancy_limit_shared_mem","launch__occupancy_limit_warps",\
"launch__registers_per_thread","launch__shared_mem_per_block_dynamic","launch__shared_mem_per_block_static",\
"l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",\
"sm__warps_active.avg.pct_of_peak_sustained_active","smsp__inst_executed_op_local_ld.sum"
"","","","","","","","","","","","Mbyte","Kbyte","usecond","block","block","block","block","register/thread",\
"Kbyte/block","byte/block","sector","%","inst"
"0","12345","quicksilver_profile","host",\
"void quicksilver::cuda::(anonymous namespace)::foo_kernel<(int)4>(quicksilver::Foo)","1","7","(256, 1, 1)",\
"(1,376, 1, 1)","0","8.0","1.5","2.5","1,234.5","32","3","2","8","72","58.90","0","4.25","24.9","0"
"1","12345","quicksilver_profile","host","bar_kernel(int)","1","7","(128, 1, 1)","(4, 1, 1)","0","8.0",\
"n/a","","10","32","16","16","16","32","0","0","n/a","50","0"
"""


def test_ncu_table():
    foo, bar = ncu_table.parse(NCU)
    assert (foo.name, foo.threads, foo.grid, foo.registers) == ("foo_kernel<4>", 256, "(1,376, 1, 1)", 72)
    assert (foo.blocks_per_sm, foo.limited_by, foo.warps_per_sm) == (2, "shared memory", 16)
    assert foo.dram_bytes == pytest.approx(1.5e6 + 2.5e3)
    assert foo.duration_us == pytest.approx(1234.5)
    assert (foo.dynamic_shared, foo.static_shared) == (pytest.approx(58900), 0)
    assert (foo.sectors_per_load, foo.achieved_occupancy, foo.local) == (4.25, 24.9, 0)
    assert foo.imma is None and foo.sectors_per_store is None
    assert (bar.dram_bytes, bar.sectors_per_load, bar.duration_us) == (None, None, pytest.approx(10))


def test_ncu_table_command(tmp_path, capsys):
    file = tmp_path / "run.csv"
    file.write_text(NCU)
    assert ncu_table.main([str(file)]) == 0
    assert "| foo_kernel<4> | (1,376, 1, 1) | 256 | 72 |" in capsys.readouterr().out
    assert ncu_table.main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["registers"] == 72
    file.write_text("no table\n")
    assert ncu_table.main([str(file)]) == 2
    assert "ncu --csv --page raw" in capsys.readouterr().err
    assert ncu_table.main([str(tmp_path / "none")]) == 2
