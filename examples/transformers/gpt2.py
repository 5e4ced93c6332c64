"""Hugging Face's GPT-2, built from a config, on bytes. Nothing in this file is specific to Manyhands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transformers import GPT2Config, GPT2LMHeadModel


def model(**options: Any) -> GPT2LMHeadModel:
    """The model with new weights. Each token is a byte. options: further arguments of GPT2Config."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=10, eos_token_id=10, **options))


def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    """The sum of the losses of all tokens predicted in a batch [samples, length + 1], and the number of these tokens.

    The model shifts the labels itself and returns the mean loss. The key-value cache is off: only generation needs it.
    """
    count = batch[:, 1:].numel()
    return model(input_ids=batch, labels=batch, use_cache=False).loss * count, count


@torch.no_grad()
def sample(model: GPT2LMHeadModel, prompt: str = "def ", length: int = 200) -> str:
    """The prompt and `length` more bytes, each the most likely one. Restores the model's training mode."""
    training = model.training
    model.eval()
    try:
        tokens = torch.tensor([list(prompt.encode())], device=model.device)
        for _ in range(length):
            window = tokens[:, -model.config.n_positions :]
            following = model(input_ids=window, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    finally:
        model.train(training)
    return bytes(tokens[0].tolist()).decode(errors="replace")
