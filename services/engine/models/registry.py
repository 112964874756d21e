"""Which class runs which architecture of config.json. Knows names only."""

from __future__ import annotations

from services.engine.models.fields import ConfigError
from services.engine.models.gemma2 import Gemma2
from services.engine.models.gemma3 import Gemma3
from services.engine.models.internlm2 import InternLM2
from services.engine.models.internlm3 import InternLM3
from services.engine.models.llama import Llama
from services.engine.models.mistral import Mistral
from services.engine.models.phi3 import Phi3
from services.engine.models.qwen2 import Qwen2
from services.engine.models.qwen3 import Qwen3

ARCHITECTURES: dict[str, type[Llama]] = {
    "Gemma2ForCausalLM": Gemma2,
    "Gemma3ForCausalLM": Gemma3,
    "InternLM2ForCausalLM": InternLM2,
    "InternLM3ForCausalLM": InternLM3,
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "Phi3ForCausalLM": Phi3,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
}


def model_class(architecture: str) -> type[Llama]:
    """The class for one entry of `architectures`. Raises ConfigError."""
    try:
        return ARCHITECTURES[architecture]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(
            f"config.json: architecture {architecture!r:.80} is not supported ({known} are)"
        ) from None
