"""The screen of one session: the tree, the transcript, a line to type in, and what the keys do."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Input, Static

from kvloom.browse import actions, outline, screens
from kvloom.browse.actions import Saying
from kvloom.browse.outline import Outline
from kvloom.browse.speech import Speech, told
from kvloom.browse.transcript import BLOCKS, Block, Transcript, heading
from kvloom.browse.tree_pane import MARKS, TreePane
from kvloom.errors import KVLoomError, NothingToDo
from kvloom.shown import clean, labels, preview, role_style, strip
from kvloom.shown import told as told_of
from kvloom_store.names import MAIN

if TYPE_CHECKING:
    from kvloom.listing import TreeTurn
    from kvloom.loom import KVLoom
    from kvloom.session import Session

P = ParamSpec("P")

SPEECH = "speech"
"""The group of the worker that waits for a reply."""

STRIP = 30
"""Bars of the strip that shows how uncertain the model was along a reply: it fits half of 80 columns."""

LOOKS = 10
"""How often a second a growing reply is looked at."""

_HINTS = "s say · r again · f fork · e edit · m mark · d diff · / search · ? keys · q quit"


def _acts(
    action: Callable[Concatenate[Conversation, P], Coroutine[Any, Any, None]],
) -> Callable[Concatenate[Conversation, P], object]:
    """What a key does, beside all else that goes on; what goes wrong is told."""

    @functools.wraps(action)
    async def safely(self: Conversation, /, *args: P.args, **options: P.kwargs) -> None:
        try:
            await action(self, *args, **options)
        except KVLoomError as error:
            self._fail(error)

    return work(safely)


class Conversation(Screen[None]):
    """One session. ``at`` is the turn to begin at (None: where main is)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "go into the transcript, to scroll it"),
        Binding("s", "say", "say something here; a new branch begins where none ends"),
        Binding("r", "again", "another reply, on a new branch"),
        Binding("f", "fork", "begin a branch here"),
        Binding("e", "edit", "edit what you said, and say it on a new branch"),
        Binding("t", "tag", "give this turn a name"),
        Binding("m", "mark", "mark this turn, or take the mark away"),
        Binding("d", "diff", "compare the two marked turns, or the marked one and this"),
        Binding("a", "accept", "move main here; its old tip keeps a branch"),
        Binding("x", "delete", "delete a branch that ends here; its turns stay"),
        Binding("slash", "search", "search all turns"),
        Binding("n", "next(1)", "next turn that was found"),
        Binding("N", "next(-1)", "the one found before"),
        Binding("question_mark", "keys", "these keys"),
        Binding("escape,ctrl+c", "stop", "stop the reply (what was said is kept); back to the tree"),
        Binding("backspace", "sessions", "back to the list of sessions"),
        Binding("q", "app.leave", "quit"),
    ]

    def __init__(self, loom: KVLoom, session: Session, at: str | None, sampling: Mapping[str, Any]) -> None:
        super().__init__()
        self.loom = loom
        self.session = session
        self.speech: Speech | None = None
        self._begin_at = at
        self._sampling = sampling
        self._asked: asyncio.Future[str | None] | None = None
        self._looking: Timer | None = None
        self._seen: tuple[str, int, bool] | None = None
        self._strips: dict[str, str] = {}
        self._news: tuple[str, str | None] = "", None

    def compose(self) -> ComposeResult:
        with Horizontal(id="panes"):
            yield TreePane()
            yield Transcript(id="transcript")
        yield Static(id="status")
        yield Input(id="line")
        yield Static(_HINTS, classes="keys")

    def on_mount(self) -> None:
        self.line.display = False
        self.tree_pane.focus()
        self._begin()

    @property
    def tree_pane(self) -> TreePane:
        return self.query_one(TreePane)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def line(self) -> Input:
        return self.query_one(Input)

    # What is shown

    @_acts
    async def _begin(self) -> None:
        found = await asyncio.to_thread(outline.read, self.loom, self.session.name)
        mains = (place.node.id for place in found.places if MAIN in place.node.branches)
        self.tree_pane.show(found, self._begin_at or next(mains, None))

    async def _look_again(self, at: str | None = None) -> None:
        """Read the session anew, and go to a turn (None: stay)."""
        found = await asyncio.to_thread(outline.read, self.loom, self.session.name)
        self.tree_pane.show(found, at or self.tree_pane.at)

    def on_tree_pane_moved(self) -> None:
        tree = self.tree_pane
        path = tree.outline.path(tree.cursor)
        blocks = [self._block(tree.outline, turn, here=turn is path[-1]) for turn in path[-BLOCKS:]]
        speech = self.speech
        if speech is not None and speech.saying.at == tree.at:
            if speech.saying.text is not None:
                blocks.append(Block(None, heading("user", role_style("user"), ["being said"]), speech.saying.text))
            elif path and path[-1].role == "assistant":
                blocks.pop()
            doing = "being said" if speech.pieces else speech.stage
            blocks.append(Block(None, heading("assistant", role_style("assistant"), [doing]), speech.text))
        self.transcript.show(blocks, above=max(0, len(path) - BLOCKS))
        self._tell()

    def _look(self) -> None:
        """Show how far the reply got, if it got any further."""
        speech = self.speech
        seen = (speech.stage, len(speech.pieces), speech.stopping) if speech is not None else None
        if seen != self._seen:
            self._seen = seen
            self.on_tree_pane_moved()

    def _block(self, found: Outline, turn: TreeTurn, *, here: bool = False) -> Block:
        notes = [found.short(turn.id), *labels(turn)]
        if turn.tokens:
            notes.append(f"{turn.tokens} tokens, {'held' if found.is_held(turn) else 'not held'}")
        if here and turn.tokens and turn.finish_reason is not None and (shown := self._entropy(turn)):
            notes.append(f"\nentropy {shown}")
        return Block(turn.id, heading(turn.role, role_style(turn.role), notes), turn.text)

    def _entropy(self, turn: TreeTurn) -> str:
        """The strip of a reply, read once; "" if nothing is kept of what the model thought of it."""
        if turn.id not in self._strips:
            self._strips[turn.id] = ""
            try:
                self._strips[turn.id] = strip([each.entropy for each in self.session.token_scores(turn)], STRIP)
            except KVLoomError as error:  # the text is there all the same
                self._fail(error)
        return self._strips[turn.id]

    def _tell(self) -> None:
        """The line below the panes: what is going on, else where the cursor is."""
        tree, speech = self.tree_pane, self.speech
        if speech is not None:
            doing = "stopping" if speech.stopping else f"{len(speech.pieces)} pieces" if speech.pieces else speech.stage
            text = f"{doing} · Esc stops"
        elif self._news[0] and self._news[1] == tree.at:
            text = self._news[0]
        else:
            turns = tree.outline.path(tree.cursor)
            tokens = sum(turn.tokens for turn in turns)
            where = "".join(f"@{name}" for name in tree.outline.branches(tree.cursor)[:1])
            text = f"{self.session.name}{where} · {len(turns)} turns" + (f", {tokens} tokens" if tokens else "")
        self.query_one("#status", Static).update(Content(clean(text)))

    # Asking and telling

    async def _ask(self, question: str, text: str = "") -> str | None:
        """What is typed into the line at the bottom; None if that was left."""
        self._answer(None)
        line = self.line
        line.value, line.placeholder, line.border_title = text, question, question
        line.display = True
        line.focus()
        self._asked = asyncio.get_running_loop().create_future()
        return await self._asked

    def _answer(self, text: str | None) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(text)
            self.line.display = False
            self.tree_pane.focus()
        self._asked = None

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._answer(event.value)

    def _fail(self, error: Exception) -> None:
        message, hint = told(error)
        self.notify(clean(f"{message}\n{hint}" if hint else message), severity="error", timeout=8, markup=False)

    def _note(self, news: str) -> None:
        """Tell something below the panes, until the cursor moves."""
        self._news = news, self.tree_pane.at
        self._tell()

    # Saying

    @_acts
    async def action_say(self) -> None:
        at = self.tree_pane.at
        if not self._busy():
            text = await self._ask("say (Enter sends, Esc leaves)")
            if text is not None:
                self._say(Saying(self.session, at, text, self._sampling))

    @_acts
    async def action_again(self) -> None:
        at = self.tree_pane.at
        if at is None:
            raise NothingToDo("there is no reply to make again here", hint="go to a turn first")
        self._say(Saying(self.session, at, None, self._sampling))

    @_acts
    async def action_edit(self) -> None:
        turn = self.tree_pane.outline.turn(self.tree_pane.cursor)
        if turn is None or turn.role != "user":
            raise NothingToDo("only what you said can be edited", hint="go to one of your turns (u in the tree)")
        if not self._busy():
            text = await self.app.push_screen_wait(screens.Edit(turn.text))
            if text is not None:
                self._say(Saying(self.session, turn.parent, text, self._sampling, fresh=True))

    def _busy(self) -> bool:
        if self.speech is not None:
            self.notify("a reply is being made; Esc stops it", severity="warning", markup=False)
        return self.speech is not None

    def _say(self, saying: Saying) -> None:
        if not self._busy():
            self.speech = Speech(self.loom, saying)
            self._looking = self.set_interval(1 / LOOKS, self._look)
            self.tree_pane.go(self.tree_pane.outline.rows.get(saying.at, 0))
            self._speak(self.speech)

    @work(group=SPEECH)
    async def _speak(self, speech: Speech) -> None:
        await asyncio.to_thread(speech.run)
        if self._looking is not None:
            self._looking.stop()
        self.speech, reply = None, speech.reply
        if speech.error is not None:
            self._fail(speech.error)
        for notice in reply.notices if reply is not None else ():
            self.notify(clean(notice), severity="warning", timeout=8, markup=False)
        there = self.tree_pane.at == speech.saying.at
        self._after(reply.turn if reply is not None and there else None, told_of(reply) if reply is not None else "")

    @_acts
    async def _after(self, at: str | None, news: str) -> None:
        """Show what came of it; and again when its state is stored, too."""
        await self._look_again(at)
        self._note(news)
        await asyncio.to_thread(self.loom.flush)
        await self._look_again()

    def action_stop(self) -> None:
        if self._asked is not None:
            self._answer(None)
        elif self.speech is not None:
            self.speech.stop()
            self._tell()
        else:
            self.tree_pane.focus()

    def model_loading(self, stage: str, fraction: float) -> None:
        """Told by the model's loader, in the thread that speaks, how far it got."""
        speech = self.speech
        if speech is not None:
            speech.loading(stage, fraction)

    # Names

    @_acts
    async def action_fork(self) -> None:
        at = self.tree_pane.at
        name = await self._ask("name of the new branch")
        if name:
            await asyncio.to_thread(actions.fork, self.loom, self.session, name, at)
            await self._changed(f"branch {name} begins here")

    @_acts
    async def action_tag(self) -> None:
        at = self.tree_pane.at
        name = await self._ask("name of the tag")
        if name:
            await asyncio.to_thread(actions.tag, self.session, name, at)
            await self._changed(f"tagged #{name}")

    @_acts
    async def action_accept(self) -> None:
        kept = await asyncio.to_thread(actions.accept, self.session, self.tree_pane.at)
        await self._changed("main is here" + (f"; where it was is {kept} now" if kept else ""))

    @_acts
    async def action_delete(self) -> None:
        tree = self.tree_pane
        names = [name for name in tree.outline.branches(tree.cursor) if name != MAIN]
        if not names:
            hint = "go to a turn with a [branch]; main is never deleted"
            raise NothingToDo("no branch that could be deleted ends here", hint=hint)
        choices = {name: f"delete {name}" for name in names}
        asked = screens.Choose("Delete a branch? Its turns stay in the tree.", "keep all", choices)
        name = await self.app.push_screen_wait(asked)
        if name is not None:
            gone = await asyncio.to_thread(actions.remove, self.session, name)
            await self._changed(f"branch {name} is deleted" if gone else f"branch {name} moved meanwhile and is kept")

    async def _changed(self, news: str) -> None:
        await self._look_again()
        self._note(news)

    # Looking

    def action_open(self) -> None:
        self.transcript.focus()

    def action_mark(self) -> None:
        self.tree_pane.mark()

    def action_diff(self) -> None:
        tree = self.tree_pane
        marked = [*tree.marks, *([tree.at] if tree.at is not None and tree.at not in tree.marks else [])][: len(MARKS)]
        if len(marked) < len(MARKS):
            return self._fail(NothingToDo("there is nothing to compare", hint="mark two turns with m first"))
        shared, left, right = tree.outline.part(*(tree.outline.rows[each] for each in marked))
        title = "they part at the very beginning"
        if shared:
            last = shared[-1]
            title = f"they part after {last.role} {tree.outline.short(last.id)}: {preview(last.text, 100)}"
        columns = [[self._block(tree.outline, turn) for turn in turns] for turns in (left, right)]
        self.app.push_screen(screens.Compare(clean(title), *columns))
        return None

    @_acts
    async def action_search(self) -> None:
        words = await self._ask("search")
        if words is None:
            return
        tree = self.tree_pane
        tree.hits = tree.outline.find(words)
        tree.refresh()
        if tree.cursor not in tree.hits:
            self.action_next(1)
        self._note(f"{len(tree.hits)} turns found · n N go from one to the next")

    def action_next(self, by: int) -> None:
        tree = self.tree_pane
        hits = sorted(tree.hits)
        if by < 0:
            hits.reverse()
        beyond = [row for row in hits if (row - tree.cursor) * by > 0]
        if hits:
            tree.go((beyond or hits)[0])

    def action_keys(self) -> None:
        bindings = [each for each in (*TreePane.BINDINGS, *self.BINDINGS) if isinstance(each, Binding)]
        self.app.push_screen(screens.Keys([f"{_key(each.key):<16} {each.description}" for each in bindings]))

    def action_sessions(self) -> None:
        if not self._busy():
            self.dismiss(None)


def _key(keys: str) -> str:
    """Keys as people read them."""
    names = {"slash": "/", "question_mark": "?", "escape": "Esc", "ctrl+c": "Ctrl-C", "pagedown": "PgDn"}
    names |= {"pageup": "PgUp"}
    return " ".join(names.get(key, key) for key in keys.split(","))
