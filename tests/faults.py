"""Deliberate faults, and the tests that catch them: python tests/faults.py [NAME ...]

Each fault is put into a copy of the repository by itself, and its tests must fail on it. They run
on the unchanged code first, where they must pass. With names, or parts of them, only these faults
are tried, and what the tests say is shown.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
TIME_LIMIT = 300   # seconds for one fault
LEAST = 0.95       # the share that must be caught
PASSED, FAILED = 0, 1   # pytest's exit codes; a fault that only breaks an import ends with another
MEANING = {PASSED: "its tests pass", -signal.SIGKILL: f"no answer in {TIME_LIMIT} s"}


class Fault(NamedTuple):
    """`text`, which stands once in `file`, becomes `becomes`; then one of `tests` fails."""
    name: str
    file: str
    text: str
    becomes: str
    tests: tuple[str, ...]   # ids below tests/


def fault(name: str, file: str, text: str, becomes: str, *tests: str) -> Fault:
    return Fault(name, file, text, becomes, tests)


CLIPPING = [
    fault("norm leaves out biases", "variants/ghost.py",
          "map(ghost_norms, factors.values())",
          "[ghost_norms(v) for n, v in factors.items() if not n.endswith('.bias')]",
          "variants/test_ghost.py::test_it_equals_the_textbook_on_every_kind_of_layer"),
    fault("norm leaves out normalisation layers", "variants/ghost.py",
          "map(ghost_norms, factors.values())",
          "[ghost_norms(v) for n, v in factors.items() if 'norm' not in n]",
          "variants/test_ghost.py::test_it_equals_the_textbook_on_attention_modules"),
    fault("one clip weight per chunk", "dp_sgd.py",
          "clip_weights(map(norms, grads.values()), size, C)",
          "clip_weights(map(norms, grads.values()), size, C).min().expand(len(batch[0]))",
          "core/test_dp_sgd.py::test_clipping_comes_before_the_sum"),
    fault("last partial chunk is skipped", "dp_sgd.py",
          "            for name, s in clipped_sum(model, parameters, chunk, C).items():",
          "            if len(chunk[0]) < min(physical_batch, len(batch[0])):\n"
          "                continue\n"
          "            for name, s in clipped_sum(model, parameters, chunk, C).items():",
          "core/test_dp_sgd.py::test_the_clipped_sum_does_not_depend_on_the_chunks"),
    fault("cross terms of repeated calls are dropped", "variants/ghost.py",
          "return [torch.cat(tensors, dim=1) for tensors in zip(*entries, strict=True)]",
          "return max(entries, key=lambda entry: entry[0].shape[1])",
          "variants/test_ghost.py::test_it_equals_the_textbook_on_every_kind_of_layer"),
    fault("infinite gradients become 1e30", "dp_sgd.py",
          "torch.where(norms.isfinite(), (C / norms).clamp(max=1.0), 0.0)",
          "(C / norms.nan_to_num(1e30, 1e30)).clamp(max=1.0)",
          "variants/test_ghost.py::test_an_example_that_is_not_finite_contributes_nothing"),
    fault("clip twice as high in the last tenth", "train.py",
          "clipped_sum(model, parameters, batch, plan.clip_to)",
          "clipped_sum(model, parameters, batch, plan.clip_to * (1 + (step >= 0.9 * plan.steps)))",
          "core/test_train.py::test_every_step_clips_and_adds_noise_as_planned"),
]

NOISE = [
    fault("noise of sigma instead of sigma C", "dp_sgd.py",
          "std = plan.noise_multiplier * plan.max_grad_norm",
          "std = plan.noise_multiplier",
          "core/test_dp_sgd.py::test_the_noise_on_the_sum_has_standard_deviation_sigma_times_C"),
    fault("every step has the same noise", "train.py",
          "grads = add_noise(total, plan, rng)",
          "once = int(2**53 * rng.random(1)[0]) if step == first else once\n"
          "        grads = add_noise(total, plan, np.random.default_rng(once))",
          "runtime/test_runs.py::test_every_step_s_noise_is_full_and_fresh"),
    fault("biases have no noise", "dp_sgd.py",
          "s += std * torch", "s += (s.dim() > 1) * std * torch",
          "core/test_dp_sgd.py::test_tensors_of_all_dimensions_have_noise"),
    fault("tensors of one shape share their noise", "dp_sgd.py",
          "    for s in total.values():\n"
          "        s += std * torch.from_numpy(rng.standard_normal(s.shape))",
          "    same = {}\n"
          "    for s in total.values():\n"
          "        s += std * torch.from_numpy(same.setdefault(\n"
          "            s.shape, rng.standard_normal(s.shape)))",
          "core/test_dp_sgd.py::test_the_noise_of_parameters_and_steps_is_independent"),
    fault("uniform noise of the same variance", "dp_sgd.py",
          "rng.standard_normal(s.shape)", "(12**0.5 * (rng.random(s.shape) - 0.5))",
          "core/test_dp_sgd.py::test_the_noise_on_the_sum_has_standard_deviation_sigma_times_C"),
    fault("noise of a generator with 24 bits", "dp_sgd.py",
          "torch.from_numpy(rng.standard_normal(s.shape))",
          "torch.randn(s.shape, generator=torch.Generator().manual_seed(\n"
          "            int(2**24 * rng.random(1)[0])))",
          "runtime/test_noise.py::test_a_private_run_reads_everything_from_the_system"),
    fault("seed of 32 bits", "dp_sgd.py",
          "return SystemGenerator() if insecure_seed is None",
          "return np.random.default_rng(int.from_bytes(os.urandom(4))) if insecure_seed is None",
          "core/test_dp_sgd.py::test_every_number_takes_64_bits_of_the_system_s"),
    fault("seed from the clock", "dp_sgd.py",
          "return SystemGenerator() if insecure_seed is None",
          "import time\n"
          "    return np.random.default_rng(time.time_ns()) if insecure_seed is None",
          "core/test_dp_sgd.py::test_every_number_takes_64_bits_of_the_system_s"),
    fault("normal numbers of 53 bits", "dp_sgd.py",
          "ndtri((bits >> 1) * 2.0**-64 + 2.0**-65)",
          "ndtri((bits >> 11) * 2.0**-54 + 2.0**-55)",
          "core/test_dp_sgd.py::test_normal_numbers_reach_as_far_as_63_bits"),
    fault("low bits of the noise are kept", "dp_sgd.py",
          "        s.div_(grid).round_().mul_(grid)\n", "",
          "core/test_dp_sgd.py::test_the_low_bits_of_the_noisy_sum_are_gone"),
    fault("numbers drawn ahead are used twice", "runtime/noise.py",
          "numbers, self.left_over = np.split(np.concatenate(taken), [count])",
          "numbers = np.concatenate(taken)[:count]",
          "runtime/test_noise.py::test_numbers_drawn_ahead_are_the_generator_s_in_order"),
    fault("seed from the plan", "train.py",
          "private_generator(private.insecure_noise_seed,",
          "private_generator(max(plan.steps, private.insecure_noise_seed),",
          "runtime/test_runs.py::test_private_runs_with_one_seed_differ"),
    fault("resumed run's seed is the public one", "train.py",
          "private_generator(private.insecure_noise_seed,",
          "private_generator(config.public.seed if run.start else private.insecure_noise_seed,",
          "runtime/test_runs.py::test_private_runs_with_one_seed_differ"),
    fault("unfinished file keeps numbers yet to be drawn", "train.py",
          'training["step"], training=training)',
          'training["step"], training={**training, "rng": rng.left_over.tolist()})',
          "runtime/test_runs.py::test_only_weights_depend_on_data_and_noise"),
    fault("no noise in every tenth step", "train.py",
          "grads = add_noise(total, plan, rng)",
          "sigma = plan.noise_multiplier * (step % 10 != 9)\n"
          "        grads = add_noise(\n"
          "            total, dataclasses.replace(plan, noise_multiplier=sigma), rng)",
          "core/test_train.py::test_every_step_clips_and_adds_noise_as_planned"),
    fault("no noise in the last step", "train.py",
          "grads = add_noise(total, plan, rng)",
          "sigma = plan.noise_multiplier * (step < plan.steps - 1)\n"
          "        grads = add_noise(\n"
          "            total, dataclasses.replace(plan, noise_multiplier=sigma), rng)",
          "runtime/test_runs.py::test_every_step_s_noise_is_full_and_fresh"),
    fault("noise halves during the run", "train.py",
          "grads = add_noise(total, plan, rng)",
          "sigma = plan.noise_multiplier * (1 - 0.5 * step / plan.steps)\n"
          "        grads = add_noise(\n"
          "            total, dataclasses.replace(plan, noise_multiplier=sigma), rng)",
          "runtime/test_runs.py::test_every_step_s_noise_is_full_and_fresh"),
    fault("draws of the global generator", "ldm.py",
          "eps = rng.standard_normal((B, K, *z_0.shape[1:]), dtype=np.float32)",
          "eps = torch.randn(B, K, *z_0.shape[1:]).numpy()",
          "core/test_dp_sgd.py::test_the_draws_do_not_follow_the_global_seeds"),
]

SAMPLING = [
    fault("sample rate 2% higher", "dp_sgd.py",
          "rng.random(plan.num_examples) < plan.sample_rate",
          "rng.random(plan.num_examples) < 1.02 * plan.sample_rate",
          "core/test_dp_sgd.py::test_every_example_is_included_with_probability_q"),
    fault("sample rate of one more example", "dp_sgd.py",
          "rng.random(plan.num_examples) < plan.sample_rate",
          "rng.random(plan.num_examples) < (plan.expected_batch + 1) / plan.num_examples",
          "core/test_dp_sgd.py::test_every_example_is_included_with_probability_q"),
    fault("sampling with replacement", "dp_sgd.py",
          "torch.from_numpy(np.flatnonzero(rng.random(plan.num_examples) < plan.sample_rate))",
          "torch.from_numpy(rng.integers(0, plan.num_examples, rng.binomial(\n"
          "        plan.num_examples, plan.sample_rate)))",
          "core/test_dp_sgd.py::test_every_example_is_included_with_probability_q"),
    fault("batches of at most twice the expected size", "dp_sgd.py",
          "rng.random(plan.num_examples) < plan.sample_rate)",
          "rng.random(plan.num_examples) < plan.sample_rate)[:2 * plan.expected_batch]",
          "core/test_dp_sgd.py::test_every_example_is_included_with_probability_q"),
    fault("first batch is everyone", "train.py",
          "i = sample(plan, rng).to(z_0.device)",
          "i = sample(plan, rng).to(z_0.device) if step else torch.arange(len(z_0))",
          "core/test_dp_sgd.py::test_a_run_of_empty_batches_takes_all_its_steps"),
    fault("each batch serves two steps", "train.py",
          "i = sample(plan, rng).to(z_0.device)",
          "i = i if (step - first) % 2 else sample(plan, rng).to(z_0.device)",
          "core/test_dp_sgd.py::test_the_batches_of_a_private_run_are_poisson_samples"),
    fault("an empty batch is no step", "train.py",
          'optimizer.param_groups[0]["lr"] = private.lr * lr_factor(step, plan.steps)',
          "if not len(i):\n"
          "            continue\n"
          '        optimizer.param_groups[0]["lr"] = private.lr * lr_factor(step, plan.steps)',
          "core/test_dp_sgd.py::test_a_run_of_empty_batches_takes_all_its_steps"),
]

# What leaves a run beside the noisy sums, or enters an example's gradient beside the example.
LEAKS = [
    fault("latents scaled by private data", "train.py",
          "    labels, names = conditions(model, dataset, config)",
          "    z_0 = z_0 / z_0.std()\n"
          "    labels, names = conditions(model, dataset, config)",
          "runtime/test_runs.py::test_an_example_changes_its_own_gradients_only"),
    fault("learning rate from private latents", "train.py",
          "private.lr * lr_factor(step, plan.steps)",
          "private.lr * lr_factor(step, plan.steps) * z_0.std().item()",
          "runtime/test_runs.py::test_an_example_changes_its_own_gradients_only"),
    fault("learning rate follows the actual batch", "train.py",
          "private.lr * lr_factor(step, plan.steps)",
          "private.lr * lr_factor(step, plan.steps) * len(i) / plan.expected_batch",
          "runtime/test_runs.py::test_the_size_of_a_batch_changes_nothing"),
    fault("average weighted by the actual batch", "train.py",
          'optimizer.param_groups[0]["lr"] = private.lr',
          "ema.decay = config.diffusion.ema_decay ** (len(i) / plan.expected_batch)\n"
          '        optimizer.param_groups[0]["lr"] = private.lr',
          "runtime/test_runs.py::test_the_size_of_a_batch_changes_nothing"),
    fault("actual batch size in the progress bar", "train.py",
          '    for step in trange(first, plan.steps, initial=first, total=plan.steps, '
          'desc="private"):',
          '    bar = trange(first, plan.steps, initial=first, total=plan.steps, desc="private")\n'
          "    for step in bar:\n"
          "        if step > first:\n"
          "            bar.set_postfix(batch=len(i))",
          "runtime/test_runs.py::test_the_size_of_a_batch_changes_nothing"),
    fault("number of clipped examples is printed", "variants/ghost.py",
          "    total = {}\n",
          '    total = {}\n    print(int((weights < 1).sum()), "examples are clipped")\n',
          "runtime/test_runs.py::test_only_weights_depend_on_data_and_noise"),
    fault("optimiser sees the exact sum", "train.py",
          "grads = add_noise(total, plan, rng)",
          "exact = {name: s.norm() for name, s in total.items()}\n"
          "        grads = add_noise(total, plan, rng)\n"
          "        grads = {name: g / (1 + exact[name]) for name, g in grads.items()}",
          "core/test_dp_sgd.py::test_a_step_without_noise_is_the_textbook_formula"),
    fault("class embeddings start from label counts", "train.py",
          "    labels, names = conditions(model, dataset, config)",
          "    model.embedder.embedding.weight.data[:-1] *= torch.bincount(\n"
          "        torch.from_numpy(dataset.labels), minlength=len(classes))[:, None] / N\n"
          "    labels, names = conditions(model, dataset, config)",
          "runtime/test_runs.py::test_an_example_changes_its_own_gradients_only"),
    fault("label counts in the checkpoint", "train.py",
          "    run.finish(config, files, classes)",
          "    run.public_config[\"counts\"] = np.bincount(dataset.labels).tolist()\n"
          "    run.finish(config, files, classes)",
          "runtime/test_runs.py::test_an_example_changes_its_own_gradients_only"),
    fault("grid shows the classes that have images", "train.py",
          "if config.has_captions else classes\n    save_samples",
          "if config.has_captions else [\n"
          "        classes[k] for k in np.unique(dataset.labels)]\n    save_samples",
          "runtime/test_runs.py::test_an_example_changes_its_own_gradients_only"),
    fault("grid shows private captions", "train.py",
          "names = list(config.samples.prompts) if config.has_captions else classes",
          "names = list(dataset.captions[:10]) if config.has_captions else classes",
          "runtime/test_runs.py::test_a_run_on_captions_keeps_them_to_itself"),
    fault("samples' labels by a stored prior", "sample.py",
          "return np.arange(count) % classes",
          "return np.sort(np.random.default_rng(0).integers(0, classes, count))",
          "core/test_sample.py::test_labels_of_samples_are_uniform"),
]

LEDGER = [
    fault("accountant's sample rate too low", "runtime/ledger.py",
          '(e["expected_batch"] / e["num_examples"]',
          '((e["expected_batch"] - 1e-3) / e["num_examples"]',
          "runtime/test_ledger.py::test_segments_are_what_the_accountant_composes"),
    fault("one step fewer is counted", "runtime/ledger.py",
          'e["noise_multiplier"], e["steps"])', 'e["noise_multiplier"], e["steps"] - 1)',
          "runtime/test_ledger.py::test_segments_are_what_the_accountant_composes"),
    fault("only the last two entries count", "runtime/ledger.py",
          "for e in ledger]", "for e in list(ledger)[-2:]]",
          "runtime/test_ledger.py::test_segments_are_what_the_accountant_composes"),
    fault("only the largest entry counts", "runtime/ledger.py",
          "return ACCOUNTANTS[accountant].total_epsilon(segments(ledger), delta)",
          "return max((ACCOUNTANTS[accountant].total_epsilon([segment], delta)\n"
          "                for segment in segments(ledger)), default=0.0)",
          "runtime/test_ledger.py::test_budgets_of_several_runs_add_up"),
    fault("overspending by 1% is allowed", "runtime/ledger.py",
          "epsilon * (1 + 1e-9)", "epsilon * 1.01",
          "runtime/test_ledger.py::test_overspending_is_refused_with_what_remains"),
    fault("overspending is asked of this run only", "runtime/runs.py",
          "ledger.check_overspending(run.earlier, plan", "ledger.check_overspending([], plan",
          "runtime/test_runs.py::test_what_is_said_is_computed_and_not_the_target"),
    fault("seeded means that every run is", "runtime/ledger.py",
          'return any("insecure', 'return bool(ledger) and all("insecure',
          "runtime/test_ledger.py::test_a_seed_of_the_noise_is_on_record"),
    fault("seed 0 is not put on record", "runtime/ledger.py",
          "return entry if insecure_noise_seed < 0", "return entry if insecure_noise_seed <= 0",
          "runtime/test_ledger.py::test_a_seed_of_the_noise_is_on_record"),
    fault("seeds of runs are not put on record", "runtime/runs.py",
          "ledger.ledger_entry(self.plan, steps, seed)", "ledger.ledger_entry(self.plan, steps)",
          "runtime/test_runs.py::test_insecure_noise_is_repeatable_loud_and_on_record"),
    fault("steps are rounded down", "dp_sgd.py",
          "round(epochs * num_examples / expected_batch)",
          "int(epochs * num_examples / expected_batch)",
          "core/test_train.py::test_a_private_run_follows_the_plan_that_it_reports"),
    fault("interrupted second run forgets the first", "runtime/runs.py",
          'PrivacyPlan(**metadata["plan"]), metadata["ledger"][:-1]',
          'PrivacyPlan(**metadata["plan"]), []',
          "runtime/test_ledger.py::test_a_third_run_tells_of_all_three"),
    fault("third run forgets the second", "runtime/runs.py",
          'metadata.get("ledger", [])', 'metadata.get("ledger", [])[:1]',
          "runtime/test_ledger.py::test_a_third_run_tells_of_all_three"),
    fault("public data of a chain by its own flag", "runtime/runs.py",
          'metadata.get("public_config", metadata["config"])', 'metadata["config"]',
          "runtime/test_ledger.py::test_a_third_run_tells_of_all_three"),
    fault("last line tells of the own run only", "runtime/runs.py",
          "ledger.all_epsilons(run.ledger_after(run.plan.steps, config), run.plan.delta)",
          "ledger.all_epsilons(run.ledger_after(run.plan.steps, config)[-1:], run.plan.delta)",
          "runtime/test_runs.py::test_what_is_said_is_computed_and_not_the_target"),
    fault("last line tells the target", "runtime/runs.py",
          'f"{in_words(epsilon)} ({name.upper()})"',
          'f"{in_words(config.private.epsilon)} ({name.upper()})"',
          "runtime/test_runs.py::test_what_is_said_is_computed_and_not_the_target"),
    fault("privacy.json tells of the own run only", "runtime/runs.py",
          "ledger.write_privacy_json(path, whole,", "ledger.write_privacy_json(path, whole[-1:],",
          "runtime/test_ledger.py::test_a_third_run_tells_of_all_three"),
    fault("privacy.json has the delta of the settings", "runtime/runs.py",
          "ledger.write_privacy_json(path, whole, self.plan.delta)",
          "ledger.write_privacy_json(path, whole, config.private.delta)",
          "runtime/test_runs.py::test_a_privacy_json_is_never_another_checkpoints"),
    fault("origin of samples is the last run only", "runtime/samples.py",
          'ledger, found["delta"], accountant)', 'ledger[-1:], found["delta"], accountant)',
          "runtime/test_samples.py::test_epsilon_is_of_all_the_ledger"),
]

RESUMING = [
    fault("resume makes one step again", "runtime/runs.py",
          'return start["step"]', 'return max(0, start["step"] - 1)',
          "runtime/test_runs.py::test_a_crashed_run_goes_on_to_the_planned_steps"),
    fault("unfinished file counts one step too few", "runtime/runs.py",
          "dict(step=step, parameters", "dict(step=max(0, step - 1), parameters",
          "runtime/test_runs.py::test_a_crashed_run_goes_on_to_the_planned_steps"),
    fault("unfinished weights have spent nothing", "train.py",
          'training["step"], training=training)', "0, training=training)",
          "runtime/test_runs.py::test_a_crashed_run_goes_on_to_the_planned_steps"),
    fault("resume takes other data of the same classes", "runtime/runs.py",
          "if begun_with != (num_examples, classes):", "if begun_with[1] != classes:",
          "runtime/test_runs.py::test_a_resumed_run_keeps_its_data"),
    fault("delta, accountant and draws are free on resume", "runtime/config.py",
          "if there != value and not (",
          'if there != value and key not in (\n'
          '                        "delta", "accountant", "noise_multiplicity", "label_dropout"'
          ") and not (",
          "runtime/test_config.py::test_a_change_of_mechanism_or_model_is_found"),
]

NUMBERS = [
    fault("rounding bound of the norm is dropped", "variants/ghost.py",
          " + (LEAST_SHARE * lengths).square()).sqrt()", ").sqrt()",
          "variants/test_ghost.py::test_what_cancels_keeps_the_sum_s_rounding_below_its_bound"),
    fault("rounding bound is a tenth", "variants/ghost.py",
          "(LEAST_SHARE * lengths).square()", "0.1 * (LEAST_SHARE * lengths).square()",
          "variants/test_ghost.py::test_what_cancels_keeps_the_sum_s_rounding_below_its_bound"),
    fault("no room for the rounding of sums", "train.py",
          "clipped_sum(model, parameters, batch, plan.clip_to)",
          "clipped_sum(model, parameters, batch, plan.max_grad_norm)",
          "core/test_train.py::test_every_step_clips_and_adds_noise_as_planned"),
    fault("chunks are added up in float32", "dp_sgd.py",
          "torch.zeros_like(p, dtype=torch.float64)", "torch.zeros_like(p)",
          "core/test_dp_sgd.py::test_sums_have_the_digits_of_float64"),
    fault("examples are added up in float32", "dp_sgd.py",
          "sum(w @ part.double().nan_to_num(", "sum(w.float() @ part.float().nan_to_num(",
          "core/test_dp_sgd.py::test_sums_have_the_digits_of_float64"),
    fault("Gram matrices in float32", "variants/ghost.py",
          "norms_by_gram(x, g.double())", "norms_by_gram(x, g)",
          "core/test_dp_sgd.py::test_no_product_of_tiny_numbers_is_lost"),
    fault("layers may get tokens first", "variants/ghost.py",
          "for count in (2, 3):", "for count in ():",
          "variants/test_ghost.py::test_a_layer_that_gets_tokens_first_is_refused"),
    fault("norms in few digits", "variants/ghost.py",
          "return norms(factors[0], rows)", "return norms(factors[0].bfloat16(), rows)",
          "core/test_dp_sgd.py::test_norms_and_sums_have_all_digits"),
    fault("factors stay bfloat16", "variants/ghost.py",
          "x, g = (v.float() if v.dtype == torch.bfloat16 else v for v in (x, g))", "pass",
          "variants/test_ghost.py::test_factors_in_bfloat16_are_multiplied_in_float32"),
    fault("calibrated to 1.01 of the target", "accountant.py",
          "return math.log(max(total(log_sigma), 1e-300) / target_epsilon)",
          "return math.log(max(total(log_sigma), 1e-300) / target_epsilon / 1.01)",
          "core/test_accountant.py::test_calibration_known_values"),
    fault("last stride of calibration is left out", "accountant.py",
          "    while total(log_sigma) > target_epsilon:",
          "    while total(log_sigma) > target_epsilon * (1 + 1e-4):",
          "core/test_accountant.py::test_calibration_is_safe_and_tight"),
    fault("conversion without log alpha", "accountant.py",
          "(math.log(delta) + math.log(alpha)) / (alpha - 1)", "math.log(delta) / (alpha - 1)",
          "core/test_accountant.py::test_epsilon_known_values"),
    fault("segments of one step count nothing", "accountant.py",
          "for q, sigma, t in segments if q > 0 and t > 0]",
          "for q, sigma, t in segments if q > 0 and t > 1]",
          "core/test_accountant.py::test_epsilon_known_values",
          "core/test_accountant.py::test_segments_add_up"),
    fault("small sample rates by their leading term", "accountant.py",
          "    if q == 0:\n        return 0.0\n",
          "    if q == 0:\n        return 0.0\n"
          "    if q < 1e-5:\n"
          "        return q * q * alpha * math.expm1(min(700, 1 / sigma**2)) / 2\n",
          "core/test_accountant.py::test_rdp_known_values"),
    fault("epsilon is rounded to the nearest", "accountant.py",
          "rounding: str = decimal.ROUND_CEILING", "rounding: str = decimal.ROUND_HALF_EVEN",
          "core/test_accountant.py::test_what_is_said_is_never_less_than_what_is_spent"),
    fault("PLD: removal is dropped", "variants/pld.py",
          "for removed in (True, False):", "for removed in (False,):",
          "variants/test_pld.py::test_the_worse_direction_counts_whichever_it_is",
          "variants/test_pld.py::test_known_values_lie_between_the_bounds"),
    fault("PLD: addition is dropped", "variants/pld.py",
          "for removed in (True, False):", "for removed in (True,):",
          "variants/test_pld.py::test_the_worse_direction_counts_whichever_it_is"),
    fault("PLD: cut tails are not counted", "variants/pld.py",
          "    error = error + (2 * steps + law.relative_error) * tail\n", "",
          "variants/test_pld.py::test_few_steps_agree_with_direct_integration"),
    fault("PLD: mass above the window is not counted", "variants/pld.py",
          "error = math.exp(min(0, law.log_beyond - tilt * sums[-1]))", "error = 0.0",
          "variants/test_pld.py"),
    fault("PLD: wrap-around below is not counted", "variants/pld.py",
          " + 2 * math.exp(-tilt * step * points)", "", "variants/test_pld.py"),
    fault("PLD: round-off of the FFT is not counted", "variants/pld.py",
          "error += steps * FFT_ROUND_OFF * math.sqrt(2 * np.exp(2 * law.log_growth).sum())",
          "pass",
          "variants/test_pld.py::test_the_worst_fft_errors_stay_within_the_bounds"),
    fault("PLD: round-off on the way back is not counted", "variants/pld.py",
          "error += 2 * FFT_ROUND_OFF * way_back", "pass",
          "variants/test_pld.py::test_the_worst_fft_errors_stay_within_the_bounds"),
    fault("PLD: shift is not added to the upper bound", "variants/pld.py",
          "highest = grid.step * (grid.first + top) + epsilon_shift",
          "highest = grid.step * (grid.first + top)",
          "variants/test_pld.py::test_the_worst_errors_of_one_step_stay_within_the_bounds"),
    fault("PLD: upper bound is one grid point lower", "variants/pld.py",
          "highest = grid.step * (grid.first + top) + epsilon_shift",
          "highest = grid.step * (grid.first + top - 1) + epsilon_shift",
          "variants/test_pld.py"),
    fault("PLD: lower bound is the upper", "variants/pld.py",
          "lower = max(lower, grid.step * (grid.first + point) - epsilon_shift if point else 0.0)",
          "lower = upper", "variants/test_pld.py"),
    fault("PLD: losses are rounded down", "variants/pld.py",
          "np.append(p - rising, 0) + np.append(0, rising)", "np.append(p, 0)",
          "variants/test_pld.py::test_rounding_raises_delta_within_its_bound"),
    fault("PLD: losses are rounded to the nearest", "variants/pld.py",
          "np.append(p - rising, 0) + np.append(0, rising)",
          "np.append(p / 2, 0) + np.append(0, p / 2)",
          "variants/test_pld.py::test_rounding_raises_delta_within_its_bound"),
    fault("PLD: round-off of the masses is not counted", "variants/pld.py",
          "factor = math.exp(law.relative_error + steps * ROUND_OFF)", "factor = 1.0",
          "variants/test_pld.py::test_the_worst_errors_of_one_step_stay_within_the_bounds"),
    fault("PLD: round-off of one step only", "variants/pld.py",
          "law.relative_error + t * relative_error", "law.relative_error + relative_error",
          "variants/test_pld.py::test_the_worst_errors_of_one_step_stay_within_the_bounds"),
    fault("PLD: steps are limited in each segment", "variants/pld.py",
          '"steps": [sum(steps)]', '"steps": steps',
          "variants/test_pld.py::test_the_steps_of_all_segments_are_limited_together"),
    fault("PLD: epsilon may exceed RDP's", "variants/pld.py",
          "float(min(upper, rdp_epsilon))", "float(upper)",
          "variants/test_pld.py::test_where_rdp_proves_more_its_epsilon_counts"),
    fault("PLD: only the last segment is added", "variants/pld.py",
          "    for q, sigma, t in segments:\n        lowest",
          "    for q, sigma, t in segments if removed else segments[-1:]:\n        lowest",
          "variants/test_pld.py::test_few_steps_agree_with_direct_integration"),
]

PROCESSES = [
    fault("every process draws its own noise", "runtime/distributed.py",
          "        if dist.get_rank() == 0:\n            total = add_noise(total, plan, rng)\n"
          "        in_one_message(total.values(), functools.partial(dist.broadcast, src=0))\n"
          "        return total\n",
          "        return add_noise(total, plan, rng)\n",
          "runtime/test_distributed.py::test_the_sum_and_the_noise_are_one_process_s"),
    fault("processes average instead of adding up", "runtime/distributed.py",
          "    exchange(flat)\n", "    exchange(flat)\n    flat /= dist.get_world_size()\n",
          "runtime/test_distributed.py::test_the_sum_and_the_noise_are_one_process_s"),
    fault("every process draws from all examples", "runtime/distributed.py",
          "return chosen[chosen % world == rank]", "return chosen",
          "runtime/test_distributed.py::test_each_process_draws_from_a_share_of_its_own"),
    fault("processes share the insecure seed", "runtime/noise.py",
          "(insecure_seed + first_step, rank_and_world()[0])", "insecure_seed + first_step",
          "runtime/test_noise.py::test_an_insecure_seed_names_step_and_process"),
    fault("every process writes", "runtime/distributed.py",
          "rank_and_world()[0] == 0", "rank_and_world()[0] >= 0",
          "runtime/test_distributed.py::test_the_first_process_writes"),
]

FILES = [
    fault("checkpoints may run code", "runtime/weights.py",
          "weights_only=True", "weights_only=False",
          "runtime/test_checkpoints.py::test_code_in_a_checkpoint_is_not_run"),
    fault("privacy.json comes after its checkpoint", "runtime/files.py",
          "            on_commit()\n            os.replace(partial, path)\n",
          "            os.replace(partial, path)\n            on_commit()\n",
          "runtime/test_runs.py::test_a_privacy_json_comes_before_its_checkpoint"),
    fault("checkpoints are written in place", "runtime/files.py",
          "partial = partial_name(path)", "partial = path",
          "runtime/test_files.py::test_atomic_write_replaces_at_the_end"),
    fault("unfinished weights stay behind", "runtime/runs.py",
          "leftover.unlink(missing_ok=True)", "pass",
          "runtime/test_runs.py::test_a_crashed_run_goes_on_to_the_planned_steps"),
    fault("a second run may write the same checkpoint", "train.py",
          "distributed.process_group(), files.locked(config) as complete:",
          "distributed.process_group():\n"
          "        complete = files.check(config.run.resume, config.run.overwrite)",
          "runtime/test_locks.py::test_a_second_run_of_one_target_is_refused"),
    fault("a private checkpoint without its ledger is public", "runtime/checkpoints.py",
          'metadata.keys() and not metadata.get("ledger")', "set()",
          "runtime/test_checkpoints.py::test_a_foreign_file_is_refused"),
    fault("public images by another name are private", "runtime/runs.py",
          "return same_name or set_digest(digests) == self.public_digest",
          "return same_name",
          "runtime/test_fingerprint.py::test_public_images_by_another_name_stay_public"),
    fault("a resumed run may have other images", "runtime/fingerprint.py",
          "if keyed_digest(key, dataset, digests) != digest:", "if False:",
          "runtime/test_fingerprint.py::test_a_resumed_run_has_the_images_it_began_with"),
    fault("private latents lie in a file with a name", "runtime/latents.py",
          "tempfile.TemporaryFile(dir=folder)",
          "tempfile.NamedTemporaryFile(dir=folder, delete=False)",
          "runtime/test_latents.py::test_private_latents_lie_in_no_named_file"),
    fault("only Ctrl-C saves", "runtime/cli.py",
          "(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)", "(signal.SIGINT,)",
          "runtime/test_stopping.py::test_a_signal_ends_the_step_and_saves"),
    fault("weights that are not finite are saved", "train.py",
          'runs.check_finite(model, "--private-lr")', "pass",
          "runtime/test_runs.py::test_weights_that_are_not_finite_are_not_saved"),
]

IMAGES = [
    fault("an image named twice counts twice", "datasets/folders.py",
          "if place in lines:", "if False:",
          "datasets/test_folders.py::test_an_image_named_twice_is_refused_by_lines"),
    fault("an image that two links lead to counts twice", "datasets/trees.py",
          "for name in files if self.has_links else ():", "for name in ():",
          "datasets/test_trees.py::test_an_image_that_two_links_lead_to_is_refused"),
    fault("test images below Test/ are trained on", "datasets/listing.py",
          "SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS",
          "SPLITS[folder] for folder in folders if folder in SPLITS",
          "datasets/test_listing.py::test_every_file_is_an_image_or_left_out"),
    fault("validation images are trained on", "datasets/listing.py",
          'found[folder] = f"of {folder}"', 'found[folder] = "train"',
          "datasets/test_listing.py::test_every_file_is_an_image_or_left_out"),
    fault("numbers of private images are said", "datasets/__init__.py",
          "    if is_public:", "    if True:",
          "datasets/test_load.py::test_numbers_and_sizes_are_said_of_public_images_only"),
    fault("what is left out is not said", "datasets/folders.py",
          "counts = Counter(reason for _, reason in (*tree.left_out, *left_out))",
          "counts = Counter()",
          "datasets/test_random_trees.py::test_no_file_of_a_random_tree_is_lost"),
]

FAULTS = (CLIPPING + NOISE + SAMPLING + LEAKS + LEDGER + RESUMING + NUMBERS + PROCESSES + FILES
          + IMAGES)


# ---- trying them -------------------------------------------------------------------------------

def put_into(fault: Fault, root: Path) -> str:
    """Put the fault into the copy `root`; the file's text before. ValueError if it has no place."""
    path = root / fault.file
    before = path.read_text("utf-8")
    if before.count(fault.text) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has its text {before.count(fault.text)} "
                         "times instead of once")
    path.write_text(before.replace(fault.text, fault.becomes), "utf-8")
    return before


def copy_tree(folder: Path) -> Path:
    left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "data", "*.npz")
    return shutil.copytree(ROOT, folder / "tree", ignore=left_out)


def run_tests(root: Path, tests: Iterable[str], time_limit: float | None = None,
              *options: str) -> tuple[int, str]:
    """(pytest's exit code, what it says) of the tests in a copy; code -9 past the time limit."""
    # Python would take the compiled file of a fault that was gone within a second for current.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", *options,
               f"--basetemp={root.parent / 'tmp'}", *(f"tests/{test}" for test in tests)]
    with subprocess.Popen(command, cwd=root, env=environment, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)   # and processes that a test has started
            output, _ = process.communicate()
    return process.returncode, output


def try_fault(fault: Fault, root: Path) -> tuple[int, str]:
    """What its tests say of the fault in the copy, which is left as it was."""
    before = put_into(fault, root)
    try:
        return run_tests(root, fault.tests, TIME_LIMIT, "-x")
    finally:
        (root / fault.file).write_text(before, "utf-8")


def try_all(faults: list[Fault], copies: list[Path]) -> dict[str, tuple[int, str]]:
    """{name: what its tests say}, one fault at a time in each copy."""
    idle: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for root in copies:
        idle.put(root)

    def work(fault: Fault) -> tuple[str, tuple[int, str]]:
        root = idle.get()
        try:
            return fault.name, try_fault(fault, root)
        finally:
            idle.put(root)

    with ThreadPoolExecutor(len(copies)) as pool:
        return dict(tqdm(pool.map(work, faults), desc="faults", total=len(faults)))


def check_unchanged(faults: list[Fault], copies: list[Path]) -> None:
    """ValueError unless the unchanged code passes all tests: else they would catch everything."""
    tests = sorted({test for fault in faults for test in fault.tests})
    shares = [tests[k::len(copies)] for k in range(len(copies))]
    with ThreadPoolExecutor(len(copies)) as pool:
        found = list(pool.map(run_tests, copies, filter(None, shares)))
    if failures := [output[-2000:] for code, output in found if code != PASSED]:
        raise ValueError("the unchanged code fails:\n" + "\n".join(failures))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try, by part of a name")
    names = parser.parse_args(argv).names
    faults = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    if not faults:
        parser.error(f"no fault is called {' or '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_tree(Path(folder) / str(k)) for k in range(min(WORKERS, len(faults)))]
        print(f"trying the tests of {len(faults)} faults on the unchanged code")
        try:
            check_unchanged(faults, copies)
            found = try_all(faults, copies)
        except ValueError as error:
            parser.error(str(error))
    if names:
        for name, (_, output) in found.items():
            print(f"\n{name}:\n{output[-1500:]}")
    missed = {name: code for name, (code, _) in found.items() if code != FAILED}
    for name, code in missed.items():
        print(f"MISSED: {name} ({MEANING.get(code, f'pytest ended with code {code}')})")
    caught = len(faults) - len(missed)
    print(f"caught {caught} of {len(faults)}")
    return int(caught < LEAST * len(faults))


if __name__ == "__main__":
    sys.exit(main())
