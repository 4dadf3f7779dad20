"""The card that a model writes of itself wherever it is saved or pushed, as sentence-transformers' and SetFit's do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any


# By sentence-transformers 5 and 6, and by SetFit 1.2. Remove when these ask a callback for what a card is to say.
_METHODS = ("_create_model_card", "create_model_card")


Finish = Callable[[Path, str | None], None]


def finish_own_cards(model: Any, finish: Finish) -> None:
    """
    From now on a model that writes a card of itself has it finished; of other models nothing is changed.

    Args:
        model (`torch.nn.Module` or any): Whose class has a method that writes `README.md` into a folder.
        finish (callable): Called with the path of each card that was written, and with the repository that it is
            for, or `None`. It goes where the model goes, into the processes of an encoding pool for one, so it has to
            be one that pickle takes.
    """
    for cls in type(model).__mro__:
        for name in _METHODS:
            method = vars(cls).get(name)
            if method is not None:
                model.__dict__["_finish_own_card"] = finish
                if not hasattr(method, "_finishes"):
                    setattr(cls, name, _finishing(method))


def _finishing(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def create(model: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        method(model, path, *args, **kwargs)
        finish = model.__dict__.get("_finish_own_card")
        if finish is not None:
            finish(Path(path) / "README.md", getattr(getattr(model, "model_card_data", None), "model_id", None))

    create._finishes = True  # type: ignore[attr-defined]
    return create
