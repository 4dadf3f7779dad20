"""Tiny models with random weights, a tokenizer and data for them, built in code."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


VOCABULARY = 32


def tiny_llama(seed=0, **sizes):
    """Two layers, 16 wide, without dropout, unless other sizes are given; on the device of the context."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    defaults |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes}))


def tiny_lora(seed=0, **options):
    """The same with an adapter of rank 2 on every linear layer."""
    model = tiny_llama(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options))


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=10))


def tiny_mixtral():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, **heads)
    config._experts_implementation = "eager"  # the others know no float64
    return MixtralForCausalLM(config)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def token_blocks(count=48, length=12, seed=1):
    """Random tokens; labels are the tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]
