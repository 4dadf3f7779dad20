"""What an access token of the Hub looks like; the one place that says so."""

from __future__ import annotations

import re


MASK = "<TOKEN>"  # as the host masks it in to_dict()
# hf_oauth_... too. ASCII: a letter that is no part of a token does not hide one that stands beside it.
TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{30,}\b", re.ASCII)
TOKEN_BYTES = re.compile(TOKEN.pattern.encode())
