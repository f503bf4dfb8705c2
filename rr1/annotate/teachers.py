"""The teachers G of Eq. (14)-(17). A teacher is any function

    teacher(step, images=(), attempt=0, **fields) -> text

`step` is "influence", "reasoning", "conclusion" or "length"; `images` are RGB uint8 (H, W, 3);
`fields` fill the step's template under rr1/annotate/prompts/. Another `attempt` may give another
answer. There are two:

    template_teacher    writes from the fields alone. It needs nothing and never looks at the
                        picture: what it says of the damage is true in general, the answer is the
                        given one, and nothing in between is seen. For trying things out.
    ChatTeacher         asks a chat model behind any OpenAI-compatible endpoint, with the pictures.
"""

import base64
import hashlib
import math
import re
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, Sequence

import cv2
import numpy as np

from degrade import Degradation
from rr1 import files
from rr1.annotate.questions import Truth
from rr1.chain import Chain, parse, render
from rr1.client import ChatClient, Refused

STEPS = ("influence", "reasoning", "conclusion", "length")
PROMPTS = Path(__file__).parent / "prompts"


class Rejected(Exception):
    """An answer that cannot be used: the step, the reason, the answer as it came.

    `again`: nothing was paid for it, so the next run asks again by itself.
    """

    def __init__(self, step: str, reason: str, answer: str = "", again: bool = False):
        super().__init__(f"{step}: {reason}")
        self.step, self.reason, self.answer, self.again = step, reason, answer, again


def fill(step: str, fields: dict[str, Any]) -> str:
    """The prompt of a step: its template, filled."""
    return template(step).format(
        **{name: _as_text(value) for name, value in fields.items()}
    )


def template(name: str) -> str:
    """A file under prompts/ without the lines that begin with "#"."""
    lines = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).strip()


def _as_text(value: Any) -> Any:
    """A list of degradations as it stands in a chain; everything else as it is."""
    if not isinstance(value, list):
        return value
    return ", ".join(f"{type}({s:.2f})" for type, s in value) or "nothing"


# ---------------------------------------------------------------- offline


def read_effects() -> dict[str, list[str]]:
    """type -> what it does, what it hides, what is to be thought in its place."""
    rows = [line.split(" | ") for line in template("effects").splitlines()]
    return {type: sentences for type, *sentences in rows}


def template_teacher(
    step: str, images: Sequence[np.ndarray] = (), attempt: int = 0, **fields: Any
) -> str:
    """The offline teacher: ready sentences, as many as the length calls for."""
    worst_first = sorted(fields.get("degradations", []), key=lambda d: -d.intensity)
    if step == "influence":
        sentences = _influence(worst_first)
    elif step == "reasoning":
        sentences = _reasoning(worst_first, fields["truth"])
    elif step == "conclusion":
        sentences = [
            f"the answer is {fields['truth'].answer_text}.",
            "this is what the undamaged picture would show.",
        ]
    else:
        return render(_shortened(parse(fields["chain"]), fields["words"]))
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _influence(degradations: list[Degradation]) -> list[str]:
    effects, looks, hides = read_effects(), [], []
    for type, s in degradations:
        effect, hidden, _ = effects[type]
        severity = "slight" if s < 1 / 3 else "clear" if s < 2 / 3 else "strong"
        looks.append(f"{severity} {type}: {effect}.")
        hides.append(f"under the {type}, {hidden}.")
    return (looks or ["nothing is damaged."]) + hides


def _reasoning(degradations: list[Degradation], truth: Truth) -> list[str]:
    sentences = [
        f"with the damage allowed for, the picture agrees with {truth.answer_text}.",
        f"the question is: {truth.question.rstrip('?.')}.",
    ]
    effects = read_effects()
    for type, _ in degradations:
        instead = effects[type][2]
        sentences.append(
            f"without the {type}, {instead}, and what it concealed can be made out."
        )
    others = [choice for choice in truth.choices or () if choice != truth.answer_text]
    if others:
        sentences.append(
            f"the other choices, {', '.join(others)}, agree with it less well."
        )
    sentences.append(
        "what is still visible is compared with what the question asks for, part by part."
    )
    return sentences


def _shortened(chain: Chain, words: int) -> Chain:
    """The first sentence of each section, then one more of each in turn, as long as that brings
    the chain nearer to `words`."""
    sections = (chain.influence, chain.reasoning, chain.conclusion)
    waiting = [re.split(r"(?<=\.) ", text) for text in sections]
    kept = [[sentences.pop(0)] for sentences in waiting]

    def so_far() -> Chain:
        return Chain(chain.degradations, *(" ".join(part) for part in kept), chain.answer)

    room = words - len(render(so_far()).split())
    while any(waiting) and room > 0:
        for section, rest in zip(kept, waiting):
            if not rest:
                continue
            sentence = rest.pop(0)
            length = len(sentence.split())
            if length <= 2 * room:
                section.append(sentence)
            room -= length
    return so_far()


# ---------------------------------------------------------------- over the network


class ChatTeacher:
    """A chat model that sees pictures; safe to call from many threads.

    Every answer is a line of the file `answers` the moment it arrives: key, step, model, text,
    finish, refusal, tokens_in, tokens_out, cost. What is in that file is never asked again, not
    even where it was unusable: another attempt has another key. Whatever kills the process, only
    requests that were under way are asked anew.

    prices     dollars for a million tokens read, and written
    max_cost   the file's total never comes above so many dollars, what is under way included
    """

    def __init__(
        self,
        client: ChatClient,
        answers: Path,
        prices: tuple[float, float] = (0.0, 0.0),
        max_cost: float | None = None,
    ):
        self.client, self.file, self.prices = client, answers, prices
        self.max_cost = math.inf if max_cost is None else max_cost
        self.spent = 0.0
        self._under_way: list[float] = []  # dollars that each request under way may cost
        self._ratio = {}  # step -> tokens read over those estimated, the most
        self._lock = threading.Condition()
        self._receipts = {}  # key -> line of the file
        for receipt in files.read_lines(answers):
            self.spent += receipt["cost"]
            self._receipts[receipt["key"]] = receipt

    def __call__(
        self, step: str, images: Sequence[np.ndarray] = (), attempt: int = 0, **fields: Any
    ) -> str:
        prompt = fill(step, fields)
        key = self.key(prompt, images, attempt)
        receipt = self._receipts.get(key) or self._ask(key, step, prompt, images)
        if receipt["refusal"] or receipt["finish"] == "content_filter":
            raise Rejected(step, "refused", receipt["refusal"] or receipt["text"])
        if receipt["finish"] == "length":
            problem = (
                f"cut off after {receipt['tokens_out']} tokens: give a larger --max-tokens"
            )
            raise Rejected(step, problem, receipt["text"])
        return receipt["text"]

    def key(self, prompt: str, images: Sequence[np.ndarray], attempt: int) -> str:
        """What an answer is filed under: a hash of model, prompt, pictures and attempt."""
        shapes = [image.shape for image in images]
        text = files.to_json([self.client.model, prompt, shapes, attempt])
        digest = hashlib.sha256(text.encode())
        for image in images:
            digest.update(np.ascontiguousarray(image))
        return digest.hexdigest()[:32]

    def summary(self) -> str:
        """What was paid for, over all runs that wrote to the file."""
        receipts = self._receipts.values()
        read = sum(receipt["tokens_in"] for receipt in receipts)
        written = sum(receipt["tokens_out"] for receipt in receipts)
        cost = f", ${self.spent:.4f}" if any(self.prices) else ""
        return f"{len(receipts)} answers of {self.client.model}: {read} + {written} tokens{cost}"

    def _ask(self, key: str, step: str, prompt: str, images: Sequence[np.ndarray]) -> dict:
        estimate = estimated_tokens(prompt, images)
        most = self._cost(
            estimate * self._ratio.get(step, 1.0), self.client.max_tokens or 0
        )
        self._reserve(most)
        try:
            reply = self.client.ask(prompt, [data_url(image) for image in images])
            tokens_in, tokens_out = reply.tokens_in or 0, reply.tokens_out or 0
            receipt = {
                "key": key,
                "step": step,
                "model": self.client.model,
                **asdict(reply),
            }
            receipt |= {"tokens_in": tokens_in, "tokens_out": tokens_out}
            receipt["cost"] = self._cost(tokens_in, tokens_out)
            with self._lock:
                files.append_lines(self.file, [receipt])
                self._receipts[key] = receipt
                self.spent += receipt["cost"]
                self._ratio[step] = max(self._ratio.get(step, 0.0), tokens_in / estimate)
        except Refused as error:
            problem = f"the server refuses the request, {error}"
            raise Rejected(step, problem, again=True) from None
        finally:
            with self._lock:
                self._under_way.remove(most)
                self._lock.notify_all()
        if None in (reply.tokens_in, reply.tokens_out) and self.max_cost < math.inf:
            self.client.stop(
                "the server does not count tokens, so --max-cost cannot be kept"
            )
        return receipt

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        price_in, price_out = self.prices
        return (tokens_in * price_in + tokens_out * price_out) / 1e6

    def _reserve(self, most: float) -> None:
        """Wait until a request may cost `most` dollars; raise Stop where it never may."""
        with self._lock:
            while (
                self._under_way and self.spent + sum(self._under_way) + most > self.max_cost
            ):
                self._lock.wait()
            if self.spent + most > self.max_cost:
                limit = f"--max-cost {self.max_cost:g} is reached: ${self.spent:.4f} spent"
                raise self.client.stop(f"{limit}, and the next answer may cost ${most:.4f}")
            self._under_way.append(most)


def estimated_tokens(prompt: str, images: Sequence[np.ndarray]) -> int:
    """Tokens that a prompt takes, on the high side: no two models count alike."""
    pictures = sum(max(1500, image.shape[0] * image.shape[1] // 784) for image in images)
    return len(prompt.encode()) // 2 + pictures


def data_url(image: np.ndarray) -> str:
    """A picture as it is sent: JPEG of quality 95, which adds next to nothing to the damage."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
    jpeg = cv2.imencode(".jpg", image[..., ::-1], quality)[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
