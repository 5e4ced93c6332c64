"""A small GPT over bytes or other tokens: model, loss, learning-rate schedule and sampler, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then a two-layer network, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.network_norm = nn.LayerNorm(width)
        self.network_up = nn.Linear(width, 4 * width)
        self.network_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length, width] to the same shape."""
        x = x + self._drop(self.attention_out(self._attention(self.attention_norm(x))))
        return x + self._drop(self.network_out(F.gelu(self.network_up(self.network_norm(x)))))

    def _attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        if x.device.type == "cpu":
            heads = heads.float()  # on CPUs torch's bf16 attention takes two to three times as long as its fp32 one
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, width).to(x.dtype)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """Predicts the next token at each position.

    The input at a position is the sum of the embeddings of its token, of the position, and of the `recent` tokens
    before it. Attention therefore need not learn to find these tokens, which would take most of a short training, and
    samples soon contain words. If `tied`, the output layer shares its weights with the token embedding.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        length: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        recent: int = 3,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} can't be divided among {heads} heads: make it a multiple of {heads}")
        self.vocabulary, self.length, self.recent, self.dropout = vocabulary, length, recent, dropout
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.recent_embedding = nn.Embedding(recent * vocabulary, width) if recent else None  # a table per distance
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token_embedding.weight
        self._initialise(width, depth)

    def _initialise(self, width: int, depth: int) -> None:
        spread = 0.7 / math.sqrt(width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif parameter is self.head.weight:  # small, so that at first all tokens are about equally likely
                nn.init.normal_(parameter, std=0.02)
            elif "embedding" in name:
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith("_out.weight"):  # the outputs of 2 x depth of these are added on the residual path
                nn.init.normal_(parameter, std=spread / math.sqrt(2 * depth))
            else:
                nn.init.normal_(parameter, std=spread)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [batch, length] to logits [batch, length, vocabulary]."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(length, device=tokens.device))
        for distance in range(1, self.recent + 1):
            before = F.pad(tokens, (distance, 0))[:, :length]
            x = x + self.recent_embedding(before + (distance - 1) * self.vocabulary)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    """The sum of the cross entropies (nats, fp32) of a batch [samples, length + 1], and the number of its targets."""
    targets = batch[:, 1:]
    logits = model(batch[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def warmup_cosine(optimizer: Optimizer, warmup: int, steps: int, floor: float = 0.1) -> LambdaLR:
    """A linear rise over `warmup` steps, then half a cosine period down to `floor` times the peak at step `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def sample(
    model: GPT,
    prompt: str = "def ",
    length: int = 400,
    temperature: float = 0.8,
    top_k: int = 20,
    seed: int = 0,
    tokenizer: str | None = None,
) -> str:
    """The prompt and `length` more tokens that the model generates, as text.

    The same weights and seed give the same text. Tokens are bytes, or the tokens of `tokenizer`, a file of Hugging
    Face's tokenizers library. The model sees a sliding window of the last `model.length` tokens. The model's training
    mode and torch's global random state stay as they were.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    encode, decode = _bytes if tokenizer is None else _tokens_of(tokenizer)
    tokens = encode(prompt) or encode("\n")
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for _ in range(length):
            window = torch.tensor([tokens[-model.length :]], device=device)
            logits = model(window)[0, -1].float().cpu() / temperature  # drawn on CPU: the same on every device
            best, candidates = logits.topk(min(top_k, len(logits)))
            choice = torch.multinomial(best.softmax(0), 1, generator=generator)
            tokens.append(int(candidates[choice]))
    finally:
        for module, mode in training.items():
            module.training = mode
    return decode(tokens)


def _tokens_of(file: str) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode


_bytes = (lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode(errors="replace"))
