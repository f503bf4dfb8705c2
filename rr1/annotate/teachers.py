"""The teachers G of Eq. (14)-(17). A teacher is any function

    teacher(step, images=(), attempt=0, **fields) -> text

where `step` is "influence", "reasoning", "conclusion" or "length", `images` are RGB uint8 arrays (H, W, 3), `fields` fill the
step's template under rr1/annotate/prompts/, and another `attempt` may give another answer. There are two:

    template_teacher    writes from the fields alone. It needs nothing and never looks at the picture: what it says of the damage is
                        true in general, the answer is the given one, and nothing in between is seen. For trying things out.
    ChatTeacher         asks a chat model behind any OpenAI-compatible endpoint, with the pictures.
"""
from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Sequence

import cv2
import numpy as np

from rr1.chain import Chain, parse, render
from rr1.annotate.questions import read_rows
from rr1.files import to_json

STEPS = ("influence", "reasoning", "conclusion", "length")
PROMPTS = Path(__file__).parent / "prompts"
FIRST_WAIT = 1.0  # seconds before a request is repeated for the first time; each further wait is twice as long


class Rejected(Exception):
    """An answer that cannot be used: the step, the reason, the answer as it came."""

    def __init__(self, step: str, reason: str, answer: str = ""):
        super().__init__(f"{step}: {reason}")
        self.step, self.reason, self.answer = step, reason, answer


class NoAnswer(Exception):
    """The server gave no answer, however often it was asked."""


class Stop(Exception):
    """Nothing more can be asked: the key is refused, the money is spent, or somebody pressed Ctrl-C."""


def fill(step: str, fields: dict[str, Any]) -> str:
    """The prompt of a step: its template without the comment lines, filled; lists of degradations as in a chain."""
    lines = (PROMPTS / f"{step}.txt").read_text(encoding="utf-8").splitlines()
    template = "\n".join(line for line in lines if not line.startswith("#")).strip()
    as_text = {name: ", ".join(f"{d.type}({d.intensity:.2f})" for d in value) or "nothing" if isinstance(value, list) else value
               for name, value in fields.items()}
    return template.format(**as_text)


# ---------------------------------------------------------------- offline

EFFECTS = {  # type -> what it does, what it hides, what is to be thought in its place
    "lens blur": ("every outline is spread into a soft disk", "small things and lettering run together", "outlines are crisp"),
    "lens flare": ("a bright source throws a veil and coloured ghosts", "contrast is washed out around the light", "contrast is even"),
    "motion blur": ("everything is smeared along one direction", "edges across that direction are lost", "edges stand still"),
    "dirty lens": ("dim spots and smears lie over the view", "what is behind them is pale and vague", "the view is clear"),
    "saturation": ("colours are drained towards grey", "things known by colour look alike", "colours are full"),
    "compression": ("the picture breaks into flat blocks", "fine texture inside each block is gone", "textures are fine"),
    "block change": ("square pieces have changed places", "parts of one thing appear inside another", "each piece is in its place"),
    "shifting": ("bands of rows have slid sideways", "upright shapes are cut and torn apart", "upright lines are whole"),
    "scan lines": ("dark lines run across the whole picture", "thin level details vanish between them", "surfaces are unbroken"),
    "darkness": ("little light is left and shadows are noisy", "dark things melt into their background", "the light is ordinary"),
    "atmospheric turbulence": ("shapes waver as if through hot air", "straight edges and faces are distorted", "straight edges are straight"),
    "noise": ("coloured grain covers every surface", "weak texture and faint edges drown in it", "surfaces are smooth"),
    "color diffusion": ("colours bleed beyond their edges", "neighbouring things borrow each other's colour", "each thing keeps its colour"),
    "sharpness change": ("edges ring with bright and dark halos", "texture looks harsher than it is", "edges have no halos"),
    "graffiti": ("strokes of paint are sprayed over the picture", "what is under the paint cannot be seen", "nothing is painted over"),
    "watermark damage": ("letters are repeated aslant over the picture", "details under the letters are confused", "no letters lie above it"),
}


def template_teacher(step: str, images: Sequence[np.ndarray] = (), attempt: int = 0, **fields: Any) -> str:
    """The offline teacher: long texts from ready sentences, then in the last step as many of these as the length calls for."""
    if step == "influence":
        worst = sorted(fields["degradations"], key=lambda d: -d.intensity)
        first = [f"{_severity(d.intensity)} {d.type}: {EFFECTS[d.type][0]}." for d in worst] or ["nothing is damaged."]
        rest = [f"under the {d.type}, {EFFECTS[d.type][1]}." for d in worst]
        return _sentences(first + rest)
    if step == "reasoning":
        truth, worst = fields["truth"], sorted(fields["degradations"], key=lambda d: -d.intensity)
        undone = [f"without the {d.type}, {EFFECTS[d.type][2]}, and what it concealed can be made out." for d in worst]
        others = [choice for choice in truth.choices or () if choice != truth.answer_text]
        ruled_out = [f"the other choices, {', '.join(others)}, agree with it less well."] if others else []
        return _sentences([f"with the damage allowed for, the picture agrees with {truth.answer_text}.",
                           f"the question is: {truth.question.rstrip('?.')}.", *undone, *ruled_out,
                           "what is still visible is compared with what the question asks for, part by part."])
    if step == "conclusion":
        return _sentences([f"the answer is {fields['truth'].answer_text}.", "this is what the undamaged picture would show."])
    return render(_shortened(parse(fields["chain"]), fields["words"]))


def _severity(s: float) -> str:
    return "slight" if s < 1 / 3 else "clear" if s < 2 / 3 else "strong"


def _sentences(sentences: list[str]) -> str:
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _shortened(chain: Chain, words: int) -> Chain:
    """The first sentence of each section, then one more of each in turn, as long as that brings the chain nearer to `words`."""
    left = [re.split(r"(?<=\.) ", text) for text in (chain.influence, chain.reasoning, chain.conclusion)]
    kept = [[sentences.pop(0)] for sentences in left]
    room = words - len(render(Chain(chain.degradations, *map(" ".join, kept), chain.answer)).split())
    while any(left) and room > 0:
        for here, there in zip(kept, left):
            if there:
                sentence = there.pop(0)
                if len(sentence.split()) <= 2 * room:
                    here.append(sentence)
                room -= len(sentence.split())
    return Chain(chain.degradations, *map(" ".join, kept), chain.answer)


# ---------------------------------------------------------------- over the network


class ChatTeacher:
    """A chat model that sees pictures, behind an OpenAI-compatible endpoint; safe to call from many threads.

    Every answer is appended to the file `answers` (JSON lines: key, step, model, text, finish, refusal, tokens_in, tokens_out, cost) the moment
    it arrives, and what is in that file is never asked again, not even where it was unusable: another attempt has another key.
    Whatever kills the process, only requests then under way are asked anew.

    price_in, price_out   dollars for a million tokens; with max_cost, nothing more is asked that could bring the file's total above it
    per_minute            requests a minute, 0: as many as will go
    """

    def __init__(self, model: str, base_url: str = "", answers: Path = Path("answers.jsonl"), price_in: float = 0.0,
                 price_out: float = 0.0, max_cost: float | None = None, per_minute: float = 0.0, retries: int = 6,
                 max_tokens: int = 1024, timeout: float = 120.0):
        try:
            import openai
        except ImportError:
            raise SystemExit(f"--teacher {model} needs openai: pip install openai, or leave the flag out for the offline teacher") from None
        self._openai, self._key = openai, os.environ.get("OPENAI_API_KEY", "")
        if not self._key and not base_url:
            raise SystemExit(f"--teacher {model}: put your key into the environment variable OPENAI_API_KEY, or name a server of "
                             "your own by --base-url")
        self._client = openai.OpenAI(api_key=self._key or "none", base_url=base_url or None, max_retries=0, timeout=timeout)
        self.model, self.prices, self.max_cost, self.retries = model, (price_in, price_out), max_cost, retries
        self.limit, self.interval = {"max_tokens": max_tokens}, 60 / per_minute if per_minute else 0.0
        self.stopped, self.why = threading.Event(), ""
        self._lock, self._next, self._asking = threading.Lock(), 0.0, 0
        self.receipts = read_rows(answers)
        self.spent = sum(receipt["cost"] for receipt in self.receipts)
        self._dearest = max((receipt["cost"] for receipt in self.receipts), default=0.0)
        self._file = os.open(answers, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._answers: dict[str, Future] = {}
        for receipt in self.receipts:
            self._answers[receipt["key"]] = future = Future()
            future.set_result(receipt)

    def __call__(self, step: str, images: Sequence[np.ndarray] = (), attempt: int = 0, **fields: Any) -> str:
        prompt = fill(step, fields)
        key = self.key(prompt, images, attempt)
        with self._lock:  # the same thing asked by two threads is asked once
            future = self._answers.setdefault(key, ours := Future())
        if future is ours:
            try:
                future.set_result(self._ask(key, step, prompt, images))
            except Exception as error:
                with self._lock:
                    del self._answers[key]
                future.set_exception(error)
        receipt = future.result()
        if receipt["refusal"] or receipt["finish"] == "content_filter":
            raise Rejected(step, "refused", receipt["refusal"] or receipt["text"])
        if receipt["finish"] == "length":
            raise Rejected(step, f"cut off after {receipt['tokens_out']} tokens: give a larger --max-tokens", receipt["text"])
        return receipt["text"]

    def key(self, prompt: str, images: Sequence[np.ndarray], attempt: int) -> str:
        """What an answer is filed under: a hash of model, prompt, pictures and attempt."""
        digest = hashlib.sha256(to_json([self.model, prompt, [image.shape for image in images], attempt]).encode())
        for image in images:
            digest.update(np.ascontiguousarray(image))
        return digest.hexdigest()[:32]

    def stop(self, why: str) -> Stop:
        """Let no thread ask anything more; returns the exception that says why."""
        self.why = self.why or why
        self.stopped.set()
        return Stop(self.why)

    def summary(self) -> str:
        """What was paid for, over all runs that wrote to the file."""
        tokens = [sum(receipt[name] for receipt in self.receipts) for name in ("tokens_in", "tokens_out")]
        cost = f", ${self.spent:.4f}" if any(self.prices) else ""
        return f"{len(self.receipts)} answers of {self.model}: {tokens[0]} + {tokens[1]} tokens{cost}"

    def _ask(self, key: str, step: str, prompt: str, images: Sequence[np.ndarray]) -> dict:
        with self._lock:
            if self.max_cost is not None and self.spent + (self._asking + 1) * self._dearest > self.max_cost:
                raise self.stop(f"--max-cost {self.max_cost:g} is reached: ${self.spent:.4f} spent")
            self._asking += 1
        try:
            reply = self._request(step, prompt, images)
            usage = reply.usage
            tokens_in, tokens_out = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
            choice = reply.choices[0]
            receipt = {"key": key, "step": step, "model": self.model, "text": choice.message.content or "", "finish": choice.finish_reason,
                       "refusal": getattr(choice.message, "refusal", None), "tokens_in": tokens_in, "tokens_out": tokens_out,
                       "cost": (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6}
            line = (to_json(receipt) + "\n").encode()
            with self._lock:
                os.write(self._file, line)  # first of all: it is paid for
                self.receipts.append(receipt)
                self.spent += receipt["cost"]
                self._dearest = max(self._dearest, receipt["cost"])
            if usage is None and self.max_cost is not None:
                self.stop("the server does not say how many tokens it took, so --max-cost cannot be kept")
            return receipt
        finally:
            with self._lock:
                self._asking -= 1

    def _request(self, step: str, prompt: str, images: Sequence[np.ndarray]) -> Any:
        """One chat completion: after 429, 5xx, silence or garbage again, with longer and longer waits."""
        content = [{"type": "text", "text": prompt}, *({"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images)]
        for tries in range(self.retries + 1):
            self._wait_for_turn()
            asked_to_wait, limit = None, self.limit
            try:
                reply = self._client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": content}], **limit)
                if _is_completion(reply):
                    return reply
                problem = "what came is not a chat completion"
            except self._openai.APIStatusError as error:
                problem = f"HTTP {error.status_code}"
                if error.status_code in (401, 403):
                    raise self.stop(f"{problem}: the key in OPENAI_API_KEY was not accepted") from None
                if error.status_code == 404:
                    raise self.stop(f"{problem}: there is no model {self.model!r} at {self._client.base_url}") from None
                if error.status_code == 400 and "max_completion_tokens" in str(error) and "max_tokens" in limit:
                    self.limit = {"max_completion_tokens": limit["max_tokens"]}     # what models that think first want instead
                    return self._request(step, prompt, images)
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    raise Rejected(step, f"the server refuses the request, {problem}", self._without_key(str(error))) from None
                asked_to_wait = error.response.headers.get("retry-after")
            except self._openai.APITimeoutError:
                problem = "no answer in time"
            except (self._openai.APIError, ValueError) as error:  # no connection, a reply that is not JSON
                problem = self._without_key(f"{type(error).__name__}: {error}")
            if tries < self.retries:
                self._pause(tries, asked_to_wait)
        raise NoAnswer(f"{step}: asked {self.retries + 1} times, last: {problem}")

    def _wait_for_turn(self) -> None:
        """Return when the next request may go out; raise Stop where none may."""
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self.interval
        if self.stopped.wait(max(0.0, start - time.monotonic())):
            raise Stop(self.why)

    def _pause(self, tries: int, asked_to_wait: str | None) -> None:
        """Wait 1, 2, 4 .. 60 seconds, more or less; where the server says how long, all threads wait that long."""
        try:
            seconds = float(asked_to_wait)
            with self._lock:
                self._next = max(self._next, time.monotonic() + seconds)
        except (TypeError, ValueError):
            seconds = min(60.0, FIRST_WAIT * 2**tries)
        self.stopped.wait(seconds * random.uniform(0.75, 1.25))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _data_url(image: np.ndarray) -> str:
    """A picture as it is sent: JPEG of quality 95, which adds next to nothing to the damage."""
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _is_completion(reply: Any) -> bool:
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    return isinstance(getattr(message, "content", None), str) or bool(getattr(message, "refusal", None))
