"""LoRA with peft: a frozen base model in bf16, and adapters in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def model(folder: str | None = None, rank: int = 8, targets: Sequence[str] = ("q_proj", "v_proj")) -> PeftModel:
    """Adapters of rank `rank` on the model in `folder`, or on a small new Llama over bytes if there is no folder.

    The base model stays in bf16, because frozen parameters keep their dtype at every precision of the recipe.
    """
    if folder is None:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=10, eos_token_id=10, **sizes, **heads))
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    return get_peft_model(base.to(torch.bfloat16), config)
