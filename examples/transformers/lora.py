"""LoRA through peft: a frozen base in bf16, adapters in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def model(folder: str | None = None, rank: int = 8, targets: Sequence[str] = ("q_proj", "v_proj")) -> PeftModel:
    """Adapters of `rank` on the model in `folder`; without one, on a small new Llama over bytes.

    The base is in bf16: frozen parameters keep their dtype, whatever the recipe's precision.
    """
    if folder is None:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=10, eos_token_id=10, **sizes, **heads))
    else:
        base = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    return get_peft_model(base.to(torch.bfloat16), config)
