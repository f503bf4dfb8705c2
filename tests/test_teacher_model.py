"""The data construction with a real model as the teacher: the shipped tiny Qwen2.5-VL behind an
OpenAI-compatible endpoint on the loopback, asked over HTTP, its answers made by transformers'
`generate`; then both trainers on what came out."""

import base64
import io
import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import train_grpo
import train_sft
from rr1 import records, run_folder, tiny, vlm
from rr1.annotate import __main__ as command
from rr1.annotate import card
from rr1.chain import is_well_formed
from rr1.files import read_lines
from rr1.tiny import world

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared" / "photos"


class ModelServer:
    """POST /v1/chat/completions of one model. `log` has what was asked and answered.

    A model of 3M parameters cannot write a chain anew; with `copies` its place in that step is
    taken by one that returns the chain as it was sent.
    """

    def __init__(self, checkpoint):
        self.model, self.processor = vlm.load(checkpoint)
        self.model.eval()
        self.log, self.copies, self.lock = [], False, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = outer.answer(
                    self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, path, request):
        assert path == "/v1/chat/completions" and request["model"] == "tiny"
        (message,) = request["messages"]
        content = message["content"]
        text, *images = [{"text": content}] if isinstance(content, str) else content
        images = [
            Image.open(
                io.BytesIO(base64.b64decode(part["image_url"]["url"].partition("base64,")[2]))
            ).convert("RGB")
            for part in images
        ]
        with self.lock:
            said, tokens_in, tokens_out = self.generate(text["text"], images, request["max_tokens"])
            if self.copies and "nothing else.\n\n" in text["text"]:
                said = text["text"].partition("nothing else.\n\n")[2]
            self.log.append(
                SimpleNamespace(
                    prompt=text["text"],
                    images=images,
                    said=said,
                    tokens_in=tokens_in,
                    tokens_out=tokens_out,
                )
            )
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": said},
        }
        usage = {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
        }
        return json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "tiny",
                "choices": [choice],
                "usage": usage,
            }
        ).encode()

    @torch.inference_mode()
    def generate(self, text, images, max_tokens):
        pixels, grid = (
            self.processor.pixels(images) if images else (None, torch.zeros(0, 3, dtype=torch.long))
        )
        ids = torch.tensor([self.processor.prompt_ids(text, self.processor.visual_tokens(grid))])
        seen = (
            {
                "pixel_values": pixels,
                "image_grid_thw": grid,
                "mm_token_type_ids": (ids == self.processor.image_token_id).int(),
            }
            if images
            else {}
        )
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self.processor.end_id,
            pad_token_id=self.processor.end_id,
            suppress_tokens=self.processor.banned_ids,
            **seen,
        )
        new = out[0, ids.shape[1] :].tolist()
        return self.processor.decode(new), ids.shape[1], len(new)


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # a server of one's own needs none
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(card.Card, "figure", lambda _: Figure((1, 1)))
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)
    server = ModelServer(tiny.BASE)
    yield server
    server.http.shutdown()
    server.http.server_close()


def drawn(folder):
    lines = []
    for n in range(8):
        rng = np.random.default_rng(n)
        scene = world.sample_scene(rng)
        Image.fromarray(world.draw(scene, rng)).save(folder / f"{n}.png")
        asked = world.questions(scene)[n % 3]
        row = {"id": f"q{n}", "image": f"{n}.png", "question": asked.text, "answer": asked.answer}
        lines.append(json.dumps(row | ({"choices": world.choices(asked, rng)} if n % 2 else {})))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def photos(folder):
    if not PHOTOS.is_dir():
        pytest.skip("the photos with questions are not here")
    return PHOTOS / "questions.jsonl"


def alike(sent, kept):
    """The same picture, but for what JPEG does to single pixels (colour noise loses a lot)."""
    coarse = [
        np.asarray(Image.fromarray(np.asarray(image)).reduce(4), int) for image in (sent, kept)
    ]
    return coarse[0].shape == coarse[1].shape and np.abs(coarse[0] - coarse[1]).mean() < 6


@pytest.mark.parametrize("questions", [drawn, photos])
def test_a_real_model_teaches_over_http_and_both_trainers_learn_from_it(
    questions, server, tmp_path
):
    path, out = questions(tmp_path), tmp_path / "data"
    n = 8  # fewer than so many rejections one after the other as stop a run
    ask = [
        "--data",
        str(path),
        "--teacher",
        "tiny",
        "--base-url",
        server.url,
        "--max-tokens",
        "32",
        "--workers",
        "2",
        "--limit",
        "8",
        "--price-in",
        "2",
        "--price-out",
        "10",
        "--out",
        str(out),
    ]

    # the model writes all four steps; it cannot write the chain anew, so each question ends in
    # rejected.jsonl with that reason
    command.main(ask)
    rejected = read_lines(out / "rejected.jsonl")
    assert len(rejected) == n and {(row["step"], row["reason"]) for row in rejected} == {
        ("length", "a tag is lost")
    }
    first = list(server.log)
    assert max(Counter(request.prompt for request in first if not request.images).values()) == 1
    command.main(ask)
    assert len(server.log) == len(first), "nothing is asked again by itself"

    # the same with a model that can: the first three steps come from answers.jsonl, the last is
    # asked once more
    server.copies = True
    command.main([*ask, "--retry-rejected"])
    again = server.log[len(first) :]
    assert (
        len(again) == n
        and all("Rewrite the INFLUENCE" in request.prompt for request in again)
        and read_lines(out / "rejected.jsonl") == []
    )

    # what was asked: the pictures, clean and damaged as they lie in the folder, and the prompts
    # with what came before
    read = records.read(out / "train.jsonl")
    assert len(read) == n
    said = {request.prompt: request for request in first}
    for record in read:
        X, X_d = (np.asarray(records.open_image(record[key])) for key in ("clean_image", "image"))
        chain, degradations = record["chain"], record["degradations"]
        damage = ", ".join(f"{d.type}({d.intensity:.2f})" for d in degradations)
        about = [
            request
            for request in first
            if request.images
            and damage in request.prompt
            and record["question"] in request.prompt
            and alike(request.images[-1], X_d)
        ]
        influence, reasoning = sorted(about, key=lambda request: -len(request.images))
        assert (
            len(influence.images) == 2
            and alike(influence.images[0], X)
            and len(reasoning.images) == 1
        )
        assert (
            chain.influence == influence.said.strip() and chain.reasoning == reasoning.said.strip()
        )
        assert f"What the damage does to it:\n{chain.influence}\n" in reasoning.prompt
        [concluded] = [
            prompt
            for prompt in said
            if "Draw the conclusion" in prompt
            and f"picture:\n{chain.reasoning}\n" in prompt
            and record["question"] in prompt
        ]
        assert chain.conclusion == said[concluded].said.strip()
        assert (
            chain.degradations == degradations
            and is_well_formed(record["response"])
            and record["teacher"] == "tiny"
        )
    assert len({record["chain"].influence for record in read}) > 1, "the pictures are looked at"

    # what it cost: every answer once, as the server counted
    receipts = read_lines(out / "answers.jsonl")
    counted = [
        sum(getattr(request, name) for request in server.log)
        for name in ("tokens_in", "tokens_out")
    ]
    assert (
        len(receipts) == len(server.log)
        and [sum(row[name] for row in receipts) for name in ("tokens_in", "tokens_out")] == counted
    )
    cost = (2 * counted[0] + 10 * counted[1]) / 1e6
    assert (
        f"{len(receipts)} answers of tiny: {counted[0]} + {counted[1]} tokens, ${cost:.4f}"
        in (out / "card.txt").read_text()
    )

    # and it can be trained on
    common = ["--data", f"{out}/train.jsonl", "--part", "all", "--micro-batch", "2"]
    train_sft.main(
        [
            *common,
            "--model",
            tiny.BASE,
            "--steps",
            "3",
            "--batch",
            "4",
            "--lr",
            "1e-3",
            "--warmup",
            "1",
            "--out",
            str(tmp_path / "sft"),
        ]
    )
    train_grpo.main(
        [
            *common,
            "--model",
            str(tmp_path / "sft" / "model"),
            "--steps",
            "1",
            "--prompts",
            "2",
            "--group-size",
            "2",
            "--max-new-tokens",
            "8",
            "--out",
            str(tmp_path / "grpo"),
        ]
    )
    losses = [
        row["loss"]
        for run in ("sft", "grpo")
        for row in read_lines(tmp_path / run / "metrics.jsonl")
    ]
    assert (
        len(losses) == 4
        and all(loss is not None and math.isfinite(loss) for loss in losses)
        and losses[2] < losses[0]
    )
