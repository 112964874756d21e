"""The report: well formed, self-contained, nothing in it that a name could smuggle in, small, and seen by a
browser.
"""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from services.quantizer.report import build_report, report_json
from services.quantizer.report_page import report_html
from weft.artifact.manifest import LinearError

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
VOID = {"meta", "link", "br"}
HOSTILE = "</style><script>alert(1)</script><img src=http://x/y onerror=1>\"'&\u202e\x00\ud800"


def record(rounding, chosen, method="gptq"):
    bell = [round(40_000 * math.exp(-(((i - 32) / 12) ** 2))) for i in range(64)]
    return {
        "method": method,
        "scales": "duo 0.350",
        "held_out": {"rounding": rounding, "search": 0.8 * rounding, "gptq": chosen},
        "shrink": {"low": 0.93, "high": 0.91},
        "histogram": {"low": -0.3125, "high": 0.29, "source": bell, "chosen": bell[::-1]},
    }


def make_report(num_blocks=2, prefix="model.layers", *, with_records=True, **changes):
    errors, records = {}, {}
    for block in range(num_blocks):
        for number, name in enumerate(LINEARS):
            full_name = f"{prefix}.{block}.{name}"
            errors[full_name] = LinearError(0.004, 0.004 * (number + 1) / 10)
            records[full_name] = record(0.004, 0.004 * (number + 1) / 10)
    quality = {
        "tokens": 4096,
        "predicted_tokens": 4088,
        "windows": 8,
        "source": {"perplexity": 40.0},
        "rounding": {"perplexity": 42.0, "mean_kl": 0.03, "greedy_agreement": 0.9},
        "chosen": {"perplexity": 40.5, "mean_kl": 0.0125, "greedy_agreement": 0.945},
        "intervals": {"level": 0.95, "chosen": {"mean_kl": [0.011, 0.014], "perplexity": [39.0, 42.0]}},
    }
    texts = {
        "calibration": [{"file": "a.jsonl", "kind": "jsonl", "weight": 2.0, "documents": 9, "chosen": 5}],
        "evaluation": [{"file": "b.txt", "kind": "text", "documents": 1}],
    }
    sizes = {"parameters": 1000, "source_bytes": 2000, "artifact_bytes": 600, "bits_per_parameter": 4.8}
    arguments = {
        "quality": quality,
        "choices": {f"{prefix}.0.self_attn.q_proj k_proj": "duo 0.350"},
        "full_precision": [f"{prefix}.0.mlp.odd_proj"],
        "texts": texts,
        "sizes": sizes,
        "records": records if with_records else None,
        **changes,
    }
    model = arguments.pop("model", "demo")
    recipe = arguments.pop("recipe", {"bits": 4, "group_size": 128, "calibration_weights": [None, 2.0]})
    return build_report(model, recipe, errors=errors, **arguments)


class Reader(HTMLParser):
    """Every element closed in order; what stands in them."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.titles = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.titles += [value for name, value in attributes if name == "title"]
        assert len({name for name, _ in attributes}) == len(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(report):
    page = report_html(report).decode("utf-8")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader, page


def test_the_page_is_well_formed_and_needs_nothing_else():
    reader, page = read(make_report())
    assert not {"script", "img", "iframe", "object", "embed", "form"} & set(reader.tags)
    addresses = [value for _, name, value in reader.attributes if name in ("src", "href", "action", "srcset")]
    assert addresses == ["data:,"]
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "@import" not in page


def test_it_says_what_the_document_says():
    reader, page = read(make_report(missed=["mean KL is 0.02 nats, 0.01 is allowed (--max-kl)"]))
    words = " ".join(reader.texts)
    for said in (
        "demo", "40.500", "1.25%", "0.01250", "94.50%", "0.01100 to 0.01400", "39.000 to 42.000", "gptq",
        "Not published: mean KL is 0.02 nats, 0.01 is allowed (--max-kl).", "a.jsonl", "b.txt", "duo 0.350",
        "model.layers.0.mlp.odd_proj", "2.0 KiB", "600 bytes", "0.930", "0.910", "[null, 2.0]", "block 1",
        "-0.312 to 0.29",
    ):  # fmt: skip
        assert said in words, said
    assert "model.layers.1.self_attn.o_proj: rounding 0.004, chosen 0.0016, 40% left, gptq, duo 0.350" in (
        reader.titles
    )
    assert page.count("<path") == 2 * 14


def test_hostile_names_stay_text():
    hostile_recipe = {"group_size": HOSTILE, HOSTILE: HOSTILE}
    texts = {"calibration": [{"file": HOSTILE, "kind": HOSTILE}], "evaluation": [{"file": HOSTILE}]}
    report = make_report(
        prefix=HOSTILE, model=HOSTILE, recipe=hostile_recipe, texts=texts, missed=[HOSTILE],
        choices={HOSTILE: HOSTILE}, full_precision=[HOSTILE],
    )  # fmt: skip
    for linear in report["linears"].values():
        linear["method"] = linear["scales"] = HOSTILE
        linear["held_out"] = {HOSTILE: 1.0}
    reader, page = read(report)
    assert set(reader.tags) == set(read(make_report(missed=["x"]))[0].tags)
    assert "<script" not in page
    assert not set(page) & set("\u202e\x00")
    assert json.loads(report_json(report))["model"] == HOSTILE


def test_it_copes_with_what_is_missing():
    bare = make_report(
        with_records=False, quality=None, choices={}, full_precision=[], texts=None, sizes=None
    )
    reader, page = read(bare)
    assert "Not evaluated." in " ".join(reader.texts)
    assert "Histograms" not in page
    odd = make_report()
    entries = iter(odd["linears"].values())
    next(entries)["histogram"] = {"source": "x", "chosen": [1]}
    next(entries)["histogram"] = {"low": None, "high": float("nan"), "source": [0] * 64, "chosen": [0] * 64}
    next(entries).update(held_out=None, shrink=5, method=None, rounding=float("nan"))
    next(entries).update(rounding=0.0, chosen=0.0)
    read(odd)
    empty = {**odd, "linears": {}, "quality": {"chosen": {}}}
    read(empty)
    read({**odd, "linears": {"lm_head": {"rounding": 0.1, "chosen": 0.1, **record(0.1, 0.1)}}})


def test_eighty_layers_stay_small_and_a_thousand_bounded():
    page, document = report_html(make_report(80)), report_json(make_report(80))
    assert len(page) < 1_500_000
    assert len(document) < 1_500_000
    assert page.count(b"<svg") == 560
    page = report_html(make_report(1000))
    assert len(page) < 4_000_000
    assert 300 < page.count(b"<svg") <= 650
    assert b"one block of" in page


def test_equal_documents_give_equal_bytes_and_json_reads_back():
    report = make_report()
    assert report_html(report) == report_html(make_report())
    assert json.loads(report_json(report)) == json.loads(json.dumps(report))
    shuffled = {key: report[key] for key in reversed(report)}
    assert report_json(shuffled) == report_json(report)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_it_without_a_request_or_an_error(tmp_path, width):
    """The page's own frame stays within the window: only tables scroll sideways."""
    (tmp_path / "report.html").write_bytes(report_html(make_report(4)))
    frame = (
        f"<iframe id=f src=report.html width={width} height=900></iframe><pre id=out></pre><script>"
        "const f=document.getElementById('f');f.onload=()=>{const d=f.contentDocument;"
        "document.getElementById('out').textContent=JSON.stringify({wide:d.documentElement.scrollWidth,"
        "cells:d.querySelectorAll('table.map td').length,paths:d.querySelectorAll('path').length,"
        "requests:f.contentWindow.performance.getEntriesByType('resource').map(e=>e.name),"
        "ink:f.contentWindow.getComputedStyle(d.querySelector('td.c8')).backgroundColor})};</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--log-level=0",
        "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(re.search(r"<pre id=\"out\">(\{.*?\})</pre>", done.stdout)[1])
    assert told["requests"] == []
    assert told["wide"] <= width
    assert told["cells"] == 2 * 4 * 7
    assert told["paths"] == 2 * 4 * 7
    assert told["ink"].startswith("rgb(")
    assert told["ink"] != "rgba(0, 0, 0, 0)"
    assert not re.search(r"CONSOLE", done.stderr), done.stderr[-2000:]
