"""A reward that looks at the picture: darkness is to be named where it is dark, only there.

Beside the paper's rewards, with a small weight:

    torchrun train_grpo.py --rewards deg len examples/dark.py:dark \\
        --reward-weights 1 1 0.5 --out runs/dark
"""

import numpy as np
from PIL import Image


def dark(response, record):
    with Image.open(record["image"]) as image:
        is_dark = np.asarray(image.convert("L")).mean() < 70  # grey levels, of 255
    named = any(type == "darkness" for type, _ in response.chain.degradations)
    return float(named == is_dark)
