"""Iterative magnitude pruning with rewinding, as a block of a recipe."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qatkit import QatkitError, magnitude_mask
from qatkit.pipeline.runner import run_stages
from qatkit.recipe import PartConfig, RewindConfig
from qatkit.recipe.loading import load_recipe, recipe_to_yaml
from qatkit.run.folder import Run
from tests.support import warm
from tests.support.waiting import wait_for

RECIPE = """
name: lottery
seed: 3
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  ticket: {max_steps: 60, lr: 3.0e-3, lottery: {rounds: 2, fraction: 0.5, rewind: 10, reinit: true}}
"""


def run_of(folder: Path, *overrides: str) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "lottery.yaml").write_text(RECIPE)
    return Run(load_recipe(str(folder / "lottery.yaml"), list(overrides)), folder / "run")


def weights(run: Run, stage: str) -> dict[str, Tensor]:
    return load_file(run.folder(stage) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    run = run_of(tmp_path_factory.mktemp("lottery"))
    run_stages(run)
    return run


def test_the_block_expands_into_stages(tmp_path: Path) -> None:
    recipe = run_of(tmp_path).recipe
    stages = recipe.stages
    assert list(stages) == ["ticket_start", "ticket_0", "ticket_1", "ticket_2", "ticket_reinit"]
    assert [stage.max_steps for stage in stages.values()] == [10, 50, 50, 50, 60]
    assert [stage.prune and stage.prune.sparsity for stage in stages.values()] == [None, None, 0.5, 0.75, None]
    assert stages["ticket_start"].part == PartConfig(of=60)
    assert stages["ticket_2"].part == PartConfig(of=60, start=10)
    assert stages["ticket_2"].rewind == RewindConfig("ticket_start")
    assert stages["ticket_reinit"].rewind == RewindConfig(seed=4)
    (tmp_path / "whole.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "whole.yaml") == recipe


def test_every_round_prunes_a_fraction_of_the_remaining_trained_weights(done: Run) -> None:
    for before, after, sparsity in (("ticket_0", "ticket_1", 0.5), ("ticket_1", "ticket_2", 0.75)):
        for name in ("1.weight", "3.weight"):
            mask = magnitude_mask(weights(done, before)[name], sparsity)
            assert torch.equal(weights(done, after)[name] != 0, mask)
        assert done.record(after).zeros == {"1": round(2048 * sparsity), "3": round(320 * sparsity)}


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rounds of no steps: what is saved is what a round starts from."""
    torch.set_num_threads(1)
    round_ = "{max_steps: 0, prune: {sparsity: 0.5, scope: model}, rewind: {stage: %s, seed: %s}}"
    stages = [
        "early: {max_steps: 5, lr: 3.0e-3}, late: {max_steps: 30, lr: 3.0e-3}",
        "to_early: " + round_ % ("early", "null"),
        "to_init: {max_steps: 0, rewind: {stage: null}}",
        "fresh: {max_steps: 0, rewind: {seed: 9}}",
    ]
    model = ["model.factory=qatkit.models:cnn", "model.args={channels: [8, 8]}"]
    run = run_of(tmp_path_factory.mktemp("rewound"), f"stages={{{', '.join(stages)}}}", *model)
    run_stages(run)
    return run


def test_a_round_starts_with_earlier_weights_under_the_mask_of_the_trained_ones(rewound: Run) -> None:
    early, late, found = (weights(rewound, stage) for stage in ("early", "late", "to_early"))
    names = ["conv1.weight", "conv2.weight", "classifier.weight"]
    kept = magnitude_mask(torch.cat([late[name].flatten() for name in names]), 0.5).split(
        [late[n].numel() for n in names]
    )
    for name, mask in zip(names, kept, strict=True):
        assert torch.equal(found[name], early[name] * mask.view_as(early[name]))
        assert not torch.equal(magnitude_mask(early[name], 0.5), mask.view_as(early[name]))
    for name in found.keys() - set(names):  # biases and the statistics of BatchNorm
        assert torch.equal(found[name], early[name]), name


def test_the_zeros_stay_with_initial_and_with_fresh_weights(rewound: Run) -> None:
    late = weights(rewound, "to_early")
    for stage, model in (("to_init", rewound.build_model()), ("fresh", rewound.build_model(seed=9))):
        for name, value in weights(rewound, stage).items():
            expected = model.state_dict()[name]
            assert torch.equal(value, expected * (late[name] != 0) if late[name].dim() > 1 else expected), name
        assert rewound.record(stage).zeros == rewound.record("to_early").zeros
    assert not torch.equal(weights(rewound, "fresh")["conv1.weight"], weights(rewound, "to_init")["conv1.weight"])


KILLED = ["stages.ticket.max_steps=150"]
COMMAND = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.recipes.test_lottery import run_of, run_stages
run_stages(run_of(Path(sys.argv[1]), *sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_lottery_killed_in_the_middle_of_a_round_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", *KILLED)
    run_stages(whole)
    command = [warm.python(), "-c", COMMAND, str(tmp_path / "killed"), *KILLED]
    killed = run_of(tmp_path / "killed", *KILLED)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    wait_for(killed.folder("ticket_1") / "last.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # until the process that writes the files has gone
    assert killed.find("ticket_0") is not None
    assert killed.find("ticket_1") is None
    assert run_stages(killed) == ["ticket_1", "ticket_2", "ticket_reinit"]
    for stage in whole.recipe.stages:
        one, two = weights(whole, stage), weights(killed, stage)
        assert all(torch.equal(one[name], two[name]) for name in one), stage


def test_more_rounds_continue_where_the_others_ended(done: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(done.out, tmp_path / "run")
    more = ["stages.ticket.lottery.rounds=3", "stages.ticket.lottery.reinit=false"]
    assert run_stages(run_of(tmp_path, *more)) == ["ticket_3"]


def test_the_learning_rate_continues_the_schedule_of_the_whole_stage(done: Run) -> None:
    from qatkit.pipeline.learning_rate import lr_factor
    from qatkit.pipeline.module import CompressionModule

    def rates(stage: str) -> list[float]:
        module = CompressionModule(done.build_model(), done.recipe.stages[stage], 0)
        found = module.configure_optimizers()
        optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
        values = []
        for _ in range(done.recipe.stages[stage].max_steps):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return values

    expected = [3e-3 * lr_factor(step / 60, "cosine") for step in range(60)]
    assert [*rates("ticket_start"), *rates("ticket_1")] == expected
    assert rates("ticket_reinit") == expected


def test_learning_rate_rewinding_keeps_the_trained_weights_and_takes_the_whole_schedule(tmp_path: Path) -> None:
    stages = run_of(tmp_path, "stages.ticket.lottery.rewind=learning_rate").recipe.stages
    assert list(stages) == ["ticket_0", "ticket_1", "ticket_2", "ticket_reinit"]
    assert [(stages[name].rewind, stages[name].part, stages[name].max_steps) for name in ("ticket_1", "ticket_2")] == [
        (None, None, 60)
    ] * 2


def test_init_is_where_the_stage_started(tmp_path: Path) -> None:
    stages = run_of(tmp_path, "stages.ticket.lottery.rewind=init").recipe.stages
    assert stages["ticket_1"].rewind == RewindConfig(None)
    first = "stages={base: {max_steps: 5}, t: {max_steps: 9, distill: {}, lottery: {rounds: 1}}}"
    recipe = run_of(tmp_path, first).recipe
    assert recipe.stages["t_1"].rewind == RewindConfig("base")
    assert recipe.stages["t_0"].distill is None
    assert recipe.teacher_of("t_1") == "t_0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.ticket.lottery.rounds=0", r"stages\.ticket\.lottery\.rounds: 0 is out of range"),
        ("stages.ticket.lottery.fraction=1.0", r"stages\.ticket\.lottery\.fraction: 1\.0 is out of range"),
        (
            "stages.ticket.lottery={rounds: 40, fraction: 0.5}",
            r"stages\.ticket\.lottery\.rounds: 40 rounds that prune 0\.5 each leave no weight",
        ),
        ("stages.ticket.lottery.rewind=start", r"lottery\.rewind: 'start' is unknown; use init, learning_rate or a"),
        ("stages.ticket.lottery.rewind=0", r"lottery\.rewind: 0 is out of range; use init, or a number of steps"),
        ("stages.ticket.lottery.rewind=60", r"lottery\.rewind: 60 is not below max_steps=60"),
        ("stages.ticket.prune={sparsity: 0.5}", r"stages\.ticket\.prune: prune cannot be combined with lottery"),
        ("stages.after={max_steps: 5}", r"reinit: the next stage would continue from the control 'ticket_reinit'"),
        (
            "stages={ticket_1: {max_steps: 1}, ticket: {max_steps: 9, lottery: {rounds: 1}}}",
            r"stages\.ticket_1: .* name",
        ),
        (
            "stages={a: {max_steps: 1}, b: {max_steps: 1, rewind: {stage: a}}}",
            r"stages\.b\.rewind: the stage has no pruned weights",
        ),
        (
            "stages={a: {max_steps: 1}, b: {max_steps: 1, prune: {sparsity: 0.5}, rewind: {stage: c}}}",
            r"stages\.b\.rewind\.stage: 'c' is not an earlier stage of the same model; use one of a",
        ),
        (
            "stages={a: {max_steps: 1, quantize: {weight: {num_bits: 4}}}, "
            "b: {max_steps: 1, prune: {sparsity: 0.5}, rewind: {stage: null}}}",
            r"stages\.b\.rewind: stage 'a' quantizes, which changes the layers",
        ),
        (
            "stages={a: {max_steps: 1, prune: {sparsity: 0.5}}, b: {max_steps: 9, lottery: {rounds: 1}}}",
            r"stages\.b\.lottery: lottery tickets need a dense model, but an earlier stage has pruned it",
        ),
        ("stages={a: {max_steps: 9, part: {of: 8}}}", r"stages\.a\.part\.of: 8 is less than start=0 plus max_steps=9"),
        ("stages={a: {max_steps: 9, part: {of: 8, start: 8}}}", r"stages\.a\.part\.start: 8 is not a step in"),
    ],
)
def test_invalid_blocks_are_refused_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        run_of(tmp_path, override)
