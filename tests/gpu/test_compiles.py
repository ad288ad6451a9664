"""A few kernels compile for GPUs of three generations and keep the limits of the machine code.

`make gpu-compile` compiles all kernels in all shapes; see docs/gpu-kernels.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/                   LDL R2, [R1] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0050*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0060*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0070*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0080*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0090*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00a0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00b0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
        /*00d0*/               @P1 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
"""


def test_spills_of_the_innermost_loop_are_counted() -> None:
    pytest.importorskip("triton")
    from gpu.aot.binary import loop_code, loop_spills, main_loops

    assert [len(loop) for loop in main_loops(SASS)] == [11], "from the load to the branch"
    assert loop_spills(SASS) == 1, "the store is in the outer loop"
    assert loop_spills(SASS.replace("LDL R2", "MOV R2")) == 0
    assert loop_code(SASS) == {"loop_code": 11, "loop_matrix": 1}


def test_limits_name_kernel_and_figure() -> None:
    from gpu.aot.limits import broken

    row = {"case": "a", "kernel": "_matmul", "capability": 80, "loop_spills": 3}
    row |= {"shared": 200 << 10, "wgmma": 0, "mma": 0, "tcgen05": 0}
    assert broken(row) == [
        "sm_80 _matmul (a): 3 spills in a main loop",
        "sm_80 _matmul (a): 204800 bytes of shared memory exceed 166912",
        "sm_80 _matmul (a): a product without tensor cores",
    ]
    decode = row | {"kernel": "_decode_splits", "capability": 90, "loop_spills": 0, "mma": 8}
    assert broken(decode) == ["sm_90 _decode_splits (a): attention without wgmma"]
    assert not broken(decode | {"case": "fast attention"}), "tiles of 16 rows"
    assert broken(decode | {"case": "fast attention", "mma": 0, "wgmma": 8})
    refused = row | {"error": "type fp8e4nv not supported in this architecture"}
    assert not broken(refused) and broken(refused | {"capability": 90})


TTGIR = """
#linear = #ttg.linear<{register = [[0, 1], [0, 2]], lane = [[1, 0], [0, 4]], warp = [[16, 0]], block = []}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]}>
  %m = "tt.reduce"(%a) <{axis = 1 : i32}> ({
    %b = arith.maxnumf %c, %d : f32
  }) : (tensor<64x64xf32, #mma>) -> tensor<64xf32>
  %l = "tt.reduce"(%a) <{axis = 1 : i32}> ({
    %b = arith.addf %c, %d : f32
  }) : (tensor<64x8xf32, #linear>) -> tensor<64xf32>
"""  # noqa: E501


def test_kernels_that_sum_a_row_in_different_orders_are_named() -> None:
    from gpu.aot.limits import unlike
    from gpu.aot.row_sums import row_sums

    sums = row_sums(TTGIR)
    assert sums == ["8 columns: register [1, 2], lane [4], warp []"], "the maximum has no order"
    other = row_sums(TTGIR.replace("warp = [[16, 0]]", "warp = [[16, 0], [0, 4]]"))
    more_rows = row_sums(TTGIR.replace("warp = [[16, 0]]", "warp = [[16, 0], [32, 0]]"))
    decode = {"capability": 100, "case": "a", "kernel": "_decode_splits", "row_sums": sums}
    prefill = decode | {"kernel": "_prefill", "row_sums": more_rows}
    assert not unlike([decode, prefill])
    (text,) = unlike([decode, prefill | {"row_sums": other}])
    assert text.startswith("sm_100 (a): decode and prefill sum a row in different orders")
    norm = decode | {"kernel": "_rms_norm"}
    sums_of_ranks = norm | {"kernel": "_symmetric_sum"}
    assert not unlike([norm, sums_of_ranks | {"row_sums": []}, sums_of_ranks])
    (text,) = unlike([norm, sums_of_ranks | {"row_sums": other}, sums_of_ranks])
    assert text.startswith("sm_100 (a): norms sum a row in different orders")


def test_a_few_kernels_compile_within_the_limits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--only", "subset", "--capability", "90"),
            *("--processes", "1", "--json", str(out)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())
    assert Counter(row["kernel"] for row in rows) == {
        "_matmul": 1,
        "_quantize_rows": 2,
        "_rms_norm": 2,  # with float8 rows and without: the same order of a sum
        "_silu_mul_rounded": 1,
        "_symmetric_sum": 1,
    }
