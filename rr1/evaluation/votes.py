"""R-Bench's own scores: the votes of a judge, a model behind an OpenAI-compatible endpoint.

    choice     five votes of 0 or 1                      score: 1 if three are 1, else 0
    open       five votes of 0, 1 or 2                   sum / 10
    caption    one vote of 0, 1 or 2 for each reference  sum / (2 x references)

The numbers are R-Bench's, the wording of the requests is ours, and so is the judge: its default was
GPT-3.5. Each vote is kept on disk and never asked for twice; what holds no vote is asked for once
more, and then counts as unread.
"""

import hashlib
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from rr1 import files
from rr1.client import ChatClient, NoAnswer, Refused, Stop
from rr1.evaluation.scores import find_answer

ROUNDS = 5  # votes on a choice or an open answer
MOST = {"choice": 1, "open": 2, "caption": 2}
AT_ONCE = 8  # requests under way
MANY = 20  # so many requests without an answer in a row: nobody is there
TASKS = {
    "choice": "Does the answer choose what the correct answer is? "
    "Reply with 1 for yes or 0 for no.",
    "open": "Is the answer right? Reply with 2 if it means the same as the correct answer, "
    "1 if it does in part, 0 if it does not.",
    "caption": "Does the answer describe the same picture as the reference? "
    "Reply with 2 for yes, 1 for in part, 0 for no.",
}


def requests(row: dict, answer: str | None) -> list[str]:
    """What the judge is asked about one answer, a text for each vote; of silence nothing."""
    if not answer or not answer.strip():
        return []
    named, truths = "correct answer", [row["answer"]] * ROUNDS
    if row["form"] == "caption":
        named, truths = "reference", row["references"]
    rest = f"The answer to judge: {answer}\n\n{TASKS[row['form']]} Reply with the number alone."
    return [f"Question: {row['question']}\nThe {named}: {truth}\n{rest}" for truth in truths]


def vote(rows: Sequence[dict], url: str, model: str, cache: Path) -> None:
    """Give each row of R-Bench its `votes` (None for an unread one) and `most`, the highest vote.

    `url`: the endpoint's root, such as http://localhost:8000/v1; `cache`: the file that keeps the
    votes. SystemExit where the endpoint cannot be asked.
    """
    if not url.startswith(("http://", "https://")):
        raise SystemExit(f"--judge {url}: expected an address such as https://api.openai.com/v1")
    client, lock = ChatClient(model, url, flag="--judge"), threading.Lock()
    known = {row["key"]: row["vote"] for row in files.read_lines(cache)}
    keys = {}  # row -> the keys of its votes
    todo = {}  # key -> text, the highest vote
    for i, row in enumerate(rows):
        if "strength" in row and row["answer"] is not None and row["form"] in MOST:
            row["most"] = MOST[row["form"]]
            texts = requests(row, find_answer(row["response"], row["form"]))
            keys[i] = [_key(model, k, text) for k, text in enumerate(texts)]
            todo |= {key: (text, row["most"]) for key, text in zip(keys[i], texts)}

    failed = []  # requests without an answer, since the last answer

    def ask(key: str) -> None:
        text, most = todo[key]
        try:
            found = read_vote(client.ask(text).text, most)
            if found is None:
                found = read_vote(client.ask(text).text, most)
        except (NoAnswer, Refused) as error:
            failed.append(str(error))
            if len(failed) >= MANY:
                client.stop(f"{MANY} requests in a row failed, the last: {error}")
            return
        with lock:
            failed.clear()
            known[key] = found
            files.append_lines(cache, [{"key": key, "vote": found}])

    missing = [key for key in todo if key not in known]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            list(tqdm(pool.map(ask, missing), "votes", len(missing), disable=None))
        except Stop as error:
            raise SystemExit(
                f"--judge {url}: {error}. Votes are kept: run again to go on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    lost = [key for key in missing if key not in known]
    if lost:
        print(f"--judge {url}: {len(lost)} votes could not be had; run again to ask for them")
    for i, own in keys.items():
        rows[i]["votes"] = [known.get(key) for key in own]


def _key(model: str, k: int, text: str) -> str:
    return hashlib.sha256(f"{model}\n{k}\n{text}".encode()).hexdigest()


def read_vote(reply: str, most: int) -> int | None:
    """The one number in a reply, if it is a vote."""
    numbers = re.findall(r"\d+", reply)
    if len(numbers) != 1 or int(numbers[0]) > most:
        return None
    return int(numbers[0])
