"""Eq. 3-4: the degradation-aware reasoning chain, from data to text and back.

    <TYPE>lens blur(0.47), noise(0.20)<TYPE_END>      D_d      what damaged the image, how strongly
    <INFLUENCE>the far car is smeared<INFLUENCE_END>  Delta_d  what that does to what can be seen
    <REASONING>four vehicles in a row<REASONING_END>  T_X      what the clean image would show
    <CONCLUSION>they are all trucks<CONCLUSION_END>   Y_d      what follows for the question
    <ANSWER>0<ANSWER_END>                             optional: the answer, which is scored

`render` and `parse` are inverse: parse(render(chain)) == chain for every Chain that can be made.
The tags are plain text, not new tokens, so any tokenizer can write them.
"""

import math
import re
from dataclasses import dataclass, field

from degrade import ALIASES, DEGRADATIONS, Degradation, canonical

SECTIONS = ("TYPE", "INFLUENCE", "REASONING", "CONCLUSION", "ANSWER")  # the order of Eq. 4
TAGS = tuple(tag for name in SECTIONS for tag in (f"<{name}>", f"<{name}_END>"))
IMAGE = "<image>"  # stands for a picture in the text of a question
INSTRUCTION = f"Give {', '.join(SECTIONS)} in this order."

MAX_INSTANCES = 64  # there are 16 types; a cap keeps `parse` fast on a model that loops
LONGEST_NUMBER = 40  # a float written in full takes 24 characters
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass
class Chain:
    """One reasoning chain (Eq. 4). A text that is None is a section that is not there; "" is empty.

    The constructor brings every part into the form in which it is written: type names canonical
    where known and in lower case elsewhere, intensities in [0, 1] rounded to two decimals (others
    stay as they came), texts stripped. Raises ValueError for what could not be read back: a text
    with a tag in it, a type name that is empty or has one of "(),", an intensity that is not a
    finite number, more than MAX_INSTANCES degradations.
    """

    degradations: list[Degradation] = field(default_factory=list)
    influence: str | None = None
    reasoning: str | None = None
    conclusion: str | None = None
    answer: str | None = None

    def __post_init__(self):
        self.degradations = [_normalised(*instance) for instance in self.degradations or []]
        if len(self.degradations) > MAX_INSTANCES:
            count = len(self.degradations)
            raise ValueError(
                f"{count} degradations in a chain; expected at most {MAX_INSTANCES}"
            )
        for name in ("influence", "reasoning", "conclusion", "answer"):
            text = getattr(self, name)
            if text is None:
                continue
            text = str(text).strip()  # str: the answer may come as a choice's index
            if tag := _first_tag(text):
                raise ValueError(
                    f"the {name} contains the tag {tag}, which is not text: remove it"
                )
            setattr(self, name, text)


def render(chain: Chain) -> str:
    """The chain as text, Eq. 4: one section per line, in order; one that is None is left out."""
    types = ", ".join(f"{type}({_written(s)})" for type, s in chain.degradations)
    bodies = (types, chain.influence, chain.reasoning, chain.conclusion, chain.answer)
    sections = [(name, body) for name, body in zip(SECTIONS, bodies) if body is not None]
    return "\n".join(f"<{name}>{body}<{name}_END>" for name, body in sections)


def parse(text: str) -> Chain:
    """Read whatever a model wrote. Never raises, in time linear in the text.

    A section is what stands between its first closing tag and the nearest opening tag before it,
    with no other tag between. One that is missing, not closed or torn is None (for TYPE: no
    degradations, []). The order does not matter here: `is_well_formed` judges the form. Of TYPE,
    every `name(number)` is kept, unknown names and numbers outside [0, 1] too; what has no readable
    number is not an instance.
    """
    types, *texts = (_section(text, name) for name in SECTIONS)
    # Every instance ends in ")", so nothing after the last one counts.
    pieces = (types or "").split(")", MAX_INSTANCES)[:-1]
    instances = [_instance(piece.rpartition(",")[2]) for piece in pieces]
    return Chain([instance for instance in instances if instance is not None], *texts)


def stated_types(text: str) -> list[Degradation] | None:
    """The instances of the TYPE section; None where it is missing or any of it cannot be read."""
    body = _section(text, "TYPE")
    return None if body is None else _listed(body)


def is_well_formed(text: str) -> bool:
    """Whether `text` is a chain as Eq. 4 has it.

    That is every section once, closed, in order (ANSWER may be absent), nothing but white space
    around them, and TYPE empty or a comma-separated list of `known type(number in [0, 1])`.
    """
    rest = text.strip()
    for name in SECTIONS:
        if name == "ANSWER" and not rest:
            return True
        opening, closing = f"<{name}>", f"<{name}_END>"
        end = rest.find(closing)
        if end < 0 or not rest.startswith(opening):
            return False
        body = rest[len(opening) : end]
        if _first_tag(body) or (name == "TYPE" and not _well_formed_types(body)):
            return False
        rest = rest[end + len(closing) :].lstrip()
    return not rest


def build_question(question: str, choices: list[str] | None = None) -> str:
    """The question as the data holds it: any choices on a line below, as `0. trucks 1. wagons`."""
    if not choices:
        return question.strip()
    listed = " ".join(f"{index}. {choice}" for index, choice in enumerate(choices))
    return f"{question.strip()}\n{listed}"


def build_prompt(question: str, choices: list[str] | None = None) -> str:
    """P of Eq. 1: the question with its choices, and a line that names the sections to write."""
    return f"{build_question(question, choices)}\n{INSTRUCTION}"


def _first_tag(text: str) -> str | None:
    return next((tag for tag in TAGS if tag in text), None) if "<" in text else None


def _section(text: str, name: str) -> str | None:
    end = text.find(f"<{name}_END>")
    start = text.rfind(f"<{name}>", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    body = text[start + len(f"<{name}>") : end]
    return None if _first_tag(body) else body.strip()


def _instance(text: str) -> Degradation | None:
    """`name(number` -> Degradation; None if it does not read so."""
    name, _, number = text.partition("(")
    number = number.strip()
    if len(number) > LONGEST_NUMBER or not NUMBER.fullmatch(number):
        return None
    try:
        return _normalised(name, float(number))
    except ValueError:  # an empty name, 1e999
        return None


def _normalised(type: str, intensity: float) -> Degradation:
    name, s = " ".join(type.lower().split()), float(intensity)
    if not name or any(mark in name for mark in "(),"):
        raise ValueError(
            f"type name {type!r} could not be read back: it is empty or has '(),'"
        )
    if not math.isfinite(s):
        raise ValueError(
            f"intensity of {name} is {s}: expected a finite number, best in [0, 1]"
        )
    if 0 <= s <= 1:
        s = round(s, 2) + 0.0  # no minus zero
    return Degradation(_known(name) or name, s)


def _known(name: str) -> str | None:
    """The paper's name for `name`, None if there is none.

    It is looked up first: the error that `canonical` raises for a wrong name searches for the
    nearest one, which is slow on a response full of invented names.
    """
    plain = " ".join(name.replace("_", " ").replace("-", " ").split())
    return canonical(plain) if plain in DEGRADATIONS or plain in ALIASES else None


def _written(s: float) -> str:
    """Outside [0, 1] exactly as it came: rounding could bring it inside."""
    return f"{s:.2f}" if 0 <= s <= 1 else repr(s)


def _listed(body: str) -> list[Degradation] | None:
    """`name(number), ..` -> instances; None if any of them cannot be read."""
    if not body.strip():
        return []
    instances = []
    for item in body.split(",", MAX_INSTANCES - 1):
        item = item.strip()
        instance = _instance(item[:-1]) if item.endswith(")") else None
        if instance is None:
            return None
        instances.append(instance)
    return instances


def _well_formed_types(body: str) -> bool:
    instances = _listed(body)
    return instances is not None and all(
        0 <= s <= 1 and _known(tau) for tau, s in instances
    )
