"""Would the tests notice? One-line mutants of the source, each with the test that must fail.

    python tests/mutants.py                   # all; prints the survivors, exit status 1 if any
    python tests/mutants.py rr1/grpo.py       # those whose file or test contains this

It is run by hand, not by pytest. The source is copied to a temporary folder; there each mutant is
made in turn, its test is run by a process forked from this one (which has imported torch once), and
the file is put back. A mutant is killed where the test fails or takes too long; it has survived
where it passes. A test that cannot be collected or fails without a mutant, or a line that is not
there exactly once, is an error of the table below.

Not in the table, since nothing can tell it from the code: in `training.held_out`, every rank
answering all records in place of its share (the same means, for more work).
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
# a .pyc of the same second and size as a mutant would be taken for it
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
sys.dont_write_bytecode = True

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # a mutant that makes a test wait for ever is killed

# file, then test, then pairs of lines: what stands there, and what the mutant has instead
MUTANTS = r"""
degrade.py
    test_degrade.py::test_s_zero_is_the_identity
        return image.copy()
        return image
    test_degrade.py::test_type_and_zero_in_a_list_is_exactly_nothing
        if s > 0:
        if s >= 0:
    test_degrade.py::test_an_intensity_outside_zero_to_one_is_refused
        if not isinstance(s, numbers.Real) or not 0 <= s <= 1:
        if not 0 <= s <= 1:
        or not 0 <= s <= 1:
        or not 0 <= s:
    test_degrade.py::test_another_kind_of_image_is_refused
        if dtype != np.uint8 or not is_rgb:
        if not is_rgb:
        shape[2:] == (3,) and 0 not in shape
        shape[2:] == (3,)
    test_degrade.py::test_a_side_that_is_too_long_is_refused_with_the_limit
        and max(shape) <= LARGEST
        and max(shape) <= 1e9
    test_degrade.py::test_later_paint_does_not_cover_earlier_paint
        reversed(range(math.ceil(8 * s)))
        range(math.ceil(8 * s))
    test_degrade.py::test_damage_grows_on_each_of_other_photos_too
        left = math.ceil(0.7 * s**0.9 * h)
        left = h
        move = np.rint([[32, 0, 32 * far.real], [0, 32, 32 * far.imag]]) / 32
        move = np.rint([[1, 0, far.real], [0, 1, far.imag]])
        math.ceil(0.32 * s * len(order))
        math.ceil(0.32 * len(order))
    test_degrade.py::test_the_bits_do_not_hang_on_the_processors_vector_instructions
        kernel = np.rint(1000 * kernel / kernel.sum())
        kernel = 1000 * kernel / kernel.sum()
        cv2.resize(np.float64(field), (w, h)
        cv2.resize(np.float32(field), (w, h)
        cv2.convertScaleAbs(np.exp(-s * light), alpha=255)
        np.float32(255 * np.exp(-s * light))
    test_degrade.py::test_the_seed_alone_decides_in_any_process
        spawn_key=(index, repeat))
        spawn_key=(hash(name) % 2**32, repeat))
    test_degrade.py::test_the_same_type_twice_draws_twice
        spawn_key=(index, repeat))
        spawn_key=(index,))
    test_degrade.py::test_adding_an_op_does_not_reshuffle_another
        spawn_key=(index, repeat))
        spawn_key=(len(strengths[name]), sum(map(len, strengths.values()))))
    test_degrade.py::test_ops_are_applied_in_stage_order_whatever_the_lists_order
        enumerate(DEGRADATIONS.items()):
        reversed(list(enumerate(DEGRADATIONS.items()))):
    test_degrade.py::test_sample_degradations
        [0.25 / len(names) for names
        [1 / 16 for names
        rng.integers(low, high + 1)
        rng.integers(low, high)
        for i in sorted(picked)]
        for i in picked]
        round(float(rng.random()), 2)
        float(rng.random())
    test_degrade.py::test_noise_has_the_deviation_that_it_says
        table = np.int16(np.rint(60 * s * NORMAL_QUANTILES))
        table = np.int16(np.rint(50 * s * NORMAL_QUANTILES))
    test_degrade.py::test_damage_looks_the_same_at_every_width
        radius = 0.03 * s**0.7 * side
        radius = 9 * s**0.7
    test_degrade.py::test_a_smooth_field_has_no_more_knots_than_pixels
        cells = min(cells, h, w)
        cells = cells
    test_degrade.py::test_one_more_photo_renames_and_redraws_nothing
        /{name}.png"
        /{Path(name).with_suffix('')}.png"
        zlib.crc32(os.fsencode(name))]
        len(plan)]
    test_degrade.py::test_a_replaced_photo_is_noticed_and_done_again
        content_hash = zlib.crc32(photo.read_bytes())
        content_hash = 0
        if labels.get(image) != label or not
        if not
    test_degrade.py::test_labels_of_photos_that_are_gone_are_said_and_kept
        if not (folder / label["clean_image"]).exists():
        if False:
    test_degrade.py::test_a_torn_labels_file_is_named_and_left_alone
        except (ValueError, KeyError, TypeError) as error:
        except (ValueError, KeyError) as error:
    test_degrade.py::test_a_folder_its_labels_a_broken_photo_and_going_on
        or not (out / image).exists()
        or False
        if not is_photo or is_our_copy:
        if not is_photo:
    test_degrade.py::test_folders_and_dangling_links_named_like_photos_are_none
        in SUFFIXES and photo.is_file()
        in SUFFIXES
    test_degrade.py::test_a_run_cut_short_goes_on
        pool.shutdown(cancel_futures=True)
        return 3
    test_degrade.py::test_a_jpeg_is_whole_with_any_tail_and_cut_off_without_its_end
        not in data[at:]
        not in data
        not in data[at:]
        not in data[len(data) // 2 :]
    test_degrade.py::test_sixteen_bits_and_floats_are_scaled
        for top in (1, 255, 65535, np.inf)
        for top in (255, 65535, np.inf)
    test_degrade.py::test_the_same_picture_is_opened_as_for_training
        cv2.imdecode(data, cv2.IMREAD_COLOR)
        cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    test_degrade.py::test_a_wrong_argument_is_named_and_nothing_is_written
        if image in plan:
        if False:
        else (args.types or args.levels)
        else args.types

rr1/vlm.py
    test_vlm.py::test_packed_groups_equal_separate_rows
        steps += range(len(response))
        steps += range(len(ids) - len(response), len(ids))
        torch.where(is_first, prompt_end[row], column - 1)
        column - 1
        torch.where(is_first, prompt_end[row], column - 1)
        torch.where(is_first, prompt_end[row], column)
        ((looked_at == PROMPT) | (looked_at == looking)).tril()
        (looked_at == PROMPT).tril()
        ((looked_at == PROMPT) | (looked_at == looking)).tril()
        ((looked_at == PROMPT) | (looked_at == looking))
        owner += [number] * len(response)
        owner += [0] * len(response)
        prompt.next_position + prompt.ids.new_tensor(steps)
        prompt.ids.new_tensor(steps)
    test_vlm.py::test_groups_of_unequal_size_and_a_batch_equal_one_by_one
        packed.ids, torch.cat([prompt.features for prompt in prompts])
        packed.ids, torch.cat([prompt.features for prompt in prompts[::-1]])
    test_vlm.py::test_entropy_is_that_of_the_scaled_policy
        entropy = -(p * logps.detach()).nansum(-1)
        entropy = (p * logps.detach()).nansum(-1)
    test_vlm.py::test_the_projection_in_chunks_equals_the_whole_and_never_holds_more
        if len(hidden) <= size:
        if True:
    test_vlm.py::test_where_packing_saves_little_separate_rows_are_taken
        if token_ratio(prompts, responses) < PACK_FROM:
        if False:
    test_vlm.py::test_freeze_vision_freezes_tower_and_merger_and_nothing_else
        model.model.visual.requires_grad_(False)
        model.model.visual.blocks.requires_grad_(False)
    test_vlm.py::test_end_of_turn_is_trained_and_is_not_the_padding
        mask = by_response(torch.ones_like(logps))
        mask = by_response((packed.targets != model.config.text_config.eos_token_id) * 1.0)

rr1/rollout.py
    test_rollout.py::test_the_samplers_log_probabilities_are_the_scorers
        scale_logits(logits, temperature, banned).log_softmax(-1)
        scale_logits(logits, 1.0, banned).log_softmax(-1)
    test_rollout.py::test_greedy_equals_generate_token_for_token
        writers.position + t, visible
        writers.position, visible
        attention_mask=owner == PROMPT,
        attention_mask=owner == owner,
        (owner == PROMPT) | (owner == self.response[:, :, None])
        (owner == PROMPT) | (owner == owner)
        self.position = self.position[rows]
        self.position = self.position[: int(rows.sum())]
    test_rollout.py::test_image_placeholders_forced_high_are_never_sampled
        next_token_logps(logits, temperature, banned)
        next_token_logps(logits, temperature)
    test_rollout.py::test_truncated_says_whether_the_turn_was_ended
        .truncated = token != end_id
        .truncated = token == end_id
    test_rollout.py::test_an_end_of_turn_is_the_last_token_and_stands_once
        self.active & (self.token != end_id)
        self.active
    test_rollout.py::test_what_is_sampled_depends_on_a_prompts_seed_and_not_on_its_company
        torch.Generator().manual_seed(seed) for seed in seeds
        torch.Generator().manual_seed(seeds[0]) for seed in seeds
    test_rollout.py::test_a_prompt_that_ends_first_may_stand_first
        uniform[writers.prompt, writers.response, t]
        uniform[writers.prompt - writers.prompt[0], writers.response, t]
        self.owner = self.owner[rows]
        self.owner = self.owner[: int(rows.sum())]
    test_rollout.py::test_responses_of_a_group_differ_and_global_random_states_do_not_matter
        uniform[writers.prompt, writers.response, t]
        uniform[writers.prompt, 0 * writers.response, t]
    test_rollout.py::test_pick_never_takes_an_impossible_token
        threshold[..., None], right=True)
        threshold[..., None])
        torch.minimum(u * total, below_total)
        u * total
    test_rollout.py::test_temperature_and_banned_ids
        if temperature == 0:
        if temperature < 0:

rr1/u1/flow.py
    test_flow.py::test_the_printed_loss_is_the_velocitys_times_one_minus_t_squared
        return (1 - t) * z_0 + t * eps
        return t * z_0 + (1 - t) * eps
        (v - (eps - z_0)) ** 2
        (v - (z_0 - eps)) ** 2
    test_flow.py::test_times_are_uniform_and_a_shift_moves_them_to_noise
        return shift * t / (1 + (shift - 1) * t)
        return t / (1 + (shift - 1) * t)
    test_flow.py::test_score_is_the_gradient_of_the_log_density
        return -(x + (1 - t) * v) / t
        return -(x + t * v) / t
    test_flow.py::test_the_samplers_take_the_steps_that_the_formulas_say
        return x + v.to(x.dtype) * dt
        return x - v.to(x.dtype) * dt
    test_flow.py::test_sigma_at_pure_noise_takes_the_second_time_and_the_rest_its_own
        below_one = t if t < 1 else float(grid[1])
        below_one = float(grid[1])
        a * math.sqrt(t / (1 - below_one))
        a * t / (1 - below_one)
    test_flow.py::test_a_step_is_the_sde_with_the_score
        drift = v - sigma**2 / 2 * pull
        drift = v + sigma**2 / 2 * pull
        sigma * math.sqrt(-dt)
        sigma * -dt
    test_flow.py::test_log_probability_and_kl_are_those_of_normal_distributions_per_dimension
        ** 2 / (2 * std**2))
        ** 2 / std**2)
        + 0.5 * math.log(2 * math.pi)
        + math.log(2 * math.pi)
    test_flow.py::test_noise_is_where_the_window_is_and_each_noisy_step_is_recorded_as_it_was
        if k in ks:
        if k not in ks:
        after.append(x_next)
        after.append(mean)

rr1/grpo.py
    test_grpo.py::test_equal_rewards_give_exactly_0
        rewards = rewards - rewards[:, :1]
        rewards = rewards - 0
    test_grpo.py::test_advantages_by_hand
        rewards - rewards.mean(dim=1, keepdim=True)
        rewards.mean(dim=1, keepdim=True) - rewards
        correction=0) + eps
        correction=1) + eps
        correction=0) + eps
        correction=0)
        if scale_by_std:
        if True:
    test_grpo.py::test_groups_do_not_mix_and_a_constant_changes_nothing
        rewards - rewards.mean(dim=1, keepdim=True)
        rewards - rewards.mean()
    test_grpo.py::test_k3_by_hand
        return q.exp() - q - 1
        return -q
        q = (logp_ref.detach() - logp)
        q = (logp - logp_ref.detach())
    test_grpo.py::test_only_logp_gets_a_gradient
        q = (logp_ref.detach() - logp)
        q = (logp_ref - logp)
        log_ratio = (logp - logp_old.detach())
        log_ratio = (logp - logp_old)
    test_grpo.py::test_a_log_ratio_far_out_leaves_loss_and_gradient_finite
        - logp).clamp(max=LARGEST_EXPONENT)
        - logp)
        log_ratio.clamp(max=LARGEST_EXPONENT).exp()
        log_ratio.exp()
    test_grpo.py::test_the_kl_term_still_pulls_where_the_reference_finds_a_token_all_but_impossible
        - logp).clamp(max=LARGEST_EXPONENT)
        - logp).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    test_grpo.py::test_truth_table_of_the_clip
        torch.min(unclipped, clipped)
        torch.max(unclipped, clipped)
        (ratio < 1 - clip) & (A < 0)
        (ratio < 1 - clip) & (A > 0)
        -clipped_objective(ratio, A, clip, high)
        clipped_objective(ratio, A, clip, high)
    test_grpo.py::test_clip_higher
        high = clip if clip_high is None else clip_high
        high = clip
    test_grpo.py::test_equals_the_literal_writing
        per_token + beta * kl
        per_token + 2 * beta * kl
        normaliser = n_sequences * max_length
        normaliser = n_sequences
    test_grpo.py::test_the_split_into_micro_batches_changes_nothing
        n_tokens = mask.sum() if n_tokens is None else n_tokens
        n_tokens = mask.sum()
        n_sequences = N if n_sequences is None else n_sequences
        n_sequences = N
    test_grpo.py::test_the_losses_weigh_tokens_as_they_say
        loss, n_sequences, n_tokens, max_length or L)
        loss, n_sequences, n_tokens, L)
    test_grpo.py::test_what_stands_in_the_padding_does_not_matter
        logp_old.detach()).masked_fill(~mask, 0)
        logp_old.detach())
    test_grpo.py::test_a_response_masked_everywhere_is_not_nan
        mask.sum(dim=1, keepdim=True).clamp(min=1)
        mask.sum(dim=1, keepdim=True)

rr1/advantages.py
    test_grpo.py::test_other_advantages
        * G / max(1, G - 1)
        * G
        group_advantages(reward) for
        group_advantages(reward, False) for
        R / share - 1
        R - share
        R.argmax(
        R.argmin(
        weighted_sum(terms, weights), scale_by_std=False
        weighted_sum(terms, weights), scale_by_std=True
    test_grpo.py::test_gdpo_weighs_what_is_normalised
        return weighted_sum(torch.stack(each, -1), weights)
        return weighted_sum(torch.stack(each, -1), weights.sign())
    test_grpo.py::test_a_group_of_equal_rewards_has_no_advantage_by_any_rule
        chosen * differ
        chosen * 1

rr1/rewards.py
    test_rewards.py::test_a_response_can_be_copied_and_pickled
        return str(self), self.length, self.truncated
        return (str(self),)
    test_rewards.py::test_r_deg_matched_by_hand
        return pairs - difference - unmatched
        return pairs - difference
        len(truth) - 2 * pairs
        len(truth) - pairs
        if tau == type and 0 <= s <= 1)
        if tau == type)
        if tau == type and 0 <= s <= 1)
        if 0 <= s <= 1)
    test_rewards.py::test_r_deg_matched_is_the_best_of_all_matchings
        cost.append(min(cost[j], before[j] + abs(s - t)))
        cost.append(before[j] + abs(s - t))
        return sorted(s for tau, s in instances
        return list(s for tau, s in instances
    test_rewards.py::test_pairwise_is_the_double_sum
        if tau_d == tau_gt else -1
        if tau_d == tau_gt else 0
    test_rewards.py::test_no_number_that_a_policy_writes_ends_a_run
        1 - min(1, abs(s_d - s_gt))
        1 - abs(s_d - s_gt)
        1.5 - min(1, abs(s_d - s_gt))
        1.5 - abs(s_d - s_gt)
    test_rewards.py::test_r_deg_released_by_hand
        return total - len(missed)
        return total
        -1 if s_gt is None
        0 if s_gt is None
    test_rewards.py::test_r_len_by_hand
        return 1 - abs(length - truth_length) / truth_length
        return 1 - abs(length - truth_length) / length
    test_rewards.py::test_accuracy_of_a_choice
        right, _ = is_right(answer, truth, record.get("choices"))
        right = plain(answer) == plain(truth)
    test_rewards.py::test_rewards_read_the_records_damage_and_not_its_chain
        record["degradations"])
        record["chain"].degradations)
    test_rewards.py::test_eq_9_is_the_weighted_sum
        total = sum(weight * value
        total = sum(value
    test_rewards.py::test_what_float32_cannot_hold_is_named
        if not abs(total) <= LARGEST:
        if abs(total) > LARGEST:
        or not abs(value) <= LARGEST:
        or not math.isfinite(value):
    test_rewards.py::test_a_reward_that_fails_is_named_with_its_record
        if not isinstance(value, numbers.Real) or
        if
    test_rewards.py::test_every_reward_pays_a_perfect_response_the_most
        "deg_released": _deg(r_deg_released)
        "deg_released": _deg(r_deg_pairwise)

rr1/chain.py
    test_chain.py::test_repeated_sections
        end = text.find(f"<{name}_END>")
        end = text.rfind(f"<{name}_END>")
    test_chain.py::test_parse_inverts_render
        repr(s)
        f"{s:.2f}"
    test_chain.py::test_an_unknown_type_is_kept_and_reported
        0 <= s <= 1 and _known(tau)
        0 <= s <= 1
    test_chain.py::test_a_number_outside_the_range_is_kept_and_reported
        0 <= s <= 1 and _known(tau)
        _known(tau)
    test_data.py::test_a_reward_needs_a_truth_that_can_be_read
        return None if body is None else _listed(body)
        return [] if body is None else _listed(body)

rr1/records.py
    test_data.py::test_a_reward_needs_a_truth_that_can_be_read
        if damage and response and stated is None and not known:
        if damage and response and stated is None:
        if damage and not all(0 <= s <= 1 for _, s in known):
        if False:
        abs(s - t) < 0.015
        True
        x == y and
        True and
        len(a) == len(b) and
        True and
    test_metrics.py::test_level_borders
        if total >= LEVELS[name]:
        if total > LEVELS[name]:
    test_train.py::test_right_answers_are_counted_by_the_total_intensity
        "medium": 0.75
        "medium": 0.85
        "strong": 1.5
        "strong": 1.7
    test_data.py::test_a_record_without_a_chain
        if "len" in rewards and not (isinstance(length, int) and length >= 1):
        if False:
        if chain.reasoning or chain.conclusion else None
        if True else None
        Chain([(d["type"], d["intensity"]) for d in listed]).degradations
        [Degradation(d["type"], d["intensity"]) for d in listed]
    test_data.py::test_a_bad_record_is_named_by_file_and_line
        if os.path.commonpath([root, full]) != root:
        if False:
        if "_pad|>" in raw["question"] + (raw["response"] or ""):
        if "_pad|>" in raw["question"]:
        if not all(0 <= s <= 1 for _, s in found):
        if False:
    test_data.py::test_of_several_turns_the_last_one_is_asked
        "question": "\n".join(text for _, text in said)
        "question": said[-1][1]
    test_data.py::test_a_picture_is_what_a_person_sees
        _to_8_bits(ImageOps.exif_transpose(image))
        _to_8_bits(image)
    test_data.py::test_sixteen_bits_are_scaled_and_not_clipped
        np.asarray(image) // 256
        np.asarray(image)
    test_data.py::test_errors_of_data_are_one_line_once
        raise SystemExit(2) from None
        raise SystemExit(1) from None

rr1/data.py
    test_data.py::test_a_quarter_for_sft_and_the_rest_for_rl
        share < SFT_SHARE
        share > SFT_SHARE
        f"0:{id}"
        f"1:{id}"
    test_data.py::test_every_record_once_an_epoch
        np.random.default_rng([seed, epoch])
        np.random.default_rng([seed, 0])
        np.random.default_rng([seed, epoch])
        np.random.default_rng([0, epoch])
        int(orders[place // n][place % n])
        int(orders[place // n][place % size])
    test_data.py::test_usable_raises_the_first_bad_record_or_leaves_it_out
        if str(i) not in skipped["records"]
        if i not in skipped["records"]
    test_data.py::test_a_picture_that_cannot_be_used_is_named_by_line
        tokens > max_image_tokens
        tokens > 9 * max_image_tokens
    test_data.py::test_records_without_their_chains
        text = short_answer(record) if plain else record["response"]
        text = record["response"]
        texts = [r["question"] if plain
        texts = [r["question"] if not plain
    test_data.py::test_the_length_to_aim_for
        len(response_ids(record, processor)) - 1
        len(response_ids(record, processor))
    test_data.py::test_a_prompt_longer_than_the_model_is_named
        len(ids) + length > positions
        len(ids) > positions
    test_vlm.py::test_a_part_of_a_batch_keeps_its_own_patches
        torch.cat([patches[i] for i in part])
        torch.cat([patches[0] for i in part])
    test_data.py::test_prefetch_keeps_the_order_and_works_ahead
        ahead.append((step, pool.submit(make, step)))
        ahead.append((step + 1, pool.submit(make, step)))

train_recover.py
    test_restorer.py::test_reinforcement_goes_where_the_reward_is
        A = grpo.group_advantages(R)
        A = -grpo.group_advantages(R)
        loss.backward()
        (-loss).backward()
    test_restorer.py::test_the_damaged_picture_is_seen
        z_c = 2 * damaged
        z_c = 0 * damaged
        z_c = (2 * damaged
        z_c = (0 * damaged
    test_restorer.py::test_the_reward_is_against_the_clean_picture
        target = clean.to
        target = damaged.to

rr1/u1/restorer.py
    test_restorer.py::test_a_recovery_is_the_mean_of_several_from_noise_of_their_own
        z_1[:, k]
        z_1[:, 0]
    test_restorer.py::test_a_gate_leaves_pictures_that_would_hardly_change
        given) < gate
        given) > gate

rr1/u1/report.py
    test_restorer.py::test_the_sampler_that_earns_most_on_training_pairs_becomes_the_models_own
        if R.mean() > R_recovered.mean()
        if R.mean() < R_recovered.mean()
        change < gate, R_damaged
        change > gate, R_damaged

rr1/evaluation/statistics.py
    test_metrics.py::test_wilson_known_values
        centre = (p + Z**2 / (2 * n)) / shrink
        centre = p
    test_metrics.py::test_bootstrap_cells_weighs_cells_alike
        means.append(cell.mean())
        means.append(cell.sum() / n)
    test_metrics.py::test_paired_difference
        bootstrap(np.subtract(after, before))
        bootstrap(np.subtract(after, before[::-1]))
    test_metrics.py::test_mcnemar_known_values
        min(1.0, 2 * ways / 2**n)
        min(1.0, ways / 2**n)

rr1/evaluation/metrics.py
    test_metrics.py::test_summary_by_hand
        2 * column("matched")
        column("matched")
    test_metrics.py::test_table_1_by_hand
        for name, cell in cells.items() if not name.endswith("none")
        for name, cell in cells.items()
    test_metrics.py::test_versus_counts_what_turned_right_and_wrong
        gained = int((scores > scores_then).sum())
        gained = int((scores >= scores_then).sum())
    test_benchmarks.py::test_circles_count_once_and_only_if_all_are_right
        min(first["score"], row["score"])
        max(first["score"], row["score"])

rr1/evaluation/figure_6.py
    test_metrics.py::test_confusion_by_hand
        parts = max(1, left.sum(), wrong.sum())
        parts = max(1, left.sum())
    test_metrics.py::test_a_border_of_total_intensity_is_in_the_bin_below
        math.ceil(row["total"] / WIDTH)
        math.floor(row["total"] / WIDTH)
    test_metrics.py::test_intensities_outside_the_range_end_no_report
        == 1 and 0 <= s <= 1:
        == 1:

rr1/evaluation/scores.py
    test_benchmarks.py::test_free_text_is_read_as_vlmevalkit_reads_it
        > len(words) - 5:
        > len(words) - 9:
        (?i:answer\s+is)
        (?i:answer\s+was)
    test_benchmarks.py::test_the_letter_after_answer_is_stands_alone
        ([A-D])\b
        ([A-D])
    test_benchmarks.py::test_r_benchs_majority_of_votes
        score = float(score >= 0.5)
        score = float(score)
    test_benchmarks.py::test_a_model_taught_by_index_is_asked_by_index
        if row.get("asked") == "index":
        if False:

rr1/client.py
    test_annotate_hostile.py::test_a_reply_that_drips_is_given_up_and_asked_for_again_20
        response.stream = bounded(response.stream, self.timeout)
        bounded(response.stream, self.timeout)
        except (ValueError, RecursionError, TimeoutError):
        except (ValueError, RecursionError):

rr1/evaluation/tsv.py
    test_benchmarks.py::test_absent_cells_are_those_of_pandas
        if text in ABSENT:
        if text.lower() == "nan":
    test_benchmarks.py::test_which_sets_come_damaged
        not name.endswith("-ref") and
        True and
    test_benchmarks.py::test_several_pictures_in_a_row
        question["image"] = found[0] if len(found) == 1 else found
        question["image"] = found[0]
    test_benchmarks.py::test_evaluate_on_a_tsv_and_its_damaged_copy
        if row.get("degradation"):
        if False:

rr1/evaluation/benchmarks.py
    test_benchmarks.py::test_r_bench_in_utf_8_and_with_full_width_marks
        for encoding in ("utf-8-sig", "gb18030"):
        for encoding in ("gb18030",):
    test_benchmarks.py::test_an_answer_that_is_no_option_is_kept_and_never_right
        if letters and answer is not None and answer not in list(letters):
        if False:
    test_benchmarks.py::test_skip_bad_leaves_rows_out_and_names_them
        bad if skip_bad else None)
        None)
    test_benchmarks.py::test_damage_with_skip_bad_leaves_rows_out_and_names_them
        options.target, options.levels, options.seed, bad
        options.target, options.levels, options.seed

rr1/evaluation/votes.py
    test_benchmarks.py::test_a_busy_judge_is_waited_for_and_one_lost_vote_ends_nothing
        if len(failed) >= MANY:
        if False:

rr1/evaluation/predictions.py
    test_evaluate.py::test_mending_one_record_asks_about_that_one_again
        stored.pop(mark) | job
        job | stored.pop(mark)
    test_evaluate.py::test_another_picture_under_the_same_name_is_asked_about
        os.path.basename(path), size, job
        os.path.basename(path), job
    test_evaluate.py::test_a_picture_is_read_and_encoded_once
        if shown not in images:
        if True:
        by_picture.setdefault(pictures_of(job)[0], [])
        by_picture.setdefault(job["key"], [])

train_grpo.py
    test_step.py::test_the_gradients_of_the_second_step
        group.advantages = advantages
        group.advantages = -advantages
        zip(groups, A.float()
        zip(groups, A.flip(1).float()
        beta=config.beta,
        beta=2 * config.beta,
        whole = [not r.truncated for
        whole = [r.truncated for
        n_tokens=int(kept_tokens),
        n_tokens=int(mask.sum()),
        if not (r.truncated and config.mask_truncated)]
        if True]
        max_length=config.max_new_tokens,
        max_length=None,
        n_sequences=config.prompts * config.group_size,
        n_sequences=len(logps),
        clip_high=config.clip_high,
        clip_high=None,
        logp_ref=reference_logps[k],
        logp_ref=old_logps[k],
        old_logps[k],
        logps.detach(),
        y, group.record, formula, config.reward_weights
        y, group.record, formula
        y, group.record, formula,
        y, groups[0].record, formula,
        copy.deepcopy(policy, {id(visual): visual})
        policy
        share = len(part) / config.prompts
        share = 1
    test_step.py::test_the_random_numbers_of_two_steps_differ
        data.seed_for(config.seed, step, place)
        data.seed_for(config.seed, place)
        temperature=config.temperature,
        temperature=1.0,
        gap.max()
        gap.min()
    test_train.py::test_every_flag_changes_something[grpo --advantage rloo]
        ADVANTAGES[config.advantage](
        ADVANTAGES["grpo"](
    test_train.py::test_two_processes_do_what_one_does
        range(rt.rank, config.prompts, rt.world_size)
        range(0, config.prompts, rt.world_size)
    test_train.py::test_an_error_saves_the_steps_before_it
        , run.kept(policy, processor, optimizer):
        , run.kept(policy, processor, None):

train_sft.py
    test_train.py::test_sft_loss_is_the_mean_over_response_tokens_end_of_turn_included
        -(logps * mask).sum() / n_tokens
        -(logps * mask).sum() / mask.numel()
        [[responses[i]] for i in part]
        [[responses[i][:-1]] for i in part]
    test_train.py::test_two_processes_do_what_one_does
        indices[rt.rank :: rt.world_size]
        indices[:: rt.world_size]
        runtime.sum_over_ranks(count, rt)["tokens"]
        count["tokens"]

rr1/groups.py
    test_step.py::test_a_sampler_at_another_temperature_is_seen
        (logps - pad_sequence(
        (logps - logps + 0 * pad_sequence(
    test_train.py::test_a_reward_of_ones_own
        [y.length for y in group.responses]
        [len(y) for y in group.responses]

rr1/training.py
    test_train.py::test_two_nodes_do_what_one_process_does
        shard.broadcast_parameters(model, rt)
        pass
    test_train.py::test_held_out_answers_are_greedy_and_judged_by_the_rewards
        temperature=0,
        temperature=1,
        and step != config.steps:
        and step != 0:
    test_train.py::test_right_answers_are_counted_by_the_total_intensity
        2 * pairs, count
        pairs, count
    test_train.py::test_the_vision_tower_stands_and_the_language_model_moves
        vlm.freeze_vision(model)
        pass
    test_train.py::test_gradient_checkpointing_computes_again_and_ends_at_the_same_place
        model.model.language_model.gradient_checkpointing_enable()
        model.gradient_checkpointing_enable()
    test_train.py::test_a_run_goes_on_with_less_memory
        "micro_batch",
        "max_new_tokens",
    test_train.py::test_a_reward_that_fails_on_a_held_out_record_is_named
        _, terms = rewards.composite(y, record, formula)
        terms = {name: reward(y, record) for name, reward in formula.items()}

rr1/runtime.py
    test_runtime.py::test_two_processes
        dist.all_reduce(total)
        pass
        seed_everything(seed + rank)
        seed_everything(seed)
        dist.ReduceOp.MAX)
        dist.ReduceOp.SUM)
        or math.nan)
        or 1)
    test_runtime.py::test_three_steps_without_a_finite_gradient_end_a_run
        if math.isfinite(norm):
        if True:
    test_runtime.py::test_schedule
        return (step + 1) / warmup
        return step / warmup
        (step - warmup) / max
        step / max
    test_runtime.py::test_optimizer_groups
        if p.ndim < 2], "weight_decay": 0.0}
        if p.ndim < 2], "weight_decay": weight_decay}
    test_runtime.py::test_one_process_also_fills_in_missing_gradients
        if p.requires_grad and p.grad is None:
        if rt.world_size > 1 and p.grad is None:
    test_runtime.py::test_the_second_interrupt_kills_unless_it_is_the_echo_of_the_first
        self._asked > 1:
        self._asked > -1:
    test_options.py
        low <= x <= high and math.isfinite(x)
        low <= x <= high
        low <= x
        low < x

rr1/run_folder.py
    test_runtime.py::test_resume_is_bit_for_bit
        shard.load_optimizer_state(model, optimizer, tensors)
        pass
        set_random_states(states["generators"], self.rt)
        pass
        self.rows = files.cut_back(self.out / "metrics.jsonl", kept)
        pass
    test_runtime.py::test_an_error_does_not_lose_the_steps_that_were_done
        between = updates == updates_of(optimizer)
        between = True
        set_random_states(states, self.rt)
        pass
    test_train.py::test_a_run_killed_before_its_first_checkpoint_looks_once
        kept = step if folder else -1
        kept = step
    test_runtime.py::test_save_every_0_is_never_but_at_the_end
        or every > 0 and step
        or step
    test_runtime.py::test_a_start_that_fails_does_not_occupy_its_folder
        (self.out / "skipped.json").unlink(missing_ok=True)
        pass
    test_runtime.py::test_three_steps_without_a_finite_gradient_end_a_run
        self.skipped + 1 if values["skipped"] else 0
        self.skipped + 1 if values["skipped"] else self.skipped
    test_runtime.py::test_dying_at_any_file_operation_leaves_a_resumable_folder
        os.replace(temporary, folder)
        shutil.copytree(temporary, folder)

rr1/shard.py
    test_shard.py
        module.set_gradient_divide_factor(1.0)
        module.set_gradient_divide_factor(2.0)
        state[name][key] = tensor
        state[name][key] = tensor * 0
        here = tensor.detach().to(rt.device)
        here = tensor.detach().to(rt.device) * 0
    test_runtime.py::test_two_processes
        first = tensor.detach().clone()
        first = tensor.detach()
    test_shard.py
        layer.set_reshard_after_forward(True)
        pass
"""

# Mutants that no test should kill, with the reason:
#   rr1/grpo.py     LARGEST_EXPONENT = 20.0 -> 30.0: far beyond any clip, within float32's range
#   rr1/rewards.py  dict(truth) -> sorted(dict(truth)): another order of a sum
#   rr1/data.py     generate_state(..)[0] >> 1 -> [1] >> 1: other random numbers, as good as these
#   rr1/data.py     chunksize=64 -> 1, reasons[:10] -> [:9]: how fast, and how much is said


class Mutant(NamedTuple):
    file: str
    test: str
    old: str
    new: str


def table() -> list[Mutant]:
    mutants, file, test, old = [], "", "", None
    for line in MUTANTS.splitlines():
        text = line.strip()
        if not text:
            continue
        if not line.startswith(" "):
            file = text
        elif not line.startswith(" " * 8):
            test = text
        elif old is None:
            old = text
        else:
            mutants.append(Mutant(file, test, old, text))
            old = None
    return mutants


def load_libraries() -> None:
    """What our modules import stays for the forked processes; our modules are forgotten."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT))
    import hypothesis
    import pytest

    import train_grpo
    import train_recover

    assert hypothesis and pytest and train_grpo and train_recover
    sys.path.remove(str(ROOT))
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if name.split(".")[0] == "rr1" or Path(file).parent == ROOT:
            del sys.modules[name]


def run(test: str, folder: Path) -> int:
    """The exit status of pytest on one test, in a process of its own; -1 where it took too long."""
    child = os.fork()
    if child == 0:
        output = os.open(folder / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        os._exit(pytest.main([*options, f"tests/{test}"]))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def attempt(mutant: Mutant, folder: Path, passing: set[str]) -> str:
    """What became of a mutant; `passing`: the tests that are known to pass without one."""
    if mutant.test not in passing and run(mutant.test, folder) != 0:
        return f"ERROR: the test does not pass without a mutant; see {folder}/pytest.log"
    passing.add(mutant.test)
    path = folder / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        return f"ERROR: stands there {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    status = run(mutant.test, folder)
    path.write_text(source, encoding="utf-8")
    meaning = {0: "SURVIVED", 1: "killed", -1: "killed, by time"}
    return meaning.get(
        status, f"ERROR: pytest ended with {status}; see {folder}/pytest.log"
    )


def main(wanted: str = "") -> None:
    load_libraries()
    folder = Path(tempfile.mkdtemp(prefix="mutants-")) / "rr1"
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", "*.pyc", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    chosen = [mutant for mutant in table() if wanted in f"{mutant.file} {mutant.test}"]
    failures, passing = [], set()
    for number, mutant in enumerate(chosen, start=1):
        start = time.perf_counter()
        found = attempt(mutant, folder, passing)
        seconds = time.perf_counter() - start
        line = f"{mutant.file}: {mutant.old}  ->  {mutant.new}  [{mutant.test}]"
        print(f"{number:3d}/{len(chosen)} {seconds:5.1f} s  {found}  {line}", flush=True)
        if not found.startswith("killed"):
            failures.append(f"{found}  {line}")
    print(
        f"{len(chosen)} mutants, {len(chosen) - len(failures)} killed", *failures, sep="\n"
    )
    shutil.rmtree(folder.parent)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
