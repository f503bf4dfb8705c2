"""The page to play with: what it shows, without a browser; and the page itself in Chromium."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from socket import socket

import numpy as np
import pytest
import torch
from PIL import Image

from degrade import STAGES, Degradation, degrade
from rr1 import rewards
from rr1.chain import Chain, render
from rr1.demo import show
from rr1.grpo import group_advantages
from rr1.records import DataError

TYPES = [kind for kinds in STAGES.values() for kind in kinds]


@pytest.fixture(scope="module")
def sft():
    return show.load(show.TINY["SFT"])


def view_of(seed=3, damage=(("noise", 0.4),)):
    return show.damaged(show.drawn(seed), [Degradation(*each) for each in damage], seed)


def response(chain, length=30):
    return rewards.Response(render(chain), length)


# ---------------------------------------------------------------- pictures


def test_a_seed_draws_the_same_scene_again():
    first, again, other = show.drawn(3), show.drawn(3), show.drawn(4)
    assert np.array_equal(first.clean, again.clean) and first.scene == again.scene
    assert not np.array_equal(first.clean, other.clean)
    assert first.questions and all(text == q.text for text, q in first.questions.items())


def test_the_controls_are_the_damage():
    chosen = show.damage_of(["noise", "", "lens blur"], [0.4, 0.9, 0.256])
    assert chosen == [("lens blur", 0.26), ("noise", 0.4)]
    assert show.damage_of(["noise", None, None], [0, 1, 1]) == []
    view = show.damaged(show.drawn(3), chosen, 3)
    assert np.array_equal(view.seen, degrade(view.clean, chosen, 3))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_changes_a_drawn_scene(kind):
    view = view_of(damage=[(kind, 1.0)])
    assert not np.array_equal(view.seen, view.clean)


def test_an_upload_is_read_and_made_small():
    file = io.BytesIO()
    Image.new("RGB", (2000, 1000), (10, 20, 30)).save(file, "PNG")
    view = show.uploaded(file.getvalue())
    assert view.clean.shape == (show.LARGEST // 2, show.LARGEST, 3)
    assert view.scene is None and (view.clean == (10, 20, 30)).all()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"x" * 99])
def test_a_broken_upload_is_one_sentence(content):
    with pytest.raises(DataError, match="^your upload: cannot be read as an image") as told:
        show.uploaded(content)
    assert "0x" not in str(told.value)


def test_an_upload_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    file = io.BytesIO()
    Image.new("RGB", (10, 10)).save(file, "PNG")
    with pytest.raises(DataError, match="10 x 10 pixels, more than 99"):
        show.uploaded(file.getvalue())


def test_a_drawn_scene_is_recovered_and_a_photo_is_not():
    view = view_of()
    assert show.recovered(view).shape == view.clean.shape
    assert show.recovered(show.View(view.clean, seen=view.seen)) is None


# ---------------------------------------------------------------- answers


def test_the_truth_of_a_drawn_scene_is_the_ideal_chain(sft):
    view = view_of()
    text, asked = next(iter(view.questions.items()))
    record = show.truth(view, text, sft.processor)
    assert record["answer"] == asked.answer and record["chain"].answer == asked.answer
    assert record["degradations"] == record["chain"].degradations == [("noise", 0.4)]
    ideal = response(record["chain"], record["length"])
    values, [total], _ = show.judged(
        [ideal], record, "matched", {"deg": 1, "format": 1, "len": 1, "accuracy": 1}
    )
    assert (
        values == [{"deg": 1.0, "format": 1.0, "len": 1.0, "accuracy": 1.0}] and total == 4
    )


def test_of_a_question_of_ones_own_only_the_damage_is_known(sft):
    record = show.truth(view_of(), "is it art?", sft.processor)
    assert record["answer"] is record["chain"] is record["length"] is None
    assert list(show.terms(record)) == ["deg", "format"]


def test_a_model_answers_the_same_again_and_samples_a_group(sft):
    view = view_of()
    text = next(iter(view.questions))
    [one] = show.respond(sft, view.seen, text)
    [again] = show.respond(sft, view.seen, text)
    assert one == again and one.chain.conclusion
    group = show.respond(sft, view_of(damage=[("noise", 1.0)]).seen, text, show.G, 1.0)
    assert len(group) == show.G and len(set(group)) > 1


def test_base_says_an_answer_alone():
    base = show.load(show.TINY["base"])
    view = view_of(damage=[])
    text = next(iter(view.questions))
    [said] = show.respond(base, view.seen, text)
    record = show.truth(view, text, base.processor)
    card = show.answer_card("base", said, record, plain=True)
    assert base.plain and said.chain.answer
    assert "accuracy" in card and "deg" not in card


def test_another_reading_and_other_weights_judge_the_same_group(sft):
    view = view_of(damage=[("noise", 0.4), ("darkness", 0.6)])
    record = show.truth(view, "is it art?", sft.processor)
    named = [[], [("noise", 0.4)], [("noise", 0.4), ("darkness", 0.6)]]
    group = [response(Chain(each, "a", "b", "c", "d")) for each in named]
    weights = {"deg": 2.0, "format": 0.5, "len": 1.0, "accuracy": 1.0}
    found = {}
    for reading in rewards.READINGS:
        values, totals, advantages = show.judged(group, record, reading, weights)
        deg = [
            rewards.r_deg(each, record["degradations"], reading)
            for each in [g.chain.degradations for g in group]
        ]
        assert [list(value.values())[0] for value in values] == deg
        assert totals == pytest.approx([2 * value + 0.5 for value in deg])
        expected = group_advantages(torch.tensor([totals]))[0].tolist()
        assert advantages == pytest.approx(expected)
        found[reading] = deg
    assert found == {"matched": [-2, 0, 2], "pairwise": [0, 0, 0], "released": [-2, 0.5, 3]}
    assert show.group_table(group, record, "pairwise", weights).count("<tr>") == 4


def test_what_a_model_writes_is_text_and_never_html():
    chain = Chain([("<img>", 0.5)], "<script>", "<b>", "&", "<i>x")
    html = show.chain_html(chain)
    record = {"degradations": [], "length": None, "answer": None, "chain": None}
    html += show.answer_card("<u>", response(chain), record)
    html += show.group_table([response(chain)], record, "matched", {"deg": 1, "format": 1})
    assert "&lt;script&gt;" in html and "&lt;img&gt;" in html
    assert not re.search("<(script|img|u>&|i>x)", html)


def test_bars_go_left_for_less_than_nothing():
    assert "left:50.0%;width:50.0%" in show.bar("deg", 3.0)
    assert "left:25.0%;width:25.0%" in show.bar("deg", -1.5)
    assert "left:0.0%;width:50.0%" in show.bar("deg", -99.0)


# ---------------------------------------------------------------- the page


def test_without_gradio_one_line_says_what_to_install():
    code = "import sys, runpy; sys.modules['gradio'] = None; runpy.run_module('rr1.demo')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the page needs Gradio: pip install -e .[demo]\n"


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio")
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rr1.demo", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url) or server.poll() is not None, 300)
        assert server.poll() is None, server.stdout.read().decode()
        yield url
    finally:
        server.terminate()
        server.wait(20)


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def until(condition, seconds=90):
    """What the condition gives once it is true; AssertionError where it never is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


def test_a_busy_port_is_one_line(address):
    port = address.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "rr1.demo", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True)
    said = f"port {port} of 127.0.0.1 is not free: choose another with --port\n"
    assert (done.returncode, done.stderr) == (1, said)


def send(url, content, kind="application/json"):
    request = urllib.request.Request(url, content, {"Content-Type": kind})
    return urllib.request.urlopen(request, timeout=60).read().decode()


def photo_from(address, path, session):
    """What the page's server says to a photo that is said to lie at this path."""
    config = json.load(urllib.request.urlopen(f"{address}/config"))
    [button] = [c["id"] for c in config["components"] if c["type"] == "uploadbutton"]
    [upload] = [d for d in config["dependencies"] if d["inputs"] == [button]]
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [given], "fn_index": upload["id"], "session_hash": session}
    send(f"{address}/gradio_api/queue/join", json.dumps(body).encode())
    events = f"{address}/gradio_api/queue/data?session_hash={session}"
    return urllib.request.urlopen(events, timeout=60).read().decode().replace(" ", "")


def test_no_path_from_the_page_is_opened(address, tmp_path):
    """A file of this computer, named as if it had been uploaded, is refused; an upload is not."""
    file = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(file)
    assert '"success":false' in photo_from(address, str(file), "one")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}/gradio_api/file={file}")
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    form = head.encode() + file.read_bytes() + b"\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    [path] = json.loads(send(f"{address}/gradio_api/upload", form, kind))
    assert '"success":true' in photo_from(address, path, "two")


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking "
    flags += "disable-component-update disable-sync window-size=1400,1500"
    for flag in [*flags.split(), f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def test_damage_ask_read_the_chain_and_upload_something_broken(address, browser, tmp_path):
    def all_of(css):
        return browser.find_elements("css selector", css)

    def source():
        return [image.get_attribute("src") for image in all_of("#seen img")]

    browser.get(address)
    before = until(source)
    [first, *_] = until(lambda: all_of("input[aria-label='number input for intensity']"))
    first.clear()
    first.send_keys("0.9\t")
    until(lambda: source() and source() != before)

    until(lambda: all_of("#ask"))[0].click()
    until(lambda: len(all_of("#answers .card")) == 4)
    truth, base, sft, grpo = (card.text for card in all_of("#answers .card"))
    assert "darkness 0.90" in truth and base.startswith("base")
    for text in (sft, grpo):
        assert "what the clean picture would show" in text and "format" in text

    all_of("#sample")[0].click()
    until(lambda: len(all_of("#group tr")) == 1 + show.G)
    sampled = [row.text for row in all_of("#group tr")]
    all_of("input[type=radio][value=released]")[0].click()
    until(lambda: "deg_released" in all_of("#group tr")[0].text)
    texts = [row.text.split(" +")[0].split(" -")[0] for row in all_of("#group tr")[1:]]
    assert texts == [row.split(" +")[0].split(" -")[0] for row in sampled[1:]]

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no picture")
    all_of("input[type=file]")[0].send_keys(str(broken))
    said = "your upload: cannot be read as an image"
    until(lambda: said in browser.find_element("tag name", "body").text)
    assert len(all_of("#answers .card")) == 4
