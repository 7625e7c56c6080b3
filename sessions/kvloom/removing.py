"""Taking sessions and branches away, if it is asked for, for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom.errors import NothingToDo, RefNotFound
from kvloom_store import erase as erasing
from kvloom_store import names, refs, removal
from kvloom_store.erase import Erased

if TYPE_CHECKING:
    from kvloom.loom import KVLoom


def session(loom: KVLoom, name: str, *, erase: bool) -> Erased:
    """Take a session away; see ``KVLoom.remove``."""
    loom.flush()
    made = Erased()
    with loom.database.write() as conn:
        row = refs.get_session(conn, name).row
        if erase:
            made = erasing.session(conn, row)
        else:
            removal.remove_session(conn, row)
    _forget(loom)
    if erase:
        scrub(loom)
    return made


def branch(loom: KVLoom, owner: str, name: str, *, erase: bool) -> Erased:
    """Take a branch away; see ``KVLoom.remove_branch``."""
    loom.flush()
    made = Erased()
    with loom.database.write() as conn:
        found = {each.name: each for each in refs.branches(conn, refs.get_session(conn, owner).row)}
        if name not in found:
            raise RefNotFound("branch", name, names.nearest(name, found), session=owner)
        if len(found) == 1:
            raise NothingToDo(f"{name} is the only branch of {owner}", hint=f"kvloom rm {owner} deletes all of it")
        if erase:
            made = erasing.branch(conn, found[name])
        else:
            removal.remove_branch(conn, found[name])
    _forget(loom)
    if erase:
        scrub(loom)
    return made


def scrub(loom: KVLoom) -> None:
    """Write the file anew, without what was deleted; see ``KVLoom.scrub``."""
    loom.flush()
    erasing.scrub(loom.database)


def _forget(loom: KVLoom) -> None:
    if "resumer" in loom.__dict__:  # what it holds may be state of turns that are gone
        loom.resumer.forget()
