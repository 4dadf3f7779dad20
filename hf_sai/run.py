"""`python -m hf_sai.run`: what `hf-sai run` does, for `accelerate launch -m` and `torchrun -m`."""

from __future__ import annotations

import sys

from .cli import app


if __name__ == "__main__":
    app(["run", *sys.argv[1:]], prog_name="hf-sai")
