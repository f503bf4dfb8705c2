"""A chat endpoint on the loopback that answers well, badly, late or never; photos to ask about."""

import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from rr1 import client
from rr1.annotate import __main__ as command
from rr1.files import read_lines
from rr1.tiny import world


class Raw(NamedTuple):
    """An answer as it goes over the line."""

    status: int
    body: str
    headers: dict = {}


class Server:
    """A chat endpoint on the loopback.

    `behave(request)` says how to treat a request: "ok", a status, "html", "odd", "never", "drip",
    or a dict that changes the good answer's choice. `log` has every request in order, `paid` the
    requests that were answered.
    """

    def __init__(self):
        self.log, self.paid, self.behave, self.lock = (
            [],
            [],
            lambda request: "ok",
            threading.Lock(),
        )
        self.open, self.most_open, self.slow, self.release = 0, 0, 0.0, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, http):
        raw = http.rfile.read(int(http.headers["Content-Length"]))
        content = json.loads(raw)["messages"][0]["content"]
        prompt, *pictures = [content] if isinstance(content, str) else content
        prompt = prompt["text"] if pictures else prompt
        with self.lock:
            request = SimpleNamespace(
                number=len(self.log),
                body=raw,
                prompt=prompt,
                step=step_of(prompt),
                model=json.loads(raw)["model"],
                pictures=[part["image_url"]["url"] for part in pictures],
                key=http.headers["Authorization"],
                max_tokens=json.loads(raw).get("max_tokens"),
                time=time.monotonic(),
            )
            self.log.append(request)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        time.sleep(self.slow)
        with self.lock:  # before the reply: whoever has it may ask again at once
            self.open -= 1
        try:
            self.reply(http, request, self.behave(request))
        except OSError:
            pass  # the other side was killed

    def reply(self, http, request, how):
        if how == "never":
            self.release.wait(20)
            return
        status, body, headers = response(request, how)
        http.send_response(status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": len(body),
        } | headers
        for name, value in headers.items():
            http.send_header(name, str(value))
        http.end_headers()
        if how == "drip":
            for byte in body:
                http.wfile.write(bytes([byte]))
                time.sleep(0.1)
            return
        half = len(body) // 2
        http.wfile.write(body[:half])
        if how == "kill during":
            self.kill()
        http.wfile.write(body[half:])
        if isinstance(how, dict) or how == "ok" or str(how).startswith("kill"):
            with self.lock:
                self.paid.append(request.body)
        if how == "kill after":
            self.kill()
        if how == "kill once on file":
            while self.on_file() < self.number_on_file + 1:
                time.sleep(0.002)
            self.kill()

    def on_file(self):
        return len(read_lines(self.answers))

    def kill(self):
        os.kill(self.victim, signal.SIGKILL)


def response(request, how):
    """(status, body, headers) of the answer to a request that is to be treated so."""
    if isinstance(how, Raw):
        return how.status, how.body.encode(), how.headers
    if isinstance(how, int):
        error = {"error": {"message": f"no, {request.key}: use 'max_completion_tokens'"}}
        headers = {"Retry-After": "0.02"} if how == 429 else {}
        return how, json.dumps(error).encode(), headers
    if how == "html":
        return 200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"}
    if how == "odd":
        return 200, b"{]" if request.number % 2 else b'{"choices": []}', {}
    return (
        200,
        completion(request.prompt, **(how if isinstance(how, dict) else {})).encode(),
        {},
    )


def completion(prompt, usage=(1000, 100), **changes):
    """The JSON of a good answer, its choice changed as given."""
    message = {"role": "assistant", "content": good_answer(prompt)}
    choice = {"index": 0, "finish_reason": "stop", "message": message} | changes
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    whole["choices"] = [choice]
    whole["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(whole)


def step_of(prompt):
    marks = {
        "influence": "Describe what the damage does",
        "reasoning": "Reason out",
        "conclusion": "Draw the conclusion",
        "length": "Rewrite the",
    }
    (step,) = (step for step, mark in marks.items() if mark in prompt)
    return step


def good_answer(prompt):
    step = step_of(prompt)
    return (
        prompt.partition("nothing else.\n\n")[2]
        if step == "length"
        else f"a {step} of {len(prompt)} letters and {sum(map(ord, prompt)) % 9973}"
    )


@contextmanager
def serving(monkeypatch):
    """A Server whose key is in the environment, and clients that do not wait long."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-8191")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr(client, "PAUSE", 0.02)
    server = Server()
    yield server
    server.release.set()
    server.http.shutdown()
    server.http.server_close()


def flags(server, *more):
    return ["--teacher", "m", "--base-url", server.url, "--workers", 1, "--limit", 2, *more]


def start(server, questions, out, *more):
    """annotate in a process of its own, which the server may kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rr1.annotate.__main__", "openai"])
    process = context.Process(
        target=command.main,
        args=(
            ["--data", str(questions), "--out", str(out), *map(str, flags(server, *more))],
        ),
    )
    process.start()
    server.victim = process.pid
    return process


def write_questions(folder):
    """JSON lines of 12 questions about drawn scenes; every third is open."""
    lines = []
    for n in range(12):
        rng = np.random.default_rng(n)
        scene = world.sample_scene(rng)
        cv2.imwrite(str(folder / f"{n}.png"), world.draw(scene, rng)[..., ::-1])
        asked = world.questions(scene)[0]
        row = {
            "image": f"{n}.png",
            "question": asked.text,
            "answer": asked.answer,
            "id": f"q{n}",
        }
        lines.append(
            json.dumps(row if n % 3 == 0 else row | {"choices": world.choices(asked, rng)})
        )
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"
