"""Textual inversion: the vectors of new words get the exact gradient, and nothing else changes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.stages.conftest import CAPTIONS, fit, stage_b, stage_c, training
from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.b import StageB
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.data_checks import check_cache
from wuerstchen_pl.stages.stage import Batch, Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode")
WORD = "<rex>"
WITH_WORD = [f"a {WORD} bear", WORD, "green frog", f"{WORD} and frog"]


def of_model(network: Any, noise: float = 0.05) -> Any:
    """A network as if it was read from a model; with noise, as some weights are 0 at first."""
    network.source = Source(path="model", sha256="0")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return network.eval()


def encoder() -> TextEncoder:
    return of_model(TextEncoder(width=16, depth=1, num_heads=2, context_length=8))


def learning_c(**options: Any) -> StageC:
    torch.manual_seed(1)
    prior = of_model(Prior(width=32, depth=2, num_heads=2, text_dim=16, dropout=0.1))
    words = NewWords(text=WORD, init="black bear", num_vectors=2)
    return stage_c(
        **{
            "prior": prior, "text_encoder": encoder(), "train_text_encoder": False, "words": words,
            "caption_drop_prob": 0.0, **options,
        }
    )  # fmt: skip


def learning_b(**options: Any) -> StageB:
    torch.manual_seed(1)
    diffnext = DiffNeXt(
        widths=[16, 24], num_blocks=[1, 1], num_heads=[None, 2],
        inject_semantic=[True, True], cond_dim=8, text_dim=16, dropout=0.0,
    )  # fmt: skip
    words = NewWords(text=WORD, init="black bear", num_vectors=2)
    return stage_b(
        **{
            "diffnext": of_model(diffnext), "text_encoder": encoder(), "words": words,
            "text_drop_prob": 0.0, **options,
        }
    )  # fmt: skip


LEARNING: dict[str, Any] = {"c": learning_c, "b": learning_b}


def losses(stage: Any, batch: Batch) -> Tensor:
    """The loss of each sample at a fixed time, with fixed noise."""
    x0, text = stage.latents(batch), encode_captions(batch, stage.text)
    rng = torch.Generator().manual_seed(2)
    noise = torch.randn(x0.shape, generator=rng).to(x0)
    t = torch.linspace(0.3, 0.7, len(x0))
    semantic = [] if isinstance(stage, StageC) else [stage.semantic(batch)]
    return stage.loss(x0, t, noise, *semantic, text)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["b", "c"])
def test_the_gradient_is_the_derivative_of_the_loss(name: str, cached: bool, batch: Batch) -> None:
    """Along the gradient itself, and in other directions."""
    stage = LEARNING[name]()
    batch = cast(Batch, {**batch, "caption": WITH_WORD})
    if cached:
        key = {"b": "latents", "c": "semantic"}[name]
        batch = cast(Batch, {**batch, key: stage.latents(batch)})
    vectors: nn.Parameter = stage.words[0].vectors
    losses(stage, batch).sum().backward()
    gradient = cast(Tensor, vectors.grad)
    rng = torch.Generator().manual_seed(3)
    directions = [gradient, *torch.randn(3, *gradient.shape, generator=rng)]
    with torch.no_grad():
        center, step = vectors.clone(), 0.02
        for direction in directions:
            unit = direction / direction.norm()
            values = []
            for sign in (1, -1):
                vectors.copy_(center + sign * step * unit)
                values.append(float(losses(stage, batch).sum()))
            derivative = (values[0] - values[1]) / (2 * step)
            tolerance = 0.02 * float(gradient.norm())
            assert float((gradient * unit).sum()) == pytest.approx(derivative, abs=tolerance)


@pytest.mark.parametrize("name", ["b", "c"])
def test_only_the_vectors_change_and_are_saved(name: str, batch: Batch) -> None:
    stage = LEARNING[name]()
    networks = {**stage.frozen.present(), **dict(stage.named_children())}
    del networks["words"]
    before = {
        f"{part}.{key}": tensor.clone()
        for part, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    start = stage.words[0].vectors.detach().clone()
    trainer = fit(stage, cast(Batch, {**batch, "caption": WITH_WORD}), 2)
    for part, network in networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[f"{part}.{key}"]), (part, key)
    assert not torch.equal(stage.words[0].vectors, start)
    parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert [id(p) for p in parameters] == [id(stage.words[0].vectors)]
    assert stage.state_dict().keys() == stage.ema.shadow.keys() == {"words.0.vectors"}
    gradients = [p.grad for n in networks.values() for p in n.parameters() if p.grad is not None]
    assert gradients == []


def test_a_state_is_loaded_without_the_base_model() -> None:
    stage, other = learning_c(), learning_c()
    nn.init.normal_(stage.words[0].vectors)  # type: ignore[union-attr, index]
    other.load_state_dict(stage.state_dict(), assign=True)
    assert torch.equal(other.text([WORD]), stage.text([WORD]))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"words.0.vectors\""):
        other.load_state_dict({})


def test_captions_without_the_word_give_gradients_of_zero(batch: Batch) -> None:
    """Not of None, as two processes wait for each other's."""
    stage = learning_c()
    losses(stage, batch).sum().backward()
    vectors = stage.words[0].vectors  # type: ignore[index]
    assert torch.equal(cast(Tensor, vectors.grad), torch.zeros(2, 16))


@pytest.mark.slow
def test_a_word_learns_an_image_and_captions_without_it_keep_their_loss(batch: Batch) -> None:
    """The image of a caption that the model knows, so that the word should mean the same."""
    target = torch.randn(4, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    captioned = cast(Batch, {"semantic": target, "caption": CAPTIONS})
    base = stage_c(caption_drop_prob=0.0)
    fit(base, captioned, 200)
    stage = learning_c(
        prior=of_model(base.prior, noise=0.0),
        text_encoder=of_model(base.text_encoder, noise=0.0),
        words=NewWords(text=WORD, init="green frog", num_vectors=2),
        **training(0.03),
    )
    image = {"semantic": target[:1].expand(16, -1, -1, -1)}

    def loss_of(caption: str) -> float:
        with torch.no_grad():
            return float(losses(stage, cast(Batch, {**image, "caption": [caption] * 16})).mean())

    known_loss, start, of_frog = loss_of(CAPTIONS[0]), loss_of(WORD), loss_of("green frog")
    assert start == of_frog > 2 * known_loss
    fit(stage, cast(Batch, {**image, "caption": [WORD] * 16}), 100)
    assert loss_of(WORD) < known_loss + 0.1 * (start - known_loss)
    assert (loss_of(CAPTIONS[0]), loss_of("green frog")) == (known_loss, of_frog)


def test_a_word_and_an_adapter_are_trained_together(batch: Batch) -> None:
    stage = learning_c(adapter=Adapter(rank=2))
    base = {n: p.clone() for n, p in stage.prior.named_parameters() if not p.requires_grad}
    start = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    fit(stage, cast(Batch, {**batch, "caption": WITH_WORD}), 2)
    after = stage.state_dict()
    assert after.keys() == stage.ema.shadow.keys()
    assert {"lora_" in name for name in after.keys() - {"words.0.vectors"}} == {True}
    assert not any(torch.equal(after[name], start[name]) for name in after)
    assert all(torch.equal(p, base[n]) for n, p in stage.prior.named_parameters() if n in base)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (learning_c, {"train_text_encoder": True}, "words need a frozen text encoder"),
        (
            learning_c,
            {"text_adapter": Adapter(rank=2, targets=["*.attn.*"])},
            "set train_text_encoder=false and text_adapter=null",
        ),
        (learning_c, {"prior": Prior(width=32, depth=1, num_heads=2, text_dim=16)}, "base model"),
        (learning_b, {"text_encoder": None}, "text_dim=16 and text_encoder disagree"),
    ],
)
def test_what_no_word_can_be_trained_with_is_refused(
    build: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_cache_with_text_embeddings_is_refused() -> None:
    cache: Any = SimpleNamespace(made_with={"text_encoder": "a"})
    with pytest.raises(ValueError, match="is a cache with text embeddings"):
        check_cache(learning_c(), cache)


def test_a_stage_b_without_text_is_refused() -> None:
    diffnext: Stage = of_model(
        DiffNeXt(
            widths=[16, 24], num_blocks=[1, 1], num_heads=[None, 2],
            inject_semantic=[True, True], cond_dim=8,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="this Stage B reads no text; use stage=c"):
        learning_b(diffnext=diffnext, text_encoder=None)
