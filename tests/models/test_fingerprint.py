"""A network's fingerprint depends on what it computes, and on nothing else."""

import copy

import pytest
import torch
from torch import nn

from wuerstchen_pl.distributed.sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm
from wuerstchen_pl.models.compressor import ConvBackbone, SemanticCompressor
from wuerstchen_pl.models.fingerprint import encoder_fingerprints, network_fingerprint
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.words import Word


def compressor(**changes: float) -> SemanticCompressor:
    torch.manual_seed(0)
    return SemanticCompressor(backbone=ConvBackbone(width=4, depth=2), latent_channels=4, **changes)


def test_a_copy_has_the_same_fingerprint_in_any_mode_and_memory_format() -> None:
    one = compressor()
    other = copy.deepcopy(one).eval().requires_grad_(False)
    for parameter in other.parameters():  # as a file may store it
        parameter.data = parameter.data.contiguous(memory_format=torch.preserve_format).clone()
    assert network_fingerprint(one) == network_fingerprint(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.mapper.weight.data[0, 0].add_(1e-6),
        lambda net: net.norm.running_mean[0].add_(1e-6),
        lambda net: setattr(net, "resize", 0.5),
        lambda net: setattr(net.backbone.layers, "2", torch.nn.ReLU()),
        lambda net: net.half(),
    ],
    ids=["weight", "statistics", "resize", "activation", "type"],
)
def test_a_network_that_computes_something_else_has_another_fingerprint(change: object) -> None:
    one, other = compressor(), compressor()
    change(other)
    assert network_fingerprint(one) != network_fingerprint(other)


def test_a_text_encoders_fingerprint_depends_on_its_heads_tokens_and_words() -> None:
    def fingerprint(heads: int = 2, same_tokens: bool = True, word: float | None = None) -> str:
        torch.manual_seed(0)
        text = TextEncoder(width=16, depth=1, num_heads=heads)
        text.set_words([] if word is None else [Word("<rex>", torch.full((1, 16), word))])
        if not same_tokens:
            encode = text.tokenizer.encode
            text.tokenizer.encode = lambda caption: encode(caption.swapcase()[:9])
        stage = type("StageB", (), {"encoding": compressor()})
        return encoder_fingerprints("c", encoder=stage, text_encoder=text)["text_encoder"]

    assert fingerprint() == fingerprint()
    changed = [fingerprint(heads=4), fingerprint(same_tokens=False)]
    changed += [fingerprint(word=1.0), fingerprint(word=2.0)]
    assert len({fingerprint(), *changed}) == 5


def test_a_synchronized_batch_norm_has_the_fingerprint_of_a_plain_one() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = network_fingerprint(plain)
    assert network_fingerprint(convert_sync_batchnorm(plain)) == before
    assert type(plain[1]) is SyncBatchNorm2d
