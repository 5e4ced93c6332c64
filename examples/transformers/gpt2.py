"""Hugging Face's GPT-2, made from a config, on bytes: what its users write, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transformers import GPT2Config, GPT2LMHeadModel


def model(**options: Any) -> GPT2LMHeadModel:
    """The model with new weights. options: GPT2Config's; a token is a byte."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=10, eos_token_id=10, **options))


def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    """The sum over the tokens predicted in a batch [samples, length + 1], and their number.

    The model shifts labels itself, and gives the mean; without the key-value cache, which is for generating.
    """
    count = batch[:, 1:].numel()
    return model(input_ids=batch, labels=batch, use_cache=False).loss * count, count


@torch.no_grad()
def sample(model: GPT2LMHeadModel, prompt: str = "def ", length: int = 200) -> str:
    """The prompt and `length` more bytes, the likeliest each; the model is left in the mode that it was in."""
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
