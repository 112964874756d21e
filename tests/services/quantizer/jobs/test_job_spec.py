"""What a client may ask for: paths stay below their roots, numbers are judged as the command judges them."""

import os

import pytest

from services.quantizer.config import QuantizerConfig
from services.quantizer.jobs.spec import Places, Rules, SpecRefused, needs_network, run_options, wanted_device
from weft.config import build_config, flags_of


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "sources" / "llama" / "8b").mkdir(parents=True)
    (tmp_path / "sources" / "file").write_text("")
    (tmp_path / "outside" / "model").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "artifacts").mkdir()
    os.symlink("../outside", tmp_path / "sources" / "out")
    os.symlink("llama/8b", tmp_path / "sources" / "inside")
    os.symlink("loop", tmp_path / "sources" / "loop")
    return Rules(Places(tmp_path / "sources", tmp_path / "artifacts", tmp_path / "texts"), ("cpu",))


def options(rules, **spec):
    return run_options({"source": "llama/8b", "name": "m", **spec}, rules, rules.places, "cpu")


def test_options_become_the_flags_of_run(rules, tmp_path):
    found = options(
        rules, samples=4, propagate_error=False, max_perplexity_increase=0.01, calibration=["a.txt@2"]
    )
    assert found == {
        "name": "m",
        "artifacts": f"{tmp_path}/artifacts",
        "source": f"{tmp_path}/sources/llama/8b",
        "calibration": f"{tmp_path}/texts/a.txt@2",
        "samples": "4",
        "propagate_error": False,
        "max_perplexity_increase": "1%",
        "device": "cpu",
    }
    assert "--no-propagate-error" in flags_of(found)
    assert build_config(QuantizerConfig, found).max_perplexity_increase == 0.01


def test_a_container_has_other_names_for_the_same_places(rules):
    places = Places(*(type(rules.places.sources)(name) for name in ("/s", "/a", "/c")))
    found = run_options({"source": "inside", "name": "m", "calibration": ["a.txt"]}, rules, places, "cpu")
    assert (found["source"], found["artifacts"], found["calibration"]) == ("/s/inside", "/a", "/c/a.txt")


HOSTILE = {
    "up": "../outside/model",
    "up later": "llama/../../outside",
    "dot": "./llama",
    "empty part": "llama//8b",
    "absolute": "/etc",
    "a link out": "out/model",
    "a link to itself": "loop",
    "nothing": "",
    "NUL": "a\0b",
    "line end": "a\nb",
    "a flag": "--force",
    "a file": "file",
    "missing": "none",
    "a megabyte": "x" * (1 << 20),
    "long but whole": "x/" * 400,
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_sources_stay_below_the_root(rules, case):
    with pytest.raises(SpecRefused) as refused:
        options(rules, source=HOSTILE[case])
    ((field, reason),) = refused.value.violations
    assert field == "source"
    assert len(reason) < 300


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "none.txt", "a.txt:b.txt", "", "a.txt@0", "x" * 9999]
)
def test_calibration_texts_stay_below_their_root(rules, name):
    with pytest.raises(SpecRefused) as refused:
        options(rules, calibration=["a.txt", name])
    assert refused.value.violations[0][0] == "calibration[1]"


@pytest.mark.parametrize("name", ["x//y@2", "x/./y@2", "./x/y@2"])
def test_the_text_that_is_checked_is_the_one_that_is_read(rules, tmp_path, name):
    (tmp_path / "texts" / "x").mkdir()
    (tmp_path / "texts" / "x" / "y").write_text("")
    os.symlink("/etc/passwd", tmp_path / "texts" / "x" / "yy")
    with pytest.raises(SpecRefused, match="no path below the root"):
        options(rules, calibration=[name])
    assert options(rules, calibration=["x/y@2"])["calibration"] == f"{tmp_path}/texts/x/y@2"


def test_without_a_calibration_root_no_text_is_named(rules):
    bare = Rules(Places(rules.places.sources, rules.places.artifacts), ("cpu",))
    with pytest.raises(SpecRefused, match="no calibration root"):
        options(bare, calibration=["a.txt"])
    with pytest.raises(SpecRefused, match="more than 64"):
        options(rules, calibration=["a.txt"] * 65)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * (1 << 20)}, "name"),
        ({"group_size": 7}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"samples": 2**32 - 1}, "samples"),
        ({"samples": 0}, "samples"),
        ({"sequence_length": 2**32 - 1}, "sequence_length"),
        ({"seed": 2**64}, "seed"),
        ({"evaluation_tokens": 2**32 - 1}, "evaluation_tokens"),
        ({"calibration_tokens": 2**64 - 1}, "calibration_tokens"),
        ({"max_perplexity_increase": float("nan")}, "max_perplexity_increase"),
        ({"max_perplexity_increase": float("inf")}, "max_perplexity_increase"),
        ({"max_perplexity_increase": -0.5}, "max_perplexity_increase"),
        ({"max_kl": float("nan")}, "max_kl"),
        ({"max_kl": -1.0}, "max_kl"),
        ({"threads": 0}, "threads"),
        ({"format": "gguf"}, "format"),
        ({"format": "x" * 100}, "format"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_absurd_values_are_named(rules, spec, field):
    with pytest.raises(SpecRefused) as refused:
        options(rules, **spec)
    assert refused.value.violations[0][0] == field
    assert len(str(refused.value)) < 400


def test_everything_wrong_is_told_at_once(rules):
    with pytest.raises(SpecRefused) as refused:
        options(rules, source="../x", calibration=["../y"], format="x" * 100)
    assert [field for field, _ in refused.value.violations] == ["source", "calibration[0]", "format"]


REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_the_hub_is_for_those_who_allow_it(rules, tmp_path):
    spec = {"source": "org/model", "revision": REVISION}
    with pytest.raises(SpecRefused, match="nothing from the hub"):
        options(rules, **spec)
    places = Places(rules.places.sources, rules.places.artifacts, hub_cache=tmp_path)
    open_rules = Rules(places, ("cpu",), can_use_hub=True)
    for wrong in (
        {"source": "org"},
        {"source": "../x"},
        {"source": "a/b/c"},
        {"revision": "main"},
        {"revision": ""},
    ):
        with pytest.raises(SpecRefused):
            options(open_rules, **{**spec, **wrong})
    assert needs_network(spec)
    if "revision" in QuantizerConfig.__dataclass_fields__:
        assert options(open_rules, **spec)["hub_cache"] == str(tmp_path)


def test_devices(rules):
    gpus = Rules(rules.places, ("cuda:0", "cuda:1"))
    assert wanted_device({}, gpus) == ""
    assert wanted_device({"device": "cuda"}, gpus) == "cuda"
    assert wanted_device({"device": "cuda:1"}, gpus) == "cuda:1"
    for device, given in (("cpu", gpus), ("cuda:2", gpus), ("cuda", rules), ("", None)):
        if given is not None:
            with pytest.raises(SpecRefused, match="is none of"):
                wanted_device({"device": device}, given)
