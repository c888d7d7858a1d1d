"""Any family of transformers with any head, by its name; what does not exist or would run other code is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qatkit import QatkitError
from qatkit.models import pretrained_model, timm_model, torchvision_model, untrained_model
from qatkit.recipe.common import FactoryConfig
from qatkit.recipe.factories import build

TEXT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
IMAGE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}


@pytest.mark.parametrize(
    ("family", "head", "shape", "of"),
    [
        ("bert", "TokenClassification", TEXT, "BertForTokenClassification"),
        ("bert", "QuestionAnswering", TEXT, "BertForQuestionAnswering"),
        ("bert", "Model", TEXT, "BertModel"),
        ("vit", "ImageClassification", IMAGE, "ViTForImageClassification"),
    ],
)
def test_a_model_with_a_head_is_built_saved_and_loaded_also_without_memory(
    family: str, head: str, shape: dict[str, Any], of: str, tmp_path: Path
) -> None:
    config = FactoryConfig("qatkit.models:untrained_model", {"family": family, "head": head, "config": shape})
    model = build(config, "model")  # as an untrusted recipe does
    model.save_pretrained(tmp_path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            loaded = pretrained_model(str(tmp_path), head)
            assert type(loaded).__name__ == type(model).__name__ == of
            assert next(loaded.parameters()).device.type == device
            assert type(untrained_model(family, head, shape)).__name__ == of
    again = pretrained_model(str(tmp_path), head).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("head", "classes", "place"),
    [("TokenClassification", 5, "classifier.weight"), ("QuestionAnswering", None, "qa_outputs.weight")],
)
def test_a_model_without_the_head_gets_one_and_keeps_its_other_weights(
    head: str, classes: int | None, place: str, tmp_path: Path
) -> None:
    body = untrained_model("bert", "Model", TEXT)
    body.save_pretrained(tmp_path)  # type: ignore[operator]  # of a transformers model
    model = pretrained_model(str(tmp_path), head, num_classes=classes, dtype="bfloat16", attn_implementation="eager")
    assert model.get_parameter(place).shape == (classes or 2, 16)
    assert model.get_parameter(place).dtype == torch.bfloat16
    ours, theirs = (each.get_parameter("encoder.layer.0.output.dense.weight") for each in (body, model.bert))  # type: ignore[union-attr]
    assert torch.equal(ours.bfloat16(), theirs)
    with pytest.raises(QatkitError, match=r"^name_or_path: the files of .* lack \d+ weights of a bert model"):
        pretrained_model(str(tmp_path), "MaskedLM")  # its head is not trained on a user's labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("brt", "Model"), r"family: unknown family 'brt'; did you mean 'bert'"),
        (("bert", "TokenClasification"), r"head: unknown head 'TokenClasification'; did you mean 'TokenCl"),
        (("bert", "token_classification"), r"head: unknown head"),
        (("bert", "Model", {"hiden_size": 8}), r"config\.hiden_size: the config of this .* did you mean 'hid"),
        (("bert", "Model", {"auto_map": {}}), r"config\.auto_map: the config of this family has no such entry"),
        (("bert", "Model", {"_attn_implementation": "a/b"}), r"config\._attn_implementation: the config of this"),
        (("clip", "Model", {"text_config": {"hiden_size": 8}}), r"config\.text_config\.hiden_size: the config of this"),
        (("detr", "ObjectDetection", {"backbone_config": {}}), r"config\.backbone_config: this entry would load code"),
        (("bert", "ImageClassification"), r"config: transformers cannot build a 'bert' model with the head Image"),
        (("bert", "Model", {"hidden_size": "x"}), r"config: transformers cannot build a .* with the head Model"),
        (("bert", "TokenClassification", TEXT, 0), r"num_classes: 0 is out of range; use a positive integer"),
    ],
)  # fmt: skip
def test_what_does_not_exist_or_names_other_code_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(QatkitError, match=f"^{message}"):
        untrained_model(*arguments)


def importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(("factory", "package"), [(timm_model, "timm"), (torchvision_model, "torchvision")])
def test_a_model_of_a_package_has_the_weights_of_a_file_or_the_error_names_the_package(
    factory: Callable[..., nn.Module], package: str, tmp_path: Path
) -> None:
    if not importable(package):  # the torchvision of PyPI does not fit a torch for the CPU only
        with pytest.raises(
            QatkitError, match=rf"^factory: {package} (is not installed; run: pip|cannot be imported \()"
        ):
            factory("resnet18")
        pytest.skip(f"{package} is not installed for this torch: only the error is tested")
    model = factory("resnet18", num_classes=3)
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    again = factory("resnet18", num_classes=3, weights=str(tmp_path / "resnet.safetensors")).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        QatkitError, match=r"^weights: .*resnet\.safetensors does not contain the weights of this model"
    ):
        factory("resnet18", num_classes=4, weights=str(tmp_path / "resnet.safetensors"))
    with pytest.raises(QatkitError, match=rf"^name: {package} has no model 'resnet19'; did you mean 'resnet18'"):
        factory("resnet19")
