"""The colours of pictures, on light and on dark ground. Each pair is readable on its ground (WCAG AA)."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "text": "#1f2328",
    "dim": "#59636e",
    "rail": "#d1d9e0",
    "name": "#9a4d00",
    "hit": "#fff3b8",
    "system": "#8250df",
    "user": "#0757ae",
    "assistant": "#116329",
    "tool": "#7d4e00",
}

DARK: Mapping[str, str] = {
    "ground": "#0d1117",
    "text": "#e6edf3",
    "dim": "#9198a1",
    "rail": "#3d444d",
    "name": "#ffa657",
    "hit": "#4b3a00",
    "system": "#d2a8ff",
    "user": "#79c0ff",
    "assistant": "#7ee787",
    "tool": "#e3b341",
}

ROLES = ("system", "user", "assistant", "tool")


def role_class(role: str) -> str:
    """The class of a role's colour; a role without one of its own is plain text."""
    return role if role in ROLES else "text"
