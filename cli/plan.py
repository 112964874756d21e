"""`weft plan`: what a model takes and what fits on a device, from its shape alone. It loads nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.connection import fail
from weft.config import parse_size
from weft.memory import (
    BLOCK_SIZES,
    DEVICES,
    GB,
    GIB,
    KV_BITS,
    MIB,
    PRESETS,
    WEIGHT_BITS,
    MemoryPlan,
    ModelShape,
    ShapeError,
    bits_per_weight,
    kv_bytes_per_token,
    nominal_weight_bytes,
    rows_until_compute_bound,
    weight_bytes,
)
from weft.memory import plan as make_plan

TABLE_BATCH = 8
TABLE_CONTEXTS = (2048, 8192, 32768)
TABLE_ROWS = ((16, "auto"), (4, "int8"))


def size(text: str | None) -> int | None:
    """Bytes of "80GiB". Raises typer.BadParameter."""
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise typer.BadParameter unless the value is allowed."""
    if value not in (choices := list(allowed)):
        raise typer.BadParameter(f"--{name} must be one of {', '.join(map(str, choices))}, found {value}")


def plan(
    model: Annotated[str | None, typer.Option(help=f"A preset: {', '.join(PRESETS)}.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json, or the directory that holds it.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "a100-80",
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="In place of the device's own, as 24GiB.")
    ] = None,
    memory_fraction: Annotated[float, typer.Option(min=0.01, max=1, help="The part of it to use.")] = 0.9,
    weight_bits: Annotated[int, typer.Option(help="4, 8, 16 or 32.")] = 4,
    group_size: Annotated[int, typer.Option(min=1, help="Weights that share a scale.")] = 128,
    kv_dtype: Annotated[str, typer.Option(help=f"One of {', '.join(KV_BITS)}; auto is 16 bits.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens in a block.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = TABLE_BATCH,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Weights, KV cache, blocks that fit, and when decoding turns compute-bound.

    Without --model or --config: the tables of the two presets and the roofline of every known device.
    """
    one_of("device", device, DEVICES)
    one_of("weight-bits", weight_bits, WEIGHT_BITS)
    one_of("kv-dtype", kv_dtype, KV_BITS)
    one_of("block-size", block_size, BLOCK_SIZES)
    shape = chosen_shape(model, config)
    if shape is None:
        print_tables(as_json)
        return
    try:
        result = make_plan(
            shape,
            device=DEVICES[device],
            device_memory=size(device_memory),
            memory_fraction=memory_fraction,
            weight_bits=weight_bits,
            group_size=group_size,
            kv_dtype=kv_dtype,
            block_size=block_size,
            context=context,
            batch=batch,
        )
    except ShapeError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | {"fits": result.fits}, indent=2))
    else:
        print_plan(result)


def chosen_shape(model: str | None, config: Path | None) -> ModelShape | None:
    """The shape asked for; None when none was. Ends the command when it cannot be read."""
    if model and config:
        raise typer.BadParameter("--model and --config exclude each other")
    if model:
        one_of("model", model, PRESETS)
        return PRESETS[model]
    if config:
        try:
            return ModelShape.from_file(config)
        except (ShapeError, OSError) as error:
            fail(str(error))
    return None


def print_plan(result: MemoryPlan) -> None:
    """One model on one device."""
    table = Table("", "", "exactly", title=f"{result.model} on {result.device}", show_header=False)
    bits, dtype = result.weight_bits, result.kv_dtype
    for row in (
        ("parameters", f"{result.num_parameters / 1e9:.3g} B", f"{result.num_parameters:,}"),
        (f"weights, {bits} bits", f"{result.weight_bytes / GB:.3g} GB", f"{result.weight_bytes:,} bytes"),
        (
            f"KV of a token, {dtype}",
            f"{result.kv_bytes_per_token / 1024:g} KiB",
            f"{result.kv_bytes_per_token:,} bytes",
        ),
        (
            f"a block of {result.block_size} tokens",
            f"{result.block_bytes / MIB:g} MiB",
            f"{result.block_bytes:,} bytes",
        ),
        (f"a sequence of {result.context} tokens", f"{result.kv_bytes_per_sequence / GIB:.4g} GiB", ""),
        (f"{result.batch} such sequences", f"{result.kv_bytes_per_batch / GIB:.4g} GiB", ""),
        (
            "device memory",
            f"{result.device_memory / GIB:.4g} GiB",
            f"{result.memory_fraction:.0%} of it used",
        ),
        ("blocks that fit", f"{result.num_blocks:,}", f"{result.num_blocks * result.block_size:,} tokens"),
        (
            "sequences that fit",
            f"{result.num_sequences:,}",
            f"the batch of {result.batch} {'fits' if result.fits else 'does not fit'}",
        ),
        ("compute-bound from", f"{result.compute_bound_rows:.0f} rows", f"{result.device}, fp16 arithmetic"),
    ):
        table.add_row(*row)
    Console().print(table)


def table_rows() -> list[dict[str, Any]]:
    """The memory of each preset: as quoted and exactly."""
    rows = []
    for shape in PRESETS.values():
        for bits, dtype in TABLE_ROWS:
            cache = (shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)
            quoted = kv_bytes_per_token(*cache, with_scales=False)
            rows.append(
                {
                    "model": shape.name,
                    "weight_bits": bits,
                    "kv_dtype": dtype,
                    "weight_gb": nominal_weight_bytes(shape, bits) / GB,
                    "weight_gb_exact": weight_bytes(shape, bits) / GB,
                    "kv_gib": [quoted * tokens * TABLE_BATCH / GIB for tokens in TABLE_CONTEXTS],
                    "kv_gib_exact": [
                        kv_bytes_per_token(*cache) * t * TABLE_BATCH / GIB for t in TABLE_CONTEXTS
                    ],
                }
            )
    return rows


def roofline_rows() -> list[dict[str, Any]]:
    """For each device the rows from which a linear waits for arithmetic, with 16-bit and 4-bit weights."""
    return [
        {
            "device": device.name,
            "tflops": device.flops / 1e12,
            "bandwidth_gb_s": device.bandwidth / GB,
            "rows_16_bits": rows_until_compute_bound(device, 16),
            "rows_4_bits": rows_until_compute_bound(device, bits_per_weight(4, 128)),
        }
        for device in DEVICES.values()
    ]


def print_tables(as_json: bool) -> None:
    """The presets and the roofline."""
    if as_json:
        typer.echo(
            json.dumps({"batch": TABLE_BATCH, "memory": table_rows(), "roofline": roofline_rows()}, indent=2)
        )
        return
    memory = Table(title=f"Weights in GB, KV cache of {TABLE_BATCH} sequences in GiB")
    for heading in ("model", "weights", "KV", ""):
        memory.add_column(heading)
    for heading in ("weights", *(f"KV {tokens // 1024}k" for tokens in TABLE_CONTEXTS)):
        memory.add_column(heading, justify="right")
    for row in table_rows():
        names = (row["model"], f"{row['weight_bits']} bits", row["kv_dtype"])
        memory.add_row(*names, "as quoted", *(f"{size:g}" for size in (row["weight_gb"], *row["kv_gib"])))
        exact = (row["weight_gb_exact"], *row["kv_gib_exact"])
        memory.add_row("", "", "", "exactly", *(f"{size:.4g}" for size in exact), end_section=True)
    roofline = Table(title="Rows from which decoding is compute-bound (fp16 arithmetic)")
    for heading in ("device", "TFLOP/s", "GB/s", "16-bit weights", "4-bit weights"):
        roofline.add_column(heading, justify="left" if heading == "device" else "right")
    for row in roofline_rows():
        roofline.add_row(
            row["device"],
            f"{row['tflops']:g}",
            f"{row['bandwidth_gb_s']:g}",
            f"{row['rows_16_bits']:.0f}",
            f"{row['rows_4_bits']:.0f}",
        )
    console = Console()
    console.print(memory)
    console.print(roofline)
