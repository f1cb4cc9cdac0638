"""`python -m benchmarks.static`: what the compiler makes of every launch, without a GPU.

With a stand-in for Triton's driver, every op of `mfengine.ops.OPS` runs on real tensors, strided and packed as in a
step of B/2, L/2 and XL/2 and of iMF's B/2 and XL/2; attention also runs on dense and odd ones. Triton specializes on
these arguments and compiles as on a GPU, for sm_80, sm_90 and sm_100; only the launch does nothing. The CUDA library is
inspected as built. The table shows registers, stack, shared memory, tensor-core instructions and the widths of global
accesses in loops. A row fails on

- any stack, which is a spill or a local array, except the bytes that `STACK` allows;
- a dot product without tensor-core instructions;
- a global access of less than 8 bytes in a loop (anywhere, if there is none).

Exit code 1 if a row fails; `--json FILE` writes the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mfengine import ops
from mfengine.kernels.launch import forget_plans
from mfengine.kernels.multi_tensor import LIBRARY
from mfengine.ops import OPS, Dual, use_backend
from mfengine.ops.table import New, Shape

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # architecture -> bytes that a program may use
LOADS, STORES = re.compile(r"\bLDG\.[\w.]*128\b"), re.compile(r"\bSTG\.[\w.]*128\b")  # 16 bytes wide
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)
ROW_STATISTICS = {"delta_kernel": 1, "delta_dual_kernel": 2}
"""Accesses of 4 bytes per row and lane, 128 bytes per warp: the log-sum-exp.

An odd number of rows has twice as many, because an even number lets some be read in pairs."""

STACK = {
    ("forward_kernel", "d72", 80): 8,
    ("backward_kv_kernel", "d96", 80): 8,
    ("backward_kv_kernel", "d128", 80): 8,
    ("backward_q_kernel", "d128", 80): 16,
}
"""Bytes allowed by kernel, head dim and architecture, in the variants of attention that `SPILLING` names. All 255
registers are in use, so these store this much before a loop and read it afterwards. Only slower configurations avoid
that."""

SPILLING = {"causal", "mask", "term", "sequences"}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {
    "B/2": Shape(3, 256, 12, 64),
    "L/2": Shape(3, 256, 16, 64),
    "XL/2": Shape(3, 256, 16, 72),
    "iMF B/2": Shape(3, 276, 12, 64),
    "iMF XL/2": Shape(3, 276, 16, 64),
    "d72 iMF": Shape(3, 276, 16, 72),
    **{f"d{dim}": Shape(3, 256, 16, dim) for dim in (80, 96, 128)},  # other tiles
}

IMF = ("gated_residual_rms_norm", "rotary_attention", "swiglu")
"""Ops that only iMF's networks use, compiled only for their number of tokens."""

# ----------------------------------------------------------------------------
# The launches.


class Case(NamedTuple):
    """A call that launches kernels."""

    name: str
    run: Callable[[], Any]


def new_tensors(dtype: torch.dtype) -> New:
    return lambda *size, wide=False: torch.empty(size, dtype=torch.float32 if wide else dtype)


def cases() -> Iterator[Case]:
    """Forward, dual and backward of every op with kernels, in the layouts of a step; attention also in others."""
    for (name, make), (network, shape), (label, dtype) in product(OPS.items(), SHAPES.items(), DTYPES.items()):
        example = make(shape, new_tensors(dtype))
        # Without products, an op depends only on the width, so only the networks' own widths matter.
        if example.op is None or (not any(example.flops) and network.startswith("d")):
            continue
        if ("iMF" in network) != (name in IMF):
            continue
        yield from calls(f"{name} {network} {label}", example.function, example.arguments)
    for layout, (label, dtype) in product(("dense", "odd"), DTYPES.items()):
        batch, tokens, heads, dim = SHAPES["XL/2"]
        q, k, v = torch.empty(3, batch, heads, tokens, dim, dtype=dtype).unbind(0)
        if layout == "odd":  # no size is a multiple of anything useful
            q, k, v = torch.empty(3, batch, heads, 77, dim + 1, dtype=dtype)[..., 1:].unbind(0)
        yield from calls(f"attention XL/2 {label} {layout}", ops.attention, (q, k, v))
    yield from attention_cases()


def attention_cases() -> Iterator[Case]:
    """Attention beyond our networks: gradients through the tangent, causal, masks, grouped queries, sequences."""
    batch, tokens, heads = 3, 256, 16
    cu = torch.tensor([0, 100, tokens], dtype=torch.int32)
    variants: dict[str, tuple[int, dict[str, Any]]] = {
        "all": (heads, {}),
        "causal": (heads, {"is_causal": True}),
        "grouped mask": (4, {"mask": torch.empty(tokens, tokens, dtype=torch.bool)}),
        "term": (heads, {"mask": torch.empty(heads, tokens, tokens)}),
    }
    for dim, (label, dtype) in product((64, 72, 80, 96, 128), (("bf16", torch.bfloat16), ("fp16", torch.float16))):
        for variant, (groups, options) in variants.items():
            q, k, v = torch.empty(3, batch, heads, tokens, dim, dtype=dtype).unbind(0)
            arguments, name = (q, k[:, :groups], v[:, :groups]), f"attention d{dim} {label} {variant}"
            function = partial(ops.attention, **options)
            yield Case(f"{name} through", partial(through, function, arguments))
            if variant != "all":
                yield from calls(name, function, arguments)
        q, k, v = torch.empty(3, tokens, heads, dim, dtype=dtype).unbind(0)
        function = partial(
            ops.attention_varlen, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=156, max_seqlen_k=156, is_causal=True
        )
        yield Case(f"attention d{dim} {label} sequences through", partial(through, function, (q, k, v)))


def through(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
    """The backward of a loss of output and tangent."""
    leaves = [x.detach().requires_grad_() for x in (*arguments, *arguments)]
    with use_backend("triton"), ops.differentiable_tangents():
        output = function(*map(Dual, leaves[: len(arguments)], leaves[len(arguments) :]))
    torch.autograd.backward(output, [torch.empty_like(o) for o in output])


def calls(name: str, function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Iterator[Case]:
    def outputs(*arguments: Tensor | Dual) -> tuple[Any, ...]:
        with use_backend("triton"):
            returned = function(*arguments)
        return returned if isinstance(returned, tuple) and not isinstance(returned, Dual) else (returned,)

    def backward(only_last: bool) -> None:
        made = outputs(*(x.detach().requires_grad_() for x in arguments))[-1 if only_last else 0 :]
        torch.autograd.backward(made, [torch.empty_like(o) for o in made])

    yield Case(name, partial(outputs, *arguments))
    yield Case(f"{name} dual", partial(outputs, *(Dual(x, x) for x in arguments)))
    yield Case(f"{name} backward", partial(backward, False))
    if name.startswith("gated_residual"):  # the last one, whose residual stream has no other use
        yield Case(f"{name} last backward", partial(backward, True))


# ----------------------------------------------------------------------------
# The compilation.


class CompileOnly:
    """A driver for Triton that claims a GPU. Launchers specialize and compile for it, and launch nothing."""

    def __init__(self, name: str, arch: int) -> None:
        self.device, self.arch, self.utils = f"{name} {arch}", arch, self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return self.device  # unique per case, because Triton caches compiled code by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, most threads of a program


def compiled(name: str, arch: int) -> list[dict[str, Any]]:
    """One row for each kernel that a case launches."""
    case = next(case for case in cases() if case.name == name)
    found: list[dict[str, Any]] = []

    def look(*, metadata: dict[str, Any], metadata_group: dict[str, str], **rest: Any) -> None:
        kernel = metadata["name"]
        cubin, ttir = (Path(metadata_group[f"{kernel}.{kind}"]) for kind in ("cubin", "ttir"))
        row = {"kernel": f"{name}: {kernel}", "arch": f"sm_{arch}", "shared": metadata["shared"]}
        row |= {option: metadata[option] for option in ("num_warps", "num_stages")} | inspect(cubin)
        allowed = narrow_accesses(name, kernel), stack_allowed(name, kernel, arch)
        row["faults"] = faults(row, "tt.dot" in ttir.read_text(), *allowed)
        found.append(row)

    driver.set_active(CompileOnly(name, arch))
    forget_plans()
    triton.knobs.compilation.listener = look
    case.run()
    return found


def narrow_accesses(name: str, kernel: str) -> int:
    """How many accesses under 8 bytes are expected.

    A tail of 16 columns by 16 rows, as heads of 72 and 80 have, is 4 bytes per lane. The backward through the tangent
    reads the tails of four operands, the backward of keys and values with a mask those of two.
    """
    odd = "odd" in name or "sequences" in name
    due = ROW_STATISTICS.get(kernel, 0) * (2 if odd else 1)
    tails = {"through": 4} if kernel != "backward_kv_kernel" else {"through": 4, "mask": 2, "term": 2}
    words = name.split()
    return due + (next((n for word, n in tails.items() if word in words), 0) if {"d72", "d80"} & {*words} else 0)


def stack_allowed(name: str, kernel: str, arch: int) -> int:
    words = name.split()
    if not SPILLING.intersection(words):
        return 0
    return next((n for (of, part, at), n in STACK.items() if (of, at) == (kernel, arch) and part in words), 0)


def faults(row: dict[str, Any], dots: bool, narrow: int, stack: int = 0) -> list[str]:
    """Why a row fails. `dots`: the kernel has dot products; `narrow`: accesses under 8 bytes that are due; `stack`:
    bytes that are allowed.
    """
    return [
        fault
        for fault, present in (
            ("stack", row["stack"] > stack),
            ("no tensor cores", dots and not row["tensor_core"]),
            ("narrow accesses", sum(n for size, n in row["accesses"].items() if int(size) < 8) > narrow),
        )
        if present
    ]


def inspect(cubin: Path) -> dict[str, Any]:
    """Registers, stack in bytes, tensor-core instructions, and accesses {bytes: number} of a compiled kernel."""
    usage, sass = (disassemble(option, cubin) for option in ("-res-usage", "-sass"))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "tensor_core": len(TENSOR_CORES.findall(sass)),
        "accesses": accesses(sass),
    }


def accesses(sass: str) -> dict[str, int]:
    """Number of global accesses in loops by their width in bytes; of all accesses if there is no loop."""
    code = [(int(at, 16), opcode, operands) for at, opcode, operands in INSTRUCTION.findall(sass)]
    jumps = ((at, re.search(r"0x([0-9a-f]+)", operands)) for at, opcode, operands in code if opcode.startswith("BRA"))
    back = ((int(target[1], 16), at) for at, target in jumps if target and int(target[1], 16) < at)
    # Slow paths after the end of a kernel also jump back into it, but with its exit in between.
    exits = [at for at, opcode, _ in code if opcode == "EXIT"]
    loops = [(first, last) for first, last in back if not any(first < at < last for at in exits)]
    found: Counter[str] = Counter()
    for at, opcode, _ in code:
        name, *modifiers = opcode.split(".")
        if name in ("LDG", "STG", "LDGSTS") and (not loops or any(first <= at <= last for first, last in loops)):
            bits = next((int(m.lstrip("US")) for m in modifiers if m in ("U8", "S8", "U16", "S16", "64", "128")), 32)
            found[str(bits // 8)] += 1
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def disassemble(option: str, file: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def rows(only: str = "") -> Iterator[dict[str, Any]]:
    """One row for each launch and architecture, for cases whose name contains `only`."""
    names = [case.name for case in cases() if only in case.name]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(compiled, *zip(*product(names, SHARED_MEMORY), strict=True)))


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
        code = sass[label, arch]
        # Scalars and a few partial sums are read one at a time; data of the parameters' size, 16 bytes at a time.
        wide = all(pattern.search(code) for pattern, due in ((LOADS, " " in label), (STORES, "adamw" in label)) if due)
        row = {"kernel": label, "arch": arch, "registers": registers, "stack": stack, "shared": shared}
        faults = ["stack"] * (stack > 0) + ["narrow accesses"] * (not wide)
        yield row | {"accesses": accesses(code), "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="inspect only kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET is set, so nothing would be compiled: unset it", file=sys.stderr)
        return 2
    print(f"Triton {triton.__version__}")
    columns = ("registers", "stack", "shared", "tensor_core")
    heading = "".join(f"{column.replace('_', ' '):>12}" for column in columns)
    print(f"{'kernel':56} {'arch':7}{heading}  accesses in loops x bytes")
    built = library_rows(LIBRARY, args.only) if LIBRARY.is_file() else iter(())
    found = []
    for row in chain(rows(args.only), built):
        found.append(row)
        figures = "".join(f"{row.get(column, ''):12}" for column in columns)
        widths = ", ".join(f"{count} x {width}" for width, count in row["accesses"].items())
        failed = f"  FAILED: {', '.join(row['faults'])}" if row["faults"] else ""
        print(f"{row['kernel']:56} {row['arch']:7}{figures}  {widths}{failed}", flush=True)
    if not LIBRARY.is_file():
        print("the CUDA library is not built, so its kernels are not covered")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1) + "\n")
    if not found:
        print(f"error: no kernel's name contains {args.only}: use the name of an op, such as rms_norm", file=sys.stderr)
        return 2
    failed = sum(bool(row["faults"]) for row in found)
    print(f"{len(found)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
