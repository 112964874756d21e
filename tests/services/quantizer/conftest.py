"""Small random models with everything that the real ones have: grouped heads, biases, odd norms, tied
embeddings.
"""

import json
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from services.quantizer import calibration

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "models" / "demo"
LONG_TEXT = 50_000
"""Characters from which a text is one of the bundled ones."""


@pytest.fixture(scope="session", autouse=True)
def _bundled_texts_are_encoded_once() -> Iterator[None]:
    """A run of a tiny model spends more time on the ids of the bundled texts than on the model. The same
    tokenizer gives the same text the same ids; all other texts are encoded as ever.
    """
    known: dict[tuple[bytes, str], tuple[calibration.Ids, calibration.Ids]] = {}
    encode = calibration._stream

    def remember(tokenizer, text, prefix):
        if not isinstance(text, str) or len(text) < LONG_TEXT:
            return encode(tokenizer, text, prefix)
        key = (blake2b(tokenizer.to_str().encode()).digest(), text)
        if key not in known:
            known[key] = encode(tokenizer, text, prefix)
        return tuple(ids.copy() for ids in known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_stream", remember)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Small operations on two threads of a busy machine wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_checkpoint(tmp_path):
    """make_checkpoint("Llama" | "Qwen2", dtype, **config) -> directory of a random checkpoint with the demo's
    tokenizer.
    """

    def make(family="Llama", dtype=torch.bfloat16, **changes):
        values = {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
        config = getattr(transformers, f"{family}Config")(**values)
        torch.manual_seed(7)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.2, 2.0)
                    parameter[3], parameter[5] = 0.0, 1e-3
                else:
                    parameter.normal_(std=0.15)
        directory = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        tensors = {
            name: tensor.to(dtype).contiguous()
            for name, tensor in model.state_dict().items()
            if not (values["tie_word_embeddings"] and name == "lm_head.weight")
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        document = {**values, "architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
        (directory / "config.json").write_text(json.dumps({**document, "rms_norm_eps": 1e-6}))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(DEMO / name, directory / name)
        return directory

    return make


@pytest.fixture
def transformers_logits():
    """transformers_logits(directory, token_ids, replaced) -> fp32 logits of the library's own whole model."""

    def compute(directory, token_ids, replaced=None):
        with torch.inference_mode():
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            if replaced:
                missing = set(replaced) - set(model.state_dict())
                assert not missing
                model.load_state_dict({**model.state_dict(), **replaced})
            return model(token_ids).logits

    return compute
