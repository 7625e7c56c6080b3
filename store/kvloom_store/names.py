"""Names and refs: how a user points at a session, a branch, a turn.

A ref is ``session``, ``session@branch``, ``session@tag``, ``session@branch~2`` (two turns back) or
``session@<turn id>`` (any unique prefix of at least four hex digits). Behind each of these ``:1234`` may stand: the
point on the path to there where 1234 tokens are kept, counted from the conversation's first one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvloom_store.errors import InvalidName

MAX_NAME = 100
"""Characters of a session, branch or tag name."""

MAIN = "main"
"""The branch every session begins with."""

_NAME = re.compile(r"[\w][\w.+/-]*", re.UNICODE)
_REF = re.compile(r"(?P<session>[^@~:]+)(?:@(?P<point>[^@~:]+))?(?:~(?P<back>\d{1,6}))?(?::(?P<token>\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Ref:
    """A ref taken apart: ``point`` is a branch, tag or turn id (None: the branch main), then ``back`` turns up.

    ``token``, if the ref names one, is how many tokens of that path are kept.
    """

    session: str
    point: str | None
    back: int
    token: int | None = None

    @property
    def at(self) -> str | None:
        """What stands behind the session, the branch main named; None if nothing does."""
        if self.point is None and not self.back and self.token is None:
            return None
        return str(replace(self, point=self.point or MAIN)).removeprefix(f"{self.session}@")

    def __str__(self) -> str:
        point = f"@{self.point}" if self.point else ""
        token = "" if self.token is None else f":{self.token}"
        return f"{self.session}{point}{f'~{self.back}' if self.back else ''}{token}"


def check_name(what: str, name: str) -> str:
    """A valid session, branch or tag name, or InvalidName."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME or name.endswith(("/", ".")):
        raise InvalidName(
            f"{name!r} cannot be the name of a {what}",
            hint=f"use letters, digits and . _ - + / (at most {MAX_NAME} characters)",
        )
    return name


def parse_ref(text: str) -> Ref:
    """Take a ref apart.

    Raises:
        InvalidName: it does not have the form of a ref.
    """
    found = _REF.fullmatch(text)
    if found is None:
        raise InvalidName(
            f"{text!r} is not a ref",
            hint="write SESSION, SESSION@BRANCH, SESSION@BRANCH~2, SESSION@TURN or one of these with :TOKEN behind it",
        )
    check_name("session", found["session"])
    token = None if found["token"] is None else int(found["token"])
    return Ref(found["session"], found["point"], int(found["back"] or 0), token)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three names that are close to one that was not found."""
    known = [each for each in names if isinstance(each, str)]  # a damaged index says anything
    return difflib.get_close_matches(name, known, n=3, cutoff=0.5)
