"""A data set with recovered pictures, for stage III: each record shows the damaged picture, then
the recovered one.

    python -m rr1.u1                      # the drawn world's splits -> runs/recovered
    python -m rr1.u1 --model runs/recover/model --data test.jsonl --images images --out recovered

writes FILE.jsonl and FILE/ with the pictures. A line's `image` is [damaged, recovered], and its
question begins with <image><image>. A run that was cut off goes on where it stopped.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rr1 import data, files, records, runtime, tiny
from rr1.runtime import opt
from rr1.u1 import pairs
from rr1.u1.report import to_png
from rr1.u1.restorer import Restorer

# fields that `records.read` adds, or that are written anew
OURS = {"where", "number", "chain", "question", "response", "messages", "images"}


@dataclass
class Config:
    model: str = opt(tiny.RESTORER, "a restorer's folder, as train_recover.py writes it")
    data: list[str] = opt([], "files of records; none: the drawn world's train and test")
    images: str = opt("", "folder that image paths are relative to; empty: each file's own")
    part: str = opt(
        "all", "25 % of the records, the other 75 %, or all", ["all", "sft", "rl"]
    )
    steps: int | None = opt(
        None, "Euler steps of a recovery; default: the model's own", low=1
    )
    seed: int = opt(0, "of the noise that recovery starts from")
    batch: int = opt(64, "pictures at a time", low=1)
    out: str = opt("runs/recovered", "folder of the new data set")


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    device = runtime.setup().device
    model = Restorer.from_pretrained(config.model).to(device)
    out = Path(config.out)
    files.begin(out, asdict(config), free={"batch", "data", "out"})
    for path in config.data or [tiny.dataset("train"), tiny.dataset("test")]:
        found = data.split(records.read(path, config.images), config.part)
        write_data_set(model, found, Path(path).stem, config)


def write_data_set(
    model: Restorer,
    found: records.Records,
    name: str,
    config: Config,
) -> None:
    """Write out/NAME.jsonl and its pictures. What has been recovered stays."""
    out = Path(config.out)
    recovered = out / name / "recovered"
    recovered.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(len(found)) if not (recovered / f"{i:06d}.png").exists()]
    for start in tqdm(range(0, len(todo), config.batch), desc=f"recovering {name}"):
        numbers = todo[start : start + config.batch]
        images = [np.asarray(records.open_image(found[i]["image"])) for i in numbers]
        seeds = [data.seed_for(config.seed, i) for i in numbers]
        pictures = pairs.recover_images(model, images, seeds, config.steps)
        for i, picture in zip(numbers, pictures):
            files.write_bytes(recovered / f"{i:06d}.png", to_png(picture))
    rows = [new_record(record, out, name, i) for i, record in enumerate(found)]
    files.write_text(out / f"{name}.jsonl", files.lines_of(rows))
    print(f"written: {out}/{name}.jsonl, {len(rows)} records")


def new_record(record: dict, out: Path, name: str, number: int) -> dict:
    """The line of the new data set; its pictures are paths in `out`."""
    row = {key: value for key, value in record.items() if key not in OURS}
    row["image"] = [
        copied(record["image"], out, f"{name}/damaged/{number:06d}"),
        f"{name}/recovered/{number:06d}.png",
    ]
    if "clean_image" in record:
        row["clean_image"] = copied(
            record["clean_image"], out, f"{name}/clean/{number:06d}"
        )
    human = {"from": "human", "value": "<image><image>" + record["question"]}
    row["conversations"] = [human]
    if record["response"]:
        row["conversations"].append({"from": "gpt", "value": record["response"]})
    row["degradations"] = [d._asdict() for d in record["degradations"]]
    return row


def copied(source: str, out: Path, name: str) -> str:
    """Copy a picture into `out`; its path there."""
    name += Path(source).suffix
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, out / name)
    return name


if __name__ == "__main__":
    main()
