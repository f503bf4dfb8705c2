"""What the page shows, without the page: pictures, answers and rewards, as arrays and as HTML.

What a model or a visitor wrote is escaped before it becomes HTML.

Shapes: H, W of the picture; G responses in a group.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from degrade import DEGRADATIONS, Degradation, degrade
from rr1 import data, fast, rewards, rollout, tiny, vlm
from rr1.chain import Chain, build_prompt, render
from rr1.grpo import group_advantages
from rr1.records import open_image
from rr1.tiny.questions import Question, questions, true_chain
from rr1.tiny.scenes import Scene, draw, sample_scene
from rr1.u1.pairs import recover_images
from rr1.u1.restorer import Restorer

TINY = {"base": tiny.BASE, "SFT": tiny.SFT, "GRPO": tiny.GRPO}
G = 8
LONGEST = 160  # tokens of a response
LARGEST = 512  # pixels a side of a photo, once it is read
PARTS = {
    "influence": "what the damage hides",
    "reasoning": "what the clean picture would show",
    "conclusion": "what follows",
    "answer": "answer",
}


class Model(NamedTuple):
    """A checkpoint, ready to answer. `plain`: it writes no chain, only the answer."""

    model: torch.nn.Module
    processor: vlm.Processor
    plain: bool


def load(folder: str) -> Model:
    """SystemExit for a folder that holds no Qwen2.5-VL."""
    model, processor = vlm.load(folder)
    fast.enable(model)
    return Model(model.eval().requires_grad_(False), processor, folder == tiny.BASE)


# ---------------------------------------------------------------- pictures


@dataclass
class View:
    """What a visitor looks at: the clean picture (H, W, 3), its scene if it was drawn, what was
    done to it, and what the models therefore see (H, W, 3)."""

    clean: np.ndarray
    scene: Scene | None = None
    questions: dict[str, Question] = field(default_factory=dict)
    damage: list[Degradation] = field(default_factory=list)
    seen: np.ndarray | None = None


class Upload(io.BytesIO):
    """Bytes that call themselves so in an error."""

    def __repr__(self) -> str:
        return "your upload"


def drawn(seed: int) -> View:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    asked = {question.text: question for question in questions(scene)}
    return View(draw(scene, rng), scene, asked)


def uploaded(content: bytes) -> View:
    """DataError for bytes that are no picture, or one of too many pixels."""
    image = open_image(Upload(content))
    image.thumbnail((LARGEST, LARGEST))
    return View(np.asarray(image))


def damage_of(types: Sequence[str | None], intensities: Sequence[float]) -> list:
    """What the controls say, as degradations in the order in which they are applied."""
    chosen = [(type, s) for type, s in zip(types, intensities) if type and s > 0]
    order = list(DEGRADATIONS)
    return sorted(Chain(chosen).degradations, key=lambda found: order.index(found.type))


def damaged(view: View, damage: list[Degradation], seed: int) -> View:
    return replace(view, damage=damage, seen=degrade(view.clean, damage, seed))


@cache
def restorer() -> Restorer:
    return Restorer.from_pretrained(tiny.RESTORER).eval()


def recovered(view: View) -> np.ndarray | None:
    """The damaged picture undone, at the restorer's size; None for a photo, of which it knows
    nothing."""
    if view.scene is None:
        return None
    [found] = recover_images(restorer(), [view.seen])
    return found


# ---------------------------------------------------------------- answers


def respond(
    asked: Model,
    picture: np.ndarray,
    question: str,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[rewards.Response]:
    """n responses to the question about the picture. ValueError for a question that spells a
    token which stands for a picture."""
    model, processor, plain = asked
    text = question if plain else build_prompt(question)
    batch = data.collate([text], [Image.fromarray(picture)], processor)
    [sampled] = rollout.sample_group(
        model,
        data.encode(model, batch),
        n,
        [seed],
        end_id=processor.end_id,
        max_new_tokens=LONGEST,
        temperature=temperature,
        banned=processor.banned_ids,
    )
    responses = []
    for found in sampled:
        said = processor.decode(found.ids)
        if plain:
            untagged = said.replace("<", "").replace(">", "")
            said = render(Chain(answer=untagged))
        responses.append(rewards.Response(said, found.length, found.truncated))
    return responses


def truth(view: View, question: str, processor: vlm.Processor) -> dict:
    """The record that the rewards judge by. Of a photo, and of a question that is not among the
    scene's, only the damage is known: answer, chain and length are None."""
    record = {
        "id": "the page",
        "question": question,
        "choices": None,
        "degradations": view.damage,
        "answer": None,
        "chain": None,
        "length": None,
    }
    if asked := view.questions.get(question):
        answer = None if asked.kind == "caption" else asked.answer
        chain = true_chain(view.scene, asked, view.damage, answer)
        length = len(processor.response_ids(render(chain))) - 1  # without the end of turn
        record |= {"answer": answer, "chain": chain, "length": length}
    return record


def terms(record: dict, reading: str = "matched") -> dict[str, rewards.Reward]:
    """The rewards that can be given where so much is known, Eq. 6 in the reading chosen."""
    names = ["deg" if reading == "matched" else f"deg_{reading}", "format"]
    names += ["len"] if record["length"] else []
    names += ["accuracy"] if record["answer"] else []
    return rewards.load_rewards(names)


def judged(
    responses: list[rewards.Response],
    record: dict,
    reading: str,
    weights: dict[str, float],
) -> tuple[list[dict[str, float]], list[float], list[float]]:
    """Each response's terms, R (Eq. 9) and advantage (Eq. 10-11). `weights` by a term's first
    word: deg, len, format, accuracy."""
    chosen = terms(record, reading)
    factors = [weights[name.split("_")[0]] for name in chosen]
    scored = [rewards.composite(each, record, chosen, factors) for each in responses]
    totals = [total for total, _ in scored]
    [advantages] = group_advantages(torch.tensor([totals])).tolist()
    return [values for _, values in scored], totals, advantages


# ---------------------------------------------------------------- HTML


def damage_text(damage: list[Degradation]) -> str:
    return escape(", ".join(f"{type} {s:.2f}" for type, s in damage) or "none")


def chain_html(chain: Chain, plain: bool = False) -> str:
    """The chain's sections, each under what it is."""
    rows = [] if plain else [("damage", damage_text(chain.degradations))]
    for name, meaning in PARTS.items():
        said = getattr(chain, name)
        if plain and name != "answer":
            continue
        rows.append((meaning, "<i>missing</i>" if said is None else escape(said)))
    return "".join(f"<dt>{meaning}</dt><dd>{said}</dd>" for meaning, said in rows)


def bar(name: str, value: float) -> str:
    """A reward term between -3 and 3, to the left or to the right of the middle."""
    width = min(50.0, abs(value) * 50 / 3)
    start = 50 - width if value < 0 else 50
    sign = "minus" if value < 0 else "plus"
    filled = f'<b class="{sign}" style="left:{start:.1f}%;width:{width:.1f}%"></b>'
    return f'<div class="bar"><u>{name}</u><s>{filled}</s><em>{value:+.2f}</em></div>'


def answer_card(
    name: str, response: rewards.Response, record: dict, plain: bool = False
) -> str:
    """One model's response. A plain one is judged by its answer alone."""
    chosen = terms(record)
    if plain:
        chosen = {key: chosen[key] for key in chosen if key == "accuracy"}
    _, values = rewards.composite(response, record, chosen)
    bars = "".join(bar(key, value) for key, value in values.items())
    cut = ", cut off" if response.truncated else ""
    chain = chain_html(response.chain, plain)
    size = f"<p>tokens: {response.length}{cut}</p>"
    return f'<div class="card"><h3>{escape(name)}</h3><dl>{chain}</dl>{bars}{size}</div>'


def truth_card(record: dict) -> str:
    """What is true: the whole ideal chain of a drawn scene, the damage alone of a photo."""
    damage = f"<dt>damage</dt><dd>{damage_text(record['degradations'])}</dd>"
    known = chain_html(record["chain"]) if record["chain"] else damage
    return f'<div class="card truth"><h3>truth</h3><dl>{known}</dl></div>'


def group_table(
    responses: list[rewards.Response],
    record: dict,
    reading: str,
    weights: dict[str, float],
) -> str:
    """A row a response: its damage, its answer, each term, R and the advantage."""
    values, totals, advantages = judged(responses, record, reading, weights)
    head = ["damage named", "answer", "tokens", *values[0], "R", "advantage"]
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    for response, own, total, A in zip(responses, values, totals, advantages):
        chain = response.chain
        cells = [damage_text(chain.degradations), escape(chain.answer or "missing")]
        cells += [str(response.length), *(f"{value:+.2f}" for value in own.values())]
        cells += [f"{total:+.2f}", f'<b class="{"up" if A > 0 else "down"}">{A:+.2f}</b>']
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
