"""Rates of a link, as people write them and as `tc` takes them: 200mbit, 1gbit, unlimited."""

import re

__all__ = ["parse_rate", "rate_name"]

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_rate(text: str) -> float | None:
    """Bits a second of "0.2gbit", "200mbit", "1gbit"; None for "unlimited".

    Raises:
        ValueError: none of these.
    """
    if text == "unlimited":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.strip().lower())
    rate = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1e6 <= rate <= 1e11:
        raise ValueError(f"rate = {text!r}: must be a number and kbit, mbit or gbit, from 1mbit to 100gbit, "
                         f"such as 0.2gbit, or unlimited")  # fmt: skip
    return rate


def rate_name(rate: float | None) -> str:
    """For people: "0.2 Gbit/s", "unlimited"."""
    return "unlimited" if rate is None else f"{rate / 1e9:g} Gbit/s"
