"""Text encoders are read from both of the classes that transformers saves."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from wuerstchen_pl.formats import clip


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_both_text_models_of_transformers_are_read(kind: type, tmp_path: Path) -> None:
    """The projection is not used by Stage B or C and is dropped."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=16, projection_dim=32,
    )  # fmt: skip
    model = kind(config)
    model.save_pretrained(tmp_path)
    part = clip.read_text_encoder(tmp_path)
    expected = {
        name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()
    }
    embedding = part.tensors["tower.token_embedding.weight"].load()
    assert torch.equal(embedding, expected["embeddings.token_embedding.weight"])
    assert not any("projection" in name for name in part.tensors if "in_proj" not in name)
