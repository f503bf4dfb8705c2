"""Build a data set of reasoning chains from photos with questions, Eq. (13)-(17).

The questions are A-OKVQA's json, or JSON lines of image, question, choices, answer. The default
teacher is offline and does not look at the picture; any chat model that sees pictures takes its
place:

    python -m rr1.annotate --data questions.jsonl                    # offline -> runs/data
    python -m rr1.annotate --data aokvqa_v1p0_train.json --images coco --dry-run  # asks nothing
    OPENAI_API_KEY=.. python -m rr1.annotate --data aokvqa_v1p0_train.json --images coco \\
        --limit 10000 --teacher gpt-4o --price-in 2.5 --price-out 10 --max-cost 200 \\
        --out runs/data-10k
    python -m rr1.annotate --data questions.jsonl --base-url http://localhost:8000/v1 \\
        --teacher Qwen/Qwen2.5-VL-72B-Instruct

--out then holds train.jsonl (the released form and our own keys), llamafactory.json with
dataset_info.json, images/, clean/, rejected.jsonl (unusable answers, with the reason),
answers.jsonl (every answer that was paid for), card.txt and card.png. The command may be killed at
any moment: the same one goes on where it was, and asks nothing again but what was under way.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Sequence
from urllib.parse import quote

import cv2
import numpy as np
from tqdm import tqdm

from degrade import Degradation, degrade, sample_degradations
from rr1 import files
from rr1.annotate import build_chain, target_words
from rr1.annotate.card import Card, total_intensity
from rr1.annotate.folder import Folder
from rr1.annotate.questions import Source, read_questions
from rr1.annotate.teachers import STEPS, ChatTeacher, Rejected, fill, template_teacher
from rr1.chain import build_question, render
from rr1.client import ChatClient, NoAnswer, Stop
from rr1.records import DataError, open_image
from rr1.runtime import opt, parse_config


@dataclass
class Config:
    # what goes in and out
    data: str = opt("", "the questions: A-OKVQA's json, or JSON lines")
    images: str = opt("", "folder that image paths are relative to; empty: the data file's own")
    out: str = opt("runs/data", "folder to write; where it is begun, it is gone on with")
    limit: int = opt(0, "only the first so many questions; 0: all")
    # the damage, and the chain's length
    low: int = opt(1, "fewest types a photo")
    high: int = opt(4, "most types a photo (Figure 4 shows 7)")
    words: list[int] = opt([40, 40], "Eq. (7): words at total intensity 0, and more for each 1")
    seed: int = opt(0, "fixes types, intensities and damage")
    # the teacher
    teacher: str = opt("template", "template: offline; otherwise the model's name at --base-url")
    base_url: str = opt("", "OpenAI-compatible endpoint; empty: OpenAI's. Key: OPENAI_API_KEY")
    max_tokens: int = opt(1024, "longest answer; a longer one is cut off and rejected")
    retry_rejected: bool = opt(False, "ask again for what is in rejected.jsonl")
    dry_run: bool = opt(False, "print the first question's prompts; ask and write nothing")
    # how it is asked, and what it may cost
    workers: int = opt(8, "questions worked on at once")
    per_minute: float = opt(0.0, "most requests a minute; 0: as many as will go")
    retries: int = opt(6, "how often a request is repeated after 429, 5xx, silence or garbage")
    timeout: float = opt(120.0, "seconds of silence after which a request has failed")
    price_in: float = opt(0.0, "dollars for a million tokens read by the teacher")
    price_out: float = opt(0.0, "dollars for a million tokens written by the teacher")
    max_cost: float | None = opt(None, "most dollars for all answers in --out together")


# What may differ when a folder is gone on with
FREE = (
    "images out limit base_url max_tokens retry_rejected dry_run workers per_minute retries "
    "timeout price_in price_out max_cost"
).split()


# ---------------------------------------------------------------- one question's way


def seed_of(source: Source, seed: int) -> int:
    """A question's own seed, from its id alone, so that others may come and go."""
    return int(np.random.SeedSequence([seed, zlib.crc32(source.id.encode())]).generate_state(1)[0])


def damage(source: Source, config: Config) -> tuple[np.ndarray, np.ndarray, list[Degradation]]:
    """Step 1, Eq. (13): X, X_d and D_d of a question."""
    try:
        X = np.asarray(open_image(source.photo))
    except DataError as error:
        raise Rejected("damage", str(error)) from None
    seed = seed_of(source, config.seed)
    D_d = sample_degradations(np.random.default_rng(seed), config.low, config.high)
    return X, degrade(X, D_d, seed), D_d


def annotate(source: Source, config: Config, teacher, attempts: dict[str, int]) -> dict:
    """One question's line of train.jsonl, its pictures written.

    `attempts`: which attempt to make at each step (0 where absent).
    """

    def G(step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
        return teacher(step, images, attempts.get(step, 0), **fields)

    truth = source.truth
    X, X_d, D_d = damage(source, config)
    chain = build_chain(G, X, X_d, D_d, truth, config.words)
    name = quote(source.id, safe="")
    image, clean = f"images/{name}.png", f"clean/{name}{source.photo.suffix.lower()}"
    png = cv2.imencode(".png", X_d[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
    files.write_bytes(Path(config.out, image), png)
    files.write_bytes(Path(config.out, clean), source.photo.read_bytes())
    question = "<image>" + build_question(truth.question, truth.choices)
    return {
        "id": source.id,
        "image": image,
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": render(chain)},
        ],
        "degradations": [d._asdict() for d in D_d],
        "seed": seed_of(source, config.seed),
        "clean_image": clean,
        "choices": truth.choices,
        "answer": truth.answer,
        "teacher": config.teacher,
    }


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    check(config)
    sources = read_questions(Path(config.data), config.images)
    wanted = sources[: config.limit or None]
    folder = Folder(config.out)
    done = sum(source.id in folder.done for source in wanted)
    rejected = [] if config.retry_rejected else folder.rejected
    todo = [source for source in wanted if source.id not in {*folder.done, *rejected}]
    print(
        f"{len(wanted)} of {len(sources)} questions in {config.data}: {done} done before, "
        f"{sum(source.id in folder.rejected for source in wanted)} rejected before, "
        f"{len(todo)} to do, {len(STEPS)} answers each, by {config.teacher}"
    )
    if config.dry_run:
        return dry_run(config, todo[0]) if todo else None

    folder.begin(asdict(config), FREE, defaults=asdict(Config()))
    teacher = make_teacher(config)
    problem = work(config, folder, todo, teacher)
    rows = folder.finish([source.id for source in sources])
    if rows:
        paid = "offline teacher: it has not looked at the pictures"
        if isinstance(teacher, ChatTeacher):
            paid = teacher.summary()
        aims = [target_words(total_intensity(row), config.words) for row in rows]
        card = Card(rows, aims)
        print("\n" + card.write(folder.path, list(folder.rejected.values()), paid))
    if folder.rejected:
        again = f"see {folder.bad}; --retry-rejected asks for them again"
        print(f"{len(folder.rejected)} rejected, {again}")
    if problem:
        done = sum(source.id in folder.done for source in wanted)
        there = f"{done} of {len(wanted)} questions are in {folder.path}"
        raise SystemExit(f"{problem}\n{there}; the same command goes on from here")


def check(config: Config) -> None:
    """SystemExit for a command line that cannot be meant."""
    if not 0 <= config.low <= config.high <= 16:
        given = f"--low {config.low} --high {config.high}"
        raise SystemExit(f"{given}: expected 0 <= low <= high <= 16, the number of types")
    if len(config.words) != 2:
        expected = "two numbers, words at total intensity 0 and words more for each 1 of it"
        raise SystemExit(f"--words {config.words}: expected {expected}")
    offline = config.teacher == "template"
    if offline and (config.base_url or config.max_cost is not None):
        what = "--base-url and --max-cost are for a teacher that is asked over the network"
        raise SystemExit(f"{what}: name its model by --teacher")
    if config.max_cost is not None and not (config.price_in or config.price_out):
        what = "--max-cost needs the prices: --price-in and --price-out"
        raise SystemExit(f"{what}, in dollars for a million tokens")


def make_teacher(config: Config):
    if config.teacher == "template":
        return template_teacher
    client = ChatClient(
        config.teacher,
        config.base_url,
        max_tokens=config.max_tokens,
        per_minute=config.per_minute,
        retries=config.retries,
        timeout=config.timeout,
    )
    prices = (config.price_in, config.price_out)
    return ChatTeacher(client, Path(config.out, "answers.jsonl"), prices, config.max_cost)


def dry_run(config: Config, source: Source) -> None:
    """Print the prompts of one question, filled in with what the offline teacher would answer."""

    def show(step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
        sizes = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in images)
        shown = f"pictures of {sizes} pixels" if images else "no picture"
        print(f"\n--- {step}: {shown}\n\n{fill(step, fields)}")
        return template_teacher(step, images, **fields)

    X, X_d, D_d = damage(source, config)
    print(f"\nquestion {source.id}, photo {source.photo}")
    chain = build_chain(show, X, X_d, D_d, source.truth, config.words)
    print(f"\n--- the chain\n\n{render(chain)}")


def work(config: Config, folder: Folder, todo: list[Source], teacher) -> str:
    """Annotate `todo` on --workers threads, adding to the folder.

    Returns why it stopped early or what was left undone; "" if nothing was.
    """
    cv2.setNumThreads(1)  # there is a thread for each question
    chat = teacher if isinstance(teacher, ChatTeacher) else None
    problem, unanswered, in_a_row = "", 0, 0
    pool = ThreadPoolExecutor(config.workers)
    futures = {}
    for source in todo:
        future = pool.submit(annotate, source, config, teacher, folder.attempts(source.id))
        futures[future] = source
    bar = tqdm(total=len(todo), unit="question", disable=None)
    try:
        for future in as_completed(futures):
            try:
                folder.add(future.result())
                in_a_row = 0
            except Rejected as error:
                folder.reject(futures[future].id, error)
                in_a_row = 0
            except NoAnswer as error:
                unanswered, in_a_row = unanswered + 1, in_a_row + 1
                problem = f"{unanswered} questions are left undone, no answer came ({error})"
                if in_a_row > config.workers:
                    raise Stop(f"the server has stopped answering ({error})") from None
            bar.update()
            if chat and config.price_out:
                bar.set_postfix_str(f"${chat.spent:.2f}")
    except (Stop, KeyboardInterrupt) as error:
        problem = str(error) or "stopped"
    finally:
        bar.close()
        if chat:
            chat.client.stop(problem)
        pool.shutdown(cancel_futures=True)
    return problem


if __name__ == "__main__":
    main()
