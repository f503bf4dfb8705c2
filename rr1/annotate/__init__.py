"""Build a data set of reasoning chains from photos with questions: section 4 of the paper, Eq. (13)-(17), Figure 4.

For every question, in the steps of the figure:
    1. damage       X_d: random types over the four stages, at random intensities       Eq. (13)
    2. influence    what the damage does to what can be seen                            Eq. (14)
    3. reasoning    what the clean picture shows, worked out from the damaged one       Eq. (15)
    4. conclusion   what follows for the question                                       Eq. (16)
    5. length       the whole chain, as long as the total intensity calls for           Eq. (17), (7)

Steps 2 to 5 are written by a teacher. The default one is offline and does not look at the picture (see rr1/annotate/teachers.py); any chat
model that sees pictures takes its place. The questions are A-OKVQA's json, or JSON lines of image, question, choices, answer:

    python -m rr1.annotate --data questions.jsonl                                       # offline -> runs/data
    python -m rr1.annotate --data aokvqa_v1p0_train.json --images coco --dry-run        # what would be asked; nothing is
    OPENAI_API_KEY=.. python -m rr1.annotate --data aokvqa_v1p0_train.json --images coco --limit 10000 \\
        --teacher gpt-4o --price-in 2.5 --price-out 10 --max-cost 200 --out runs/data-10k
    python -m rr1.annotate --data questions.jsonl --base-url http://localhost:8000/v1 --teacher Qwen/Qwen2.5-VL-72B-Instruct

--out then holds train.jsonl (the released form and our own keys), llamafactory.json with dataset_info.json, images/, clean/,
rejected.jsonl (unusable answers, with the reason), answers.jsonl (every answer that was paid for), card.txt and card.png.
It may be killed at any moment: the same command goes on where it was, and asks nothing again but what was under way.

Differences from the paper: Y_GT is the question with its true answer, since Figure 4 feeds the pair; Psi_Len is one template with
the word count of the total intensity written into it, not a set of them.
"""
from __future__ import annotations

import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Sequence
from urllib.parse import quote

import cv2
import numpy as np
from tqdm import tqdm

from degrade import Degradation, degrade, sample_degradations
from rr1 import runtime
from rr1.annotate import card as data_card
from rr1.chain import Chain, build_question, is_well_formed, parse, render
from rr1.annotate.questions import Source, Truth, read_questions, read_rows, write_forms
from rr1.records import DataError, open_image
from rr1.files import to_json, write_bytes, write_text
from rr1.runtime import opt
from rr1.annotate.teachers import STEPS, ChatTeacher, NoAnswer, Rejected, Stop, fill, template_teacher

Teacher = Callable[..., str]


@dataclass
class Config:
    data: str = opt("", "the questions: A-OKVQA's json, or JSON lines of image, question, choices, answer")
    images: str = opt("", "folder that image paths are relative to (A-OKVQA: the one with train2017/); empty: the data file's own")
    out: str = opt("runs/data", "folder to write; where it is begun, it is gone on with")
    teacher: str = opt("template", "template: offline, nothing needed; otherwise the model's name at --base-url")
    base_url: str = opt("", "OpenAI-compatible endpoint; empty: OpenAI's. The key is taken from OPENAI_API_KEY")
    limit: int = opt(0, "only the first so many questions; 0: all")
    low: int = opt(1, "fewest types a photo")
    high: int = opt(4, "most types a photo (Figure 4 shows 7)")
    words: list[int] = opt([40, 40], "words of a chain for total intensity 0, and words more for each 1 of it, Eq. (7)")
    seed: int = opt(0, "fixes types, intensities and damage")
    workers: int = opt(8, "questions worked on at once")
    per_minute: float = opt(0.0, "most requests a minute; 0: as many as will go")
    retries: int = opt(6, "how often a request is repeated after 429, 5xx, silence or garbage")
    timeout: float = opt(120.0, "seconds to wait for an answer")
    max_tokens: int = opt(1024, "longest answer; a longer one is cut off and rejected")
    price_in: float = opt(0.0, "dollars for a million tokens read by the teacher")
    price_out: float = opt(0.0, "dollars for a million tokens written by the teacher")
    max_cost: float | None = opt(None, "stop before all answers in --out together cost more dollars than this")
    retry_rejected: bool = opt(False, "ask again for what is in rejected.jsonl")
    dry_run: bool = opt(False, "print what would be done, and the first question's prompts; ask and write nothing")


FREE = {"out", "limit", "workers", "per_minute", "retries", "timeout", "max_tokens", "price_in", "price_out", "max_cost",
        "retry_rejected", "dry_run", "base_url", "images"}    # may differ when a folder is gone on with


REFUSAL = re.compile(r"(i['\u2019]m (very )?sorry|i am sorry|sorry, (but )?i|i can(no|['\u2019])t (help|assist)|i['\u2019]m unable|"
                     r"i am unable|as an ai)", re.I)

# ---------------------------------------------------------------- the equations


def influence(G: Teacher, X: np.ndarray, X_d: np.ndarray, D_d: list[Degradation], Y_GT: Truth) -> str:
    """Eq. (14): Delta_d = G(X, X_d, D_d, Y_GT; Psi_INFLUENCE), what the damage does. Images are RGB uint8 (H, W, 3)."""
    return ask(G, "influence", [X, X_d], degradations=D_d, truth=Y_GT)


def reasoning(G: Teacher, X_d: np.ndarray, D_d: list[Degradation], Delta_d: str, Y_GT: Truth) -> str:
    """Eq. (15): T_X = G(X_d, D_d, Delta_d, Y_GT; Psi_REASONING), what the clean picture shows, without a look at it."""
    return ask(G, "reasoning", [X_d], degradations=D_d, influence=Delta_d, truth=Y_GT)


def conclusion(G: Teacher, T_X: str, Y_GT: Truth) -> str:
    """Eq. (16): Y_d = G(T_X, Y_GT; Psi_CONCLUSION), what follows for the question."""
    return ask(G, "conclusion", [], reasoning=T_X, truth=Y_GT)


def target_words(total: float, words: Sequence[int] = (40, 40)) -> int:
    """Eq. (7): len(Y) grows linearly with the total intensity, sum of s. Words of the whole chain."""
    return round(words[0] + words[1] * total)


def scale_length(G: Teacher, C: Chain, words: Sequence[int] = (40, 40)) -> Chain:
    """Eq. (17): C_hat = G(C; Psi_Len(sum of s)), the chain at the length that its total intensity calls for. Rejected if it
    came back without a tag, a type or the answer."""
    total, text = sum(s for _, s in C.degradations), render(C)
    answer = ask(G, "length", [], chain=text, total=total, words=target_words(total, words), present=len(text.split()))
    scaled = parse(answer)
    if None in (scaled.influence, scaled.reasoning, scaled.conclusion):
        raise Rejected("length", "a tag is lost", answer)
    if scaled.degradations != C.degradations:
        raise Rejected("length", "a type or an intensity is lost or changed", answer)
    if scaled.answer != C.answer:
        raise Rejected("length", f"the answer {C.answer!r} became {scaled.answer!r}", answer)
    if not is_well_formed(answer):
        raise Rejected("length", "tags out of place, or text outside them", answer)
    if not all((scaled.influence, scaled.reasoning, scaled.conclusion)):
        raise Rejected("length", "a section is empty", answer)
    return scaled


def ask(G: Teacher, step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
    """The teacher's text for one step; Rejected if it is empty, a refusal, or could not stand in a chain. Tags that it put
    round its section are taken off."""
    text = G(step, images, **fields).strip()
    if not text:
        raise Rejected(step, "empty", text)
    if REFUSAL.match(text):
        raise Rejected(step, "refused", text)
    if step == "length":
        return text
    try:
        return getattr(Chain(**{step: getattr(parse(text), step) or text}), step)
    except ValueError as error:
        raise Rejected(step, str(error), text) from None


def build_chain(G: Teacher, X: np.ndarray, X_d: np.ndarray, D_d: list[Degradation], Y_GT: Truth, words: Sequence[int] = (40, 40)) -> Chain:
    """Steps 2 to 5: what each writes, the next one reads."""
    Delta_d = influence(G, X, X_d, D_d, Y_GT)
    T_X = reasoning(G, X_d, D_d, Delta_d, Y_GT)
    Y_d = conclusion(G, T_X, Y_GT)
    C = Chain(D_d, Delta_d, T_X, Y_d, Y_GT.answer)
    return scale_length(G, C, words)


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
    own = seed_of(source, config.seed)
    D_d = sample_degradations(np.random.default_rng(own), config.low, config.high)
    return X, degrade(X, D_d, own), D_d


def annotate(source: Source, config: Config, teacher: Teacher, attempts: dict[str, int]) -> dict:
    """One question's line of train.jsonl, its pictures written. `attempts`: which attempt at each step (0 where absent)."""
    def G(step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
        return teacher(step, images, attempts.get(step, 0), **fields)

    X, X_d, D_d = damage(source, config)
    chain = build_chain(G, X, X_d, D_d, source.truth, config.words)
    name = quote(source.id, safe="")
    image, clean = f"images/{name}.png", f"clean/{name}{source.photo.suffix.lower()}"
    write_bytes(Path(config.out, image), cv2.imencode(".png", X_d[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])[1])
    write_bytes(Path(config.out, clean), source.photo.read_bytes())
    return {"id": source.id, "image": image,
            "conversations": [{"from": "human", "value": "<image>" + build_question(source.truth.question, source.truth.choices)},
                              {"from": "gpt", "value": render(chain)}],
            "degradations": [d._asdict() for d in D_d], "seed": seed_of(source, config.seed), "clean_image": clean,
            "choices": source.truth.choices, "answer": source.truth.answer, "teacher": config.teacher}


# ---------------------------------------------------------------- the folder


def open_folder(config: Config) -> None:
    """Make --out; SystemExit if it was begun with other settings."""
    out, settings = Path(config.out), {k: v for k, v in asdict(config).items() if k not in FREE}
    if (out / "config.json").exists():
        old = json.loads((out / "config.json").read_text(encoding="utf-8"))
        differ = [f"  {name}: was {old.get(name)!r}, now {value!r}" for name, value in settings.items() if old.get(name) != value]
        if differ:
            raise SystemExit("\n".join([f"{out} was begun with other settings:", *differ, "Give the old ones, or another --out."]))
    for folder in (out / "images", out / "clean"):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", to_json(settings, indent=2) + "\n")


def dry_run(config: Config, source: Source) -> None:
    """Print the prompts of one question, filled in with what the offline teacher would answer."""
    def show(step: str, images: Sequence[np.ndarray], **fields: Any) -> str:
        sizes = " and ".join("{1} x {0}".format(*image.shape) for image in images)
        print(f"\n--- {step}: {f'pictures of {sizes} pixels' if images else 'no picture'}\n\n{fill(step, fields)}")
        return template_teacher(step, images, **fields)

    X, X_d, D_d = damage(source, config)
    print(f"\nquestion {source.id}, photo {source.photo}")
    print("\n--- the chain\n\n" + render(build_chain(show, X, X_d, D_d, source.truth, config.words)))


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    out = Path(config.out)
    check(config)
    sources = read_questions(Path(config.data), config.images)
    done = {row["id"]: row for row in read_rows(out / "train.jsonl")}
    rejected = {row["id"]: row for row in read_rows(out / "rejected.jsonl") if row["id"] not in done}
    wanted = sources[:config.limit or None]
    todo = [s for s in wanted if s.id not in done and (config.retry_rejected or s.id not in rejected)]
    print(f"{len(wanted)} of {len(sources)} questions in {config.data}: {sum(s.id in done for s in wanted)} done before, "
          f"{sum(s.id in rejected for s in wanted)} rejected before, {len(todo)} to do, {len(STEPS)} answers each, by {config.teacher}")
    if config.dry_run:
        return dry_run(config, todo[0]) if todo else None

    open_folder(config)
    teacher = template_teacher if config.teacher == "template" else ChatTeacher(
        config.teacher, config.base_url, out / "answers.jsonl", config.price_in, config.price_out, config.max_cost,
        config.per_minute, config.retries, config.max_tokens, config.timeout)
    problem = work(config, todo, teacher, done, rejected)

    rows = write_forms(out, list(done.values()), [source.id for source in sources])
    rejected = {id: row for id, row in rejected.items() if id not in done}
    write_text(out / "rejected.jsonl", "".join(to_json(row) + "\n" for row in rejected.values()))
    if rows:
        paid = teacher.summary() if isinstance(teacher, ChatTeacher) else "offline teacher: it has not looked at the pictures"
        print("\n" + data_card.write(rows, out, list(rejected.values()), paid, lambda total: target_words(total, config.words)))
    if rejected:
        print(f"{len(rejected)} rejected, see {out}/rejected.jsonl; --retry-rejected asks for them again")
    if problem:
        raise SystemExit(f"{problem}\n{sum(s.id in done for s in wanted)} of {len(wanted)} questions are in {out}; the same command goes on from here")


def check(config: Config) -> None:
    """SystemExit for a command line that cannot be meant."""
    if not 0 <= config.low <= config.high <= 16:
        raise SystemExit(f"--low {config.low} --high {config.high}: expected 0 <= low <= high <= 16, the number of types")
    if len(config.words) != 2:
        raise SystemExit(f"--words {config.words}: expected two numbers, words at total intensity 0 and words more for each 1 of it")
    if config.teacher == "template" and (config.base_url or config.max_cost is not None):
        raise SystemExit("--base-url and --max-cost are for a teacher that is asked over the network: name its model by --teacher")
    if config.max_cost is not None and not (config.price_in or config.price_out):
        raise SystemExit("--max-cost needs the prices: --price-in and --price-out, in dollars for a million tokens")


def work(config: Config, todo: list[Source], teacher: Teacher, done: dict, rejected: dict) -> str:
    """Annotate `todo` on --workers threads, adding to `done` and `rejected` and to their files; returns why it stopped early or
    what was left undone, "" if nothing was."""
    cv2.setNumThreads(1)  # there is a thread for each question
    stop = getattr(teacher, "stop", lambda why: None)
    unanswered, in_a_row, problem = 0, 0, ""
    pool = ThreadPoolExecutor(config.workers)
    retry = {s.id: again(rejected[s.id]) if s.id in rejected else {} for s in todo}
    futures = {pool.submit(annotate, source, config, teacher, retry[source.id]): source for source in todo}
    try:
        with open(Path(config.out, "train.jsonl"), "a", encoding="utf-8") as good, \
             open(Path(config.out, "rejected.jsonl"), "a", encoding="utf-8") as bad, \
             tqdm(total=len(todo), unit="question", disable=None) as bar:
            for future in as_completed(futures):
                source = futures[future]
                try:
                    row = done[source.id] = future.result()
                    good.write(to_json(row) + "\n")
                    good.flush()
                    in_a_row = 0
                except Rejected as error:
                    row = rejected[source.id] = {"id": source.id, "step": error.step, "reason": error.reason, "answer": error.answer,
                                                 "attempts": retry[source.id]}
                    bad.write(to_json(row) + "\n")
                    bad.flush()
                    in_a_row = 0
                except NoAnswer as error:
                    unanswered, in_a_row = unanswered + 1, in_a_row + 1
                    problem = f"{unanswered} questions are left undone, the server gave no answer ({error})"
                    if in_a_row > config.workers:
                        raise Stop(f"the server has stopped answering ({error})") from None
                bar.update()
                bar.set_postfix_str(f"${teacher.spent:.2f}" if config.price_out and isinstance(teacher, ChatTeacher) else "")
    except (Stop, KeyboardInterrupt) as error:
        problem = str(error) or "stopped"
    finally:
        stop(problem)
        pool.shutdown(cancel_futures=True)
    return problem


def again(row: dict) -> dict[str, int]:
    """The attempts to make for a rejected question: one more at the step whose answer was of no use."""
    return row["attempts"] | {row["step"]: row["attempts"].get(row["step"], 0) + 1}
