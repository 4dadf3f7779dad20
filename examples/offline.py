"""
Data and a model for the examples that need no network: text that every Python ships, and a byte-level Llama.

With `--model_name_or_path` and `--dataset_name` the examples use the Hub instead, and nothing of this file.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


def standard_library_source(characters: int = 1_600_000) -> DatasetDict:
    """Python code: the standard library's own source, as `train` and (the last 5%) `test`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "idle_test", "lib2to3"}
    texts: list[str] = []
    total = 0
    for file in sorted(folder.rglob("*.py")):
        if total >= characters:
            break
        if skip.isdisjoint(file.relative_to(folder).parts):
            texts.append(file.read_text(encoding="utf-8", errors="replace")[:20_000])
            total += len(texts[-1])
    return split(texts)


def documentation() -> DatasetDict:
    """English: the language reference that Python's `help()` shows, as `train` and (every tenth topic) `test`."""
    from pydoc_data.topics import topics

    return split(list(dict.fromkeys(topics[name] for name in sorted(topics))), every=10)  # some stand twice


def split(texts: list[str], every: int = 20) -> DatasetDict:
    """Every `every`-th text is held out."""
    held_out = texts[::every]
    train = [text for index, text in enumerate(texts) if index % every]
    return DatasetDict(train=Dataset.from_dict({"text": train}), test=Dataset.from_dict({"text": held_out}))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def small_llama(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 4 layers, 128 wide (0.9 million parameters), with random weights."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=vocab_size - 1,
        )
    )
