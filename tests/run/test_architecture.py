"""Stages whose model is not the recipe's: recorded, built again, taught, quantized, exported and refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from qatkit import QatkitError
from qatkit.distillation.students import student_from_teacher
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.recipe import FactoryConfig
from qatkit.recipe.loading import load_recipe
from qatkit.run.architecture import Architecture, architecture_of, build_architecture
from qatkit.run.folder import Run
from qatkit.run.record import write_record

RECIPE = """
name: student
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [96], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  teacher: {max_steps: 60, lr: 3.0e-3}
  student:
    max_steps: 40
    lr: 1.0e-2
    model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16, 16], num_classes: 10}}
    distill: {alpha: 0.9}
  qat: {max_steps: 20, distill: {alpha: 0.9}, quantize: {weight: {num_bits: 4, observer: lsq}}}
export: {format: dense}
"""
LLAMA = FactoryConfig("qatkit.models:llama", {"vocab_size": 40, "hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2})


def run_of(folder: Path, *overrides: str) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "student.yaml").write_text(RECIPE)
    return Run(load_recipe(str(folder / "student.yaml"), list(overrides)), folder / "run")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tmp_path_factory.mktemp("student"))
    (coverage,) = validate_recipe(run.recipe).values()
    assert coverage.quantized == ["1", "3", "5"]
    run_stages(run)
    return run


def widths(model: nn.Module) -> list[int]:
    return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_a_stage_may_begin_with_a_model_of_its_own_and_later_stages_go_on_with_it(done: Run) -> None:
    assert widths(done.load_model("teacher")) == [96, 10]
    assert widths(done.load_model("student")) == widths(done.load_model("qat")) == [16, 16, 10]
    assert done.record("teacher").architecture is None
    assert done.record("qat").architecture == done.record("student").architecture
    assert done.recipe.teacher_of("student") == done.recipe.teacher_of("qat") == "teacher"
    assert done.record("student").metrics["test/accuracy"] > 0.3


def test_export_verification_and_report_show_it_beside_the_wide_one(done: Run) -> None:
    export_run(done)
    assert all(check.passed for check in verify_run(done).values())
    rows = {row["stage"]: row for row in report_run(done)["rows"]}
    assert list(rows) == ["teacher", "student", "qat"]
    assert rows["student"]["bytes"] < 0.5 * rows["teacher"]["bytes"]


def test_a_finished_run_is_left_alone_and_a_changed_model_is_refused_by_its_key(done: Run) -> None:
    assert run_stages(done) == []
    changed = run_of(done.out.parent, "stages.student.model.args.hidden=[16]")
    with pytest.raises(QatkitError, match=r"stages\.student\.model\.args\.hidden: was \[16, 16\], is now \[16\]"):
        run_stages(changed)


def test_a_stage_that_broke_off_goes_on_with_its_own_model(done: Run, tmp_path: Path) -> None:
    from qatkit.pipeline.module import CompressionModule

    again, step = run_of(tmp_path), CompressionModule.training_step
    with pytest.MonkeyPatch.context() as patch:

        def breaks(self: CompressionModule, batch: object, batch_idx: int) -> torch.Tensor:
            if self.global_step == 35 and len(widths(self.model)) == 3:
                raise RuntimeError("the power is gone")
            return step(self, batch, batch_idx)

        patch.setattr(CompressionModule, "training_step", breaks)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run_stages(again)
    assert (again.folder("student") / "last.ckpt").exists()
    assert run_stages(again) == ["student", "qat"]
    for key, value in done.load_model("qat", quantizers=False).state_dict().items():
        assert torch.equal(value, again.load_model("qat", quantizers=False).state_dict()[key]), key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.student.model.factory=os:system", r"stages\.student\.model\.factory: 'os:system' is outside qatkit"),
        ("stages.student.model.args={wide: 8}", r"stages\.student\.model\.args\.wide: mlp has no such argument"),
        (
            'stages.teacher.model={factory: "qatkit.models:mlp"}',
            r"stages\.teacher\.model: the first stage starts from the recipe's model",
        ),
        ("stages.qat.quantize.include=['7']", r"stages\.qat\.quantize\.include\[0\]: '7' matches no layer"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        validate_recipe(run_of(tmp_path, override).recipe)


def test_a_record_from_elsewhere_runs_no_code_outside_qatkit(done: Run, tmp_path: Path) -> None:
    import shutil

    copied = Run(done.recipe, tmp_path / "run")
    shutil.copytree(done.out, copied.out)
    record = copied.record("student")
    assert record.architecture is not None
    foreign = dataclasses.replace(
        record.architecture, model=dataclasses.replace(record.architecture.model, factory="os:system")
    )
    write_record(copied.folder("student"), dataclasses.replace(record, architecture=foreign))
    with pytest.raises(QatkitError, match="'os:system' is outside qatkit"):
        copied.load_model("student")


def test_a_changed_config_of_transformers_is_what_is_recorded() -> None:
    whole = build_architecture(Architecture(LLAMA))
    small = student_from_teacher(whole, 2)
    found = architecture_of(small, Architecture(LLAMA))
    assert found == Architecture(LLAMA, {"num_hidden_layers": 2})
    assert Architecture.from_plain(dataclasses.asdict(found)) == found
    again = build_architecture(found)
    again.load_state_dict(small.state_dict())
    tokens = torch.arange(12).view(1, -1)
    assert torch.equal(again.eval()(tokens).logits, small.eval()(tokens).logits)


def test_a_pretrained_model_is_built_again_in_its_dtype_without_its_weights(tmp_path: Path) -> None:
    build_architecture(Architecture(LLAMA)).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    args = {"name_or_path": str(tmp_path), "dtype": "bfloat16", "gradient_checkpointing": True}
    factory = FactoryConfig("qatkit.models:causal_lm", args)
    found = architecture_of(
        student_from_teacher(build_architecture(Architecture(factory)), [0, 3]), Architecture(factory)
    )
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    again = build_architecture(found)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert again.model.rotary_emb.inv_freq.dtype is torch.float32  # type: ignore[union-attr]
    assert all(layer.gradient_checkpointing for layer in again.model.layers)  # type: ignore[union-attr]
    assert again.config.use_cache is False  # type: ignore[union-attr]


class Sized(nn.Sequential):
    """A model that says what it would be built from."""

    def __init__(self, width: int, says: int | None = None) -> None:
        super().__init__(nn.Linear(4, width), nn.Linear(width, 2))
        self.says = says

    def arguments(self) -> dict[str, int]:
        return {"width": self.says or self[0].out_features}


def test_a_model_says_its_new_arguments_or_is_refused_by_name() -> None:
    factory, allow = FactoryConfig(f"{__name__}:Sized", {"width": 8}), [__name__.partition(".")[0]]
    start = Architecture(factory)
    assert architecture_of(Sized(5), start, allow).model.args == {"width": 5}
    with pytest.raises(QatkitError, match=r"Sized, rebuilt from .*, has '0\.weight' of shape \[6, 4\] instead of"):
        architecture_of(Sized(5, says=6), start, allow)
    with pytest.raises(QatkitError, match=r"Sequential has neither a transformers config nor an arguments"):
        architecture_of(nn.Sequential(*copy.deepcopy(list(Sized(5)))), start, allow)
