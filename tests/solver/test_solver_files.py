"""Saving, loading, baking and converting the learned solver."""

import ast
import copy
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, configuration_utils
from diffusers.utils import hub_utils

from solver import ConsistencySolverScheduler, convert_public_checkpoint
from solver.scheduling_consistency_solver import SOURCE_NAME


def ddim():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def flux_sigmas(steps):
    return torch.linspace(1, 1 / steps, steps).tolist()


def trained(stock=None, **overrides):
    """A solver whose zero last layer is replaced, so that it has something to lose."""
    scheduler = ConsistencySolverScheduler.from_scheduler(stock or ddim(), **overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scheduler.policy.mlp[-1].parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return scheduler


def table(scheduler, steps=5, **call):
    scheduler.set_timesteps(steps, **call)
    return scheduler.table


def assert_same_table(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head", ["gaussian", "categorical"])
def test_save_and_load(head, tmp_path):
    scheduler = trained(head=head, guidance_scale=3.0)
    scheduler.save_pretrained(tmp_path, safe_serialization=True)
    assert {file.name for file in tmp_path.iterdir()} == {"scheduler_config.json", "model.safetensors"}
    loaded = ConsistencySolverScheduler.from_pretrained(tmp_path)
    assert loaded.guidance_scale == 3.0
    assert_same_table(table(loaded), table(scheduler))


def test_load_from_a_subfolder(tmp_path):
    scheduler = trained()
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = ConsistencySolverScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert_same_table(table(loaded), table(scheduler))


def test_missing_files_are_an_error_never_an_untrained_solver(tmp_path):
    with pytest.raises(OSError, match="solver 'no/solver' is no solver folder here"):
        ConsistencySolverScheduler.from_pretrained("no/solver")
    with pytest.raises(OSError, match=r"scheduler_config\.json"):
        ConsistencySolverScheduler.from_pretrained(tmp_path)
    trained().save_config(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ConsistencySolverScheduler.from_pretrained(tmp_path)
    ddim().save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="from_scheduler"):
        ConsistencySolverScheduler.from_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="from_scheduler"):
        ConsistencySolverScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)


def rewrite_config(folder, **changes):
    config = json.loads((folder / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [{"solver_order": 3}, {"solver_order": 6}, {"hidden_dim": 128}, {"head": "categorical"}, {"learn_grid": False}],
)
def test_weights_that_do_not_fit_the_configuration(changes, tmp_path):
    trained(order=4).save_pretrained(tmp_path)
    rewrite_config(tmp_path, **changes)
    ((name, value),) = changes.items()
    with pytest.raises(
        ValueError, match=rf"model\.safetensors does not fit .*{name}={value!r}.*: .*mlp\.4\.weight is"
    ):
        ConsistencySolverScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated"])
def test_damaged_weights_name_their_file(damage, tmp_path):
    trained().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes({"empty": b"", "garbage": b"garbage " * 99, "truncated": file.read_bytes()[:-9]}[damage])
    with pytest.raises(OSError, match=r"model\.safetensors is not a readable"):
        ConsistencySolverScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"solver_order": 6}, r"baked for 4 steps has weights \(4, 4\), expected \(4, 6\)"),
        ({"solver_order": 3}, "4 weights a step, but solver_order is 3"),
        ({"solver_order": "four"}, "solver_order='four' must be a whole number"),
        ({"coefficients": {"4": {"weights": [[1.0]]}}}, "timesteps"),
        (
            {"coefficients": {"2": {"timesteps": [1, 0], "sigmas": [1, 0], "weights": [[1]] * 2}}},
            r"got \(2,\), \(2,\)",
        ),
    ],
)
def test_configuration_of_no_use_names_its_folder(changes, word, tmp_path):
    trained().bake(steps=(4,)).save_pretrained(tmp_path / "solver")
    rewrite_config(tmp_path / "solver", **changes)
    with pytest.raises(ValueError, match=f"{tmp_path / 'solver'}.*{word}"):
        ConsistencySolverScheduler.from_pretrained(tmp_path / "solver")


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_upload_has_the_file_of_the_class(way, baked, tmp_path, monkeypatch):
    """The calls that reach the Hub are replaced: what would be uploaded has the source of the class."""
    uploaded = {}

    def upload_folder(repo_id, folder_path, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("")})()
    for module in (hub_utils, configuration_utils):
        monkeypatch.setattr(module, "create_repo", lambda repo_id, **kwargs: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    scheduler = trained().bake(steps=(5,)) if baked else trained()
    if way == "push_to_hub":
        scheduler.push_to_hub("someone/solver")
    else:
        scheduler.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/solver")
    weights = set() if baked else {"model.safetensors"}
    assert set(uploaded) - {"README.md"} == {"scheduler_config.json", SOURCE_NAME} | weights
    assert uploaded[SOURCE_NAME].decode() == inspect.getsource(sys.modules[ConsistencySolverScheduler.__module__])


def test_from_config_is_fresh_and_deepcopy_is_not():
    scheduler = trained()
    fresh = ConsistencySolverScheduler.from_config(scheduler.config)
    assert (fresh.policy.mlp[-1].weight == 0).all()
    assert_same_table(table(copy.deepcopy(scheduler)), table(scheduler))


def test_baked_table_survives_files_and_from_config(tmp_path):
    scheduler = trained()
    baked = scheduler.bake(steps=(4, 5), guidance_scale=7.5)
    scheduler.guidance_scale = 7.5
    baked.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["scheduler_config.json"]
    assert set(json.loads((tmp_path / "scheduler_config.json").read_text())["coefficients"]) == {"4", "5"}
    for again in (
        baked,
        ConsistencySolverScheduler.from_pretrained(tmp_path),
        ConsistencySolverScheduler.from_config(baked.config),
    ):
        assert again.guidance_scale == 7.5
        for steps in (4, 5):
            assert_same_table(table(again, steps), table(scheduler, steps))


def test_baked_solver_refuses_what_it_does_not_know():
    baked = trained().bake(steps=(4, 5), guidance_scale=3.0)
    with pytest.raises(ValueError, match="Baked for 4, 5 steps, not for 6"):
        baked.set_timesteps(6)
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0, not 7"):
        baked.guidance_scale = 7
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0, not 7"):
        baked.coefficients(4, guidance_scale=7)
    with pytest.raises(ValueError, match="at least one"):
        trained().bake(steps=())
    with pytest.raises(ValueError, match="Baked for 9, 10 steps"):
        trained().bake(steps=(10, 9)).set_timesteps(6)


def test_bakes_what_it_was_trained_on_unless_told_otherwise():
    scheduler = trained(trained_steps=[3, 5])
    assert set(scheduler.bake().config.coefficients) == {"3", "4", "5"}
    assert set(scheduler.bake(steps=(2, 5)).config.coefficients) == {"2", "5"}
    assert set(trained().bake().config.coefficients) == {str(count) for count in range(2, 17)}


def test_baked_flow_follows_the_grid_of_the_pipeline():
    scheduler = trained(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), order=2)
    baked = scheduler.bake(steps=(4,), mu=1.15, sigmas=flux_sigmas)
    call = {"num_inference_steps": None, "sigmas": flux_sigmas(4), "mu": 1.15}
    expected = scheduler.coefficients(4, sigmas=flux_sigmas(4), mu=1.15)
    for a, b in zip(baked.coefficients(4, sigmas=flux_sigmas(4), mu=1.15), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    baked.set_timesteps(**call)
    larger = baked.table.sigmas
    torch.testing.assert_close(larger, expected.sigmas)
    baked.set_timesteps(**{**call, "mu": 0.5})  # a smaller image: less noise at every inner point
    assert (baked.table.sigmas[1:-1] < larger[1:-1]).all()
    baked.set_timesteps(4)  # no wish: the baked table as it stands
    assert_same_table(baked.table, expected)


def test_the_file_stands_alone():
    """Exported pipelines carry a copy of it."""
    tree = ast.parse(inspect.getsource(sys.modules[ConsistencySolverScheduler.__module__]))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    packages = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages == {"torch", "diffusers", "safetensors", "huggingface_hub"}


def test_static_flow_is_baked_to_the_bit():
    scheduler = trained(FlowMatchEulerDiscreteScheduler(shift=3.0))
    baked = scheduler.bake(steps=(5,))
    assert_same_table(table(baked), table(scheduler))


# -- the public checkpoint --------------------------------------------------------------------------------------------


def public_state_dict(order=4, bins=11, hidden=256):
    """The keys and shapes of the published model.ckpt, with random weights."""
    generator = torch.Generator().manual_seed(0)
    ranges = [(0.0, 2.0), (-2.0, 0.0), (-1.0, 1.0)][: order - 1]
    shapes = {"mlp.0": (hidden, 2), "mlp.2": (hidden, hidden), "mlp.4": ((order - 1) * bins, hidden)}
    state = {"action_values": torch.stack([torch.linspace(*ends, bins) for ends in ranges])}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return state


def published_actions(state, times):
    """The published network written out: ReLU MLP, softmax a dimension, expected value of the bins."""
    x = torch.relu(times @ state["mlp.0.weight"].T + state["mlp.0.bias"])
    x = torch.relu(x @ state["mlp.2.weight"].T + state["mlp.2.bias"])
    logits = (x @ state["mlp.4.weight"].T + state["mlp.4.bias"]).reshape(len(times), *state["action_values"].shape)
    return (logits.softmax(dim=-1) * state["action_values"]).sum(dim=-1)


@pytest.mark.parametrize("order, bins", [(4, 11), (2, 11), (4, 21)])
def test_public_checkpoint(order, bins, tmp_path):
    state = public_state_dict(order, bins)
    torch.save(state, tmp_path / "model.ckpt")
    scheduler = convert_public_checkpoint(tmp_path / "model.ckpt")
    assert scheduler.config.solver_order == order and scheduler.guidance_scale == 3.0
    weights = table(scheduler, 5).weights
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    times = torch.tensor([[999, 799], [799, 599], [599, 399], [399, 199], [199, -1]]) / 999
    a = published_actions(state, times)
    first = torch.tensor([1.0, *[0.0] * (order - 1)])
    torch.testing.assert_close(weights[0], first)
    last = torch.cat([a[4] + first[:-1], (1 - (a[4] + first[:-1]).sum())[None]])  # w_1 = 1 + a_1, w_j = a_j, the rest
    torch.testing.assert_close(weights[4], last, rtol=1e-5, atol=1e-5)
    scheduler.save_pretrained(tmp_path / "converted")
    again = ConsistencySolverScheduler.from_pretrained(tmp_path / "converted")
    assert_same_table(table(again), table(scheduler))


def test_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"conv\.weight"):
        convert_public_checkpoint(tmp_path / "model.ckpt")
    torch.save(public_state_dict() | {"action_values": 3}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="action_values': None"):
        convert_public_checkpoint(tmp_path / "model.ckpt")
    torch.save(public_state_dict(), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt does not fit .*solver_order=2"):
        convert_public_checkpoint(tmp_path / "model.ckpt", solver_order=2)


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "text", "tensor"])
def test_damaged_checkpoint_names_its_file(damage, tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save(torch.zeros(3) if damage == "tensor" else public_state_dict(), file)
    new = {"empty": b"", "garbage": bytes(range(256)) * 9, "truncated": file.read_bytes()[:-99], "text": b"<html>"}
    file.write_bytes(new.get(damage, file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.ckpt"):
        convert_public_checkpoint(file)
    with pytest.raises(OSError, match=r"none\.ckpt"):
        convert_public_checkpoint(tmp_path / "none.ckpt")
