"""A short answer: which of some choices it means, and what is right where no chain is asked for."""

from collections.abc import Sequence
from string import ascii_lowercase


def choice_index(answer: str | int, choices: Sequence[str]) -> int | None:
    """Which choice is meant, from 0; None if none is. Tried in order: index, letter, text, both."""
    indices = [str(i) for i in range(len(choices))]
    letters = list(ascii_lowercase[: len(choices)])
    texts = [plain(choice) for choice in choices]
    numbered = [f"{index} {text}" for index, text in zip(indices, texts)]
    lettered = [f"{letter} {text}" for letter, text in zip(letters, texts)]
    said = plain(answer)
    for forms in (indices, letters, texts, numbered, lettered):
        if said in forms:
            return forms.index(said)
    return None


def is_right(answer: str, truth: str, choices: Sequence[str] | None) -> tuple[bool, bool]:
    """(whether the answer is the true one, whether it could be read): as a choice, if there are
    choices and the truth is one, else as a text."""
    right = choice_index(truth, choices) if choices else None
    if right is None:
        return plain(answer) == plain(truth), True
    picked = choice_index(answer, choices)
    return picked == right, picked is not None


def plain(text: str | int) -> str:
    """Words in lower case, without punctuation, one space between them."""
    text = str(text).casefold()
    for mark in ".,:;!?()":
        text = text.replace(mark, " ")
    return " ".join(text.split())


def short_answer(record: dict) -> str | None:
    """What is right where no chain is asked for: the answer, of a caption the caption.

    None where the data do not say.
    """
    if record.get("form") == "caption" and "benchmark" not in record:
        return record.get("caption") or record["chain"].conclusion
    answer = record["answer"]
    if answer is None:
        return None
    return str(answer)
