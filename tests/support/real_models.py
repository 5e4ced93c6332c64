"""Models as users bring them, each built from a small config: Hugging Face, torchvision, peft, Keras, and one by hand.

Nothing is fetched: the hub is told to be offline before transformers is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KERAS_BACKEND"] = "torch"

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import manyhands as mh

VOCABULARY, LENGTH = 97, 12
Loss = Callable[[nn.Module, Any], Any]


class Sequences(Dataset[dict[str, Tensor]]):
    """Tokens as transformers' models require them; a fifth of the labels is ignored (-100)."""

    def __init__(self, masked: bool = False) -> None:
        self._masked = masked

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        positions = torch.arange(LENGTH)
        tokens = (positions * (index % 7 + 1) + index * index + positions * positions // 3) % (VOCABULARY - 4) + 4
        asked = (positions + index) % 5 > 0
        labels = torch.where(asked, tokens, -100)
        if not self._masked:
            return {"input_ids": tokens, "labels": labels}
        kinds = (positions >= LENGTH // 2).long()
        return {"input_ids": torch.where(asked, 3, tokens), "token_type_ids": kinds, "labels": labels}


class Pairs(Sequences):
    """An input sequence, and half of it in reverse order as the output."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = super().__getitem__(index)["input_ids"]
        return {"input_ids": tokens, "labels": tokens[::2].flip(0)}


class Images(Dataset[tuple[Tensor, int]]):
    """Images 3 x 16 x 16 with one of 5 labels."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)), index % 5


def adamw(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Weight decay reveals an update of a parameter without a gradient."""
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def recipe(model: Callable[[], nn.Module], loss: Loss, data: Any, precision: str, **changes: Any) -> mh.Recipe:
    """8 samples a step in 4 micro-batches of 2, which can't be divided evenly among 3 workers."""
    fields = {"optimizer": adamw, "batch": mh.Batch(global_size=8, micro_size=2), "clip_norm": 1.0, "seed": 3}
    return mh.Recipe(model=model, loss=loss, data=data, precision=precision, **fields | changes)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss that a transformers model computes from labels: a mean."""
    return model(**batch).loss


def own_loss_by_token(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the same loss as (sum, weight): exact for micro-batches with unequal numbers of labels."""
    count = int((batch["labels"][:, 1:] != -100).sum())
    return model(**batch, use_cache=False).loss * count, count


def gpt2(precision: str) -> mh.Recipe:
    """Tied embeddings, dropout in four places."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return recipe(lambda: GPT2LMHeadModel(config), own_loss_by_token, Sequences(), precision)


def llama(precision: str) -> mh.Recipe:
    """Grouped-query attention, rotary embeddings, attention dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=0.1,
    )
    return recipe(lambda: LlamaForCausalLM(config), own_loss, Sequences(), precision)


def llama_checkpointed(precision: str) -> mh.Recipe:
    """Llama with activation checkpointing, enabled as its users do."""
    plain = llama(precision)

    def model() -> nn.Module:
        built = plain.model()
        built.gradient_checkpointing_enable()  # type: ignore[operator]
        return built

    return recipe(model, own_loss_by_token, Sequences(), precision)


def bert(precision: str) -> mh.Recipe:
    """A masked-language model with token types and dropout; it has no pooler, and its decoder is tied."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
    )
    return recipe(lambda: BertForMaskedLM(config), own_loss, Sequences(masked=True), precision)


def t5(precision: str) -> mh.Recipe:
    """Encoder and decoder with shared embeddings; relative positions in the first block of each alone."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return recipe(lambda: T5ForConditionalGeneration(config), own_loss, Pairs(), precision)


def vit(precision: str) -> mh.Recipe:
    """Pictures in patches, with dropout. The pictures are cast to what the model computes in."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.1,
        num_labels=5,
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(model(pictures.to(model.dtype)).logits.float(), labels)  # type: ignore[arg-type]

    return recipe(lambda: ViTForImageClassification(config), loss, Images(), precision)


def mixtral(precision: str) -> mh.Recipe:
    """Eight experts, one for each token: with 24 tokens in a micro-batch some go unused. With the router's own loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=1,
        max_position_embeddings=LENGTH,
        output_router_logits=True,
    )
    return recipe(lambda: MixtralForCausalLM(config), own_loss, Sequences(), precision)


def resnet(precision: str) -> mh.Recipe:
    """torchvision's ResNet, its last layers cut off and with another head: batch norms with their statistics."""
    import torchvision

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(model(pictures.to(model.fc.weight.dtype)).float(), labels)  # type: ignore[union-attr, arg-type]

    def model() -> nn.Module:
        net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
        return net

    return recipe(
        model, loss, Images(), precision, optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)
    )


def lora(precision: str, base_dtype: torch.dtype = torch.float32) -> mh.Recipe:
    """Adapters through peft on a frozen Llama. With a bf16 base peft keeps the adapters in fp32."""
    from peft import LoraConfig, get_peft_model

    plain = llama("fp32")

    def model() -> nn.Module:
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return get_peft_model(plain.model().to(base_dtype), config)  # type: ignore[arg-type]

    return recipe(model, own_loss, Sequences(), precision)


def lora_on_bf16(precision: str) -> mh.Recipe:
    """The usual mixture: frozen base in bf16, adapters in fp32."""
    return lora(precision, torch.bfloat16)


def keras(precision: str) -> mh.Recipe:
    """A Keras model with batch norm, whose statistics are frozen parameters, and dropout."""
    import keras as k

    def model() -> nn.Module:
        k.utils.clear_session()  # Keras numbers its layers per process: otherwise names would differ
        layers, policy = k.layers, "mixed_bfloat16" if precision == "bf16" else "float32"
        return k.Sequential(
            [
                layers.Input((16, 16, 3)),
                layers.Conv2D(8, 3, strides=2, use_bias=False, dtype=policy),
                layers.BatchNormalization(dtype=policy),
                layers.ReLU(),
                layers.Dropout(0.2),
                layers.Flatten(),
                layers.Dense(5, dtype=policy),
            ]
        )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(model(pictures.permute(0, 2, 3, 1), training=True).float(), labels)

    return recipe(model, loss, Images(), precision)


class Winding(nn.Module):
    """Data-dependent branches and loops, a block used twice, one skipped at times, layers dropped at random."""

    def __init__(self) -> None:
        super().__init__()
        width = 24
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.twice, self.rare = self._block(width), self._block(width)
        self.layers = nn.ModuleList(self._block(width) for _ in range(3))
        self.either = nn.ModuleDict({"odd": nn.Linear(width, width), "even": nn.Linear(width, width)})
        self.head = nn.Linear(width, VOCABULARY)

    @staticmethod
    def _block(width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + self.twice(x)
        for _ in range(int(input_ids[0, 0]) % 3):
            x = x + self.twice(x) / 2
        if int(input_ids.sum()) % 4 == 0:
            x = x + self.rare(x)
        for layer in self.layers:
            if torch.rand(()) > 0.3:
                x = x + layer(x)
        x = self.either["odd" if int(input_ids[0, 1]) % 2 else "even"](x)
        return self.head(x + self.twice(x)).float()


def winding(precision: str) -> mh.Recipe:
    """The model with complex control flow."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"]).transpose(1, 2), batch["labels"])

    return recipe(Winding, loss, Sequences(), precision)


RECIPES: dict[str, Callable[[str], mh.Recipe]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama checkpointed": llama_checkpointed,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    "resnet": resnet,
    "lora": lora,
    "lora on bf16": lora_on_bf16,
    "keras": keras,
    "winding": winding,
}
