"""The table of loading instructions for model cards: a few lines of code per export format."""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.common.tables import Table


@dataclass(frozen=True)
class Usage:
    """How a file of one export format is loaded."""

    name: str
    """The format's name."""
    library: str
    """``library_name`` in the metadata of a model hub."""
    code: str = ""
    """Lines of Python or of a shell that load the file, in the folder that contains it."""
    language: str = "python"
    """The language of `code`, as in a fenced block."""
    note: str = ""
    """The options on which the results depend, in one or two sentences; empty if there are none."""
    transformers: bool = False
    """Whether transformers loads the folder if it contains a config; `code` is then for folders without one."""

    def library_of(self, architecture: str) -> str:
        """Return ``library_name`` for one folder; see `lines`."""
        return "transformers" if self.transformers and architecture else self.library

    def lines(self, architecture: str) -> str:
        """Return the code for one folder.

        Args:
            architecture: The class in the folder's transformers config; empty if there is none.
        """
        if not (self.transformers and architecture):
            return self.code
        return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained(".")'


USAGES = Table(
    "loading instructions",
    [
        Usage(
            "onnx",
            "onnxruntime",
            """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, {value.name: ... for value in session.get_inputs()})""",
            note="Verification ran this file in such a default session, without options.",
        ),
        Usage(
            "openvino",
            "openvino",
            """\
import openvino

model = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
outputs = model(...)""",
            note="Without INFERENCE_PRECISION_HINT, OpenVINO computes in bfloat16 on processors with AMX, so outputs "
            "differ from those of training.",
        ),
        Usage(
            "dense",
            "pytorch",
            """\
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))  # `model`: the PyTorch model of the first stage""",
            note="The weights are stored with their quantized values in floating point. Activations are not quantized.",
            transformers=True,
        ),
        Usage(
            "sparse",
            "qatkit",
            """\
from qatkit.pruning.storage import load_sparse

model.load_state_dict(load_sparse("model.sparse.safetensors"))  # `model`: the PyTorch model of the first stage""",
        ),
        Usage("compressed_tensors", "transformers", transformers=True),
        Usage(
            "gguf",
            "gguf",
            "llama-cli -m model.gguf -p 'Once upon a time'",
            "bash",
            "llama.cpp quantizes activations to 8 bits itself, so its outputs differ slightly from those of training. "
            "Do not convert or quantize the file again: that computes new scales.",
        ),
        Usage("torchao", "transformers", transformers=True),
        Usage(
            "onnx_genai",
            "onnxruntime-genai",
            """\
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
tokenizer = onnxruntime_genai.Tokenizer(model)""",
        ),
        Usage(
            "openvino_genai",
            "openvino",
            """\
import openvino_genai

precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
pipeline = openvino_genai.LLMPipeline(".", "CPU", **precise)
print(pipeline.generate("Once upon a time", max_new_tokens=32))""",
            note="Without these options, OpenVINO quantizes the cache and activations, and computes in bfloat16 on "
            "processors with AMX, so outputs differ from those of training.",
        ),
        Usage(
            "mlx",
            "mlx",
            """\
from mlx_lm import generate, load

model, tokenizer = load(".")
print(generate(model, tokenizer, prompt="Once upon a time"))""",
        ),
        Usage(
            "gptq",
            "transformers",
            note="transformers needs gptqmodel and optimum to load this folder. The kernels that gptqmodel selects by "
            "default compute in half precision, so outputs differ slightly from those of training.",
            transformers=True,
        ),
        Usage(
            "awq",
            "transformers",
            note="transformers needs gptqmodel to load this folder. gptqmodel computes in half precision, so outputs "
            "differ slightly from those of training.",
            transformers=True,
        ),
        Usage(
            "litert",
            "litert",
            """\
from ai_edge_litert.interpreter import Interpreter

model = Interpreter("model.tflite").get_signature_runner()
outputs = model(**{name: ... for name in model.get_input_details()})""",
            note="The default XNNPACK kernels compute what training computed; the built-in reference kernels round "
            "differently.",
        ),
        Usage(
            "executorch",
            "executorch",
            """\
from executorch.runtime import Runtime

program = Runtime.get().load_program("model.pte")
forward = program.load_method("forward")
outputs = forward.execute([...])  # tensors, in the order of the model's inputs""",
            note="On devices, link ExecuTorch's XNNPACK backend. A batch may be at most as large as the test batch "
            "from which the file was made.",
        ),
        Usage(
            "coreml",
            "coreml",
            """\
import coremltools

model = coremltools.models.MLModel("model.mlpackage")  # runs on macOS
outputs = model.predict({name: ... for name in model.input_description})""",
            note="The package was converted, and its codes, scales and parameters were compared to the trained ones. "
            "Core ML itself was not run.",
        ),
    ],
)
"""Loading instructions by the name of the export format."""
