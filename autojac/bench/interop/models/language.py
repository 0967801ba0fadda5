"""Cases of transformers and einops: sequences of embeddings, differentiated in the embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autojac.bench.interop.case import Built, case

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def encoder(model: nn.Module, width: int = 32, samples: int = 8, length: int = 6) -> Built:
    """Return the mean over a sequence of what a model makes of its embeddings, its first 8 coordinates."""
    model = model.eval()

    def func(embeddings: Tensor) -> Tensor:
        hidden: Tensor = model(inputs_embeds=embeddings).last_hidden_state
        return hidden.mean(1)[:, :8]

    return Built(func, torch.randn(samples, length, width), model)


@case("transformers/bert", trains=True)
def bert() -> Built:
    from transformers import BertConfig, BertModel

    return encoder(BertModel(BertConfig(**SMALL)))


@case("transformers/roberta", trains=True)
def roberta() -> Built:
    from transformers import RobertaConfig, RobertaModel

    return encoder(RobertaModel(RobertaConfig(**SMALL)))


@case("transformers/distilbert", trains=True)
def distilbert() -> Built:
    from transformers import DistilBertConfig, DistilBertModel

    return encoder(DistilBertModel(DistilBertConfig(vocab_size=40, dim=32, hidden_dim=48, n_layers=2, n_heads=4)))


@case("transformers/gpt2", trains=True)
def gpt2() -> Built:
    from transformers import GPT2Config, GPT2Model

    return encoder(GPT2Model(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16)))


@case("transformers/llama", trains=True)
def llama() -> Built:
    from transformers import LlamaConfig, LlamaModel

    return encoder(LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=2)))


@case("transformers/mistral", trains=True)
def mistral() -> Built:
    from transformers import MistralConfig, MistralModel

    return encoder(MistralModel(MistralConfig(**SMALL, num_key_value_heads=2)))


@case("transformers/mamba", trains=True)
def mamba() -> Built:
    from transformers import MambaConfig, MambaModel

    return encoder(MambaModel(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)), 16, 4)


@case("transformers/t5-encoder", trains=True)
def t5() -> Built:
    from transformers import T5Config, T5EncoderModel

    return encoder(T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)))


@case("transformers/vit", trains=True)
def vit() -> Built:
    from transformers import ViTConfig, ViTModel

    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    return Built(lambda x: model(pixel_values=x).last_hidden_state[:, 0, :8], torch.randn(8, 3, 8, 8), model)


@case("transformers/bert-sdpa-masked", trains=True)
def masked_bert() -> Built:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SMALL)).eval()
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[:, 4:] = 0

    def func(embeddings: Tensor) -> Tensor:
        hidden: Tensor = model(inputs_embeds=embeddings, attention_mask=mask[: len(embeddings)]).last_hidden_state
        return hidden[:, 0, :8]

    return Built(func, torch.randn(8, 6, 32), model)


@case("einops/rearrange")
def einops_rearrange() -> Built:
    from einops import rearrange, reduce, repeat

    def func(x: Tensor) -> Tensor:
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        pooled = reduce(patches.sin(), "b n d -> b d", "mean")
        return rearrange(repeat(pooled, "b d -> b k d", k=2) * torch.arange(1.0, 3.0)[:, None], "b k d -> b (k d)")

    return Built(func, torch.randn(16, 2, 8, 8))


@case("einops/layers", trains=True)
def einops_layers() -> Built:
    from einops.layers.torch import Rearrange, Reduce

    model = nn.Sequential(
        Rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        nn.Linear(8, 16),
        nn.GELU(),
        Reduce("b n d -> b d", "mean"),
        nn.Linear(16, 6),
    )
    return Built(model, torch.randn(16, 2, 8, 8), model)


@case("einops/mixer", trains=True)
def einops_mixer() -> Built:
    from einops.layers.torch import EinMix

    model = nn.Sequential(
        EinMix("b n d -> b n e", weight_shape="d e", bias_shape="e", d=8, e=16),
        nn.Tanh(),
        EinMix("b n e -> b m e", weight_shape="n m", n=6, m=4),
        nn.Tanh(),
        EinMix("b m e -> b f", weight_shape="m e f", bias_shape="f", m=4, e=16, f=5),
    )
    return Built(model, torch.randn(16, 6, 8), model)
