"""Numbers in words, for people."""

from __future__ import annotations

import math


def number(D: object) -> str:
    """D for people, from a number or the "inf" of a JSON file."""
    if D in ("inf", math.inf):
        return "inf (diffusion)"
    return f"{D:g}" if isinstance(D, (int, float)) else str(D)


def symbol(D: float) -> str:
    """D for people, where a sign is enough: "128", "∞"."""
    return "∞" if math.isinf(D) else f"{D:g}"


def counted(count: object, noun: str) -> str:
    """A number and what it counts: "1 step", "4 steps", "2 processes"."""
    return f"{count} {noun}{'' if str(count) == '1' else 'es' if noun.endswith('s') else 's'}"


def rows(facts: list[tuple[str, object]]) -> str:
    """Aligned lines, a fact each; those that are None are left out."""
    shown = [(name, str(value)) for name, value in facts if value is not None and value != ""]
    width = max(len(name) for name, _ in shown) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in shown)


def size(count: int) -> str:
    """Bytes for people: "1.50 GiB", "3.0 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """For people: "48 s", "12 min", "3.4 h", "2.1 days", "146 years"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86_400
    return f"{days:.1f} days" if days < 730 else f"{days / 365.25:,.0f} years"


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent for large numbers: "0.0123", "3.14", "172,000"."""
    return f"{float(f'{value:.3g}'):,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def at_least_thousandths(value: float) -> str:
    """As `three_digits`, of a time or a price: "13.2", and "<0.001" for what is less."""
    return "<0.001" if 0 < value < 0.001 else three_digits(value)


def significant(value: float) -> str:
    """Four significant digits, without an exponent for the sizes that occur: 0.01235, 3.314, 1234, 25310."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(digits, 0), 9)}f}"
