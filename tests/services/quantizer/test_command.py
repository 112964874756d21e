"""The command: one clear line and the right exit status for whatever is wrong, never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.quantizer.__main__ import join_lists, main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def complain(make_checkpoint, tmp_path, capfd):
    """complain(change, *flags) -> (status, the one line) of a run on a checkpoint after `change`."""

    def attempt(change=None, *flags):
        source = make_checkpoint()
        if change is not None:
            change(source)
        base = ["run", "--source", str(source), "--artifacts", str(tmp_path / "a"), "--name", "tiny"]
        quick = [
            "--samples",
            "2",
            "--sequence-length",
            "64",
            "--evaluation-tokens",
            "0",
            "--group-size",
            "32",
        ]
        try:
            status = main([*base, *quick, *flags])
        except SystemExit as exit:
            status = exit.code
        lines = [line for line in capfd.readouterr().err.splitlines() if line]
        assert "Traceback" not in "".join(lines)
        assert not (tmp_path / "a" / "tiny" / "CURRENT").exists()
        return status, lines[-1]

    return attempt


@pytest.mark.parametrize(
    "flags",
    [
        ("--group-size", "7"),
        ("--group-size", "0"),
        ("--name", "../x"),
        ("--name", "Upper"),
        ("--samples", "0"),
        ("--samples", "-1"),
        ("--sequence-length", "0"),
        ("--threads", "0"),
        ("--seed", "-1"),
        ("--device", "tpu"),
        ("--device", "cudaX"),
        ("--calibration", ""),
        ("--group-size", "many"),
        ("--evaluation-tokens", "-1"),
    ],
)
def test_wrong_flags_end_with_status_2(complain, flags):
    status, line = complain(None, *flags)
    assert status == 2
    assert line.startswith(f"python -m services.quantizer run: {flags[0]}: ")


def edit_config(**changes):
    def change(directory):
        path = directory / "config.json"
        document = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return change


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickle_weights(directory):
    (directory / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"\0" * 100)


BAD_SOURCES = {
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "weights truncated": (truncate, "truncated"),
    "a pickle": (pickle_weights, "pickle"),
    "config missing": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "another directory": (lambda d: [path.unlink() for path in d.iterdir()], "config.json: missing"),
    "the cache, not a snapshot": (
        lambda d: [*(path.unlink() for path in d.iterdir()), (d / "snapshots").mkdir()],
        "give one of the directories in",
    ),
    "tokenizer missing": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "tokenizer broken": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "architecture unknown": (
        edit_config(architectures=["GPT5ForCausalLM"]),
        "GPT5ForCausalLM is not supported",
    ),
    "architecture missing": (edit_config(architectures=None), "is not supported"),
    "architecture a number": (edit_config(architectures=[5]), "is not supported"),
    "quantized already": (edit_config(quantization_config={"bits": 4}), "quantized already"),
    "remote code": (edit_config(architectures=["OddForCausalLM"], auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "wrong shapes": (edit_config(intermediate_size=256), "mlp.gate_proj.weight: shape [128, 64]"),
    "wrong vocabulary": (edit_config(vocab_size=5000), "embed_tokens.weight: shape"),
    "too many layers": (edit_config(num_hidden_layers=3), "no tensor model.layers.2."),
    "too few layers": (edit_config(num_hidden_layers=1), "not a part of"),
    "no layers": (edit_config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "a billion layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "layers a string": (edit_config(num_hidden_layers="2"), "num_hidden_layers"),
    "heads that do not share": (edit_config(num_key_value_heads=3), "cannot share"),
    "rope of zero": (edit_config(rope_theta=0), "rope_theta"),
    "scaling unknown": (edit_config(rope_scaling={"rope_type": "magic", "factor": 2.0}), "config.json"),
    "heads that do not rotate": (edit_config(head_dim=15), "head_dim"),
    "activation unknown": (edit_config(hidden_act="magic"), "config.json"),
    "context shorter than the windows": (edit_config(max_position_embeddings=32), "--sequence-length 64"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_end_with_one_line(complain, case):
    change, expected = BAD_SOURCES[case]
    status, line = complain(change)
    assert status == 1
    assert line.startswith("error: ")
    assert expected in line


BAD_TEXTS = {
    "empty": (b"", "empty"),
    "blank": (b" \n\n ", "empty"),
    "not UTF-8": (b"abc\xff\xfe", "text.txt:1: not UTF-8 at byte 3"),
    "too short": (b"one two three", "fewer tokens"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_calibration_text_ends_with_one_line(complain, tmp_path, case):
    content, expected = BAD_TEXTS[case]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    status, line = complain(None, "--calibration", str(path))
    assert status == 1
    assert expected in line


def test_missing_text_and_source_and_unwritable_volume(complain, tmp_path):
    assert complain(None, "--calibration", str(tmp_path / "none.txt")) == (
        1,
        f"error: {tmp_path}/none.txt: no such file",
    )
    status, line = complain(None, "--source", str(tmp_path / "nowhere"))
    assert status == 1
    assert "no such directory" in line
    (tmp_path / "file").write_text("")
    status, line = complain(None, "--artifacts", str(tmp_path / "file"))
    assert status == 1
    assert "file" in line


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named(complain, name):
    def poison(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors[name].view(-1)[-1] = float("nan")
        save_file(tensors, directory / "model.safetensors")

    status, line = complain(poison)
    assert status == 1
    assert line == f"error: tensor {name} holds values that are not finite"


def test_activations_that_are_not_finite_end_with_one_line(complain):
    def explode(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.0.post_attention_layernorm.weight"].fill_(3e38)
        save_file(tensors, directory / "model.safetensors")

    status, line = complain(explode)
    assert status == 1
    assert "not finite" in line


def test_a_tokenizer_that_panics_ends_with_one_line(complain, monkeypatch):
    class PanicException(BaseException):
        """As the library raises it."""

    class Panics:
        def encode(self, *_arguments, **_options):
            raise PanicException("index out of bounds")

        def get_vocab(self, **_options):
            return {"a": 0}

    monkeypatch.setattr("services.quantizer.inputs.load_tokenizer", lambda _directory: Panics())
    status, line = complain()
    assert status == 1
    assert line == "error: tokenizer.json: the tokenizer failed: index out of bounds"


@pytest.mark.parametrize("template", [b'{"chat_template": "\\ud800"}', b"\xff"])
def test_a_template_that_is_not_text_ends_with_one_line(complain, template):
    name = "tokenizer_config.json" if template.startswith(b"{") else "chat_template.jinja"
    status, line = complain(lambda directory: (directory / name).write_bytes(template))
    assert status == 1
    assert line.endswith("the chat template is not UTF-8")


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
    ],
)
def test_too_little_memory_ends_with_one_line_and_a_bug_with_its_traceback(complain, monkeypatch, message):
    def fail(error):
        def run(*_arguments):
            raise RuntimeError(error)

        monkeypatch.setattr("services.quantizer.job.run", run)

    fail(message)
    assert complain() == (1, f"error: out of memory: {message}")
    fail("shapes do not match")
    with pytest.raises(RuntimeError):
        complain()


def test_evaluation_tokens_too_few_for_a_prediction(complain):
    status, line = complain(None, "--evaluation-tokens", "3")
    assert status == 1
    assert line == "error: --evaluation-tokens 3: too few for 2 texts"


def test_a_text_that_gives_no_window_is_not_ignored(complain, tmp_path):
    (tmp_path / "long.txt").write_text("many words " * 500)
    (tmp_path / "short.txt").write_text("few words")
    for flag in ("--calibration", "--evaluation"):
        paths = (str(tmp_path / "long.txt"), str(tmp_path / "short.txt"))
        status, line = complain(None, flag, *paths, "--evaluation-tokens", "512")
        assert status == 1
        assert f"{flag[2:]} {tmp_path}/short.txt holds fewer tokens" in line


def test_the_module_runs_and_help_names_every_flag():
    done = subprocess.run(
        [sys.executable, "-m", "services.quantizer", "run", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in ("source", "artifacts", "name", "calibration", "samples", "sequence-length", "evaluation"):
        assert f"--{flag}" in done.stdout
    for flag in ("evaluation-tokens", "group-size", "device", "threads", "seed", "force", "skip-indivisible"):
        assert f"--{flag}" in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "services.quantizer", "run", "--bits", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_lists_of_files_may_follow_a_flag_or_come_joined():
    flags = ["--calibration", "a", "b", "--name", "x", "--evaluation", "c", "--calibration=d"]
    assert join_lists(flags) == ["--name", "x", "--calibration", "a:b:d", "--evaluation", "c"]
    assert join_lists(["--calibration", "--seed", "1"]) == ["--seed", "1", "--calibration"]


@pytest.mark.parametrize("arguments", [[], ["walk"], ["--bits"]])
def test_an_unknown_command_ends_with_status_2(arguments, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
    assert main() == main(arguments) == 2
    assert "one of: run, " in capfd.readouterr().err


def test_variables_carry_the_services_name(complain, monkeypatch):
    monkeypatch.setenv("WEFT_SAMPLES", "none of ours")
    monkeypatch.setenv("WEFT_QUANTIZER_DEVICE", "tpu")
    status, line = complain()
    assert status == 2
    assert line.startswith("python -m services.quantizer run: --device: ")


def test_an_up_to_date_artifact_needs_no_torch(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=1)
    flags = [
        "run",
        "--source",
        str(source),
        "--artifacts",
        str(tmp_path / "a"),
        "--name",
        "tiny",
        "--threads",
        "1",
    ]
    flags += ["--samples", "2", "--sequence-length", "64", "--evaluation-tokens", "0", "--group-size", "32"]
    assert main(flags) == 0
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from services.quantizer.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stderr


def test_a_terminated_run_leaves_nothing_behind(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=2)
    command = [sys.executable, "-m", "services.quantizer", "run", "--source", str(source), "--threads", "1"]
    command += ["--artifacts", str(tmp_path / "a"), "--name", "tiny", "--group-size", "32"]
    command += ["--sequence-length", "256"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    directory = tmp_path / "a" / "tiny"
    while time.monotonic() < deadline and not (directory.exists() and os.listdir(directory)):
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors.decode()
    assert b"Traceback" not in errors
    assert all(name.startswith(".work-") for name in os.listdir(directory))


@pytest.mark.parametrize("command", ["run", "import"])
def test_what_a_file_is_called_does_not_drive_the_terminal(tmp_path, capfd, command):
    flags = ["--source", str(tmp_path / "a\x1b[2Jb\u202ec"), "--artifacts", str(tmp_path), "--name", "tiny"]
    assert main([command, *flags]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "a\\x1b[2Jb\\u202ec" in error
