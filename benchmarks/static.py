"""`python -m benchmarks.static`: what the compiler makes of every kernel, without a GPU.

Each Triton kernel is compiled ahead of time at its shipped configurations for sm_80, sm_90 and sm_100; the CUDA library
is looked at as it was built. The table shows registers, stack (a spill, or local arrays: there must be none), shared
memory, tensor-core instructions (every kernel with a dot product must have some) and, of the library, loads and stores
of 128 bits (what goes over all parameters must have some). Exit code 1 if one fails; `--json FILE` writes the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mfengine.kernels import adaln, attention, gelu
from mfengine.kernels.launch import Config
from mfengine.kernels.multi_tensor import LIBRARY

ARCHITECTURES = (80, 90, 100)
WIDE = {"wide_loads": re.compile(r"\bLDG\.[\w.]*128\b"), "wide_stores": re.compile(r"\bSTG\.[\w.]*128\b")}
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
HEAD_DIMS = (64, 72, 96, 128)  # B/2 and L/2; XL/2; the widest of each configuration
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TANGENTS = (
    "dq",
    "dk",
    "dv",
    "dx",
    "dy",
    "dgate",
    "dshift",
    "dscale",
    "dx_out",
    "do",
)  # None in a forward kernel's primal case
WIDTHS = (768, 1024, 1152)  # of B/2, L/2 and XL/2


def kernels() -> Iterator[tuple[str, Any, Config, dict[str, Any], dict[str, str], bool]]:
    """Name, kernel, configuration, constants, dtypes of pointers, and whether it has dot products."""
    for dim in HEAD_DIMS:
        for dtype, torch_dtype in DTYPES.items():
            names = dict(zip(("DIM", "HEAD", "TAIL"), attention.shape_constants(dim, torch_dtype), strict=True))
            for name, kernel, more in (
                ("forward", attention.forward_kernel, dict.fromkeys(TANGENTS)),
                ("dual", attention.forward_kernel, {}),
                ("delta", attention.delta_kernel, {}),
                ("backward_kv", attention.backward_kv_kernel, {}),
                ("backward_q", attention.backward_q_kernel, {}),
            ):
                config = attention.CONFIGS[name][attention.tile_class(dim, torch_dtype)]
                pointers = dict.fromkeys(
                    ("q", "k", "v", "dq", "dk", "dv", "o", "do", "go", "gq", "gk", "gv"), dtype
                ) | {"lse": "fp32", "delta": "fp32"}
                yield f"attention.{name} d{dim} {dtype}", kernel, config, names | more, pointers, name != "delta"
    for width in WIDTHS:
        constants = {"BLOCK": adaln.block(width)}
        backward = {"TOKENS": adaln.TOKENS_PER_PROGRAM}
        for dtype in ("bf16", "fp32"):
            # The residual stream is float32 whatever the rest is.
            pointers = dict.fromkeys(("x", "dx", "x_out", "dx_out", "gx_out", "gx", "sums"), "fp32") | dict.fromkeys(
                ("y", "gate", "shift", "scale", "o", "dy", "dgate", "dshift", "dscale", "do", "go", "gy"), dtype
            )
            for name, kernel, more in (
                ("forward", adaln.forward_kernel, dict.fromkeys(TANGENTS)),
                ("dual", adaln.forward_kernel, {}),
                ("backward", adaln.backward_kernel, backward),
            ):
                for residual in (True, False):
                    label = f"adaln.{name} D{width}{'' if residual else ' first'} {dtype}"
                    first = {} if residual else dict.fromkeys(("y", "gate", "dy", "dgate", "gy"))
                    all_constants = constants | more | first
                    yield label, kernel, adaln.CONFIGS[name], all_constants, pointers, False
    constants = {"ROWS": gelu.BLOCK_ROWS, "COLS": gelu.BLOCK_COLS}
    backward = {"STEPS": gelu.ROWS_PER_PROGRAM // gelu.BLOCK_ROWS}
    for dtype in ("bf16", "fp32"):
        pointers = dict.fromkeys(("x", "dx", "o", "do", "go", "gx"), dtype) | {"bias": "fp32", "sums": "fp32"}
        for name, kernel, more in (
            ("forward", gelu.forward_kernel, dict.fromkeys(TANGENTS)),
            ("dual", gelu.forward_kernel, {}),
            ("backward", gelu.backward_kernel, backward),
        ):
            yield f"gelu.{name} {dtype}", kernel, gelu.CONFIGS[name], constants | more, pointers, False


def compile_kernel(kernel: Any, config: Config, constants: dict[str, Any], pointers: dict[str, str], arch: int) -> Any:
    """Compile as the launcher would for contiguous heads, 16-byte aligned pointers and strides."""
    constants = constants | config.blocks
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name.endswith("_d"):
            signature[name], values[name] = "constexpr", constants.get(name, 1)
        elif name in pointers:
            signature[name], attributes[(i,)] = f"*{pointers[name]}", [["tt.divisibility", 16]]
        elif name in ("scale", "eps"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.endswith(("_b", "_h", "_n")) or name == "width":
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=config.options)


def disassemble(option: str, file: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def inspect(compiled: Any) -> dict[str, int]:
    """Registers, stack and shared memory in bytes, and tensor-core instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (disassemble(option, Path(file.name)) for option in ("-res-usage", "-sass"))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "tensor_core": len(TENSOR_CORES.findall(sass)),
    }


def library_rows(library: Path, only: str = "") -> Iterator[dict[str, Any]]:
    """One row for each kernel and architecture of the built CUDA library."""
    usage, sass = ({}, {})  # type: dict[tuple[str, str], str], dict[tuple[str, str], str]
    for option, found in (("-res-usage", usage), ("-sass", sass)):
        arch = ""
        for part in re.split(r"^(?=arch = |\s*Function\b)", disassemble(option, library), flags=re.MULTILINE):
            if part.startswith("arch = "):
                arch = part.split()[2]
            elif name := re.search(r"(adamw_ema|sum_of_\w+?)_kernel(I[ft]E)?", part.split("\n")[0]):
                label = f"optim.{name[1]}{ {'IfE': ' fp32', 'ItE': ' bf16', None: ''}[name[2]] }"
                found[label, arch] = part
    for (label, arch), resources in usage.items():
        if only not in label:
            continue
        registers, stack, shared = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", resources)[0])
        wide = {name: len(pattern.findall(sass[label, arch])) for name, pattern in WIDE.items()}
        needed = {"wide_loads": " " in label, "wide_stores": "adamw" in label}  # one is over a few partial sums only
        row = {"kernel": label, "arch": arch, "registers": registers, "stack": stack, "shared": shared, **wide}
        yield row | {"ok": stack == 0 and all(wide[name] for name, need in needed.items() if need)}


def rows(only: str = "") -> Iterator[dict[str, Any]]:
    """One row for each kernel and architecture whose name holds `only`."""
    for name, kernel, config, constants, pointers, dots in kernels():
        if only not in name:
            continue
        for arch in ARCHITECTURES:
            row = {"kernel": name, "arch": f"sm_{arch}", **config.kwargs}
            row |= inspect(compile_kernel(kernel, config, constants, pointers, arch))
            row["ok"] = row["stack"] == 0 and (row["tensor_core"] > 0 or not dots)
            yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    print(f"Triton {triton.__version__}")
    columns = ("registers", "stack", "shared", "tensor_core", "wide_loads", "wide_stores")
    print(f"{'kernel':30} {'arch':7}" + "".join(f"{column.replace('_', ' '):>12}" for column in columns))
    built = library_rows(LIBRARY, args.only) if LIBRARY.is_file() else iter(())
    found = []
    for row in chain(rows(args.only), built):
        found.append(row)
        figures = "".join(f"{row.get(column, ''):12}" for column in columns)
        print(f"{row['kernel']:30} {row['arch']:7}{figures}{'' if row['ok'] else '  FAILED'}", flush=True)
    if not LIBRARY.is_file():
        print("the CUDA library was not built, its kernels are not covered")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1) + "\n")
    failed = sum(not row["ok"] for row in found)
    print(f"{len(found)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
