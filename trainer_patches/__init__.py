"""
The seams of the hosts, and nothing of ours: every function here takes names and functions as arguments.

- [`optim_names`]: adds a name to `TrainingArguments(optim=...)` with the handler that builds its optimizer.
- [`training_args_file`]: a `training_args.bin` that holds no token and loads where the added names are unknown.
- [`hub_calls`]: what the host's Trainer creates and uploads on the Hub, through given functions.
- [`training_moments`]: when a training of any Trainer starts, when its first step comes, and when it ends; another
  thing in its place.
- [`own_cards`]: the card that a model writes of itself wherever it is saved.
- [`script_optimizer`]: another optimizer for a script that builds `torch.optim.AdamW` itself; needs torch, so it is
  not imported here.
- [`deepspeed_optimizer`]: a check before a Trainer under DeepSpeed makes its optimizer.
- [`compat`]: every private name of a host that is used, with since and remove-when.
"""

from .compat import UnsupportedHostError
from .deepspeed_optimizer import check_deepspeed, remove_deepspeed_check
from .hub_calls import replaced_hub_calls
from .optim_names import add_optimizer, added_optimizers, parse_optim_args, remove_optimizer
from .own_cards import finish_own_cards
from .training_args_file import token_free_pickles
from .training_moments import replaced_trainings, trainings_are_watched, unwatch_trainings, watch_trainings


__all__ = [
    "UnsupportedHostError",
    "add_optimizer",
    "added_optimizers",
    "check_deepspeed",
    "finish_own_cards",
    "parse_optim_args",
    "remove_deepspeed_check",
    "remove_optimizer",
    "replaced_hub_calls",
    "replaced_trainings",
    "token_free_pickles",
    "trainings_are_watched",
    "unwatch_trainings",
    "watch_trainings",
]
