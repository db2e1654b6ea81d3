"""A small random model on disk, and models that no test finds loaded."""

from collections.abc import Iterator

import pytest

LAYERS, HEADS, KV_HEADS, SIZE = 2, 6, 2, 8


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random Llama whose maps are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=HEADS * SIZE, intermediate_size=40, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def forget_models() -> Iterator[None]:
    """Drops the model that stands loaded, before and after."""
    from attnlab import models

    models._last.clear()
    yield
    models._last.clear()
