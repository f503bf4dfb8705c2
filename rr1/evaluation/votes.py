"""R-Bench's own scores: the votes of a judge, a language model behind any OpenAI-compatible endpoint.

    choice     five votes of 0 or 1                      score: their sum / 5
    open       five votes of 0, 1 or 2                   sum / 10
    caption    one vote of 0, 1 or 2 for each reference  sum / (2 x references)

The numbers are R-Bench's, the wording of the requests is ours, and so is the judge: its default was GPT-3.5. Each vote is kept on
disk and never asked for twice; what holds no vote is asked for once more, and then counts as unread. The key comes from the
environment variable OPENAI_API_KEY, goes nowhere but into the request's header, and may be absent for a server of one's own.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Sequence

from tqdm import tqdm

from rr1.evaluation.scores import find_answer

ROUNDS, MOST = {"choice": 5, "open": 5}, {"choice": 1, "open": 2, "caption": 2}
TASKS = {"choice": "Does the answer choose what the correct answer is? Reply with 1 for yes or 0 for no.",
         "open": "Is the answer right? Reply with 2 if it means the same as the correct answer, 1 if it does in part, 0 if it does not.",
         "caption": "Does the answer describe the same picture as the reference? Reply with 2 for yes, 1 for in part, 0 for no."}
AT_ONCE, TRIES = 8, 4                # requests under way, and how often one that the server refuses is sent


def requests(row: dict, answer: str) -> list[str]:
    """What the judge is asked about one answer, a text for each vote."""
    truths = row["references"] if row["form"] == "caption" else [row["answer"]] * ROUNDS[row["form"]]
    named = "reference" if row["form"] == "caption" else "correct answer"
    return [f"Question: {row['question']}\nThe {named}: {truth}\nThe answer to judge: {answer}\n\n{TASKS[row['form']]} Reply with the number alone."
            for truth in truths]


def vote(rows: Sequence[dict], url: str, model: str, cache: Path) -> None:
    """Give each row of R-Bench its `votes` (numbers, None for an unread one) and `most`, the highest that a vote can be.
    `url`: the endpoint's root, such as http://localhost:8000/v1. SystemExit where it cannot be asked."""
    if not url.startswith(("http://", "https://")):
        raise SystemExit(f"--judge {url}: expected an address such as https://api.openai.com/v1")
    known, lock = {}, threading.Lock()
    for line in cache.read_bytes().splitlines() if cache.exists() else ():
        try:
            known |= {(kept := json.loads(line))["key"]: kept["vote"]}
        except ValueError:
            pass                                                            # half a line of a killed run
    todo = {}                                                               # key -> (text, the most)
    for row in rows:
        if "strength" in row and row["answer"] is not None and row["form"] in MOST:
            answer, row["most"] = find_answer(row["response"], row["form"]), MOST[row["form"]]
            texts = requests(row, answer) if answer and answer.strip() else []
            row["votes"] = [hashlib.sha256(f"{model}\n{i}\n{text}".encode()).hexdigest() for i, text in enumerate(texts)]
            todo |= {key: (text, row["most"]) for key, text in zip(row["votes"], texts) if key not in known}

    def get(key: str) -> None:
        text, most = todo[key]
        found = next((v for v in (read_vote(ask(url, model, text), most) for _ in range(2)) if v is not None), None)
        with lock, open(cache, "a", encoding="utf-8") as file:
            known[key] = found
            file.write(json.dumps({"key": key, "vote": found}) + "\n")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for _ in tqdm(pool.map(get, todo), "votes", len(todo), disable=None):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    for row in rows:
        if "votes" in row:
            row["votes"] = [known[key] for key in row["votes"]]


def read_vote(reply: str, most: int) -> int | None:
    """The one number in a reply, if it is a vote."""
    numbers = re.findall(r"\d+", reply)
    return int(numbers[0]) if len(numbers) == 1 and int(numbers[0]) <= most else None


def ask(url: str, model: str, text: str) -> str:
    """One chat completion. A server that is busy is asked again, later each time."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(1, TRIES + 1):
        try:
            request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["choices"][0]["message"]["content"] or ""
        except (OSError, ValueError, LookupError, TypeError) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            if final or attempt == TRIES:
                raise SystemExit(f"--judge {url}: {type(error).__name__}: {error}. The votes so far are kept; run again to go on") from None
            time.sleep(2 ** attempt)
