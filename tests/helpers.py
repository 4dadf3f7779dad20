"""The old home of what is in `support`, for branches that are not merged yet; goes with the last of them."""

from support.models import VOCABULARY, tiny_llama, tiny_lora, token_blocks
from support.processes import peak_allocated
from support.trainers import arguments, files_below, trainable


__all__ = [
    "VOCABULARY",
    "arguments",
    "files_below",
    "peak_allocated",
    "tiny_llama",
    "tiny_lora",
    "token_blocks",
    "trainable",
]
