"""The members of SWAN's paper by name, as options of [`SWAN`]."""

from __future__ import annotations

from typing import Any

from .checks import check_choice


# Read in the paper (arXiv 2412.13148v3): SWAN-0 and SWAN whiten in float32, with weights and gradients in bfloat16, by
# Newton-Schulz, ten steps by default; NSDS, "Newton-Schulz with diagonal substitution", is its fast member. Not read
# there: the step sizes, the two steps and the bfloat16 of NSDS, which are those of a public implementation that cites
# the paper's Algorithms 1 to 3; and what else sets SWAN-0 apart from SWAN, which is how they were tuned.
PRESETS: dict[str, dict[str, Any]] = {
    "swan-0": {"whitening": "newton_schulz", "ns_steps": 10, "ns_beta": 0.8, "whitening_dtype": "float32"},
    "swan": {"whitening": "newton_schulz", "ns_steps": 10, "ns_beta": 0.8, "whitening_dtype": "float32"},
    "nsds": {"whitening": "nsds", "ns_steps": 2, "ns_beta": 0.4, "whitening_dtype": "bfloat16"},
}


def swan_preset(name: str) -> dict[str, Any]:
    """
    Options of [`SWAN`] that whiten as a member of the paper does. Its learning rate and scale are not among them.

    Args:
        name (`str`): `"swan-0"` and `"swan"` (which whiten alike: they differ in how they were tuned), or `"nsds"`.

    Raises:
        `ValueError`: No member has that name.

    Example:

    ```python
    optimizer = SWAN(hf_sai.param_groups(model, "swan"), lr=1e-3, **swan_preset("nsds"))
    ```
    """
    check_choice("name", name, PRESETS)
    return dict(PRESETS[name])
