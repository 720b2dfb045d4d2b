"""Messages that more than one module needs: unknown names and missing extras."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, given: str, accepted: Iterable[str]) -> ValueError:
    """Return the error for a name that does not exist, the accepted names closest first.

    >>> unknown("backbone", "r50w2", ["r18", "r50", "r50w2x"])
    ValueError("Unknown backbone 'r50w2'. Choose one of: r50w2x, r50, r18.")
    """
    accepted = list(accepted)
    near = difflib.get_close_matches(given, accepted, n=3, cutoff=0.4)
    names = near + [name for name in accepted if name not in near]
    return ValueError(f"Unknown {kind} '{given}'. Choose one of: {', '.join(names)}.")


def missing_extra(package: str, extra: str, purpose: str) -> ImportError:
    """Return the error for an optional dependency that is not installed."""
    return ImportError(f"{purpose} needs {package}: pip install 'mocohub[{extra}]'")
