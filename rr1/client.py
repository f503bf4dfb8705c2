"""A chat model behind any OpenAI-compatible endpoint: the teacher and the judge are asked here.

The `openai` client itself repeats a request after 408, 409, 429, 5xx, silence and a lost
connection, and waits as long as Retry-After says, up to two minutes. This file adds: how many
requests go out in a minute, replies that are no chat completion or drip in without an end, and
which errors end everything.
The key comes from the environment variable OPENAI_API_KEY and goes into the request's header only.
"""

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

from tqdm import tqdm

BUSY = (408, 409, 425, 429)
HOPELESS = {
    401: "the key in OPENAI_API_KEY was not accepted",
    402: "the account has no money left",
    403: "the key in OPENAI_API_KEY was not accepted",
    404: "there is no model {model!r} at {url}",
}
PAUSE = 1.0  # seconds before a server that did not send a chat completion is asked again
SAY_EVERY = 30.0  # seconds between two lines about why it takes long


class Stop(Exception):
    """No request can succeed any more: the key is refused, the money is spent, or Ctrl-C."""


class NoAnswer(Exception):
    """The server gave no answer, however often it was asked."""


class Refused(Exception):
    """The server refuses this one request. Others may be answered."""


@dataclass
class Reply:
    """One answer. `finish` is "stop", "length" or "content_filter"; unknown tokens are None."""

    text: str
    finish: str | None
    refusal: str
    tokens_in: int | None
    tokens_out: int | None


class ChatClient:
    """Asks one model; safe to call from many threads.

    base_url     the endpoint, such as http://localhost:8000/v1; empty: OpenAI's
    per_minute   requests a minute, repeated ones included; 0: as many as will go
    retries      how often a request is repeated
    timeout      seconds of silence after which a request counts as failed; a reply that has begun
                 to arrive must be whole after so many seconds more
    flag         the command-line flag that named the model, for error messages
    """

    def __init__(
        self,
        model: str,
        base_url: str = "",
        *,
        max_tokens: int | None = None,
        per_minute: float = 0.0,
        retries: int = 6,
        timeout: float = 120.0,
        flag: str = "--teacher",
    ):
        try:
            import openai
        except ImportError:
            raise SystemExit(f"{flag} {model} needs openai: pip install openai") from None
        self._openai = openai
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise SystemExit(
                "OPENAI_API_KEY holds characters that no key has: copy it once more"
            )
        if not self._key and not base_url:
            advice = "put your key into OPENAI_API_KEY, or name a server of your own"
            raise SystemExit(f"{flag} {model}: {advice}")
        self.model, self.retries, self.max_tokens = model, retries, max_tokens
        self.timeout = timeout
        self._limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next_turn, self._next_line, self._lock = 0.0, 0.0, threading.Lock()
        self.stopped, self.why = threading.Event(), ""
        self._client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=base_url or None,
            max_retries=retries,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [self._before], "response": [self._after]}
            ),
        )

    def ask(self, prompt: str, images: Sequence[str] = ()) -> Reply:
        """The model's answer to a text and pictures (as URLs). Raises Stop, NoAnswer or Refused."""
        content = [{"type": "text", "text": prompt}]
        content += [{"type": "image_url", "image_url": {"url": image}} for image in images]
        message = {"role": "user", "content": content if images else prompt}
        for _ in range(self.retries + 1):
            reply = read_reply(self._request(message))
            if reply is not None:
                return reply
            self.stopped.wait(PAUSE)
        times = f"{self.retries + 1} times"
        raise NoAnswer(f"{times} what came was not a chat completion, or not whole in time")

    def stop(self, why: str) -> Stop:
        """Let no thread ask anything more; returns the exception that says why."""
        self.why = self.why or why
        self.stopped.set()
        return Stop(self.why)

    def _request(self, message: dict) -> Any:
        """The JSON of one reply; None where it is not JSON, or drips."""
        limit = self._limit
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[message], **limit
            )
            return raw.http_response.json()
        except self._openai.APIStatusError as error:
            new_name = "max_completion_tokens"  # wanted by models that think first
            if (
                error.status_code == 400
                and new_name in str(error)
                and "max_tokens" in limit
            ):
                self._limit = {new_name: self.max_tokens}
                return self._request(message)
            raise self._meaning(error) from None
        except self._openai.APIConnectionError as error:
            if self.stopped.is_set():
                raise Stop(self.why) from None
            raise NoAnswer(self._without_key(f"{error} ({error.__cause__})")) from None
        except (ValueError, RecursionError, TimeoutError):
            return None

    def _meaning(self, error: Any) -> Exception:
        """What an HTTP error means for this request and for all others."""
        status = 402 if error.code == "insufficient_quota" else error.status_code
        if status in HOPELESS:
            why = HOPELESS[status].format(model=self.model, url=self._client.base_url)
            return self.stop(f"HTTP {error.status_code}: {why}")
        problem = self._without_key(f"HTTP {status}: {error.message}")
        if status < 500 and status not in BUSY:
            return Refused(problem)
        asked, wait = repetition(error.request) + 1, wait_asked_for(error.response)
        return NoAnswer(f"asked {asked} times, last: {problem}{wait}")

    def _before(self, request: Any) -> None:
        """Called before a request goes out, a repeated one too."""
        if repetition(request):
            count = f"{repetition(request)} of {self.retries} times"
            self._say(f"no answer yet: asking again, {count}")
        self._wait_for_turn()

    def _after(self, response: Any) -> None:
        """Called when a response begins to arrive."""
        if response.status_code >= 500 or response.status_code in BUSY:
            self._say(
                f"HTTP {response.status_code} from the server{wait_asked_for(response)}"
            )
        response.stream = bounded(response.stream, self.timeout)

    def _say(self, line: str) -> None:
        """Print why it takes long, now and then."""
        with self._lock:
            if time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + SAY_EVERY
        tqdm.write(f"{self.model}: {line}", file=sys.stderr)

    def _wait_for_turn(self) -> None:
        """Return when a request may go out; raise Stop where none may."""
        with self._lock:
            start = max(self._next_turn, time.monotonic())
            self._next_turn = start + self._interval
        if self.stopped.wait(max(0.0, start - time.monotonic())):
            raise Stop(self.why)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def bounded(stream: Any, seconds: float) -> Any:
    """A response's stream of bytes. TimeoutError where it is not at its end after `seconds`."""

    class Bounded(type(stream)):
        def __init__(self):
            self.end = time.monotonic() + seconds

        def __iter__(self) -> Iterator[bytes]:
            for piece in stream:
                if time.monotonic() > self.end:
                    raise TimeoutError(f"a reply was not whole after {seconds:g} seconds")
                yield piece

        def close(self) -> None:
            stream.close()

    return Bounded()


def repetition(request: Any) -> int:
    """How often a request was made before."""
    return int(request.headers.get("x-stainless-retry-count", 0))


def wait_asked_for(response: Any) -> str:
    seconds = response.headers.get("retry-after")
    return f", which asks to wait for {seconds} seconds" if seconds else ""


def read_reply(body: Any) -> Reply | None:
    """What the JSON of a chat completion says; None if it is not one. Never raises."""
    try:
        choice = body["choices"][0]
        message = dict(choice["message"])
    except (TypeError, ValueError, LookupError):
        return None
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=_text(message.get("content")),
        finish=choice.get("finish_reason"),
        refusal=_text(message.get("refusal")),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )


def _text(content: Any) -> str:
    """A string, a list of parts, or nothing, as a text that can be written in UTF-8."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        content = "".join(_text(part.get("text")) for part in parts)
    text = content if isinstance(content, str) else ""
    return text.encode(errors="replace").decode()  # half an emoji becomes "?"


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 1e12 else None
