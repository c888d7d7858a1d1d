"""Time how a language model reads a prompt and continues it; runs in the environment of the runtime, without qatkit.

`qatkit.export.separate` starts this file as a script, one process for each file, so that each has its own memory. Each
line of standard input is a request, and each line of standard output is its answer: ``{"op": "versions"}``, ``{"op":
"load", "runtime": ..., "path": ..., "threads": ...}``, ``{"op": "time", "ids": [...], "new": ...}``, which is answered
with the seconds until the first new token and those of the other ones, and ``{"op": "memory"}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module, util
from importlib.metadata import version
from pathlib import Path
from typing import Any

Time = Callable[[list[int], int], list[float]]
"""``(ids, new)``: the times at the start, and after each of the new tokens."""


def main() -> None:
    """Answer every request; an exception becomes an answer with the key "error"."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line), state)
        except Exception as error:  # the exceptions of the runtimes share no base class
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def answered(request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request; `state` holds the opened model."""
    op = request["op"]
    if op == "versions":
        return {"versions": {}}
    if op == "load":
        return loaded(request, state)
    if op == "memory":
        peak = memory("VmHWM")
        return {"peak": None if peak is None or state["before"] is None else max(0, peak - state["before"])}
    start, first, *_, last = state["time"](request["ids"], request["new"])
    return {"first": first - start, "rest": last - first}


def loaded(request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Open a file; what its runtime needs without one does not count as its memory."""
    os.environ |= {"OMP_NUM_THREADS": str(request["threads"]), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    packages, opened = RUNTIMES[request["runtime"]]
    for name in packages:
        import_module(name)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    state["before"], start = memory("VmRSS"), time.perf_counter()
    state["time"] = opened(request)
    names = [name.partition(".")[0].replace("_", "-") for name in packages]
    return {"seconds": time.perf_counter() - start, "versions": {name: version(name) for name in names}}


def memory(key: str) -> int | None:
    """Bytes of this process's resident memory; None if the system has no ``/proc``."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def open_transformers(request: dict[str, Any]) -> Time:
    """Open a folder with transformers."""
    import_module("torch").set_num_threads(request["threads"])
    kind = import_module("transformers").AutoModelForCausalLM
    return generating(kind.from_pretrained(request["path"], local_files_only=True).eval())


def open_gptqmodel(request: dict[str, Any]) -> Time:
    """Open a folder as the process that verifies it does."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import_module("torch").set_num_threads(request["threads"])
    spec: Any = util.spec_from_file_location("checker", request["checker"])
    checker = util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    return generating(checker.load(request["path"]))


def generating(model: Any) -> Time:
    """Time the method `generate` of transformers."""
    torch = import_module("torch")

    class Clock:
        times: list[float]

        def put(self, tokens: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def timed(ids: list[int], new: int) -> list[float]:
        tokens, clock = torch.tensor([ids]), Clock()
        clock.times, start = [], time.perf_counter()
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=True, streamer=clock,
        )  # fmt: skip
        return [start, *clock.times[1:]]  # the first call has the prompt

    return timed


def open_onnxruntime_genai(request: dict[str, Any]) -> Time:
    """Open a folder with onnxruntime-genai."""
    genai, np = import_module("onnxruntime_genai"), import_module("numpy")
    config = genai.Config(request["path"])
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": request["threads"]}}}})
    )
    model = genai.Model(config)

    def timed(ids: list[int], new: int) -> list[float]:
        parameters, length = genai.GeneratorParams(model), len(ids) + new
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        times = [time.perf_counter()]
        generator.append_tokens(np.array([ids], np.int32))
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return times

    return timed


def open_openvino_genai(request: dict[str, Any]) -> Time:
    """Open a folder with openvino-genai."""
    openvino, genai, np = (import_module(name) for name in ("openvino", "openvino_genai", "numpy"))
    pipeline = genai.LLMPipeline(request["path"], "CPU", **request["options"])

    class Clock(genai.StreamerBase):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, tokens: Any) -> Any:
            self.times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def timed(ids: list[int], new: int) -> list[float]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = new, False, True
        tokens, clock = np.array([ids], np.int64), Clock()
        given = genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens)))
        start = time.perf_counter()
        pipeline.generate(given, config, clock)
        return [start, *clock.times]

    return timed


def open_mlx(request: dict[str, Any]) -> Time:
    """Open a folder with mlx-lm."""
    mx, steps = import_module("mlx.core"), import_module("mlx_lm.generate").generate_step
    model = import_module("mlx_lm.utils").load_model(Path(request["path"]))[0]

    def timed(ids: list[int], new: int) -> list[float]:
        times = [time.perf_counter()]
        for token, _ in steps(mx.array(ids), model, max_tokens=new):
            int(token)
            times.append(time.perf_counter())
        return times

    return timed


# what transformers imports only when it opens the first model
_TRANSFORMERS = (
    "torch",
    "transformers.generation",
    "transformers.quantizers.auto",
    "transformers.models.llama.modeling_llama",
)
RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Time]]] = {
    "transformers": (_TRANSFORMERS, open_transformers),
    "gptqmodel": ((*_TRANSFORMERS, "gptqmodel"), open_gptqmodel),
    "onnxruntime-genai": (("onnxruntime_genai",), open_onnxruntime_genai),
    "openvino-genai": (("openvino", "openvino_genai"), open_openvino_genai),
    "mlx-lm": (("mlx.core", "mlx_lm.generate"), open_mlx),
}
"""The packages of each runtime, imported before memory is measured, and the function that opens a file."""

if __name__ == "__main__":
    main()
