"""Which things does a picture show? A small network that is in no reward and never saw damage.

It says for each quarter of a picture which shape of which colour is there, or none.
"""

from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from rr1 import data, runtime
from rr1.tiny import world
from rr1.tiny.scenes import COLORS, PLACES, SHAPES, Scene
from rr1.u1 import pairs
from rr1.u1.restorer import to_tensor

KINDS = list(product(SHAPES, COLORS))


def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def new_judge() -> nn.Module:
    """Pictures (N, 3, side, side) -> logits (N, KINDS + 1, 2, 2) for the four quarters."""
    layers, inputs = [], 3
    for width in (24, 48, 96):
        layers += block(inputs, width, stride=2)
        layers += block(width, width, stride=1)
        inputs = width
    classes = len(KINDS) + 1
    layers += [nn.AdaptiveMaxPool2d(2), nn.Conv2d(inputs, classes, 1)]
    return nn.Sequential(*layers)


def things(scenes: list[Scene]) -> Tensor:
    """Which of KINDS is in each quarter, (N, 2, 2); len(KINDS): none."""
    found = torch.full((len(scenes), 4), len(KINDS))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            place = PLACES.index(thing.place)
            found[i, place] = KINDS.index((thing.shape, thing.color))
    return found.view(-1, 2, 2)


def trained_judge(
    side: int,
    steps: int = 800,
    batch: int = 32,
) -> nn.Module:
    """Taught on clean scenes that are in no data set."""
    judge = new_judge()

    def load(step: int) -> tuple[Tensor, Tensor]:
        rng, scenes, images = np.random.default_rng([7, step]), [], []
        for _ in range(batch):
            scenes.append(world.sample_scene(rng))
            image = world.draw(scenes[-1], rng)
            images.append(pairs.resize(image, side, side))
        return to_tensor(images), things(scenes)

    optimizer = runtime.build_optimizer(judge, 3e-3, 0.01)
    for step, (images, truth) in data.prefetch(load, range(steps)):
        nn.functional.cross_entropy(judge(images), truth).backward()
        rate = 3e-3 * runtime.cosine_with_warmup(step, steps, 20, floor=0.02)
        runtime.update(optimizer, runtime.Runtime(), rate, max_grad_norm=10.0)
    return judge.eval()


@torch.no_grad()
def read_right(
    judge: nn.Module,
    pictures: Tensor,
    truth: Tensor,
) -> np.ndarray:
    """The share of each picture's things whose shape and colour are read right, (N,)."""
    read = judge(pictures.clamp(0, 1)).argmax(1)  # (N, 2, 2)
    there = truth < len(KINDS)
    right = (read == truth) & there
    return (right.sum((1, 2)) / there.sum((1, 2))).numpy()
