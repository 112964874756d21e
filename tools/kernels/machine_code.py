"""Compiles one case for one architecture and reads the result: resources, instructions, the main loop.

Knows Triton's compiler and the tools in its wheel. Judges nothing. Results are kept by content: the kernel's
source with everything it calls, the launch, Triton's version and this reader's own source.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from services.engine.kernels.gpu.compile_case import CompileCase
from tools.kernels import flow, ptx, sass

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class MainLoop:
    """The hot loop. `unroll`: passes of the source's loop in one pass of this body. `per_element`: thread
    instructions per weight or K/V value, None without `elements_per_iteration`.
    """

    num_instructions: int
    num_tensor_core: int
    unroll: int
    per_element: float | None
    opcodes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the machine code of one case says. `error`: why there is none. `loops`: (instructions, tensor-core
    instructions, is innermost) of every loop in the order of the code. `loop_spills`: those of the spill
    instructions that are inside of a loop. Bytes; `tensor_memory` in columns.
    """

    name: str
    arch: int
    error: str | None = None
    skipped: str | None = None
    registers: int = 0
    stack: int = 0
    spills: int = 0
    loop_spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    num_warps: int = 0
    num_instructions: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    loops: list[tuple[int, int, bool]] = field(default_factory=list)
    main_loop: MainLoop | None = None

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """The inverse of `to_json`."""
        values = json.loads(text)
        if values["main_loop"] is not None:
            values["main_loop"] = MainLoop(**values["main_loop"])
        values["loops"] = [tuple(loop) for loop in values["loops"]]
        return cls(**values)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))


def read_case(case: CompileCase, arch: int, cache_dir: Path, listing_dir: Path | None = None) -> Facts:
    """Compile and read, or take what is kept. `listing_dir` gets the disassembly and the PTX, then always
    compiled anew. Never raises for a kernel that does not compile.
    """
    if reason := case.notes.get(f"sm_{arch}"):
        return Facts(case.name, arch, skipped=reason)
    try:
        source = _source(case)
        kept = cache_dir / f"{_key(case, source, arch)}.json"
        if listing_dir is None and kept.is_file():
            return Facts.from_json(kept.read_text(encoding="utf-8"))
        facts = _compile_and_read(case, source, arch, cache_dir, listing_dir)
    except Exception as error:
        return Facts(case.name, arch, error=_first_lines(error))
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache_dir, delete=False, encoding="utf-8") as file:
        file.write(facts.to_json())
    Path(file.name).replace(kept)
    return facts


def _source(case: CompileCase) -> ASTSource:
    """The launch as Triton's compiler takes it. Raises ValueError for arguments missing or unknown."""
    names = list(case.kernel.arg_names)
    given = {*case.signature, *case.constexprs}
    if case.signature.keys() & case.constexprs.keys():
        raise ValueError(
            f"both typed and constexpr: {sorted(case.signature.keys() & case.constexprs.keys())}"
        )
    if given != set(names):
        raise ValueError(
            f"missing arguments {sorted(set(names) - given)}, unknown {sorted(given - set(names))}"
        )
    if stray := case.unaligned - case.signature.keys():
        raise ValueError(f"unaligned names no typed argument: {sorted(stray)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in case.unaligned and re.match(r"\*|[iu]\d+$", signature[name])
    }
    return ASTSource(case.kernel, signature, dict(case.constexprs), attrs)


def _compile_and_read(
    case: CompileCase, source: ASTSource, arch: int, cache_dir: Path, listing_dir: Path | None
) -> Facts:
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.has_fp_fusion,
        "maxnreg": case.max_registers,
    }
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        # The compiler prints the whole PTX when it fails, and keeps every stage of every kernel.
        triton.knobs.cache.dir = scratch
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin, ptx_text = compiled.asm["cubin"], compiled.asm["ptx"]
        file = Path(scratch) / "kernel.cubin"
        file.write_bytes(cubin)
        disassembly = _tool("nvdisasm", "-c", file)
        resources = _RESOURCES.search(_tool("cuobjdump", "-res-usage", file))
    if resources is None:
        raise ValueError("cuobjdump prints no resource usage")
    if listing_dir is not None:
        stem = re.sub(r"[^\w.-]+", "_", case.name) + f".sm_{arch}"
        listing_dir.mkdir(parents=True, exist_ok=True)
        (listing_dir / f"{stem}.sass").write_text(disassembly, encoding="utf-8")
        (listing_dir / f"{stem}.ptx").write_text(ptx_text, encoding="utf-8")
    return _facts(case, arch, compiled.metadata, resources, sass.parse(disassembly), ptx_text)


def _facts(
    case: CompileCase,
    arch: int,
    metadata: Any,
    resources: re.Match[str],
    listing: sass.Listing,
    ptx_text: str,
) -> Facts:
    registers, stack, _, local = (int(number) for number in resources.groups())
    return Facts(
        name=case.name,
        arch=arch,
        registers=registers,
        stack=stack + local,
        spills=listing.count("LDL", "STL"),
        loop_spills=listing.count_in_loops("LDL", "STL"),
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        num_warps=metadata.num_warps,
        num_instructions=listing.num_instructions,
        tensor_core=listing.tensor_core(),
        loops=[(loop.num_instructions, loop.num_tensor_core, loop.is_innermost) for loop in listing.loops],
        main_loop=_main_loop(case, metadata.num_warps, listing, ptx_text),
    )


def _main_loop(case: CompileCase, num_warps: int, listing: sass.Listing, ptx_text: str) -> MainLoop | None:
    index = int(case.notes["loop"]) if "loop" in case.notes else None
    loop = sass.main_loop(listing.loops, index)
    if loop is None:
        return None
    unroll = _unroll(loop, ptx_text)
    elements = case.elements_per_iteration * unroll
    threads = loop.num_instructions * 32 * num_warps
    return MainLoop(
        num_instructions=loop.num_instructions,
        num_tensor_core=loop.num_tensor_core,
        unroll=unroll,
        per_element=threads / elements if elements else None,
        opcodes=loop.opcodes(),
    )


def _unroll(loop: sass.Loop, text: str) -> int:
    """How often ptxas repeated the body: its tensor-core instructions, or else its global loads, against
    those of a loop in the PTX. 1 unless a loop of the PTX divides it.
    """
    has_tensor_cores = loop.num_tensor_core > 0
    in_sass = loop.num_tensor_core if has_tensor_cores else loop.num_global_loads
    counts = {c[0] if has_tensor_cores else c[1] for c in ptx.innermost_loops(text)} - {0}
    if not in_sass or in_sass in counts:
        return 1
    return min((in_sass // count for count in counts if in_sass % count == 0), default=1)


def _key(case: CompileCase, source: ASTSource, arch: int) -> str:
    parts = [
        triton.__version__,
        _own_source(),
        arch,
        source.hash(),
        sorted(source.signature.items()),
        [case.name, case.num_warps, case.num_stages, case.has_fp_fusion, case.max_registers],
        [case.elements_per_iteration, case.notes.get("loop")],
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _own_source() -> str:
    files = [Path(module.__file__ or "") for module in (flow, ptx, sass)] + [Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_BIN / name, *arguments], check=True, capture_output=True, text=True).stdout


def _first_lines(error: BaseException, count: int = 12) -> str:
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return "\n".join(lines[:count])
