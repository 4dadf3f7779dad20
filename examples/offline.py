"""
Data and models for the examples that need no network: text that every Python ships, a byte-level Llama, and digits.

With `--model_name_or_path` and `--dataset_name` the examples use the Hub instead, and nothing of this file.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)


# `generation` marks what the assistant says: with `assistant_only_loss` only that, and the end of it, is learned.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<' + message['role'] + '>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"""


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


def documentation_chats() -> DatasetDict:
    """A question and its answer for each paragraph of [`documentation`], as `messages`; the same topics held out."""
    texts = documentation()
    return DatasetDict(
        {part: Dataset.from_list([row for text in texts[part]["text"] for row in chats(text)]) for part in texts}
    )


def chats(topic: str) -> list[dict[str, list[dict[str, str]]]]:
    """One chat for each paragraph of a topic whose first sentence is not too long."""
    title, _, body = topic.partition("\n")
    paragraphs = [" ".join(text.split()) for text in body.split("\n\n") if re.match(r"[A-Z]", text)]
    sentences = [re.match(r"[^:]{30,200}?\.(?= |$)", text) for text in paragraphs]
    answers = [sentence.group() for sentence in sentences if sentence]
    return [
        {
            "messages": [
                {"role": "user", "content": f"What does Python's help say on {title}? Part {number}."},
                {"role": "assistant", "content": answer},
            ]
        }
        for number, answer in enumerate(answers, start=1)
    ]


def digits() -> DatasetDict:
    """1797 grey handwritten digits of 8 x 8 pixels, from scikit-learn, as `train` and (every fifth) `test`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "The digits come with scikit-learn, which is not installed; in the clone: "
            'pip install -c constraints.txt ".[examples]", or pass a data set with --dataset_name'
        ) from None
    from PIL import Image as Picture

    loaded = load_digits()
    pictures = [Picture.fromarray(each) for each in (loaded.images * 255 / 16).astype("uint8")]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in loaded.target_names])})
    data = Dataset.from_dict({"image": pictures, "label": loaded.target.tolist()}, features=features)
    parts: dict[str, list[int]] = {"train": [], "test": []}
    for index in range(len(data)):
        parts["train" if index % 5 else "test"].append(index)
    return DatasetDict({part: data.select(rows) for part, rows in parts.items()})


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


def small_vit(labels: list[str], seed: int = 0) -> ViTForImageClassification:
    """A vision transformer of 4 layers, 64 wide, for 8 x 8 pixels in patches of 2 x 2, with random weights."""
    set_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.1,  # near 1 / sqrt(64); from the usual 0.02 so narrow a model learns slowly
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
    )
