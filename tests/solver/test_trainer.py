"""PPO on a problem with a closed form: it learns, counts, resumes, and refuses what it cannot do."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_mixture import latent_psnr, toy_dataset, toy_pipeline

from solver import ConsistencySolverScheduler, SolverPolicy
from solver.exploration import actions_of, divergence, draw_choices, entropy, log_probability
from solver.ppo import group_advantages
from solver.trainer import ConsistencySolverTrainer, seeded_generator
from solver.trainer_config import ConsistencySolverConfig

ROOT = Path(__file__).parents[2]
TRL_METRICS = {
    "reward", "reward_std", "frac_reward_zero_std", "rewards/latent_psnr/mean", "rewards/latent_psnr/std",
    "clip_ratio/region_mean", "entropy", "approx_kl", "network_evaluations",
    "seconds/rollout", "seconds/decode", "seconds/reward", "seconds/update",
}  # fmt: skip


@pytest.fixture(scope="module")
def datasets():
    return toy_dataset(32, (1.0, 3.0), steps=100), toy_dataset(8, (1.0, 3.0), first_seed=1000, steps=100)


def make_config(output_dir, **changes):
    settings = {
        "output_dir": str(output_dir), "num_iterations": 2, "prompts_per_iteration": 2, "group_size": 4,
        "inference_steps": [3, 5], "eval_inference_steps": [4], "num_ppo_epochs": 2, "logging_steps": 2,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return ConsistencySolverConfig(**{**settings, **changes})


def make_trainer(output_dir, datasets, solver=(), reward_funcs=latent_psnr, **changes):
    pipe = toy_pipeline()
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3, **dict(solver))
    return ConsistencySolverTrainer(pipe, scheduler, reward_funcs, make_config(output_dir, **changes), *datasets)


CATEGORICAL = {"head": "categorical", "base_rule": "ddim", "learn_grid": False, "inputs": "published"}


# -- what reward functions may answer ---------------------------------------------------------------------------------


def test_lists_and_partial_functions_are_rewards(tmp_path, datasets):
    def answer(images, sign, **columns):
        return [None, *(sign * float(image.mean()) for image in images[1:])]

    trainer = make_trainer(tmp_path, datasets, reward_funcs=[functools.partial(answer, sign=-1), latent_psnr])
    assert trainer.scorer.names == ["partial", "latent_psnr"]
    table = trainer.scheduler.coefficients(3, 1.0)
    scores_RB = trainer.scorer.score([datasets[1][0], datasets[1][0]], 1.0, table).scores_RB
    assert scores_RB[0].isnan().tolist() == [True, False] and scores_RB[1].isfinite().all()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda images, **columns: None, "answered None: expected 2 numbers"),
        (lambda images, **columns: torch.zeros(len(images), 1), r"answered a tensor \(2, 1\): expected \(2,\)"),
        (lambda images, **columns: torch.full((len(images),), math.inf), "answered infinity"),
    ],
)
def test_other_answers_are_refused(tmp_path, datasets, answer, sentence):
    trainer = make_trainer(tmp_path, datasets, reward_funcs=answer)
    with pytest.raises(ValueError, match=sentence):
        trainer.scorer.score([datasets[1][0], datasets[1][0]], 1.0, trainer.scheduler.coefficients(3, 1.0))


# -- learning ---------------------------------------------------------------------------------------------------------


def test_ppo_beats_the_second_order_rule_at_five_steps(tmp_path):
    """Acceptance check 8 of the specification, on prompts and noises that it was not trained on."""
    datasets = toy_dataset(48, (1.0,)), toy_dataset(32, (1.0,), first_seed=1000)
    changes = {"num_iterations": 15, "prompts_per_iteration": 4, "group_size": 16, "num_ppo_epochs": 4}
    trainer = make_trainer(tmp_path, datasets, inference_steps=[5], eval_inference_steps=[5], **changes)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] > metrics["eval_base_reward"] + 2  # dB


def test_categorical_head_learns_too(tmp_path):
    datasets = toy_dataset(32, (1.0,)), toy_dataset(32, (1.0,), first_seed=1000)
    changes = {"num_iterations": 12, "group_size": 32, "num_ppo_epochs": 4, "antithetic": False}
    trainer = make_trainer(tmp_path, datasets, CATEGORICAL, inference_steps=[5], eval_inference_steps=[5], **changes)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.5  # dB; the weights alone have little to give


def test_an_update_for_one_cell_spares_the_others(tmp_path):
    rows = toy_dataset(24, (1.0, 3.0), steps=100)
    moved = {}
    for anchor_coef in (0.0, 10.0):
        changes = {"num_iterations": 1, "num_ppo_epochs": 100, "anchor_coef": anchor_coef, "inference_steps": [4, 6]}
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, (rows, rows), **changes)
        trainer.train()
        own = trainer.draw_cell(0)
        answers = {cell: trainer.scheduler.policy(trainer.scheduler.policy_inputs(*cell)) for cell in trainer.cells}
        others = torch.cat([answer for cell, answer in answers.items() if cell != own])
        moved[anchor_coef] = others.abs().mean().item(), answers[own].abs().mean().item()
    assert moved[10.0][0] < 0.3 * moved[0.0][0]  # an untrained policy answers 0
    assert moved[10.0][0] < 0.5 * moved[10.0][1]  # and its own cell is free to move


@pytest.mark.parametrize("head", ["gaussian", "categorical"])
def test_divergence_is_the_mean_of_the_log_ratio(head):
    torch.manual_seed(0)
    policy = SolverPolicy(2, [(-1.0, 1.0)], head=head, num_bins=5)
    shape = (3, 1) if head == "gaussian" else (3, 1, 5)
    old, new = torch.randn(2, *shape)
    choices = draw_choices(policy, old, 200_000, 0.5, head == "gaussian", torch.Generator().manual_seed(0))
    ratio = log_probability(policy, old, choices, 0.5) - log_probability(policy, new, choices, 0.5)
    torch.testing.assert_close(divergence(policy, old, new, 0.5), ratio.mean(0), rtol=0.03, atol=0.01)


def test_the_solver_remembers_what_it_is_trained_on(tmp_path):
    """The fewest and the most steps, and the middle guidance scale, for users who name none."""
    rows = toy_dataset(24, (1.5, 3.0, 5.0, 7.5))
    trainer = make_trainer(tmp_path, (rows, rows), inference_steps=[6, 4], prompts_per_iteration=2)
    trainer.save_model(tmp_path / "solver")
    solver = ConsistencySolverScheduler.from_pretrained(tmp_path / "solver")
    assert solver.config.trained_steps == [4, 6] and solver.guidance_scale == 3.0
    assert solver.config.trained_guidance_scales == [1.5, 7.5]


# -- the loss ---------------------------------------------------------------------------------------------------------


def roll_out(trainer, iteration=0):
    rollouts = trainer._roll_out(iteration)
    # Advantages of a toy may be small by chance; these are not.
    return rollouts._replace(advantages_B=torch.linspace(-1, 1, len(rollouts.choices_BKD)))


@pytest.mark.parametrize("solver", [{}, CATEGORICAL], ids=["gaussian", "categorical"])
def test_dead_actions_get_exactly_no_gradient_and_live_ones_get_some(tmp_path, datasets, solver):
    trainer = make_trainer(tmp_path, datasets, solver, entropy_coef=0.01, inference_steps=[4])
    rollouts = roll_out(trainer)
    collected = []
    trainer.model.mlp.register_forward_hook(lambda module, args, output: collected.append(output))
    loss = trainer.compute_loss(trainer.model, rollouts)
    (gradient,) = torch.autograd.grad(loss, collected)
    own = gradient[: len(rollouts.inputs_KF)]  # the other cells' answers follow
    gradient_KD = own.reshape(*rollouts.mask_KD.shape, -1).abs().sum(dim=-1)
    assert not rollouts.mask_KD.all()
    assert (gradient_KD[~rollouts.mask_KD] == 0).all()
    assert (gradient_KD[rollouts.mask_KD] > 0).all()


def test_dead_choices_do_not_enter_the_loss(tmp_path, datasets):
    trainer = make_trainer(tmp_path, datasets)
    rollouts = roll_out(trainer)
    dead = torch.where(rollouts.mask_KD, rollouts.choices_BKD, 1e30)
    with_dead = trainer.compute_loss(trainer.model, rollouts._replace(choices_BKD=dead))
    assert torch.equal(trainer.compute_loss(trainer.model, rollouts), with_dead)


def test_first_update_is_the_policy_gradient(tmp_path, datasets):
    """At ratio 1: the gradient of -mean over rollouts and live steps of A · Σ_d log π."""
    trainer = make_trainer(tmp_path, datasets)
    rollouts = roll_out(trainer)
    loss = trainer.compute_loss(trainer.model, rollouts)
    policy = trainer.scheduler.policy
    means = policy(rollouts.inputs_KF)
    log_prob = torch.distributions.Normal(means, rollouts.std).log_prob(rollouts.choices_BKD)
    expected = -(rollouts.advantages_B[:, None] * (log_prob * rollouts.mask_KD).sum(dim=-1)).mean()
    parameters = list(policy.parameters())
    for actual, wanted in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_ratio_is_clipped_where_it_has_gained_enough(tmp_path, datasets):
    trainer = make_trainer(tmp_path, datasets)
    rollouts = roll_out(trainer)
    advantages = torch.ones_like(rollouts.advantages_B)
    shift = math.log(1.5) / rollouts.mask_KD.sum(dim=1).clamp(min=1)  # ratio 1.5 in every step
    moved = rollouts._replace(advantages_B=advantages, old_log_prob_BKD=rollouts.old_log_prob_BKD - shift[:, None])
    loss = trainer.compute_loss(trainer.model, moved)
    assert loss.item() == pytest.approx(-1.2)
    gradients = torch.autograd.grad(loss, trainer.model.parameters(), allow_unused=True)
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in gradients)
    loss = trainer.compute_loss(trainer.model, moved._replace(advantages_B=-advantages))
    assert loss.item() == pytest.approx(1.5)  # what it has lost it may win back


def test_advantages_are_whitened_within_groups_and_zero_in_constant_ones():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0 + 1e-6, 30.0, 10.0, 20.0])
    advantages, constant = group_advantages(rewards, 3)
    assert advantages.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0, 1, -1, 0])
    assert constant == pytest.approx(1 / 3)
    nothing, constant = group_advantages(torch.ones(4), 2, "batch")
    assert nothing.tolist() == [0] * 4 and constant == 1


def test_advantages_of_a_batch_keep_what_groups_differ_by():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0 + 1e-6, 30.0, 10.0, 20.0])
    advantages, constant = group_advantages(rewards, 3, "batch")
    std = ((1**2 + 0 + 10**2) / 3) ** 0.5  # of the groups: 1, 0, 10
    assert advantages.tolist() == pytest.approx([-1 / std, 0, 1 / std, 0, 0, 0, 10 / std, -10 / std, 0])
    assert constant == pytest.approx(1 / 3)


def test_the_trainer_scales_rewards_as_it_is_told(tmp_path, datasets):
    """The same rollouts: in units of each group their std is 1, in units of the batch its root mean square."""
    stds = {}
    for scale in ("group", "batch"):
        trainer = make_trainer(tmp_path, datasets, scale_rewards=scale)
        groups = trainer._roll_out(0).advantages_B.view(-1, trainer.args.group_size)
        stds[scale] = groups.std(dim=1)
    assert len(stds["batch"]) > 1 and stds["batch"].std() > 0.01
    assert stds["group"].tolist() == pytest.approx([1] * len(stds["group"]))
    assert stds["batch"].square().mean().item() == pytest.approx(1)


# -- exploration ------------------------------------------------------------------------------------------------------


def test_gaussian_draws_are_antithetic_around_the_mean():
    policy = SolverPolicy(2, [(-1, 1)] * 3)
    means = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    choices = draw_choices(policy, means, 2000, 0.12, True, torch.Generator().manual_seed(0))
    torch.testing.assert_close((choices[::2] + choices[1::2]) / 2, means.expand(1000, 2, 3))
    torch.testing.assert_close(choices.std(dim=0), torch.full((2, 3), 0.12), rtol=0.1, atol=0)
    expected = torch.distributions.Normal(means, 0.12)
    torch.testing.assert_close(log_probability(policy, means, choices, 0.12), expected.log_prob(choices))
    torch.testing.assert_close(entropy(policy, means, 0.12), expected.entropy())
    assert actions_of(policy, choices) is choices


def test_categorical_draws_follow_their_probabilities():
    policy = SolverPolicy(2, [(0.0, 2.0), (-2.0, 0.0)], head="categorical", num_bins=3)
    logits = torch.tensor([[[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]]])
    choices = draw_choices(policy, logits, 20000, 0.1, False, torch.Generator().manual_seed(0))
    frequencies = torch.nn.functional.one_hot(choices).float().mean(dim=0)
    torch.testing.assert_close(frequencies, logits.softmax(dim=-1), rtol=0, atol=0.01)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_probability(policy, logits, choices, 0.1), expected.log_prob(choices))
    torch.testing.assert_close(entropy(policy, logits, 0.1), expected.entropy() / math.log(3))
    assert set(actions_of(policy, choices)[:, 0, 1].tolist()) == {-2.0, -1.0, 0.0}


def test_generators_depend_on_seed_and_purpose():
    draws = [seeded_generator(*key).initial_seed() for key in ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1))]
    assert len(set(draws)) == 4
    assert seeded_generator(0, "a", 1).initial_seed() == draws[0]


def test_every_cell_is_visited_once_a_sweep(tmp_path, datasets):
    trainer = make_trainer(tmp_path, datasets, inference_steps=None, min_inference_steps=2, max_inference_steps=5)
    cells = {(steps, scale) for steps in range(2, 6) for scale in (1.0, 3.0)}
    assert {trainer.draw_cell(i) for i in range(8)} == cells == {trainer.draw_cell(i) for i in range(8, 16)}
    assert [trainer.draw_cell(i) for i in range(8)] != [trainer.draw_cell(i) for i in range(8, 16)]
    assert trainer.exploration_std(0) == 0.12 and trainer.exploration_std(1) == pytest.approx(0.04)


# -- the run ----------------------------------------------------------------------------------------------------------


def rewards_logged(trainer):
    return [log["reward"] for log in trainer.state.log_history if "reward" in log and "loss" in log]


def test_resumed_run_is_the_uninterrupted_run(tmp_path, datasets):
    every = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    settings = {"num_iterations": 4, **every}
    whole = make_trainer(tmp_path, datasets, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, datasets, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rewards_logged(resumed) == rewards_logged(whole)
    assert resumed.state.best_metric == whole.state.best_metric
    other = make_trainer(tmp_path, datasets, solver={"base_rule": "ddim"}, **settings)
    with pytest.raises(ValueError, match="is of another solver than this run: base_rule 'dpm2m' against 'ddim'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert whole.model.mlp[-1].weight.abs().max() > 0


def test_checkpoints_are_solvers_and_metrics_have_their_names(tmp_path, datasets):
    settings = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, datasets, contact_sheet_rows=4, **settings)
    evaluations = trainer.renderer.pipe.unet.evaluations
    trainer.train()

    loaded = ConsistencySolverScheduler.from_pretrained(tmp_path / "checkpoint-4")
    for ours, theirs in zip(loaded.coefficients(5, 3.0), trainer.scheduler.coefficients(5, 3.0), strict=True):
        assert torch.equal(ours, theirs)
    best = ConsistencySolverScheduler.from_pretrained(tmp_path / "best")
    assert best.config.solver_order == 3
    evaluated = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert trainer.state.best_metric == max(log["eval_reward"] for log in evaluated)
    cells = [evaluated[0][f"eval_reward_4_steps_cfg_{scale}"] for scale in (1, 3)]
    assert evaluated[0]["eval_reward"] == pytest.approx(sum(cells) / 2)

    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert set(logged[0]) >= TRL_METRICS
    rollouts = sum(log["network_evaluations"] for log in logged)
    held_out = sum(log["eval_network_evaluations"] for log in evaluated)
    held_out += evaluated[0]["eval_network_evaluations"]  # of the base rule, once
    assert trainer.renderer.pipe.unet.evaluations - evaluations == rollouts + held_out
    assert trainer.budget() == (rollouts, held_out)

    sheets = sorted((tmp_path / "contact_sheets").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-000002.png", "step-000004.png"]
    assert Image.open(sheets[0]).size[0] == 3 * (128 + 4) + 4


def test_untrained_policy_scores_as_the_base_rule(tmp_path, datasets):
    metrics = make_trainer(tmp_path, datasets).evaluate()
    assert metrics["eval_reward"] == metrics["eval_base_reward"]


def test_rewards_are_weighted_and_missing_scores_left_out(tmp_path, datasets):
    def brightness(images, seeds, **columns):
        return torch.where(torch.tensor(seeds) % 2 == 0, images.flatten(1).mean(1), math.nan)

    trainer = make_trainer(tmp_path, datasets, reward_funcs=[latent_psnr, brightness], reward_weights=[1.0, 10.0])
    scores = torch.tensor([[1.0, 2.0], [0.5, math.nan]])
    none_broken = torch.tensor([False, False])
    assert trainer.scorer.total(scores, none_broken).tolist() == [6.0, 2.0]
    assert trainer.scorer.total(scores, torch.tensor([True, False])).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="latent_psnr, brightness: NaN"):
        trainer.scorer.total(scores * math.nan, none_broken)
    trainer.train()
    assert "rewards/brightness/mean" in next(log for log in trainer.state.log_history if "loss" in log)


def test_broken_previews_get_the_lowest_reward_and_are_counted(tmp_path, datasets, monkeypatch):
    trainer = make_trainer(tmp_path, datasets)
    render = trainer.renderer.render

    def overflowing(*args):
        previews = render(*args)
        previews.latents_BCHW[1], previews.images_BCHW[2] = math.inf, math.nan
        return previews

    monkeypatch.setattr(trainer.renderer, "render", overflowing)
    rows, table = [datasets[1][i] for i in range(4)], trainer.scheduler.coefficients(3, 1.0)
    scores = trainer.scorer.score(rows, 1.0, table)
    assert scores.broken_B.tolist() == [False, True, True, False] and scores.images_BCHW.isfinite().all()
    assert scores.scores_RB[0].isnan().tolist() == scores.broken_B.tolist()
    whole = scores.rewards_B[[0, 3]]
    assert whole.isfinite().all() and (scores.rewards_B[1:3] == whole.min()).all()
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["frac_previews_broken"] == 0.25 and math.isfinite(log["reward"])
    with pytest.raises(ValueError, match="All previews are NaN or infinite"):
        trainer.scorer.total(scores.scores_RB, torch.ones(4, dtype=torch.bool))


def test_the_budget_counts_what_a_pipeline_call_cuts_in_two(tmp_path, datasets):
    settings = {"rollout_batch_size": 3, "eval_strategy": "epoch", "eval_on_start": True}
    trainer = make_trainer(tmp_path, datasets, **settings)
    evaluations = trainer.renderer.pipe.unet.evaluations
    trainer.train()
    assert sum(trainer.budget()) == trainer.renderer.pipe.unet.evaluations - evaluations
    first, later = trainer.budget(0)[0], trainer.budget(1)[0]
    assert 0 < later < first


def test_cached_features_reach_the_reward_of_their_name(tmp_path, datasets):
    seen = []

    def cached(images, target_features, **columns):
        seen.append(target_features)
        return images.flatten(1).mean(1)

    def other(images, target_features, **columns):
        assert target_features is None
        return images.flatten(1).mean(1)

    rows = [[{**row, "features": {"cached": torch.tensor([float(row["seed"])])}} for row in part] for part in datasets]
    make_trainer(tmp_path, rows, reward_funcs=[cached, other])._roll_out(0)
    (features,) = seen
    assert features.shape == (8, 1)
    assert len(features.unique()) == 2 and torch.equal(features[:4], features[:1].expand(4, 1))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 5}, "group_size=5 is odd"),
        ({"scale_rewards": "none"}, "scale_rewards='none'"),
        ({"group_size": 1}, "group_size=1"),
        ({"inference_steps": None, "min_inference_steps": 6, "max_inference_steps": 5}, "min_inference_steps=6"),
        ({"inference_steps": [1, 5]}, r"inference_steps=\[1, 5\]"),
        ({"exploration_std": 0.01}, "exploration_std=0.01"),
        ({"clip_range": 1.5}, "clip_range=1.5"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"save_strategy": "steps", "save_steps": 3}, "save_steps=3 is no multiple of num_ppo_epochs=2"),
        ({"max_steps": 7}, "max_steps=7 is set by num_iterations=2"),
        ({"eval_inference_steps": []}, r"eval_inference_steps=\[\]: expected"),
        ({"eval_inference_steps": [5.5]}, "eval_inference_steps=5.5: expected a whole number"),
        ({"eval_inference_steps": ["5"]}, "eval_inference_steps='5'"),
        ({"inference_steps": []}, r"inference_steps=\[\]"),
        ({"inference_steps": [4.5]}, r"inference_steps=\[4.5\]"),
        ({"inference_steps": ["a"]}, r"inference_steps=\['a'\]"),
        ({"inference_steps": None, "max_inference_steps": "9"}, "max_inference_steps='9'"),
        ({"guidance_scales": ["a"]}, r"guidance_scales=\['a'\]: expected finite numbers"),
        ({"reward_weights": [math.nan]}, r"reward_weights=\[nan\]: expected finite numbers"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan: expected 0 or more"),
        ({"anchor_coef": math.inf}, "anchor_coef=inf: expected 0 or more"),
        ({"contact_sheet_rows": -1}, "contact_sheet_rows=-1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a number above 0"),
        ({"exploration_std": math.inf}, "exploration_std=inf"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: the best solver is kept"),
    ],
)
def test_impossible_configs_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


def test_impossible_trainers_are_refused(tmp_path, datasets):
    train, held_out = datasets
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0, 2.0\]: expected 1 numbers"):
        make_trainer(tmp_path, datasets, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        make_trainer(tmp_path, (train, []))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(tmp_path, ([], held_out))
    with pytest.raises(ValueError, match="No guidance scale has 17 rows"):
        make_trainer(tmp_path, datasets, prompts_per_iteration=17)
    with pytest.raises(ValueError, match=r"guidance_scales=\[7.5\] have 2 rows"):
        make_trainer(tmp_path, datasets, guidance_scales=[7.5])
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        make_trainer(tmp_path, datasets, reward_funcs=[])
    with pytest.raises(ValueError, match="no actions"):
        pipe = toy_pipeline()
        scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=1, learn_grid=False)
        ConsistencySolverTrainer(pipe, scheduler, latent_psnr, make_config(tmp_path), *datasets)
    with pytest.raises(ValueError, match="noise schedules differ"):
        pipe = toy_pipeline()
        scheduler = ConsistencySolverScheduler(beta_start=0.001)
        ConsistencySolverTrainer(pipe, scheduler, latent_psnr, make_config(tmp_path), *datasets)
    with pytest.raises(ValueError, match="baked"):
        pipe = toy_pipeline()
        scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler).bake(steps=(4,))
        ConsistencySolverTrainer(pipe, scheduler, latent_psnr, make_config(tmp_path), *datasets)


# -- processes and scripts --------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from test_trainer import make_trainer
from toy_mixture import toy_dataset

output_dir = Path(sys.argv[1])
datasets = toy_dataset(32, (1.0, 3.0), steps=50), toy_dataset(7, (1.0, 3.0), first_seed=1000, steps=50)
settings = {"eval_strategy": "steps", "eval_steps": 2, "num_iterations": 3}
trainer = make_trainer(output_dir, datasets, **settings)
trainer.train()
if trainer.accelerator.is_main_process:
    trainer.state.save_to_json(output_dir / "state.json")
    save_file(trainer.scheduler.policy.state_dict(), output_dir / "policy.safetensors")
trainer.end()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    from safetensors.torch import load_file

    script = tmp_path / "run.py"
    script.write_text(RUN)
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "solver")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        output_dir = tmp_path / str(processes)
        output_dir.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), str(script), str(output_dir)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    one, two = (json.loads((tmp_path / n / "state.json").read_text())["log_history"] for n in "12")
    for name in ("reward", "network_evaluations", "eval_reward", "eval_network_evaluations"):
        values = [[log[name] for log in history if name in log] for history in (one, two)]
        if name == "network_evaluations":  # a group that is cut shares its first evaluation twice
            assert len(values[0]) == len(values[1])
        else:
            assert values[0] == pytest.approx(values[1], rel=1e-4)
    policies = [load_file(tmp_path / n / "policy.safetensors") for n in "12"]
    for name, value in policies[0].items():
        torch.testing.assert_close(value, policies[1][name], rtol=1e-3, atol=1e-5)
