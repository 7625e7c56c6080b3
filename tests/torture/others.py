"""Other models than the one whose state is stored: each is refused, or computes anew; state of another is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adapters import with_adapters
from exact.worker import rows_of
from tiny import tiny_model, tiny_tokenizer
from tokenizers import AddedToken

from kvloom.engine import TransformersEngine
from kvloom.errors import KVLoomError, ModelMismatch
from kvloom.loom import KVLoom
from torture.workload import state_of

FIRST = "When was it that they were all there, and who said that it would be so?"
SECOND = "And what would you have said to her?"
HOW = {"max_tokens": 9, "temperature": 1.0, "seed": 4}
SYSTEM = "You are the one who was there."


def plain() -> TransformersEngine:
    """The model whose state is stored."""
    return TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


def other_weights() -> TransformersEngine:
    """The same shape, other numbers."""
    return TransformersEngine(tiny_model("llama", seed=1), tiny_tokenizer(), name="tiny")


def doubled_rope() -> TransformersEngine:
    """The same weights, the rope base doubled."""
    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    return TransformersEngine(tiny_model("llama", rope_parameters=rope), tiny_tokenizer(), name="tiny")


def other_dtype() -> TransformersEngine:
    """The same weights, rounded."""
    return TransformersEngine(tiny_model("llama", "bfloat16"), tiny_tokenizer(), name="tiny")


def other_tokenizer() -> TransformersEngine:
    """The same weights under a tokenizer with one more token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("zebra", special=False)])
    return TransformersEngine(tiny_model("llama"), tokenizer, name="tiny")


def other_template() -> TransformersEngine:
    """The same weights and tokens under another chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.role +", "message.role + ': ' +")
    return TransformersEngine(tiny_model("llama"), tokenizer, name="tiny")


def adapter_added() -> TransformersEngine:
    """The same weights with an adapter."""
    model = tiny_model("llama")
    with_adapters(model, style=1)
    return TransformersEngine(model, tiny_tokenizer(), name="tiny")


OTHERS: dict[str, Callable[[], TransformersEngine]] = {
    "other weights of the same shape": other_weights,
    "the rope base doubled": doubled_rope,
    "another dtype": other_dtype,
    "another tokenizer": other_tokenizer,
    "another chat template": other_template,
    "an adapter added": adapter_added,
}
SWITCHED = "an adapter switched after opening"


@dataclass
class Other:
    """What came of one of them: in the session that is there, and in a new one that says the same."""

    what: str
    there: str
    reused: int
    same_bits: bool


@dataclass
class Found:
    """All of them."""

    rows: list[Other] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path) -> Found:
    """A store of one model, opened with each of the others."""
    found = Found()
    path = folder / "models.db"
    with KVLoom(path, model=plain()) as loom:
        _talk(loom, "talk")
    for number, (what, make) in enumerate(OTHERS.items()):
        engine = make()
        with KVLoom(path, model=engine) as loom:
            there = _in_the_session(loom)
            new = _talk(loom, f"new-{number}")
        _judge(found, what, there, new, _alone(folder / f"alone-{number}.db", engine))
    _switched(folder, found)
    return found


def _switched(folder: Path, found: Found) -> None:
    """Two adapters, of which the other one is switched on while the store is open and state is in memory."""
    model = tiny_model("llama")
    layer = with_adapters(model, style=1, tone=2)
    engine = TransformersEngine(model, tiny_tokenizer(), name="tiny")
    with KVLoom(folder / "switched.db", model=engine) as loom:
        _talk(loom, "talk")
        ids = state_of(loom, "talk")[1]
        layer.active_adapter = ["tone"]
        held = loom.lookup(ids)[1]
        there = _in_the_session(loom)
        new = _talk(loom, "new")
    if held:
        found.wrong.append(f"{SWITCHED}: lookup gave {held} tokens of another model's state")
    _judge(found, SWITCHED, there, new, _alone(folder / "alone-switched.db", engine))


def _alone(path: Path, engine: TransformersEngine) -> tuple[int, list[str]]:
    """The same in a store that has never seen another model."""
    with KVLoom(path, model=engine) as loom:
        return _talk(loom, "new")


def _talk(loom: KVLoom, name: str) -> tuple[int, list[str]]:
    """A new session that says the same as ever: how much of it was reused, and digests of its state."""
    branch = loom.session(name, system=SYSTEM).branch()
    reused = branch.say(FIRST, **HOW).tokens.reused
    live = loom.resumer.live
    assert live is not None
    return reused, rows_of(live, live.captured)


def _in_the_session(loom: KVLoom) -> str:
    """Going on in the session that is there: what is said to that, or that it went on."""
    branch = loom.find("talk").branch()
    try:
        branch.say(SECOND, **HOW)
    except ModelMismatch as error:
        return f"refused: {error.field} differs"
    except KVLoomError as error:
        return f"{type(error).__name__}: {error}"
    return "goes on under its own template"


def _judge(found: Found, what: str, there: str, new: tuple[int, list[str]], alone: tuple[int, list[str]]) -> None:
    row = Other(what, there, new[0], new[1] == alone[1])
    found.rows.append(row)
    # Neither a tokenizer nor a template changes what the model makes of given tokens.
    same_function = what in ("another tokenizer", "another chat template")
    if not row.same_bits:
        found.wrong.append(f"{what}: not the bits of a store that never saw the other model")
    if row.reused and not same_function:
        found.wrong.append(f"{what}: {row.reused} tokens of another model's state were used")
    if not there.startswith("refused") and what != "another chat template":
        found.wrong.append(f"{what}: {there}")
