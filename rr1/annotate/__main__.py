"""Build a data set of reasoning chains from photos with questions, Eq. (13)-(17).

The questions are A-OKVQA's json, or JSON lines of image, question, choices, answer. The default
teacher is offline and does not look at the picture; any chat model that sees pictures takes its
place:

    python -m rr1.annotate --data questions.jsonl                    # offline -> runs/data
    python -m rr1.annotate --data questions.jsonl --no-chains        # for GRPO: no teacher needed
    python -m rr1.annotate --data aokvqa_v1p0_train.json --images coco --dry-run  # asks nothing
    OPENAI_API_KEY=.. python -m rr1.annotate --data aokvqa_v1p0_train.json --images coco \\
        --limit 10000 --teacher gpt-4o --price-in 2.5 --price-out 10 --max-cost 200 \\
        --workers 32 --out runs/data-10k
    python -m rr1.annotate --data questions.jsonl --base-url http://localhost:8000/v1 \\
        --teacher Qwen/Qwen2.5-VL-72B-Instruct

--out then holds train.jsonl (the released form and our own keys), llamafactory.json with
dataset_info.json, images/, clean/, rejected.jsonl (unusable answers, with the reason),
answers.jsonl (every answer that was paid for), card.txt and card.png. The command may be killed at
any moment: the same one goes on where it was, and asks nothing again but what was under way. A
question, an answer or a photo that was changed since is done again.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from rr1.annotate import build_chain, target_words
from rr1.annotate.card import Card, total_intensity
from rr1.annotate.folder import Folder, begun
from rr1.annotate.questions import Source, read_questions
from rr1.annotate.rows import damage
from rr1.annotate.teachers import (
    STEPS,
    ChatTeacher,
    estimated_tokens,
    fill,
    template_teacher,
)
from rr1.annotate.work import STOPPED, work
from rr1.chain import render
from rr1.client import ChatClient
from rr1.records import one_line_errors
from rr1.runtime import opt, parse_config

SECONDS = 5.0  # that an answer takes, where --dry-run estimates


@dataclass
class Config:
    # what goes in and out
    data: str = opt("", "the questions: A-OKVQA's json, or JSON lines")
    images: str = opt(
        "", "folder that image paths are relative to; empty: the data file's own"
    )
    out: str = opt("runs/data", "folder to write; where it is begun, it is gone on with")
    limit: int = opt(0, "only the first so many questions; 0: all")
    # the damage, and the chain's length
    low: int = opt(1, "fewest types a photo; 0: some stay clean", high=16)
    high: int = opt(4, "most types a photo (Figure 4 shows 7)", low=1, high=16)
    words: list[int] = opt(
        [40, 40], "Eq. (7): words at total intensity 0, and more for each 1"
    )
    seed: int = opt(0, "fixes types, intensities and damage")
    no_chains: bool = opt(
        False, "for GRPO: picture, damage and a length, no chain and no teacher"
    )
    tokens: list[int] = opt(
        [100, 55], "Eq. (7) with --no-chains, in tokens (here Qwen2.5-VL's)"
    )
    # the teacher
    teacher: str = opt(
        "template", "template: offline; otherwise the model's name at --base-url"
    )
    base_url: str = opt(
        "", "OpenAI-compatible endpoint; empty: OpenAI's. Key: OPENAI_API_KEY"
    )
    max_tokens: int = opt(
        1024, "longest answer; a longer one is cut off and rejected", low=1
    )
    retry_rejected: bool = opt(False, "ask again for what is in rejected.jsonl")
    dry_run: bool = opt(
        False, "one question's prompts, and what all would cost; asks nothing"
    )
    # how it is asked, and what it may cost
    workers: int = opt(8, "questions worked on at once", low=1)
    per_minute: float = opt(0.0, "most requests a minute; 0: as many as will go")
    retries: int = opt(
        6, "how often a request is repeated after 429, 5xx, silence or garbage"
    )
    timeout: float = opt(
        120.0, "seconds of silence, and of a dripping reply, that end a request", low=0.1
    )
    price_in: float = opt(0.0, "dollars for a million tokens read by the teacher")
    price_out: float = opt(0.0, "dollars for a million tokens written by the teacher")
    max_cost: float | None = opt(None, "most dollars for all answers in --out together")


# What may differ when a folder is gone on with
FREE = (
    "images out limit base_url max_tokens retry_rejected dry_run workers per_minute retries "
    "timeout price_in price_out max_cost"
).split()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    check(config)
    sources = read_questions(Path(config.data), config.images, config.limit)
    wanted = sources[: config.limit or None]
    out = Path(config.out)
    if config.dry_run:
        dry_run(config, to_do(config, Folder(out), sources, wanted))
        return
    client = None
    if config.teacher != "template":
        client = ChatClient(
            config.teacher,
            config.base_url,
            max_tokens=config.max_tokens,
            per_minute=config.per_minute,
            retries=config.retries,
            timeout=config.timeout,
        )
    with begun(out, asdict(config), FREE, defaults=asdict(Config())):
        folder = Folder(out)
        todo = to_do(config, folder, sources, wanted)
        teacher = template_teacher
        if client:
            prices = (config.price_in, config.price_out)
            teacher = ChatTeacher(client, out / "answers.jsonl", prices, config.max_cost)
        problem = work(config, folder, todo, teacher)
        rows = folder.finish([source.id for source in sources])
        if rows and not config.no_chains:
            print("\n" + write_card(config, folder, rows, teacher))
        print(f"{len(rows)} records are in {folder.train}")
    if folder.rejected:
        again = f"see {folder.bad}; --retry-rejected asks for them again"
        print(f"{len(folder.rejected)} rejected, {again}")
    if problem:
        done = sum(source.id in folder.done for source in wanted)
        there = f"{done} of {len(wanted)} questions are in {out}"
        problem = f"{problem}\n{there}; the same command goes on from here"
        if problem.startswith(STOPPED):
            print(problem, file=sys.stderr)
            raise SystemExit(130)
        raise SystemExit(problem)


def to_do(
    config: Config, folder: Folder, sources: list[Source], wanted: list[Source]
) -> list[Source]:
    """The wanted questions that are not done; prints how many of each kind there are."""
    changed = folder.forget(sources, wanted)
    done = sum(source.id in folder.done for source in wanted)
    rejected = sum(source.id in folder.rejected for source in wanted)
    skipped = folder.done if config.retry_rejected else {**folder.done, **folder.rejected}
    todo = [source for source in wanted if source.id not in skipped]
    by = (
        "no teacher"
        if config.no_chains
        else f"{len(STEPS)} answers each, by {config.teacher}"
    )
    print(
        f"{len(wanted)} of {len(sources)} questions in {config.data}: {done} done before, "
        f"{rejected} rejected before, {len(todo)} to do, {by}"
    )
    if changed:
        print(f"{changed} are no longer asked, or otherwise than when they were done")
    return todo


def check(config: Config) -> None:
    """SystemExit for a command line that cannot be meant."""
    if config.low > config.high:
        raise SystemExit(f"--low {config.low} --high {config.high}: expected low <= high")
    for name, given in (("words", config.words), ("tokens", config.tokens)):
        if len(given) != 2:
            expected = f"two numbers, {name} at total intensity 0 and more for each 1 of it"
            raise SystemExit(f"--{name} {given}: expected {expected}")
    offline = config.teacher == "template"
    if offline and (config.base_url or config.max_cost is not None):
        what = "--base-url and --max-cost are for a teacher that is asked over the network"
        raise SystemExit(f"{what}: name its model by --teacher")
    if config.no_chains and not offline:
        raise SystemExit("--no-chains asks no teacher: leave out --teacher")
    if config.max_cost is not None and not (config.price_in or config.price_out):
        what = "--max-cost needs the prices: --price-in and --price-out"
        raise SystemExit(f"{what}, in dollars for a million tokens")


def write_card(config: Config, folder: Folder, rows: list[dict], teacher) -> str:
    paid = "offline teacher: it has not looked at the pictures"
    if isinstance(teacher, ChatTeacher):
        paid = teacher.summary()
    aims = [target_words(total_intensity(row), config.words) for row in rows]
    return Card(rows, aims).write(folder.path, list(folder.rejected.values()), paid)


def dry_run(config: Config, todo: list[Source]) -> None:
    """Print one question's prompts as the offline teacher fills them, and what all would cost."""
    if not todo or config.no_chains:
        return
    read, written = [], []  # tokens of each answer, estimated on the high side

    def show(step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
        prompt, answer = fill(step, fields), template_teacher(step, images, **fields)
        sizes = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in images)
        shown = f"pictures of {sizes} pixels" if images else "no picture"
        print(f"\n--- {step}: {shown}\n\n{prompt}")
        read.append(estimated_tokens(prompt, images))
        written.append(estimated_tokens(answer, []))
        return answer

    source, n = todo[0], len(todo)
    X, X_d, D_d = damage(source, config)
    print(f"\nquestion {source.id}, photo {source.photo}")
    chain = build_chain(show, X, X_d, D_d, source.truth, config.words)
    print(f"\n--- the chain\n\n{render(chain)}\n")
    requests, tokens_in, tokens_out = n * len(read), n * sum(read), n * sum(written)
    seconds = requests * SECONDS / config.workers
    if config.per_minute:
        seconds = max(seconds, requests / config.per_minute * 60)
    dollars = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
    cost = f"about ${dollars:.2f}" if dollars else "--price-in and --price-out give dollars"
    print(
        f"{requests} requests, about {tokens_in} tokens read and {tokens_out} written: {cost}; "
        f"about {seconds / 3600:.1f} hours with --workers {config.workers}, "
        f"if an answer takes {SECONDS:g} seconds"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
