"""The pages say what is: links lead somewhere, named things exist, figures and code are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").rglob("*.md")])


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.M))
    named = set()
    for words in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", path.read_text(encoding="utf-8"), re.M):
        named |= set(words.split())
    assert named <= targets


def test_the_architecture_is_one_screen_of_what_exists() -> None:
    text = page("docs/architecture.md")
    assert len(text.splitlines()) <= 75
    cells = re.findall(r"^\| (`[^|]+) \|", text, re.M)
    paths = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(paths) > 15
    parent = "services/engine"
    missing = [p for p in paths if not ((ROOT / p).exists() or (ROOT / parent / p).exists())]
    assert not missing


def test_modules_that_the_pages_run_exist() -> None:
    named = {m for path in PAGES for m in re.findall(r"python -m ([\w.]+)", path.read_text(encoding="utf-8"))}
    assert {"cli", "services.engine", "weft.rpc.auth"} <= named
    for module in named:
        place = ROOT / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").exists() or place.is_dir(), module


def test_the_reader_of_the_artifact_format_reads_it() -> None:
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    from weft.artifact.packing import dequantize, pack_int4

    (code,) = re.findall(r"```python\n(.*?)```", page("docs/artifact-format.md"), re.S)
    names: dict[str, Any] = {"np": np}
    exec(code, names)
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (64, 24), generator=generator)
    zeros = torch.randint(0, 16, (2, 24), generator=generator)
    scales = torch.rand(2, 24, generator=generator).half()
    packed, packed_zeros = pack_int4(values), pack_int4(zeros)
    read = names["dequantize"](packed.numpy(), packed_zeros.numpy(), scales.numpy(), 32)
    expected = (values.numpy() - zeros.numpy().repeat(32, axis=0)) * scales.float().numpy().repeat(32, axis=0)
    assert (read == expected).all()
    assert (read == dequantize(packed, packed_zeros, scales).numpy()).all()


def test_the_memory_table_holds_the_formulas_figures() -> None:
    from weft.memory import GB, GIB, PRESETS, kv_bytes_per_token, nominal_weight_bytes

    text = page("docs/questions.md")
    for name, shape in (("Llama 7B", PRESETS["llama-7b"]), ("Llama 70B", PRESETS["llama-70b"])):
        cells = [f"| {name}"]
        for bits, dtype in ((16, "auto"), (4, "int8")):
            per_token = kv_bytes_per_token(
                shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype, with_scales=False
            )
            kv = " / ".join(f"{per_token * tokens * 1024 * 8 / GIB:g}" for tokens in (2, 8, 32))
            cells += [f"{nominal_weight_bytes(shape, bits) / GB:g} GB", f"{kv} GiB"]
        assert " | ".join(cells) in text
