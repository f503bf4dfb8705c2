"""Sampling G responses from one prefill: the tokens of `generate`, the scorer's probabilities."""

import copy

import numpy as np
import pytest
import torch
from conftest import ordinary, random_model
from PIL import Image

from rr1 import data, fast, rollout, vlm

SIZES = [(112, 112), (56, 112), (84, 56), (28, 28)]
TEXTS = [
    "what is it?",
    "how many shapes are there, and what color is the one in the top left?",
    "where?",
    "a red star " * 9,
]
NEVER = float("-inf")


@pytest.fixture(scope="module")
def model(processor, way):
    model = random_model(processor.tokenizer, seed=1, hidden=192).double()
    way(model)
    vlm.freeze_vision(model)
    return model


def batch_of(processor, n, seed=0):
    """n prompts of different lengths over pictures of different sizes."""
    rng = np.random.default_rng(seed)
    images = [
        Image.fromarray(rng.integers(0, 256, (*SIZES[i % 4], 3), dtype=np.uint8))
        for i in range(n)
    ]
    return data.collate([TEXTS[(i + i // 4) % 4] for i in range(n)], images, processor)


def options(processor, **changes):
    return (
        dict(end_id=processor.end_id, max_new_tokens=16, banned=processor.banned_ids)
        | changes
    )


def forced(model, bias):
    """A copy of the model whose logits have `bias` added, {token: number}, for all who ask."""
    model = copy.deepcopy(model)
    added = torch.zeros(model.config.text_config.vocab_size, dtype=torch.float64)
    for token, value in bias.items():
        added[token] = value
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + added)
    return model


# ---------------------------------------------------------------- against generate and scorer


def test_greedy_equals_generate_token_for_token(processor, way):
    """200 prompts in one batch; some responses end their turn early, some are cut off."""
    model = random_model(processor.tokenizer, seed=6, hidden=192).double()
    way(model)
    vlm.freeze_vision(model)
    batch = batch_of(processor, 200)
    groups = rollout.sample_group(
        model, data.encode(model, batch), 1, range(200), temperature=0, **options(processor)
    )
    P = max(map(len, batch.ids))
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (P - len(row)) + row for row in batch.ids])
    theirs = ordinary(model).generate(
        input_ids=ids,
        attention_mask=(ids != pad).long(),
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.grid_thw,
        mm_token_type_ids=(ids == processor.image_token_id).int(),
        do_sample=False,
        max_new_tokens=16,
        suppress_tokens=processor.banned_ids,
    )[:, P:]
    for (ours,), row in zip(groups, theirs.tolist()):
        assert ours.ids + [pad] * (theirs.shape[1] - len(ours.ids)) == row
    ended = [not ours.truncated for (ours,) in groups]
    assert (
        any(ended) and not all(ended) and len({tuple(ours.ids) for (ours,) in groups}) > 8
    ), "the test should see more cases"


def test_a_prompt_is_prefilled_once_and_a_group_is_one_row_of_the_cache(
    model, processor, monkeypatch
):
    """A step adds one column for each response that goes on; what has ended leaves the batch."""
    model = forced(model, {processor.end_id: 3.0})  # so that some responses end on the way
    prompts, G, calls = data.encode(model, batch_of(processor, 4)), 8, []
    P, prefill, step = (
        max(len(p.ids) for p in prompts),
        type(model.model.language_model).forward,
        getattr(model, "fast_step", rollout.decoding_step),
    )

    def watched_prefill(self, **given):
        calls.append(tuple(given["inputs_embeds"].shape[:2]))
        return prefill(self, **given)

    def watched_step(model, embeddings, position, visible, cache):
        calls.append(tuple(embeddings.shape[:2]))
        before = cache.get_seq_length()
        with monkeypatch.context() as patch:  # the plain step runs the same forward
            patch.setattr(type(model.model.language_model), "forward", prefill)
            out = step(model, embeddings, position, visible, cache)
        assert cache.layers[0].keys.shape[0] == len(embeddings)
        assert cache.get_seq_length() == before + embeddings.shape[1] == visible.shape[2]
        return out

    monkeypatch.setattr(type(model.model.language_model), "forward", watched_prefill)
    model.fast_step = watched_step
    groups = rollout.sample_group(model, prompts, G, range(4), **options(processor))
    assert calls[0] == (4, P)  # one prefill of the four prompts
    widths = [rows * places for rows, places in calls[1:]]
    assert widths == sorted(widths, reverse=True) and 4 * G >= widths[0] > widths[-1], (
        "what has ended should leave"
    )
    assert sum(widths) >= sum(len(r.ids) - 1 for group in groups for r in group)


def test_the_buffers_of_a_fast_cache_are_made_once(model):
    cache, places, n = fast.new_cache(model, 10), [], 0
    for columns in (4, 1, 5):
        keys, values = torch.rand(2, 3, 1, columns, 8, dtype=torch.float64)
        seen_keys, seen_values = cache.update(keys, values, 0)
        n += columns
        assert cache.get_seq_length() == n and seen_keys.shape == (3, 1, n, 8)
        assert torch.equal(seen_keys[:, :, -columns:], keys)
        assert torch.equal(seen_values[:, :, -columns:], values)
        places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places)) == 1


@pytest.mark.parametrize("T", [1.0, 0.7])
def test_the_samplers_log_probabilities_are_the_scorers(model, processor, T):
    """Many responses of different lengths, so that rows leave the batch on the way."""
    prompts = data.encode(model, batch_of(processor, 4))
    groups = rollout.sample_group(
        model, prompts, 8, range(4), temperature=T, **options(processor)
    )
    assert len({len(r.ids) for group in groups for r in group}) > 5
    logps, mask, _ = vlm.group_logps(
        model,
        prompts,
        [[r.ids for r in group] for group in groups],
        T,
        processor.banned_ids,
    )
    for r, row, m in zip((r for group in groups for r in group), logps, mask):
        assert int(m.sum()) == len(r.ids) == len(r.logps)
        torch.testing.assert_close(
            torch.tensor(r.logps, dtype=torch.float64),
            row[: len(r.ids)].detach(),
            rtol=0,
            atol=1e-6,
        )


def test_log_probabilities_agree_in_float32_to_its_rounding(model, processor):
    model = copy.deepcopy(model).float()
    prompts = data.encode(model, batch_of(processor, 2))
    groups = rollout.sample_group(model, prompts, 4, range(2), **options(processor))
    logps, _, _ = vlm.group_logps(
        model,
        prompts,
        [[r.ids for r in group] for group in groups],
        1.0,
        processor.banned_ids,
    )
    for r, row in zip((r for group in groups for r in group), logps):
        torch.testing.assert_close(
            torch.tensor(r.logps), row[: len(r.ids)].detach(), rtol=0, atol=5e-5
        )


# ---------------------------------------------------------------- what is never sampled, the end


def test_image_placeholders_forced_high_are_never_sampled(model, processor):
    model = forced(model, {token: 50.0 for token in processor.banned_ids})
    prompts = data.encode(model, batch_of(processor, 2))
    for temperature in (0, 1.0):
        groups = rollout.sample_group(
            model, prompts, 4, [0, 1], temperature=temperature, **options(processor)
        )
        assert not {token for group in groups for r in group for token in r.ids} & set(
            processor.banned_ids
        )
    free = rollout.sample_group(model, prompts, 1, [0, 1], **options(processor, banned=()))
    assert all(set(r.ids) <= set(processor.banned_ids) for group in free for r in group), (
        "the logits were not forced"
    )


def test_truncated_says_whether_the_turn_was_ended(model, processor):
    prompts = data.encode(model, batch_of(processor, 3))
    for bias, length, truncated in ((50.0, 1, False), (-50.0, 16, True)):
        groups = rollout.sample_group(
            forced(model, {processor.end_id: bias}),
            prompts,
            2,
            range(3),
            **options(processor),
        )
        for r in (r for group in groups for r in group):
            assert len(r.ids) == len(r.logps) == length and r.truncated is truncated
    groups = rollout.sample_group(
        model, prompts, 16, range(3), **options(processor, max_new_tokens=1)
    )
    for r in (r for group in groups for r in group):
        assert len(r.ids) == 1 and r.truncated == (r.ids[0] != processor.end_id)


def test_an_end_of_turn_is_the_last_token_and_stands_once(model, processor):
    groups = rollout.sample_group(
        model, data.encode(model, batch_of(processor, 4)), 8, range(4), **options(processor)
    )
    for r in (r for group in groups for r in group):
        assert (
            r.ids.index(processor.end_id) == len(r.ids) - 1
            if processor.end_id in r.ids
            else len(r.ids) == 16
        )


# ---------------------------------------------------------------- seeds


def test_what_is_sampled_depends_on_a_prompts_seed_and_not_on_its_company(
    model, processor, monkeypatch
):
    batch, seeds = batch_of(processor, 4), [11, 12, 13, 14]
    prompts = data.encode(model, batch)
    together = rollout.sample_group(model, prompts, 6, seeds, **options(processor))
    assert len({len(r.ids) for group in together for r in group}) > 3, (
        "rows should leave the batch at different times"
    )
    backwards = rollout.sample_group(
        model, prompts[::-1], 6, seeds[::-1], **options(processor)
    )[::-1]
    alone = [
        rollout.sample_group(
            model, data.encode(model, batch[[i]]), 6, seeds[i : i + 1], **options(processor)
        )[0]
        for i in range(4)
    ]
    monkeypatch.setattr(rollout, "SHRINK_AT", 0.0)  # rows never leave
    kept = rollout.sample_group(model, prompts, 6, seeds, **options(processor))
    for other in (backwards, alone, kept):
        assert [[r.ids for r in group] for group in other] == [
            [r.ids for r in group] for group in together
        ]
    smaller = rollout.sample_group(
        model, prompts, 6, [11, 12, 13, 15], **options(processor)
    )
    assert [[r.ids for r in group] for group in smaller[:3]] == [
        [r.ids for r in group] for group in together[:3]
    ]
    assert [r.ids for r in smaller[3]] != [r.ids for r in together[3]]


def test_a_prompt_that_ends_first_may_stand_first(model, processor):
    """Rows leave from the front, too: what is left keeps its own seed, positions and columns."""
    prompts, seeds = data.encode(model, batch_of(processor, 8)), list(range(20, 28))
    alone = []
    for prompt, seed in zip(prompts, seeds):
        alone += rollout.sample_group(model, [prompt], 1, [seed], **options(processor))
    order = sorted(range(8), key=lambda i: len(alone[i][0].ids))
    assert len({len(group[0].ids) for group in alone}) > 4
    together = rollout.sample_group(
        model,
        [prompts[i] for i in order],
        1,
        [seeds[i] for i in order],
        **options(processor),
    )
    assert [group[0].ids for group in together] == [alone[i][0].ids for i in order]


def test_responses_of_a_group_differ_and_global_random_states_do_not_matter(
    model, processor
):
    prompts = data.encode(model, batch_of(processor, 1))
    torch.manual_seed(0)
    first = [
        r.ids for r in rollout.sample_group(model, prompts, 8, [5], **options(processor))[0]
    ]
    torch.manual_seed(1)
    assert [
        r.ids for r in rollout.sample_group(model, prompts, 8, [5], **options(processor))[0]
    ] == first
    assert len(set(map(tuple, first))) == 8


# ---------------------------------------------------------------- the distribution, by hand

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [0.1, 0.4, 0.2, 0.3]),
        (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # p squared
        (dict(temperature=0), [0, 1, 0, 0]),
        (dict(temperature=0, banned=[1]), [0, 0, 0, 1]),
        (dict(banned=[1]), [1 / 6, 0, 2 / 6, 3 / 6]),
    ],
)
def test_temperature_and_banned_ids(settings, expected):
    torch.testing.assert_close(
        rollout.next_token_logps(LOGITS, **settings).exp()[0],
        torch.tensor(expected, dtype=torch.float32),
    )


def test_equal_logits_are_settled_in_favour_of_the_first():
    assert rollout.next_token_logps(
        torch.tensor([[1.0, 3.0, 3.0]]), temperature=0
    ).exp().tolist() == [[0, 1, 0]]


def test_pick_follows_the_distribution():
    n = 20_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(rollout.pick(LOGITS.expand(n, 4), u), minlength=4)
    expected = n * LOGITS[0].exp()
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 16.3  # chi-square of 3 degrees of freedom, p = .001


def test_pick_takes_the_first_token_whose_cumulative_probability_exceeds_u():
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.6999, 0.7001, 0.9999])
    assert rollout.pick(LOGITS.expand(8, 4), u).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pick_never_takes_an_impossible_token(dtype):
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    logps = torch.tensor(
        [
            [NEVER, 0.0, NEVER, NEVER],
            [NEVER, -0.7, NEVER, -0.7],
            [NEVER, NEVER, NEVER, 0.0],
            [0.0, NEVER, NEVER, NEVER],
        ],
        dtype=dtype,
    )
    for u, expected in (
        (0.0, [1, 1, 3, 0]),
        (1e-30, [1, 1, 3, 0]),
        (below_one, [1, 3, 3, 0]),
        (1.0, [1, 3, 3, 0]),
    ):
        assert rollout.pick(logps, torch.full((4,), u)).tolist() == expected


def test_pick_over_a_vocabulary_of_the_real_size():
    """Rounding of a long cumulative sum must not lead past the last possible token."""
    logits = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0))
    logps = rollout.next_token_logps(logits, banned=range(151_643, 151_936))
    for u in (0.0, 0.5, 1 - 2**-24):
        token = rollout.pick(logps, torch.full((4,), u))
        assert (token < 151_643).all() and logps.gather(1, token[:, None]).isfinite().all()
