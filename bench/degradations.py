"""Speed of the sixteen degradations: ms on one core, 640 x 480, s = 0.9, beside public ones.

    python bench/degradations.py              # ours
    pip install albumentations                # the last two columns: its nearest equivalent
    python bench/degradations.py --repeats 41

A figure is the median over the repeats of the thread's own time, ours and the other's in turn.
Exit status 1 if the mean over the ops is more than 5 ms, or one of them takes more than 20 ms.
"""

import argparse
import sys
import time

import cv2
import numpy as np

from degrade import DEGRADATIONS, degrade

LARGEST_MEAN, LARGEST = 5.0, 20.0  # ms


def scene() -> np.ndarray:
    """scikit-image's coffee, or a drawn picture where that is not installed; (480, 640, 3)."""
    try:
        from skimage.data import coffee
    except ImportError:
        knots = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        return cv2.resize(knots, (640, 480), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(coffee(), (640, 480), interpolation=cv2.INTER_AREA)


def equivalents() -> dict:
    """Op -> the transform of albumentations that is nearest to it; {} where that is missing."""
    try:
        import albumentations as A
    except ImportError:
        return {}
    return {
        "lens blur": A.Defocus(radius=(13, 13), p=1),
        "lens flare": A.RandomSunFlare(p=1),
        "motion blur": A.MotionBlur(blur_limit=(35, 35), p=1),
        "dirty lens": A.Spatter(mode="mud", p=1),
        "saturation": A.HueSaturationValue(0, (-90, -90), 0, p=1),
        "compression": A.ImageCompression(quality_range=(8, 8), p=1),
        "block change": A.RandomGridShuffle(grid=(10, 13), p=1),
        "darkness": A.ISONoise(p=1),
        "atmospheric turbulence": A.ElasticTransform(alpha=300, sigma=12, p=1),
        "noise": A.GaussNoise(std_range=(0.21, 0.21), p=1),
        "sharpness change": A.UnsharpMask(alpha=(1, 1), p=1),
    }


def time_of(call) -> float:
    start = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - start)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args(argv).repeats
    cv2.setNumThreads(1)
    image = scene()
    others = equivalents()
    print(f"OpenCV {cv2.__version__}, numpy {np.__version__}; ms")
    ours = []
    for name in DEGRADATIONS:
        other = others.get(name)
        times, other_times = [], []
        for seed in range(repeats + 2):  # the first two warm up
            times.append(time_of(lambda: degrade(image, [(name, 0.9)], seed)))
            if other:
                other_times.append(time_of(lambda: other(image=image)))
        ours.append(np.median(times[2:]))
        beside = (
            f"{np.median(other_times[2:]):8.2f}  {type(other).__name__}" if other else ""
        )
        print(f"{name:24}{ours[-1]:8.2f}{beside}")
    mean, largest = np.mean(ours), np.max(ours)
    held = mean <= LARGEST_MEAN and largest <= LARGEST
    print(
        f"mean {mean:.2f} (at most {LARGEST_MEAN:g}), largest {largest:.2f} (at most {LARGEST:g})"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
