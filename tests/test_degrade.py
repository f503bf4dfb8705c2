"""Eq. 13: what degrade.py promises, on photos (scikit-image's) and on a drawn picture."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

import degrade as module
from degrade import (
    ALIASES,
    DEGRADATIONS,
    STAGES,
    Degradation,
    canonical,
    degrade,
    sample_degradations,
)

ROOT = Path(__file__).resolve().parent.parent
DETERMINISTIC = {"lens blur", "saturation", "compression", "color diffusion", "sharpness change"}
AT_THE_PIXEL = {
    "noise",
    "compression",
}  # exempt from scaling with the short side: they live at the pixel
SEEDS = range(8)

every_op = pytest.mark.parametrize("name", DEGRADATIONS)


def drawn_picture() -> np.ndarray:
    """(112, 112, 3): two shapes on a textured ground."""
    rng = np.random.default_rng(0)
    ground = cv2.resize(
        rng.normal(0, 12, (14, 14)).astype(np.float32), (112, 112), interpolation=cv2.INTER_CUBIC
    )
    image = np.clip(ground[..., None] + [150, 130, 105], 0, 255).astype(np.uint8)
    cv2.circle(image, (40, 44), 22, (200, 40, 50), -1, cv2.LINE_AA)
    cv2.rectangle(image, (62, 58), (98, 96), (40, 80, 190), -1)
    return image


def mae(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    data = pytest.importorskip("skimage.data")
    return {"astronaut": data.astronaut(), "coffee": data.coffee()}


def small(photo: np.ndarray, width: int = 144) -> np.ndarray:
    return cv2.resize(
        photo, (width, round(len(photo) * width / photo.shape[1])), interpolation=cv2.INTER_AREA
    )


@pytest.fixture(scope="module", params=["astronaut", "coffee", "drawn"])
def picture(request) -> np.ndarray:
    return (
        drawn_picture()
        if request.param == "drawn"
        else small(request.getfixturevalue("photos")[request.param])
    )


# ---------------------------------------------------------------- names


def test_sixteen_ops_in_the_papers_four_stages():
    assert list(STAGES) == ["acquisition", "transmission", "environment", "postprocessing"]
    assert [name for names in STAGES.values() for name in names] == list(DEGRADATIONS)
    assert len(DEGRADATIONS) == 16 and [len(names) for names in STAGES.values()] == [5, 4, 4, 3]
    for op in DEGRADATIONS.values():
        assert "s:" in op.__doc__, f"the docstring of {op.__name__} does not say what s means"


@pytest.mark.parametrize(
    "alias, name",
    [
        *ALIASES.items(),
        ("Lens Blur", "lens blur"),
        ("  SCAN_LINES ", "scan lines"),
        ("JPEG-Compression", "compression"),
        ("Atmospheric Turbulence", "atmospheric turbulence"),
    ],
)
def test_canonical_knows_aliases_in_any_writing(alias, name):
    assert canonical(alias) == name and name in DEGRADATIONS


TYPOS = [("lens bluur", "lens blur"), ("nois", "noise"), ("jpeg compres", "compression")]


@pytest.mark.parametrize("typo, near", TYPOS)
def test_an_unknown_name_gets_the_nearest_known_one(typo, near):
    with pytest.raises(ValueError, match=f"{typo}.*{near}"):
        canonical(typo)


def test_a_very_long_unknown_name_is_refused_quickly_and_briefly():
    with pytest.raises(ValueError) as error:
        canonical("x" * 100_000)
    assert len(str(error.value)) < 1000


# ---------------------------------------------------------------- what s does


@every_op
def test_s_zero_is_the_identity(name, picture):
    for seed in (0, 1):
        out = degrade(picture, [(name, 0)], seed)
        assert np.array_equal(out, picture) and not np.shares_memory(out, picture)
    out = DEGRADATIONS[name](picture, 0.0, np.random.default_rng(0))
    assert np.array_equal(out, picture) and not np.shares_memory(out, picture)


@every_op
def test_damage_grows_strictly_is_visible_at_a_tenth_and_plain_at_one(name, picture):
    before = picture.copy()
    grid = [k / 20 for k in range(21)]
    curve = [
        np.mean([mae(degrade(picture, [(name, s)], seed), picture) for seed in SEEDS]) for s in grid
    ]
    assert curve[0] == 0
    falls = [s for s, low, high in zip(grid[1:], curve, curve[1:]) if high <= low]
    assert not falls, f"{name} does not grow at s = {falls}: {np.round(curve, 3)}"
    assert curve[2] >= 0.5, f"{name} at s = 0.1 is invisible: {curve[2]:.2f} grey levels"
    assert curve[20] >= 3 and curve[20] >= 2 * curve[2], (
        f"{name} at s = 1 is not plain: {curve[20]:.2f}"
    )
    assert np.array_equal(picture, before), f"{name} wrote into its input"


def check_that_damage_never_falls(photos: dict[str, np.ndarray]) -> None:
    """In steps of .05, photo by photo and seed by seed; what cannot be damaged is 0 throughout."""
    grid = [k / 20 for k in range(21)]
    for name in DEGRADATIONS:
        for label, photo in photos.items():
            for seed in (11, 12):
                curve = [mae(degrade(photo, [(name, s)], seed), photo) for s in grid]
                grows = (np.diff(curve) > 0).all()
                is_grey = (photo == photo[..., :1]).all()
                nothing_to_lose = is_grey and name in ("saturation", "color diffusion")
                assert grows or nothing_to_lose and not any(curve), f"{name}, {label}: {curve}"


def test_damage_grows_on_each_of_other_photos_too():
    data = pytest.importorskip("skimage.data")
    grey = cv2.cvtColor(small(data.camera()), cv2.COLOR_GRAY2RGB)
    check_that_damage_never_falls({"chelsea": small(data.chelsea()), "camera": grey})


def test_damage_grows_on_each_of_the_shared_photos():
    folder = ROOT.parent / "shared/photos/images"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    files = sorted(folder.glob("*.jpg"))[::6]
    assert files
    check_that_damage_never_falls({file.name: small(load(file)) for file in files})


@every_op
def test_type_and_zero_in_a_list_is_exactly_nothing(name):
    image = drawn_picture()
    others = [("noise", 0.3), ("graffiti", 0.4), ("lens flare", 0.5)]
    expected = degrade(image, others, 4)
    assert np.array_equal(degrade(image, [(name, 0), *others, (name, 0.0)], 4), expected)


def test_the_scene_can_still_be_recognised_at_one_in_a_third_of_the_ops(photos):
    """Measured by luma, 16 x 16, and its edges, 64 x 64: both correlate with the clean ones."""

    def luma(image: np.ndarray, side: int) -> np.ndarray:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
        return cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)

    def edges(image: np.ndarray) -> np.ndarray:
        return np.hypot(*np.gradient(luma(image, 64)))

    for photo in photos.values():
        clean = small(photo, 256)
        recognised = []
        for name in DEGRADATIONS:
            out = degrade(clean, [(name, 1)], 0)
            coarse = np.corrcoef(luma(out, 16).ravel(), luma(clean, 16).ravel())[0, 1]
            fine = np.corrcoef(edges(out).ravel(), edges(clean).ravel())[0, 1]
            if coarse > 0.9 and fine > 0.6:
                recognised.append(name)
        assert len(recognised) >= 6, recognised


@pytest.mark.parametrize("name", [name for name in DEGRADATIONS if name not in AT_THE_PIXEL])
def test_damage_looks_the_same_at_every_width(name, photos):
    """SSIM at s = .45 differs by at most .2 over the widths; noise and compression are exempt."""
    ssim = pytest.importorskip("skimage.metrics").structural_similarity
    for photo in photos.values():
        large = cv2.resize(
            photo, (1280, round(len(photo) * 1280 / photo.shape[1])), interpolation=cv2.INTER_CUBIC
        )
        scores = []
        for width in (160, 320, 640, 1280):
            clean = large if width == 1280 else small(large, width)
            grey = [
                cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)
                for x in (clean, degrade(clean, [(name, 0.45)], 1))
            ]
            scores.append(ssim(*grey))
        assert max(scores) - min(scores) <= 0.2, (
            f"{name}: SSIM {np.round(scores, 3)} at widths 160, 320, 640, 1280"
        )


def test_noise_has_the_deviation_that_it_says():
    grey = np.full((200, 200, 3), 128, np.uint8)
    out = degrade(grey, [("noise", 0.5)], 0).astype(float)
    assert abs(out.std() - 30) < 0.7 and abs(out.mean() - 128) < 0.5
    channels = out.reshape(-1, 3).T
    assert np.abs(np.corrcoef(channels) - np.eye(3)).max() < 0.02


def test_later_paint_does_not_cover_earlier_paint():
    grey = np.full((240, 320, 3), 128, np.uint8)
    shares = []
    for seed in range(20):
        half, whole = (degrade(grey, [("graffiti", s)], seed) for s in (0.5, 1))
        painted = (half != grey).any(axis=-1)
        shares.append((half != whole)[painted].any(axis=-1).mean())
    assert np.mean(shares) < 0.05  # what changes is the soft edge of a stroke


def test_saturation_at_one_is_grey_and_color_diffusion_keeps_the_luma(picture):
    grey = degrade(picture, [("saturation", 1)], 0)
    assert (grey == grey[..., :1]).all()
    y = [
        cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)
        for x in (picture, degrade(picture, [("color diffusion", 0.5)], 0))
    ]
    assert mae(*y) < 3  # what is left comes from colours that leave the cube


# ---------------------------------------------------------------- randomness


def fingerprint(seed: int = 5) -> str:
    image = cv2.resize(drawn_picture(), (301, 280), interpolation=cv2.INTER_CUBIC)
    outs = [degrade(image, [(name, s)], seed) for name in DEGRADATIONS for s in (0.1, 0.7)]
    outs.append(degrade(image, [("graffiti", 0.5), ("noise", 0.3), ("lens flare", 0.8)], seed))
    return hashlib.sha256(b"".join(out.tobytes() for out in outs)).hexdigest()


def test_the_seed_alone_decides_in_any_thread():
    expected = fingerprint()
    np.random.seed(1)
    random.seed(2)
    cv2.setRNGSeed(3)
    assert fingerprint() == expected
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: fingerprint(), range(3))) == {expected}


OLDER_PROCESSORS = {"OPENBLAS_CORETYPE": "Nehalem", "OPENCV_CPU_DISABLE": "AVX512_SKX,AVX2,FMA3"}


@pytest.mark.parametrize("environment", [{}, OLDER_PROCESSORS])
def test_the_seed_alone_decides_in_any_process(environment):
    code = "import sys; sys.path[:0] = sys.argv[1:]; import numpy, cv2\n"
    code += "numpy.random.seed(9); cv2.setRNGSeed(4)\n"
    code += "import test_degrade; print(test_degrade.fingerprint())"
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")]
    environment = os.environ | environment
    out = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert out.stdout.strip() == fingerprint(), out.stderr


def test_no_global_random_state_is_touched():
    def states():
        return repr(np.random.get_state()), repr(random.getstate())

    before = states()
    cv2.setRNGSeed(11)
    expected = cv2.randu(np.zeros(4, np.int32), 0, 1000).tolist()
    cv2.setRNGSeed(11)
    fingerprint()
    assert states() == before
    assert cv2.randu(np.zeros(4, np.int32), 0, 1000).tolist() == expected


@every_op
def test_the_bits_do_not_hang_on_the_processors_vector_instructions(name, photos):
    pictures = [small(photos["astronaut"], 320), small(photos["coffee"], 251), drawn_picture()]
    try:
        for picture in pictures:
            for s in (0.05, 0.3, 0.7, 1):
                cv2.setUseOptimized(True)
                with_them = degrade(picture, [(name, s)], 3)
                cv2.setUseOptimized(False)
                assert np.array_equal(degrade(picture, [(name, s)], 3), with_them), s
    finally:
        cv2.setUseOptimized(True)


@every_op
def test_another_seed_changes_every_random_op(name, picture):
    a, b = (degrade(picture, [(name, 0.5)], seed) for seed in (0, 1))
    assert np.array_equal(a, b) == (name in DETERMINISTIC)


def test_ops_are_applied_in_stage_order_whatever_the_lists_order():
    image, pairs = (
        drawn_picture(),
        [("graffiti", 0.4), ("noise", 0.5), ("compression", 0.6), ("lens blur", 0.7)],
    )
    by_hand = image
    for name, s in reversed(pairs):  # acquisition, transmission, environment, postprocessing
        by_hand = degrade(by_hand, [(name, s)], 3)
    assert np.array_equal(degrade(image, pairs, 3), by_hand)
    assert np.array_equal(degrade(image, pairs[::-1], 3), by_hand)
    assert not np.array_equal(
        degrade(degrade(image, [pairs[1]], 3), [pairs[3]], 3), degrade(image, pairs[1::2], 3)
    )


def test_adding_an_op_does_not_reshuffle_another():
    flat = np.full(
        (64, 64, 3), 128, np.uint8
    )  # shifting draws its bands, and moves nothing that can be seen
    alone = degrade(flat, [("noise", 0.6)], 7)
    assert np.array_equal(degrade(flat, [("shifting", 0.5), ("noise", 0.6)], 7), alone)


def test_the_same_type_twice_draws_twice():
    flat = np.full((64, 64, 3), 128, np.uint8)
    once = degrade(flat, [("noise", 0.3)], 0).astype(float)
    twice = degrade(flat, [("noise", 0.3)] * 2, 0).astype(float)
    assert twice.std() == pytest.approx(
        once.std() * 2**0.5, rel=0.05
    )  # the same noise again would double it


def test_sample_degradations():
    rng = np.random.default_rng(0)
    draws = [sample_degradations(rng) for _ in range(3000)]
    order = list(DEGRADATIONS)
    for drawn in draws:
        positions = [order.index(d.type) for d in drawn]
        assert positions == sorted(set(positions)) and 1 <= len(drawn) <= 3
        assert all(isinstance(d, Degradation) and 0 <= d.intensity <= 1 for d in drawn)
        assert all(d.intensity == round(d.intensity, 2) for d in drawn)
    lengths = np.bincount([len(drawn) for drawn in draws])[1:] / len(draws)
    assert np.abs(lengths - 1 / 3).max() < 0.03
    single = [d.type for drawn in draws if len(drawn) == 1 for d in drawn]
    for names in STAGES.values():  # every stage alike, however many types it has
        assert abs(sum(name in names for name in single) / len(single) - 0.25) < 0.05
    intensities = [d.intensity for drawn in draws for d in drawn]
    assert abs(np.mean(intensities) - 0.5) < 0.02 and abs(np.std(intensities) - 12**-0.5) < 0.02
    assert len(sample_degradations(rng, 16, 16)) == 16 and sample_degradations(rng, 0, 0) == []
    again = np.random.default_rng(0)
    assert draws[:5] == [sample_degradations(again) for _ in range(5)]
    for low, high in ((3, 1), (-1, 2), (1, 17)):
        with pytest.raises(ValueError, match="low"):
            sample_degradations(rng, low, high)


# ---------------------------------------------------------------- sizes and errors


@every_op
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (17, 31), (9, 400)])
def test_any_small_size(name, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for seed in range(3):
        for s in (0.01, 0.5, 1):
            out = degrade(image, [(name, s)], seed)
            assert (
                out.shape == image.shape
                and out.dtype == np.uint8
                and not np.shares_memory(out, image)
            )


@every_op
def test_twelve_megapixels(name):
    image = cv2.resize(drawn_picture(), (4000, 3000), interpolation=cv2.INTER_NEAREST)
    out = degrade(image, [(name, 0.9)], 0)
    assert out.shape == image.shape and out.dtype == np.uint8 and not np.array_equal(out, image)


@every_op
def test_a_very_long_picture_costs_no_more_than_its_pixels(name):
    """9 x 32000 has fewer pixels than 640 x 480; on a quiet core the slowest op takes 70 ms."""
    long = np.random.default_rng(0).integers(0, 256, (9, 32000, 3), np.uint8)
    for image in (long, long.transpose(1, 0, 2)):
        start = time.thread_time()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = degrade(image, [(name, 1)], 0)
        assert time.thread_time() - start < 0.7
        assert out.shape == image.shape


def test_a_smooth_field_has_no_more_knots_than_pixels():
    class Counting:
        def standard_normal(self, shape, dtype):
            self.drawn = int(np.prod(shape))
            return np.zeros(shape, dtype)

    rng = Counting()
    assert module._smooth_field(1, 32000, 14, 2, rng).shape == (1, 32000, 2)
    assert rng.drawn <= 2 * 2 * 2 * 32000  # a knot at either end of each pixel, two channels


@pytest.mark.parametrize("size", [(16, 70_000), (32_001, 2)])
def test_a_side_that_is_too_long_is_refused_with_the_limit(size):
    for name in DEGRADATIONS:
        with pytest.raises(ValueError, match="1 to 32000"):
            degrade(np.zeros((*size, 3), np.uint8), [(name, 0.5)], 0)


def test_an_array_that_is_a_view_is_fine():
    image = drawn_picture()
    for view in (image[::-1, ::2], image[..., ::-1], image.transpose(1, 0, 2)):
        view.flags.writeable = False
        for name in DEGRADATIONS:
            assert np.array_equal(
                degrade(view, [(name, 0.4)], 0), degrade(view.copy(), [(name, 0.4)], 0)
            ), name


@pytest.mark.parametrize(
    "image, came",
    [
        (np.zeros((8, 8, 3), np.float32), r"float32.*\(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"uint8.*\(8, 8\)"),
        (np.zeros((8, 8, 1), np.uint8), r"\(8, 8, 1\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        ([[[0, 0, 0]]], "list"),
        (None, "NoneType"),
    ],
)
def test_another_kind_of_image_is_refused(image, came):
    for call in (
        lambda: degrade(image, [("noise", 0.5)], 0),
        lambda: DEGRADATIONS["noise"](image, 0.5, None),
    ):
        with pytest.raises(ValueError, match=came) as error:
            call()
        assert "expected" in str(error.value) and "uint8 RGB" in str(error.value)


@pytest.mark.parametrize(
    "s",
    [
        *(-0.01, 1.01, float("nan"), float("inf"), None, "0.5", [0.5]),
        *(np.array([0.5]), np.array(0.5), np.array([0.1, 0.2])),
    ],
)
def test_an_intensity_outside_zero_to_one_is_refused(s):
    with pytest.raises(ValueError, match=r"noise.*expected a number in \[0, 1\]"):
        degrade(drawn_picture(), [("noise", s)], 0)


@pytest.mark.parametrize(
    "pairs", [["noise"], [("noise",)], Degradation("noise", 0.5), [("noise", 0.5, 1)], [0.5]]
)
def test_what_is_not_a_list_of_pairs_is_refused(pairs):
    with pytest.raises(ValueError, match="pairs"):
        degrade(drawn_picture(), pairs, 0)


@pytest.mark.parametrize("seed", [-1, None, 0.5, "7"])
def test_a_seed_that_is_no_natural_number_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        degrade(drawn_picture(), [("noise", 0.5)], seed)


def test_an_unknown_type_is_refused_before_any_work():
    with pytest.raises(ValueError, match="watermrk.*watermark damage"):
        degrade(drawn_picture(), [("noise", 0.5), ("watermrk", 0.5)], 0)


# ---------------------------------------------------------------- the command line


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, cwd / "degrade.py", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, timeout=120
    )


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image[..., ::-1])[1].tobytes())


def load(path: Path) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.fixture
def desk(tmp_path) -> Path:
    """A folder with nothing of the repository but degrade.py."""
    shutil.copy(ROOT / "degrade.py", tmp_path)
    return tmp_path


def test_the_file_alone_needs_numpy_and_opencv_only(desk):
    others = {"torch", "tqdm", "skimage", "scipy", "PIL", "rr1"}
    code = f"import sys, degrade; print({others} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=desk, check=True
    )
    assert out.stdout.strip() == "set()"


def test_one_photo(desk):
    image = drawn_picture()
    save(desk / "photo.png", image)
    types = ["--type", "Lens_Blur", "0.4", "--type", "noise", ".2"]
    out = run("photo.png", *types, "--seed", 7, "--out", "new/out.png", cwd=desk)
    assert out.returncode == 0, out.stderr
    assert np.array_equal(
        load(desk / "new/out.png"), degrade(image, [("lens blur", 0.4), ("noise", 0.2)], 7)
    )
    assert "lens blur(0.40), noise(0.20)" in out.stdout


def test_a_folder_its_labels_a_broken_photo_and_going_on(desk):
    image = drawn_picture()
    clean = {"a.png": image, "sub/b c.png": image[::-1].copy()}
    clean |= {"é.png": image.transpose(1, 0, 2).copy(), "a.bmp": image[:50].copy()}
    for name, content in clean.items():
        save(desk / "in" / name, content)
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    broken = {"cut.jpg": jpeg[: len(jpeg) // 2], "text.png": b"not an image", "empty.png": b""}
    for name, content in broken.items():
        (desk / "in" / name).write_bytes(content)
    (desk / "in/notes.txt").write_text("no photo at all")

    first = run(
        "in", "--out", "in/out", "--seed", 3, cwd=desk
    )  # inside the folder: not read as its photos later
    assert first.returncode == 1
    for name in broken:
        assert f"skipped {Path('in') / name}" in first.stderr
    out = desk / "in/out"
    labels = [
        json.loads(line) for line in (out / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    written = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert set(written) == {label["image"] for label in labels} | {"labels.jsonl"}
    assert len(labels) == 3 * len(clean)
    for label in labels:
        pairs = [(d["type"], d["intensity"]) for d in label["degradations"]]
        assert np.array_equal(
            load(out / label["image"]), degrade(clean[label["clean_image"]], pairs, label["seed"])
        )
        level = {"25": 0.25, "50": 0.5, "100": 1.0}[label["image"].split("/")[0]]
        assert {s for _, s in pairs} == {level} and 1 <= len(pairs) <= 3
    assert len({label["seed"] for label in labels}) == len(clean)

    # going on: what is there is left alone, what is missing comes back, and comes back the same
    lost = written[labels[0]["image"]]
    content, times = lost.read_bytes(), {path: path.stat().st_mtime_ns for path in written.values()}
    lost.unlink()
    text = (out / "labels.jsonl").read_bytes()
    second = run("in", "--out", "in/out", "--seed", 3, cwd=desk)
    assert second.returncode == 1 and lost.read_bytes() == content
    kept = [path for path in written.values() if path not in (lost, out / "labels.jsonl")]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
    assert (out / "labels.jsonl").read_bytes() == text

    # a mended photo makes the run whole; another seed is refused rather than mixed in
    for name in broken:
        (desk / "in" / name).unlink()
    assert run("in", "--out", "in/out", "--seed", 3, cwd=desk).returncode == 0
    other = run("in", "--out", "in/out", "--seed", 4, cwd=desk)
    assert (
        other.returncode == 2
        and "--seed" in other.stderr
        and (out / "labels.jsonl").read_bytes() == text
    )


def test_a_folder_with_given_types_and_levels(desk):
    save(desk / "in/a.png", drawn_picture())
    out = run("in", "--types", "jpeg", "Noise", "--levels", "0.23", "0.9", cwd=desk)
    assert out.returncode == 0, out.stderr
    lines = (desk / "in-degraded/labels.jsonl").read_text(encoding="utf-8").splitlines()
    degradations = [
        [(d["type"], d["intensity"]) for d in json.loads(line)["degradations"]] for line in lines
    ]
    assert degradations == [[("compression", s), ("noise", s)] for s in (0.23, 0.9)]
    assert (desk / "in-degraded/23/a.png.png").exists()
    assert (desk / "in-degraded/90/a.png.png").exists()


def labels_of(out: Path) -> dict[str, dict]:
    lines = (out / "labels.jsonl").read_text().splitlines()
    return {label["image"]: label for label in map(json.loads, lines)}


def test_one_more_photo_renames_and_redraws_nothing(desk):
    image = drawn_picture()
    save(desk / "in/a.png", image)
    assert run("in", cwd=desk).returncode == 0
    out = desk / "in-degraded"
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    labels = labels_of(out)
    save(desk / "in/a.jpg", image[::-1].copy())  # sorts before a.png
    save(desk / "in/a.png.png", image[:, ::-1].copy())
    done = run("in", cwd=desk)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert labels.items() <= labels_of(out).items()
    names = {f"{level}/{name}.png" for level in (25, 50, 100) for name in ("a.jpg", "a.png")}
    assert set(labels_of(out)) == names | {f"{level}/a.png.png.png" for level in (25, 50, 100)}


def test_a_replaced_photo_is_noticed_and_done_again(desk):
    image = drawn_picture()
    save(desk / "in/a.png", image)
    save(desk / "in/b.png", image)
    assert run("in", cwd=desk).returncode == 0
    out = desk / "in-degraded"
    kept = (out / "50/b.png.png").stat().st_mtime_ns
    save(desk / "in/a.png", image[::-1].copy())
    os.utime(desk / "in/a.png", (0, 0))  # its date says nothing
    done = run("in", cwd=desk)
    assert done.returncode == 0 and "a.png was replaced" in done.stderr
    assert "b.png" not in done.stderr and (out / "50/b.png.png").stat().st_mtime_ns == kept
    label = labels_of(out)["50/a.png.png"]
    pairs = [(d["type"], d["intensity"]) for d in label["degradations"]]
    assert np.array_equal(load(out / label["image"]), degrade(image[::-1], pairs, label["seed"]))
    assert run("in", cwd=desk).stderr == ""


def test_labels_of_photos_that_are_gone_are_said_and_kept(desk):
    for name in ("a.png", "b.png"):
        save(desk / "in" / name, drawn_picture())
    assert run("in", cwd=desk).returncode == 0
    labels = labels_of(desk / "in-degraded")
    (desk / "in/a.png").unlink()
    done = run("in", "--levels", "0.5", cwd=desk)
    assert done.returncode == 0 and "a.png is gone; 50/a.png.png and its label stay" in done.stderr
    assert "b.png" not in done.stderr and labels_of(desk / "in-degraded") == labels


@pytest.mark.parametrize("torn", ['{"image": "25/a.p', "3", '{"seed": 1}'])
def test_a_torn_labels_file_is_named_and_left_alone(desk, torn):
    save(desk / "in/a.png", drawn_picture())
    assert run("in", cwd=desk).returncode == 0
    file = desk / "in-degraded/labels.jsonl"
    whole = file.read_text()
    file.write_text(whole + torn)
    done = run("in", cwd=desk)
    assert done.returncode == 2 and "in-degraded/labels.jsonl" in done.stderr
    assert "Traceback" not in done.stderr and file.read_text() == whole + torn
    file.write_text(whole.splitlines(keepends=True)[0])  # what it says: the line is deleted
    assert run("in", cwd=desk).returncode == 0 and file.read_text() == whole


def test_folders_and_dangling_links_named_like_photos_are_none(desk):
    save(desk / "in/a.png", drawn_picture())
    (desk / "in/x.jpg").mkdir()
    (desk / "in/y.jpg").symlink_to("nowhere.jpg")
    done = run("in", cwd=desk)
    assert done.returncode == 0 and done.stderr == ""
    assert {label["clean_image"] for label in labels_of(desk / "in-degraded").values()} == {"a.png"}


def test_a_run_cut_short_goes_on(desk, monkeypatch):
    monkeypatch.chdir(desk)
    for name in ("a.png", "b.png", "c.png"):
        save(desk / "in" / name, drawn_picture())
    assert module.main(["in", "--out", "whole"]) == 0
    write = module._write_image

    def interrupted(path, image):
        if "b.png" in str(path):
            raise KeyboardInterrupt
        write(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_image", interrupted)
        with pytest.raises(SystemExit) as exit_:
            module.main(["in", "--out", "cut"])
    assert exit_.value.code == 130
    done = labels_of(desk / "cut")
    assert "50/b.png.png" not in done and all((desk / "cut" / image).exists() for image in done)
    assert module.main(["in", "--out", "cut"]) == 0
    for file in ("labels.jsonl", "50/b.png.png", "100/c.png.png"):
        assert (desk / "cut" / file).read_bytes() == (desk / "whole" / file).read_bytes()


# ---------------------------------------------------------------- what is read


def jpeg_of(image: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes()


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_jpeg_is_whole_with_any_tail_and_cut_off_without_its_end(tmp_path, progressive):
    file = tmp_path / "x.jpg"
    jpeg = jpeg_of(drawn_picture(), cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    thumbnail = jpeg_of(drawn_picture()[::4, ::4])
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    jpeg = jpeg[:2] + segment + jpeg[2:]  # a thumbnail, with an end of its own
    file.write_bytes(jpeg)
    expected = module._read(file)
    for tail in (b"\0" * 3 * len(jpeg), b"\xff\xda\xff" * 1000):
        file.write_bytes(jpeg + tail)
        assert np.array_equal(module._read(file), expected)
    for length in (1, 3, len(segment) + 40, len(jpeg) // 2, len(jpeg) - 2):
        file.write_bytes(jpeg[:length])
        assert module._is_cut_jpeg(jpeg[:length]) or length < 2
        with pytest.raises(ValueError, match="x.jpg: (cut off|not an image)"):
            module._read(file)


def test_sixteen_bits_and_floats_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    expected = (255 * ramp)[..., None]
    for suffix in ("png", "tiff"):
        cv2.imwrite(str(tmp_path / f"x.{suffix}"), (65535 * ramp).astype(np.uint16))
        assert np.abs(module._read(tmp_path / f"x.{suffix}") - expected).max() <= 1
    for scale in (1, 255, 65535):
        for channels in (1, 3):
            cv2.imwrite(str(tmp_path / "x.tiff"), np.dstack([scale * ramp] * channels))
            image = module._read(tmp_path / "x.tiff")
            assert image.shape == (8, 8, 3) and np.abs(image - expected).max() <= 0.51


def test_the_same_picture_is_opened_as_for_training(tmp_path):
    """By OpenCV here and by Pillow in rr1.records: upright, three channels of 8 bits."""
    pillow = pytest.importorskip("PIL.Image")
    open_image = pytest.importorskip("rr1.records").open_image
    rgb = small(pytest.importorskip("skimage.data").coffee(), 120)
    alpha = np.arange(rgb[..., 0].size).reshape(*rgb.shape[:2], 1).astype(np.uint8)
    deep = rgb[..., 0].astype(np.uint16) * 200 + 77
    pictures = {
        "plain.png": pillow.fromarray(rgb),
        "plain.jpg": pillow.fromarray(rgb),
        "plain.bmp": pillow.fromarray(rgb),
        "plain.tif": pillow.fromarray(rgb),
        "plain.webp": pillow.fromarray(rgb),
        "alpha.png": pillow.fromarray(np.dstack([rgb, alpha])),
        "grey.png": pillow.fromarray(rgb[..., 0]),
        "grey.jpg": pillow.fromarray(rgb[..., 0]),
        "palette.png": pillow.fromarray(rgb).quantize(32),
        "sixteen.png": pillow.fromarray(deep),
        "sixteen.tif": pillow.fromarray(deep),
        "float.tif": pillow.fromarray(rgb[..., 0].astype(np.float32) / 256),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    for orientation in range(1, 9):
        exif = pillow.Exif()
        exif[0x0112] = orientation
        pictures[f"turned-{orientation}.jpg"] = pillow.fromarray(rgb)
        pillow.fromarray(rgb).save(tmp_path / f"turned-{orientation}.jpg", exif=exif)
    for name in pictures:
        ours, theirs = module._read(tmp_path / name), np.asarray(open_image(tmp_path / name))
        assert np.array_equal(ours, theirs), name


def test_help_says_what_is_kept_and_what_is_dropped(capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in ("EXIF", "16 bits", "float", "transparency", "colour profile", "frames"):
        assert word in text, word


def test_gallery_and_list(desk, monkeypatch, capsys):
    save(desk / "photo.jpg", cv2.resize(drawn_picture(), (300, 200)))
    monkeypatch.chdir(desk)
    assert module.main(["--gallery", "photo.jpg", "--out", "sheet.png"]) == 0
    assert load(desk / "sheet.png").shape == (16 * (30 + 160), 5 * 240, 3)
    capsys.readouterr()
    assert module.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in DEGRADATIONS) and all(
        f"{stage}\n" in printed for stage in STAGES
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a photo"),
        (["none.png"], "none.png"),
        (["photo.png", "--type", "nois", "0.5"], "nearest is 'noise'"),
        (["photo.png", "--type", "noise", "1.5"], r"expected a number in \[0, 1\]"),
        (["photo.png", "--type", "noise", "much"], "much"),
        (["photo.png", "--types", "noise"], "--type NAME S"),
        (["photo.png", "--out", "x.gif", "--type", "noise", "0.5"], "x.gif"),
        (["broken.png"], "broken.png"),
        (["folder"], "no photo"),
        (["folder", "--type", "noise", "0.5"], "--types"),
        (["folder", "--levels", "2"], r"\[0, 1\]"),
        (["photo.png", "--levels", "0.5"], "--levels for a folder"),
        (["photos", "--levels", "0.5", "0.50000001"], "two of them fall into one folder"),
        (["photos", "--levels", "0.5", "0.5"], "two of them fall into one folder"),
        (["photos", "--seed", "-1"], "non-negative"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no")
    save(tmp_path / "photo.png", drawn_picture())
    save(tmp_path / "photos/photo.png", drawn_picture())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        module.main(arguments)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before
