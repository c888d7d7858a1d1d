"""Configs with per-layer settings keep those of the remaining layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers

from qatkit.common.layer_configs import shorten
from qatkit.distillation.students import student_from_teacher


def test_lists_lose_the_entries_of_lost_layers_and_numbers_become_those_of_the_layers_left() -> None:
    config = SimpleNamespace(
        num_hidden_layers=4,
        layer_types=["a", "b", "c", "d"],
        no_rope_layers=[1, 1, 1, 0, 1],  # longer than there are layers, as its class allows
        mlp_only_layers=[0, 3],
        attention_window=512,
        eos_token_id=[1, 2, 3, 4],
    )
    shorten(config, 4, [1, 3])
    assert config == SimpleNamespace(
        num_hidden_layers=2,
        layer_types=["b", "d"],
        no_rope_layers=[1, 0],
        mlp_only_layers=[1],
        attention_window=512,
        eos_token_id=[1, 2, 3, 4],
    )


def test_a_config_of_another_depth_stays_as_it_is() -> None:
    vision = SimpleNamespace(num_hidden_layers=2, layer_types=["a", "b"], mlp_only_layers=[0])
    shorten(vision, 4, [1, 3])
    assert vision == SimpleNamespace(num_hidden_layers=2, layer_types=["a", "b"], mlp_only_layers=[0])


def test_a_student_with_experts_in_some_layers_is_built_again_from_its_config() -> None:
    sizes: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    with torch.device("meta"):
        teacher = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=4, mlp_only_layers=[0, 3])
        )
        student = student_from_teacher(teacher, [1, 2, 3])
        again = type(student)(student.config)
    assert student.config.mlp_only_layers == [2]
    assert again.state_dict().keys() == student.state_dict().keys()
