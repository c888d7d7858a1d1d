"""MLX folders hold the trained codes and scales; MLX itself decodes them in an environment of its own."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qatkit import QatkitError, QuantSpec, export_model, prepare_qat, scheme
from qatkit.export.dense import dense_state
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.mlx.format import export_mlx
from qatkit.export.mlx.packing import pack
from qatkit.export.verification import verify
from qatkit.models import llama
from qatkit.schemes import SCHEMES

MLX = [name for name in SCHEMES if name.startswith("MLX")]


def plain(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return llama(300, 64, 1, 2, 1, 128, tie_embeddings=tied).eval()


def small(name: str = "MLX4", tied: bool = False) -> nn.Module:
    model = plain(tied)
    prepare_qat(model, scheme(name).weight, include=["*", "model.embed_tokens"])
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids}]


def test_codes_are_a_little_endian_bit_stream() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (3, 32), dtype=np.uint8)
    for row, words in zip(codes, pack(codes, 3), strict=True):
        stream = sum(int(code) << (3 * index) for index, code in enumerate(row))
        assert [int(word) for word in words] == [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(3)]


@pytest.mark.parametrize("name", [*MLX, "MXFP4A16", "MXFP8A16", "NVFP4_UE4M3", "Q4_0", "Q8_0"])
def test_every_scheme_is_stored_exactly_and_says_that_mlx_did_not_run(name: str, tmp_path: Path) -> None:
    model = small(name)
    result = export_model(model, "mlx", tmp_path / "mlx", batches())
    assert result.passed, result.failures
    assert result.mean_error == 0.0
    assert (result.runtime, result.not_run) == ("PyTorch, decoding the MLX folder,", "MLX")
    assert result.summary().startswith("passed, but MLX did not run: all ")
    assert result.summary().endswith("; computed by PyTorch, decoding the MLX folder; to run MLX, pass --python")
    arrays = load_file(tmp_path / "mlx" / "model.safetensors")
    affine = SCHEMES[name].weight.type == "int"  # type: ignore[union-attr]
    assert ("lm_head.biases" in arrays) == affine
    if name in MLX:  # half the bytes of float32 scales, without a rounding
        assert arrays["lm_head.scales"].dtype == (torch.float32 if name == "MLX8" else torch.float16)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"]  # type: ignore[union-attr,index]
    assert config["quantization"]["lm_head"]["mode"] == ("affine" if affine else name[:5].lower())
    assert format_of_path(tmp_path / "mlx").name == "mlx"


def test_the_scale_and_bias_of_a_scheme_are_exact_in_float16(tmp_path: Path) -> None:
    model = small("MLX5")
    export_mlx(model, tmp_path / "mlx")
    arrays = load_file(tmp_path / "mlx" / "model.safetensors")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    scales, biases = (
        arrays[f"model.layers.0.mlp.up_proj.{part}"].repeat_interleave(64, 1) for part in ("scales", "biases")
    )
    codes = ((layer.fake_quantized_weight() - biases.float()) / scales.float()).round()
    assert 0 <= codes.min() < codes.max() <= 31
    assert torch.equal((scales * codes.half() + biases).float(), layer.fake_quantized_weight())


def test_a_tied_output_layer_and_unquantized_layers(tmp_path: Path) -> None:
    assert export_model(small(tied=True), "mlx", tmp_path / "tied", batches()).passed
    assert "lm_head.scales" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = plain()
    prepare_qat(model, layers={"*up_proj": scheme("MLX3"), "*down_proj": scheme("MXFP4A16")})
    assert export_model(model, "mlx", tmp_path / "mixed", batches()).passed
    quantization = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization"]
    assert [quantization[f"model.layers.0.mlp.{name}_proj"]["bits"] for name in ("up", "down")] == [3, 4]


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_one_changed_value_is_found_and_named(part: str, tmp_path: Path) -> None:
    model, file = small(), tmp_path / "mlx" / "model.safetensors"
    export_mlx(model, tmp_path / "mlx")
    arrays = load_file(file)
    changed = arrays[f"lm_head.{part}"].view(torch.int32 if part == "weight" else torch.int16)
    changed[3, 0] += 1
    save_file(arrays, file)
    result = verify(model, tmp_path / "mlx", batches(), "mlx")
    assert not result.passed
    assert f"'lm_head.{part}': 1 of" in result.failures[0]


def test_a_changed_config_is_found(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "mlx" / "config.json"
    export_mlx(model, tmp_path / "mlx")
    config = json.loads(file.read_text())
    config["rope_theta"] = 1.0
    config["quantization"]["lm_head"]["bits"] = 8
    file.write_text(json.dumps(config))
    failures = verify(model, tmp_path / "mlx", batches(), "mlx").failures
    assert sorted(failure.split("'")[1] for failure in failures) == ["quantization", "rope_theta"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec(4, strategy="group", group_size=32), r"set scale_dtype: float16 or bfloat16 \(MLX mode affine\)"),
        (QuantSpec(4), "set strategy: group"),
        (
            QuantSpec(7, strategy="group", group_size=32, scale_dtype="float16"),
            "set num_bits: 2 or 3 or 4 or 5 or 6 or 8",
        ),
        (QuantSpec(4, strategy="group", group_size=16, scale_dtype="float16"), "set group_size: 32 or 64 or 128"),
        (scheme("NVFP4A16").weight, "set group_size: 32"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_with_the_fix(spec: QuantSpec, message: str) -> None:
    model = plain()
    prepare_qat(model, spec)
    with pytest.raises(QatkitError, match=message):
        FORMATS["mlx"].check_model(model)


def test_models_activations_and_half_precision_are_refused_by_name() -> None:
    with pytest.raises(QatkitError, match=r"'mlx' does not support the model Linear \('Linear'\)"):
        FORMATS["mlx"].check_model(nn.Linear(4, 4))
    model = plain()
    prepare_qat(model, scheme("MLX4").weight, QuantSpec(8, strategy="token"))
    with pytest.raises(QatkitError, match="MLX does not quantize activations"):
        FORMATS["mlx"].check_model(model)
    with pytest.raises(QatkitError, match="rounds the dequantized weights to bfloat16, but MLX does not"):
        FORMATS["mlx"].check_model(small().to(torch.bfloat16))


def stand_in(folder: Path, code: str) -> Path:
    """An interpreter that answers the requests of `MLXModel` with `answer(request)`, because MLX is not installed."""
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, shutil, sys\n"
        f"def answer(request):\n{textwrap.indent(textwrap.dedent(code), '    ')}\n"
        "    return {'versions': {'mlx': '0', 'mlx-lm': '0'}}\n"
        "for line in sys.stdin:\n    print(json.dumps(answer(json.loads(line))), flush=True)\n"
        f"open({str(folder / 'ended')!r}, 'w').close()\n"
    )
    script.chmod(0o755)
    return script


def test_an_interpreter_without_mlx_is_named(tmp_path: Path) -> None:
    export_mlx(model := small(), tmp_path / "mlx")
    with pytest.raises(
        QatkitError, match=r"--python: cannot import mlx-lm: ModuleNotFoundError: No module named 'mlx'"
    ):
        verify(model, tmp_path / "mlx", batches(), "mlx", python=Path(sys.executable))
    with pytest.raises(
        QatkitError, match=r"python: '.*' is not a file; pass the interpreter of an environment made by"
    ):
        verify(model, tmp_path / "mlx", batches(), "mlx", python=tmp_path / "python")
    (tmp_path / "python").touch()
    with pytest.raises(QatkitError, match=r"--python: cannot be started \(Permission denied\); pass the interpreter"):
        verify(model, tmp_path / "mlx", batches(), "mlx", python=tmp_path / "python")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("if request['op'] == 'load': return {'error': 'KeyError: a'}", "KeyError: a"),
        (
            "if request['op'] == 'weights': print('no memory', file=sys.stderr), sys.exit(9)",
            "its process ended with exit code 9: no memory",
        ),
    ],
)
def test_a_folder_that_mlx_lm_cannot_load_fails_with_its_reason(code: str, reason: str, tmp_path: Path) -> None:
    export_mlx(model := small(), tmp_path / "mlx")
    result = verify(model, tmp_path / "mlx", batches(), "mlx", python=stand_in(tmp_path, code))
    assert result.failures == [f"mlx-lm cannot load mlx: {reason}"]
    assert (result.runtime, result.not_run) == ("MLX 0 (mlx-lm 0)", "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"attention_mask": torch.tensor([[0] + [1] * 15, [1] * 16])},
            "batches: mlx-lm does not accept padded texts; use",
        ),
        (
            {"position_ids": torch.arange(16).expand(2, -1)},
            "batches: mlx-lm does not accept 'position_ids'; use data that",
        ),
    ],
)
def test_a_batch_that_mlx_lm_does_not_accept_is_an_error_of_the_data_and_ends_the_process(
    more: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    export_mlx(model := small(), tmp_path / "mlx")
    save_file(dense_state(model), tmp_path / "decoded.safetensors")
    code = f"if 'file' in request: shutil.copy({str(tmp_path / 'decoded.safetensors')!r}, request['file'])"
    with pytest.raises(QatkitError, match=message):
        verify(model, tmp_path / "mlx", [batches()[0] | more], "mlx", python=stand_in(tmp_path, code))
    assert (tmp_path / "ended").exists()


@pytest.mark.slow
@pytest.mark.skipif("QATKIT_MLX" not in os.environ, reason="QATKIT_MLX is not the interpreter of an MLX environment")
@pytest.mark.parametrize("name", [*MLX, "MXFP4A16", "MXFP8A16", "NVFP4_UE4M3"])
@pytest.mark.parametrize("tied", [False, True])
def test_mlx_decodes_the_trained_weights_and_computes_the_trained_outputs(
    name: str, tied: bool, tmp_path: Path
) -> None:
    result = export_model(small(name, tied), "mlx", tmp_path / "mlx", batches(), python=Path(os.environ["QATKIT_MLX"]))
    assert result.passed, result.failures
    assert result.runtime.startswith("MLX 0.")
    assert result.agreement == 1.0
