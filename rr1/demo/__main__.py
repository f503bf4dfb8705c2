"""A page to play with: damage a picture, ask, see what each model says and what that is paid.

    pip install -e .[demo] && python -m rr1.demo           # then open http://127.0.0.1:7860
    python -m rr1.demo --model runs/sft/model --model runs/grpo/model     # in place of the three

It listens on this computer alone unless --host says otherwise. One visitor is served at a time.
"""

import argparse
import os

# before torch and Gradio are imported: threads that wait must not spin; nothing is reported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from functools import wraps

from PIL import Image

try:
    import gradio as gr
except ImportError:
    raise SystemExit("the page needs Gradio: pip install -e .[demo]") from None

from degrade import STAGES
from rr1.demo import show
from rr1.rewards import READINGS

BYTES = 8 * 2**20  # of an upload
PIXELS = 24_000_000
LONGEST_QUESTION = 300  # characters
QUEUE = {
    "concurrency_id": "one at a time",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
PICTURE = {"interactive": False, "format": "png", "height": 250, "buttons": []}
WEIGHTS = {"deg": 1.0, "len": 1.0, "format": 0.0, "accuracy": 0.0}  # at first as in Eq. 9
STYLE = """
.cards {display: flex; gap: 12px; flex-wrap: wrap}
.card {flex: 1 1 150px; border: 1px solid #bbb; border-radius: 8px; padding: 10px}
.card h3 {margin: 0 0 6px; font-weight: 700} .truth {background: #8882}
.card dt {font-size: 12px; opacity: .7} .card dd {margin: 0 0 6px}
.card p {font-size: 12px; opacity: .7; margin: 6px 0 0}
.bar {display: flex; font-size: 13px; align-items: center; gap: 6px}
.bar u {width: 5.5em; text-decoration: none} .bar em {width: 3.2em; text-align: right}
.bar s {flex: 1; height: 10px; position: relative; background: #8883}
.bar b {position: absolute; top: 0; height: 10px} .plus {background: #2a7} .minus {background: #c43}
.group td, .group th {padding: 3px 8px; font-size: 13px; text-align: left}
.up {color: #2a7} .down {color: #c43}
"""


def sentence(function):
    """What is wrong with what a visitor gave becomes one sentence on the page."""

    @wraps(function)
    def told(*given):
        try:
            return function(*given)
        except ValueError as error:
            text = " ".join(str(error).split())
            raise gr.Error(text[:300], title="Please try again", duration=None) from None

    return told


def checked(question: str | None) -> str:
    question = (question or "").strip()
    if not 0 < len(question) <= LONGEST_QUESTION:
        raise ValueError(f"Ask something, in at most {LONGEST_QUESTION} characters.")
    return question


def begin(view):
    texts = list(view.questions) or ["describe the picture."]
    return view, view.clean, gr.Dropdown(choices=texts, value=texts[0])


@sentence
def new_scene(seed):
    return begin(show.drawn(int(seed)))


@sentence
def new_photo(content):
    return begin(show.uploaded(content))


@sentence
def see(view, seed, *controls):
    damage = show.damage_of(controls[:3], controls[3:])
    view = show.damaged(view, damage, int(seed))
    return view, view.seen, show.recovered(view)


@sentence
def judge(responses, record, reading, *weights):
    if responses is None:
        return ""
    weights = dict(zip(WEIGHTS, weights))
    table = show.group_table(responses, record, reading, weights)
    return f'<div class="group">{table}</div>'


def page(models: dict[str, show.Model]) -> gr.Blocks:
    """The page for these models, by the names they are shown under."""
    kinds = [("none", "")]
    kinds += [
        (f"{stage}: {kind}", kind) for stage, types in STAGES.items() for kind in types
    ]

    @sentence
    def ask(view, question):
        question = checked(question)
        cards = []
        for name, model in models.items():
            [response] = show.respond(model, view.seen, question)
            record = show.truth(view, question, model.processor)
            cards.append(show.answer_card(name, response, record, model.plain))
        return f'<div class="cards">{show.truth_card(record)}{"".join(cards)}</div>'

    @sentence
    def sample(view, question, name, seed):
        question, model = checked(question), models[name]
        record = show.truth(view, question, model.processor)
        return show.respond(model, view.seen, question, show.G, 1.0, int(seed)), record

    with gr.Blocks(title="Robust-R1", delete_cache=(3600, 3600)) as blocks:
        view, group, record = gr.State(), gr.State(), gr.State()
        gr.Markdown("## Robust-R1: damage a picture, ask, see what the answer is paid")
        with gr.Row():
            with gr.Column(scale=2):
                seed = gr.Number(1, label="scene", precision=0, minimum=0, maximum=2**31)
                photo = gr.UploadButton(
                    "or a photo", type="binary", file_types=["image"], elem_id="photo"
                )
                types, strengths = [], []
                for n, first in enumerate(("darkness", "", ""), start=1):
                    types.append(gr.Dropdown(kinds, label=f"damage {n}", value=first))
                    strengths.append(gr.Slider(0, 1, 0.5, step=0.01, label="intensity"))
            with gr.Column(scale=5):
                with gr.Row():
                    clean = gr.Image(label="clean", **PICTURE)
                    seen = gr.Image(label="what the models see", elem_id="seen", **PICTURE)
                    undone = gr.Image(label="recovered", **PICTURE)
                question = gr.Dropdown([], label="question", allow_custom_value=True)
                asking = gr.Button("Ask", variant="primary", elem_id="ask")
                answers = gr.HTML(elem_id="answers")
        gr.Markdown("### A group of eight: Eq. 6 to 11")
        with gr.Row():
            name = gr.Dropdown(list(models), value=list(models)[-1], label="model")
            draw_seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31)
            reading = gr.Radio(
                list(READINGS), value="matched", label="reading of Eq. 6, and the weights"
            )
            weights = [
                gr.Slider(0, 2, weight, step=0.1, label=term)
                for term, weight in WEIGHTS.items()
            ]
        sampling = gr.Button("Sample eight", elem_id="sample")
        table = gr.HTML(elem_id="group")

        controls = [view, seed, *types, *strengths]
        seeing = [view, seen, undone]
        judging = [group, record, reading, *weights]
        shown = [view, clean, question]
        drawn = gr.on([blocks.load, seed.change], new_scene, seed, shown, **QUEUE)
        drawn.success(see, controls, seeing, **QUEUE)
        read = photo.upload(new_photo, photo, shown, **QUEUE)
        read.success(see, controls, seeing, **QUEUE)
        changes = [control.change for control in (*types, *strengths)]
        gr.on(changes, see, controls, seeing, trigger_mode="always_last", **QUEUE)
        asking.click(ask, [view, question], answers, **QUEUE)
        given = [view, question, name, draw_seed]
        sampled = sampling.click(sample, given, [group, record], **QUEUE)
        sampled.success(judge, judging, table, **QUEUE)
        changes = [control.change for control in (reading, *weights)]
        gr.on(changes, judge, judging, table, trigger_mode="always_last", **QUEUE)
    return blocks.queue(max_size=32, default_concurrency_limit=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="checkpoint folder; repeatable")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860)
    a = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = PIXELS  # which `open_image` keeps to
    folders = {folder: folder for folder in a.model} if a.model else show.TINY
    models = {name: show.load(folder) for name, folder in folders.items()}
    try:
        page(models).launch(
            server_name=a.host,
            server_port=a.port,
            max_file_size=BYTES,
            state_session_capacity=100,
            css=STYLE,
            theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
            footer_links=[],
            ssr_mode=False,
        )
    except OSError:
        raise SystemExit(
            f"port {a.port} of {a.host} is not free: choose another with --port"
        ) from None


if __name__ == "__main__":
    main()
