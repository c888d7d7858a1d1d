"""The layers that patterns select, and the layers that are refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks import ConstantPruning, MagnitudePruning
from torch import nn
from torch.nn.utils import parametrizations

from qatkit import QatkitError, QatkitWarning, QuantSpec, prepare_qat
from qatkit.models import untrained_model
from qatkit.pruning.layers import prunable_layers, warn_of_unprunable
from qatkit.recipe import PruneConfig
from qatkit.stages.prune import check


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))


def test_linear_and_convolutional_layers_are_selected_quantized_ones_too() -> None:
    model = network()
    assert list(prunable_layers(model)) == ["0", "3", "4"]
    prepare_qat(model, QuantSpec(num_bits=4))
    assert list(prunable_layers(model, exclude=["4"])) == ["0", "3"]


def test_two_layers_with_one_weight_are_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert list(prunable_layers(model)) == ["a", "c"]


def test_a_weight_of_an_excluded_layer_is_not_pruned_under_another_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    for excluded, other in (("a", "b"), ("b", "a")):
        with pytest.raises(
            QatkitError, match=f"layer '{other}' shares its weight with '{excluded}', which is excluded"
        ):
            prunable_layers(model, exclude=[excluded])
    assert list(prunable_layers(model, exclude=["a", "b"])) == ["c"]
    assert list(prunable_layers(model, include=["a"])) == ["a"]  # as a later stage holds it


def test_a_weight_that_an_embedding_uses_too_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "up": nn.Linear(4, 4), "head": nn.Linear(4, 10)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(QatkitError, match=r"layer 'head' shares its weight with 'embed'.*; exclude the layer"):
        prunable_layers(model)
    assert list(prunable_layers(model, exclude=["head"])) == ["up"]


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(QatkitError, match=r"include\[1\]: '5' matches no linear or convolutional layer; use one of 0"):
        prunable_layers(network(), include=["3", "5"])
    with pytest.raises(QatkitError, match=r"exclude\[0\]: '1' matches no linear"):
        prunable_layers(network(), exclude=["1"])
    with pytest.raises(QatkitError, match=r"select no layer"):
        prunable_layers(network(), exclude=["*"])
    with pytest.raises(QatkitError, match=r"include: '\*' is not a list of patterns; use \['\*'\]"):
        prunable_layers(network(), include="*")


def test_weights_that_are_computed_or_not_floats_are_refused() -> None:
    with pytest.raises(QatkitError, match="the weight of layer '0' is computed by a hook"):
        prunable_layers(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))))
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(QatkitError, match=r"the weight of layer '0' is already quantized \(torch\.int8\).* prune the"):
        prunable_layers(nn.Sequential(layer))


def test_models_quantized_by_other_libraries_are_refused() -> None:
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8WeightOnlyConfig())
    assert model[0].weight.is_floating_point(), "it says so"
    with pytest.raises(QatkitError, match=r"the weight of layer '0' is already quantized \(Int8Tensor\)"):
        prunable_layers(model)
    packed = nn.Linear(64, 64)  # as compressed-tensors leaves it
    packed.register_parameter("weight_packed", nn.Parameter(torch.zeros(64, 8, dtype=torch.int32), requires_grad=False))
    del packed.weight
    with pytest.raises(QatkitError, match=r"the weight of layer '0' is already quantized \(packed\)"):
        prunable_layers(nn.Sequential(packed))
    assert list(prunable_layers(nn.Sequential(packed, nn.Linear(4, 4)), exclude=["0"])) == ["1"]
    eight = nn.Linear(64, 64)
    eight.weight = nn.Parameter(eight.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(QatkitError, match=r"the weight of layer '0' is already quantized \(torch\.float8_e4m3fn\)"):
        prunable_layers(nn.Sequential(eight))
    with pytest.raises(QatkitError, match="layer '0' is lazy and has no weight before its first batch"):
        prunable_layers(nn.Sequential(nn.LazyLinear(4)))
    four = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(QatkitError, match=r"the weight of layer '0' is already quantized"):
        prunable_layers(four)


def test_weights_that_pruning_leaves_dense_are_named_with_their_share_of_the_weights() -> None:
    config = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10, "n_positions": 8}
    gpt2 = untrained_model("gpt2", "CausalLM", config)
    # 3 + 1 + 4 + 4 squares of 8 x 8, next to 10 + 8 embeddings (the output layer is tied to them)
    line = (
        r"^not pruned, because these types are not supported: transformer\.h\.0\.attn\.c_attn \(Conv1D\), .*"
        r"mlp\.c_proj \(Conv1D\) \(84\.2% of the weights\); to silence this warning, add the layers to exclude$"
    )
    with pytest.warns(QatkitWarning, match=line):
        warn_of_unprunable(gpt2)
    experts = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixtral = untrained_model("mixtral", "CausalLM", experts | {"num_key_value_heads": 2, "vocab_size": 10})
    with pytest.warns(QatkitWarning, match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\)"):
        warn_of_unprunable(mixtral)
    with pytest.warns(QatkitWarning, match=r"0 \(LSTM\), 1 \(ConvTranspose2d\), 2 \(MultiheadAttention\) \("):
        warn_of_unprunable(
            nn.Sequential(nn.LSTM(4, 4), nn.ConvTranspose2d(2, 2, 2), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
        )


def test_the_warning_is_silent_where_everything_is_pruned_or_excluded() -> None:
    warn_of_unprunable(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm([2, 2]), network()))
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Linear(4, 4))
    warn_of_unprunable(model, exclude=["0"])
    warn_of_unprunable(model, include=["1"])
    assert list(prunable_layers(model, exclude=["0"])) == ["1"]
    with pytest.raises(QatkitError, match=r"^include\[0\]: '0' matches no linear or convolutional layer"):
        prunable_layers(model, include=["0"])


def test_validate_and_the_callback_warn() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Linear(4, 4))
    with pytest.warns(QatkitWarning, match=r"^not pruned, .*: 0 \(ConvTranspose2d\) \(50\.0% of the weights\)"):
        check(PruneConfig(sparsity=0.5), model)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

    for callback, warns in ((MagnitudePruning(0.5), True), (ConstantPruning(), False)):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
        with pytest.warns(QatkitWarning, match=r": net\.0 ") if warns else nullcontext():
            callback.setup(trainer, Module(), "fit")


def test_a_lazy_layer_elsewhere_in_the_model_is_passed_over() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.LazyConvTranspose1d(4, 2))
    assert list(prunable_layers(model)) == ["0"]
    warn_of_unprunable(model)
