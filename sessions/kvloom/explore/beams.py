"""One round of a beam search: the beams brought back, gone on with by some tokens, and committed together.

A beam of a round goes on from one of the round before, or from where the search began: it is that one's child. So the
tree of candidates is the one that the beams spanned, of those that were there at the end of a round.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from kvloom.beam import Beams, BeamSettings
from kvloom.explore.plan import Beam, Child, ExploreSettings
from kvloom.explore.rounds import Grew, Round, begun, commit, path_of, together
from kvloom.report import Tokens
from kvloom_store.explorations import ENDED, OPEN, Exploration

if TYPE_CHECKING:
    from kvloom.growing import Told
    from kvloom.loom import KVLoom


def beam_settings(settings: ExploreSettings) -> BeamSettings:
    """What a search by beams is, by its settings: the score decides whether length counts."""
    return BeamSettings(settings.width, 0.0 if settings.score == "logprob" else 1.0, early_stopping=False)


def run(
    loom: KVLoom,
    exploration: Exploration,
    settings: ExploreSettings,
    step: Beam,
    *,
    cancel: threading.Event | None = None,
    told: Told | None = None,
) -> Round | None:
    """Do one round; None, with nothing stored, if it was cancelled."""
    search = beam_settings(settings)
    parents = step.frontier or (None,)
    with loom.engine.lock:
        places = begun(loom, exploration, [Child(parent, 1) for parent in parents])
        starts = [at for _, at in places]
        paths = [path_of(loom, settings, each, at, None) for each, at in places]
        for number, (path, parent) in enumerate(zip(paths, parents, strict=True)):
            path.origin = number
            path.said, path.thought = (parent.total, parent.total_logprob) if parent else (0, 0.0)
        batch = together(loom, paths, starts, step.tokens)
        scores = [search.normalised(each.total_logprob, each.total) for each in step.finished]
        beams = Beams(loom.engine, batch.siblings, paths, search, scores)
        beams.search(batch.logits, steps=step.tokens, cancel=cancel, told=told)
        if any(path.reason == "interrupted" for path in beams.running):
            loom.resumer.forget()  # it holds rows of a round that never was
            return None
        born: Counter[int] = Counter()
        grew = []
        for path in beams.found:
            born[path.origin] += 1
            place = Child(parents[path.origin], born[path.origin])
            held = batch.state(path, path.origin)
            grew.append(Grew(place, path, starts[path.origin], held, ENDED if path.reason else OPEN))
        made = commit(loom, exploration, grew)
    generated = sum(len(path.tokens) for path in beams.found)
    return Round(tuple(made), Tokens(batch.reused, 0, beams.ran, generated))
