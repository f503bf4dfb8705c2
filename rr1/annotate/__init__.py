"""Building a data set of reasoning chains: section 4 of the paper, Figure 4, Eq. (14)-(17).

For every question, in the steps of the figure:
    1. damage       X_d: random types over the four stages, random intensities     Eq. (13)
    2. influence    what the damage does to what can be seen                       Eq. (14)
    3. reasoning    what the clean picture shows, worked out from the damaged one  Eq. (15)
    4. conclusion   what follows for the question                                  Eq. (16)
    5. length       the chain, as long as the total intensity calls for            Eq. (17), (7)

Steps 2 to 5 are written by a teacher G (rr1/annotate/teachers.py). `python -m rr1.annotate` does
this for a file of questions.

Differences from the paper: Y_GT is the question with its true answer, since Figure 4 feeds the
pair; Psi_Len is one template with the word count of the total intensity written into it.
"""

import re
from typing import Any, Callable, Sequence

import numpy as np

from degrade import Degradation
from rr1.annotate.questions import Truth
from rr1.annotate.teachers import Rejected
from rr1.chain import Chain, is_well_formed, parse, render

Teacher = Callable[..., str]  # teacher(step, images, **fields) -> text

REFUSAL = re.compile(
    r"(i['\u2019]m (very )?sorry|i am sorry|sorry, (but )?i|i can(no|['\u2019])t (help|assist)|"
    r"i['\u2019]m unable|i am unable|as an ai)",
    re.IGNORECASE,
)
THINKING = re.compile(r"^.*</think(ing)?>", re.IGNORECASE | re.DOTALL)
FENCED = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)


def influence(
    G: Teacher, X: np.ndarray, X_d: np.ndarray, D_d: list[Degradation], Y_GT: Truth
) -> str:
    """Eq. (14): Delta_d = G(X, X_d, D_d, Y_GT; Psi_INFLUENCE), what the damage does.

    Pictures are RGB uint8 (H, W, 3). Raises Rejected, as all functions here do.
    """
    return section(G, "influence", [X, X_d], degradations=D_d, truth=Y_GT)


def reasoning(
    G: Teacher, X_d: np.ndarray, D_d: list[Degradation], Delta_d: str, Y_GT: Truth
) -> str:
    """Eq. (15): T_X = G(X_d, D_d, Delta_d, Y_GT; Psi_REASONING), what the clean picture shows.

    The teacher does not see the clean picture.
    """
    return section(G, "reasoning", [X_d], degradations=D_d, influence=Delta_d, truth=Y_GT)


def conclusion(G: Teacher, T_X: str, Y_GT: Truth) -> str:
    """Eq. (16): Y_d = G(T_X, Y_GT; Psi_CONCLUSION), what follows for the question."""
    return section(G, "conclusion", [], reasoning=T_X, truth=Y_GT)


def target_words(total: float, words: Sequence[int] = (40, 40)) -> int:
    """Eq. (7): a chain's words grow linearly with the total intensity, the sum of s."""
    at_zero, for_each = words
    return round(at_zero + for_each * total)


def scale_length(G: Teacher, C: Chain, words: Sequence[int] = (40, 40)) -> Chain:
    """Eq. (17): C_hat = G(C; Psi_Len(sum of s)), the chain in its right length.

    Rejected if it came back without a tag, a type or the answer.
    """
    text, total = render(C), sum(s for _, s in C.degradations)
    scaled = ask(
        G,
        "length",
        [],
        chain=text,
        total=total,
        words=target_words(total, words),
        present=len(text.split()),
    )
    if problem := what_was_lost(C, scaled):
        raise Rejected("length", problem, scaled)
    return parse(scaled)


def build_chain(
    G: Teacher,
    X: np.ndarray,
    X_d: np.ndarray,
    D_d: list[Degradation],
    Y_GT: Truth,
    words: Sequence[int] = (40, 40),
) -> Chain:
    """Steps 2 to 5: what each writes, the next one reads."""
    Delta_d = influence(G, X, X_d, D_d, Y_GT)
    T_X = reasoning(G, X_d, D_d, Delta_d, Y_GT)
    Y_d = conclusion(G, T_X, Y_GT)
    C = Chain(D_d, Delta_d, T_X, Y_d, Y_GT.answer)
    return scale_length(G, C, words)


# ---------------------------------------------------------------- what a teacher's answer must be


def ask(G: Teacher, step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
    """The teacher's text for one step; Rejected if it is empty or a refusal.

    What it thought before it, and a code fence round it, are taken off.
    """
    text = THINKING.sub("", G(step, images, **fields)).strip()
    if fenced := FENCED.fullmatch(text):
        text = fenced[1].strip()
    if not text:
        raise Rejected(step, "empty", text)
    if REFUSAL.match(text):
        raise Rejected(step, "refused", text)
    if "```" in text or "<think" in text.lower():
        raise Rejected(step, "a code fence or unfinished thinking is in it", text)
    return text


def section(G: Teacher, step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
    """The text of one section, without its own tags; Rejected if other tags are in it."""
    text = ask(G, step, images, **fields)
    body = getattr(parse(text), step) or text
    try:
        Chain(**{step: body})
    except ValueError as error:
        raise Rejected(step, str(error), text) from None
    return body


def what_was_lost(C: Chain, text: str) -> str:
    """What a rewritten chain has lost of C; "" if nothing."""
    scaled = parse(text)
    sections = (scaled.influence, scaled.reasoning, scaled.conclusion)
    if None in sections:
        return "a tag is lost"
    if scaled.degradations != C.degradations:
        return "a type or an intensity is lost or changed"
    if scaled.answer != C.answer:
        return f"the answer {C.answer!r} became {scaled.answer!r}"
    if not is_well_formed(text):
        return "tags out of place, or text outside them"
    if not all(sections):
        return "a section is empty"
    return ""
