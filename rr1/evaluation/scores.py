"""Is an answer right? Text in, (score in [0, 1], whether it could be read) out.

Answers are read, never guessed at: one that names no choice is wrong and counted as unparsed. Open
answers and captions of R-Bench are scored by its judge (`rr1.evaluation.votes`); what is computed
here instead stands in for that and is reported as "proxy".
"""

import re
from collections import Counter
from collections.abc import Sequence

from rr1.answers import choice_index, is_right, plain
from rr1.chain import TAGS, parse

BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?i:answer\s+is)\s+\**([A-D])\b")


# ---------------------------------------------------------------- our own data, the drawn world


def caption_phrases(text: str) -> Counter:
    """Comma-separated phrases, the ground as one of its own.

    `a red star top left, a blue ring top right on sand` has three.
    """
    things, *ground = text.rsplit(" on ", maxsplit=1)
    phrases = [*things.split(","), *(f"on {name}" for name in ground)]
    return Counter(filter(None, map(plain, phrases)))


def caption_f1(caption: str, truth: str) -> float:
    """F1 over phrases, each counted once for each time that it stands there."""
    said = caption_phrases(caption)
    true = caption_phrases(truth)
    matched = (said & true).total()
    return 2 * matched / max(1, said.total() + true.total())


def score_answer(
    answer: str | None, form: str, truth: str, choices: Sequence[str] | None
) -> tuple[float, bool]:
    """(score, whether there was something to score) of an answer to a question of our own data.

    An answer that names no choice is wrong and unparsed; a choice may be named by index, letter or
    text.
    """
    answer = (answer or "").strip()
    if not answer:
        return 0.0, False
    if form == "caption":
        return caption_f1(answer, truth), True
    right, is_read = is_right(answer, truth, choices)
    return float(right), is_read


# ---------------------------------------------------------------- benchmarks


def find_answer(response: str, form: str) -> str | None:
    """The ANSWER section; without one, the CONCLUSION of an open question or a caption.

    Of a text without any tag all of it, None where a chain holds neither.
    """
    chain = parse(response)
    answer = chain.answer
    if not answer and form != "choice":
        answer = chain.conclusion
    if not answer and not any(tag in response for tag in TAGS):
        answer = response
    return answer or None


def read_choice(answer: str, options: dict) -> str | None:
    """The letter of the option that is meant, None if that cannot be told.

    `options`: letter -> text. First VLMEvalKit's rules (`free_text_choice`), so that figures can be
    compared. What they cannot read counts if it is exactly a letter or a text in another case, or
    both, or an index from 0 where no option is itself a number.
    """
    letter = free_text_choice(answer, options)
    if letter:
        return letter
    is_number = any(text[:1].isdigit() for text in options.values())
    if is_number and plain(answer)[:1].isdigit():
        return None
    return read_index(answer, options)


def read_index(answer: str, options: dict) -> str | None:
    """The letter of the option that an index from 0 means, or else a letter or a text alone."""
    index = choice_index(answer, list(options.values()))
    return None if index is None else list(options)[index]


def free_text_choice(answer: str, options: dict) -> str | None:
    """VLMEvalKit's rules without a judge, of August 2026 (`can_infer`).

    The one letter that stands among the words, if it is one of the last four; or the letter after
    "answer is"; or, of an answer at most twice as long as all options, the one option whose text
    occurs in it. One difference: after "answer is" the letter is a capital and stands alone, where
    theirs reads D in "the answer is dog".
    """
    words = answer.translate(BLANKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    stated = ANSWER_IS.search(answer)
    if stated and stated[1] in options:
        return stated[1]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def rouge_l(said: str, true: str) -> float:
    """F1 of the longest common subsequence of words."""
    words, truth = plain(said).split(), plain(true).split()
    longest = [0] * (len(truth) + 1)  # with truth[:j], of the words so far
    for word in words:
        before = longest[:]
        for j, other in enumerate(truth):
            longest[j + 1] = max(before[j + 1], longest[j])
            if word == other:
                longest[j + 1] = before[j] + 1
    return 2 * longest[-1] / max(1, len(words) + len(truth))


def score_benchmark(answer: str | None, row: dict) -> tuple[float, bool]:
    """(score, whether it could be read) of an answer to a benchmark's question, a row of
    predictions.jsonl.

    choice   1 or 0 (`read_choice`); asked by index, an index comes first
    direct   A-OKVQA's other score: min(1, number of the ten people who answered so / 3)
    open     proxy: does the true answer, as whole words, occur in the answer?
    caption  proxy: mean ROUGE-L over the reference captions
    """
    answer = (answer or "").strip()
    if not answer:
        return 0.0, False
    if row["form"] == "choice":
        options = dict(zip(row["letters"], row["choices"]))
        picked = None
        if row.get("asked") == "index":
            picked = read_index(answer, options)
        picked = picked or read_choice(answer, options)
        return float(picked == row["answer"]), picked is not None
    if row["form"] == "direct":
        people = [plain(true) for true in row["references"]]
        agreeing = people.count(plain(answer))
        return min(1.0, agreeing / 3), True
    if row["form"] == "caption":
        scores = [rouge_l(answer, true) for true in row["references"]]
        return sum(scores) / len(scores), True
    true, said = f" {plain(row['answer'])} ", f" {plain(answer)} "
    return float(true in said), True


def score_votes(votes: list[int | None], most: int) -> tuple[float, bool]:
    """(score, whether all votes were read), as R-Bench counts; `most`: the highest vote.

    A choice (most 1) is right if most votes are for it; of others the score is what share of the
    highest sum was given. An unread vote (None) counts as 0.
    """
    given = [vote for vote in votes if vote is not None]
    parsed = 0 < len(given) == len(votes)
    score = sum(given) / (most * max(1, len(votes)))
    if most == 1:
        score = float(score >= 0.5)
    return score, parsed
