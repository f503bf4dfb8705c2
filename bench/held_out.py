"""How a checkpoint answers the drawn world's held-out records, also with the picture blanked or
the damage forced."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rr1 import data, files, rollout, vlm
from rr1.chain import Chain, build_prompt, parse, render
from rr1.evaluation.scores import score_answer
from rr1.evaluation.statistics import Estimate, paired_difference
from rr1.records import open_image
from rr1.rewards import r_deg, r_len

OWN, TRUE, OTHER, BLANK = "own", "true damage", "another's damage", "blank picture"


def answers(
    checkpoint: str,
    found: Sequence[dict],
    path: Path,
    plain: bool,
    condition: str = OWN,
    temperature: float = 0.0,
    G: int = 1,
) -> list[dict]:
    """Rows of `path`, G a record; made if there are none. `condition` says what is done to the
    prompt: nothing, its chain begun with the true or another record's damage, or a grey
    picture in place of the record's own."""
    if path.exists():
        return files.read_lines(path)
    model, processor = vlm.load(checkpoint)
    model.eval().requires_grad_(False)
    rows = []
    for start in range(0, len(found), 64):
        part = list(found[start : start + 64])
        rows += _answered(model, processor, part, plain, condition, start, temperature, G)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, files.lines_of(rows))
    return rows


@torch.inference_mode()
def _answered(
    model, processor, part, plain, condition, start, temperature, G
) -> list[dict]:
    images = [open_image(record["image"]) for record in part]
    if condition == BLANK:
        images = [Image.fromarray(np.full_like(image, 127)) for image in images]
    texts = [
        record["question"] if plain else build_prompt(record["question"]) for record in part
    ]
    batch = data.collate(texts, images, processor)
    shift = {TRUE: 0, OTHER: len(part) // 2}.get(condition)
    forced = [None] * len(part)
    if shift is not None:
        forced = [part[(i + shift) % len(part)]["degradations"] for i in range(len(part))]
        for ids, damage in zip(batch.ids, forced, strict=True):
            ids += processor.response_ids(render(Chain(damage)))[:-1]
    sampled = rollout.sample_group(
        model,
        data.encode(model, batch),
        G,
        [start + i for i in range(len(part))],
        end_id=processor.end_id,
        max_new_tokens=128,
        temperature=temperature,
        banned=processor.banned_ids,
    )
    rows = []
    for record, damage, group in zip(part, forced, sampled, strict=True):
        for y in group:
            row = _judged(record, processor.decode(y.ids), y.length, plain)
            rows.append(row | {"forced": damage})
    return rows


def _judged(record: dict, text: str, length: int, plain: bool) -> dict:
    chain, caption = parse(text), record["form"] == "caption"
    answer = text if plain else chain.conclusion if caption else chain.answer
    score, _ = score_answer(
        answer,
        record["form"],
        data.short_answer(record),
        record["choices"],
    )
    named, true = (
        {kind for kind, _ in side} for side in (chain.degradations, record["degradations"])
    )
    return {
        "id": record["id"],
        **{name: record[name] for name in ("form", "kind", "n_steps", "level")},
        "total": sum(s for _, s in record["degradations"]),
        "score": score,
        "r_deg": r_deg(chain.degradations, record["degradations"]),
        "r_len": r_len(length, record["length"]),
        "type_f1": 2 * len(named & true) / max(1, len(named) + len(true)),
        "length": length,
        "response": text,
    }


def questions_at(rows: Sequence[dict], level: str | None = None) -> list[dict]:
    """The rows that are no captions, of one level or of all."""
    return [
        row for row in rows if row["form"] != "caption" and level in (None, row["level"])
    ]


def mean(rows: Sequence[dict], name: str = "score") -> float:
    return float(np.mean([row[name] for row in rows]))


def over_seeds(runs: Sequence[Sequence[dict]], name: str = "score") -> np.ndarray:
    """(records,) the mean over runs of one measure; the runs answered the same records."""
    return np.mean([[row[name] for row in rows] for rows in runs], axis=0)


def difference(
    after: Sequence[Sequence[dict]], before: Sequence[Sequence[dict]], name: str = "score"
) -> Estimate:
    """Paired by record, the mean over seeds of each side."""
    return paired_difference(over_seeds(after, name), over_seeds(before, name))
