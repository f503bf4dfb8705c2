"""Speed of the sixteen degradations: one thread, 640 x 480, s = 0.9, beside the nearest public equivalent.

    python bench/degradations.py                     # the peer is plain OpenCV / numpy, written below
    pip install albumentations                  # the peer is albumentations where it has such an op
    python bench/degradations.py --repeats 41

ms are medians over the repeats, ours and the peer's in turn: `wall` by the clock, `cpu` of the thread, which other
jobs on the machine disturb less. Targets: mean over the ops at most 8 ms, none above 25 ms.
"""

import argparse
import sys
import time

import cv2
import numpy as np

from degrade import DEGRADATIONS, degrade

S = 0.9
MEAN_TARGET, MAX_TARGET = 8.0, 25.0


def scene() -> np.ndarray:
    """scikit-image's coffee, or a drawn picture where that is not installed; (480, 640, 3)."""
    try:
        from skimage import data
    except ImportError:
        rng = np.random.default_rng(0)
        return cv2.resize(rng.integers(0, 256, (60, 80, 3), np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(data.coffee(), (640, 480), interpolation=cv2.INTER_AREA)


def opencv_peers(image: np.ndarray) -> dict:
    """The first thing that one would write with OpenCV and numpy, at about the same strength."""
    h, w = image.shape[:2]
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (27, 27)).astype(np.float32)
    line = np.eye(35, dtype=np.float32)
    rows = np.repeat(rng.integers(-90, 90, 36), -(-h // 36))[:h, None].astype(np.float32)
    gain = 0.6 + 0.4 * np.cos(np.arange(h) / 2)[:, None, None]

    def flare():
        glow = np.exp(-((x - 500) ** 2 + (y - 90) ** 2) / 4000)[..., None] * 255
        return (255 - (255 - image) * (255 - glow) / 255).astype(np.uint8)

    def mask_over(mask):
        mask = cv2.GaussianBlur(mask, (0, 0), 3)[..., None]
        return (image * (1 - mask) + 60 * mask).astype(np.uint8)

    def dirt():
        mask = np.zeros((h, w), np.float32)
        for _ in range(70):
            cv2.circle(mask, rng.integers(0, (w, h)).tolist(), int(rng.integers(5, 45)), 0.8, -1)
        return mask_over(mask)

    def desaturate():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
        hsv[..., 1] *= 1 - S
        return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)

    def blocks():
        tiles = image[: h // 48 * 48, : w // 48 * 48].reshape(h // 48, 48, w // 48, 48, 3).swapaxes(1, 2)
        flat = tiles.reshape(-1, 48, 48, 3)
        return flat[rng.permutation(len(flat))].reshape(tiles.shape).swapaxes(1, 2).reshape(h // 48 * 48, -1, 3)

    def dark():
        linear = (image / np.float32(255)) ** 2.2 * 0.05
        return (255 * np.clip(linear + rng.normal(0, 0.004, image.shape), 0, 1) ** (1 / 2.2)).astype(np.uint8)

    def elastic():
        dx, dy = (cv2.GaussianBlur(rng.uniform(-1, 1, (h, w)).astype(np.float32), (0, 0), 15) * 400 for _ in range(2))
        return cv2.remap(image, x + dx, y + dy, cv2.INTER_LINEAR)

    def chroma():
        ycc = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
        ycc[..., 1:] = cv2.GaussianBlur(np.ascontiguousarray(ycc[..., 1:]), (0, 0), 52)
        return cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB)

    def strokes():
        out = image.copy()
        for _ in range(8):
            path = rng.integers(0, (w, h), (60, 2))
            cv2.polylines(out, [path.astype(np.int32)], False, (200, 40, 90), 16, cv2.LINE_AA)
        return out

    def watermark():
        layer = np.zeros_like(image)
        for top in range(0, 2 * h, 60):
            cv2.putText(layer, "SAMPLE  SAMPLE  SAMPLE", (0, top), 2, 2, (255, 255, 255), 4, cv2.LINE_AA)
        layer = cv2.warpAffine(layer, cv2.getRotationMatrix2D((w / 2, h / 2), 30, 1), (w, h))
        return cv2.addWeighted(image, 1, layer, 0.6, 0)

    return {
        "lens blur": lambda: cv2.filter2D(image, -1, disk / disk.sum()),
        "lens flare": flare,
        "motion blur": lambda: cv2.filter2D(image, -1, line / line.sum()),
        "dirty lens": dirt,
        "saturation": desaturate,
        "compression": lambda: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 8])[1], 1),
        "block change": blocks,
        "shifting": lambda: cv2.remap(image, x + rows, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP),
        "scan lines": lambda: (image * gain).astype(np.uint8),
        "darkness": dark,
        "atmospheric turbulence": elastic,
        "noise": lambda: np.clip(image + rng.normal(0, 54, image.shape), 0, 255).astype(np.uint8),
        "color diffusion": chroma,
        "sharpness change": lambda: cv2.addWeighted(image, 6.5, cv2.GaussianBlur(image, (0, 0), 3), -5.5, 0),
        "graffiti": strokes,
        "watermark damage": watermark,
    }


def albumentations_peers(image: np.ndarray) -> dict:
    """{} where albumentations is not installed."""
    try:
        import albumentations as A
    except ImportError:
        return {}
    peers = {
        "lens blur": A.Defocus(radius=(13, 13), p=1),
        "lens flare": A.RandomSunFlare(p=1),
        "motion blur": A.MotionBlur(blur_limit=(35, 35), p=1),
        "dirty lens": A.Spatter(mode="mud", p=1),
        "saturation": A.HueSaturationValue(hue_shift_limit=0, sat_shift_limit=(-90, -90), val_shift_limit=0, p=1),
        "compression": A.ImageCompression(quality_range=(8, 8), p=1),
        "block change": A.RandomGridShuffle(grid=(10, 13), p=1),
        "darkness": A.ISONoise(p=1),
        "atmospheric turbulence": A.ElasticTransform(alpha=300, sigma=12, p=1),
        "noise": A.GaussNoise(std_range=(0.21, 0.21), p=1),
        "sharpness change": A.UnsharpMask(alpha=(1, 1), p=1),
    }
    return {name: (type(op).__name__, lambda op=op: op(image=image)["image"]) for name, op in peers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    cv2.setNumThreads(1)
    image = scene()
    library, plain = albumentations_peers(image), opencv_peers(image)
    print(f"OpenCV {cv2.__version__}, numpy {np.__version__}, albumentations {'there' if library else 'not installed'}")
    print(f"{'640 x 480, s = 0.9, ms':24}{'wall':>8}{'cpu':>8}{'peer wall':>12}{'cpu':>8}  peer")
    walls = []
    for name in DEGRADATIONS:
        label, peer = library.get(name, ("OpenCV / numpy", plain[name]))
        times = []
        for k in range(repeats + 2):
            row = []
            for call in (lambda: degrade(image, [(name, S)], k), peer):
                wall, cpu = time.perf_counter(), time.thread_time()
                call()
                row += [time.perf_counter() - wall, time.thread_time() - cpu]
            times.append(row)
        wall, cpu, peer_wall, peer_cpu = np.median(times[2:], axis=0) * 1e3  # the first two warm up
        walls.append(wall)
        print(f"{name:24}{wall:8.2f}{cpu:8.2f}{peer_wall:12.2f}{peer_cpu:8.2f}  {label}")
    mean, most = np.mean(walls), np.max(walls)
    held = mean <= MEAN_TARGET and most <= MAX_TARGET
    verdict = "held" if held else "MISSED"
    print(f"mean {mean:.2f} (target {MEAN_TARGET:g}), max {most:.2f} (target {MAX_TARGET:g}): {verdict}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
