"""A picture of latency against load as a PNG: it is one, and every curve is in it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.bench.charts import Chart, Series
from cli.bench.png import write_png

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
# The first run's three shades, and the second's middle one.
SHADES = ("86b6ef", "2a78d6", "12427e")
SECOND = "d6532a"


def charts(num_curves: int) -> list[Chart]:
    """Latency against load, and one point a request."""
    curves = tuple(
        Series(f"p{rank}", ((1.0, 5.0 + 20 * rank), (4.0, 9.0 + 20 * rank), (16.0, 30.0 + 20 * rank)), rank)
        for rank in range(num_curves)
    )
    dots = Series("each", ((0.0, 1.0), (1.0, 2.0)), run=1, is_scatter=True)
    return [
        Chart("TTFT", "ms", "requests at once", curves, is_load_x=True),
        Chart("Other", "ms", "s", (Series("other", ((0.0, 1.0), (1.0, 2.0)), rank=1, run=1),)),
        Chart("Dots", "ms", "s", (dots,)),
    ]


def colours_of(path: Path) -> set[str]:
    """Every colour in a picture, as six hex digits."""
    from matplotlib.image import imread

    pixels = (imread(path)[:, :, :3] * 255).round().astype("uint8").reshape(-1, 3)
    return {bytes(pixel).hex() for pixel in set(map(bytes, pixels))}


@pytest.mark.parametrize("num_curves", [2, 3])
def test_every_curve_is_in_the_picture(tmp_path: Path, num_curves: int) -> None:
    path = tmp_path / "load.png"
    write_png(path, charts(num_curves), "weft bench: demo")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    seen = colours_of(path)
    assert {shade for shade in SHADES if shade in seen} == set(SHADES[:num_curves])
    assert SECOND in seen
