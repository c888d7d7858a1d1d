"""Serve models in ONNX Runtime and OpenVINO: qatkit's files beside fp32 and ONNX Runtime's own quantization.

Run: python benchmarks/serve.py [--prepare] [--only FAMILY] [--quick]
Training takes about an hour of two cores, which may be busy with other work: ``--prepare`` does that alone, and keeps
the files in ``build/serve``. The measurements take about 20 minutes on two cores, which must be idle. A stopped
benchmark resumes after the last family. Results are those of one kind of processor: ``results/serve_avx2.json``,
``serve_vnni.json``.

Each family is trained on scikit-learn's digits; MiniLM is the real all-MiniLM-L6-v2, compared with itself on passages
of documentation. Then four files are served: fp32; `quantize_static` (QDQ, per channel, calibrated on training data)
and `quantize_dynamic`, both without training; and qatkit's, trained with the runtime's target and distilled from the
float model. Sessions of ONNX Runtime have default options; OpenVINO computes in float32 instead of bfloat16, its
default on processors with AMX. Latencies are interleaved; a ratio is the median over rounds, with a bootstrap interval
of 95 %.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import Claim, finish, machine
from journal import Journal, digest
from serve_files import RUNTIMES
from serve_measure import measure
from serve_models import FAMILIES
from serve_prepared import prepare

BUILD = Path(__file__).parent.parent / "build" / "serve"


def claims_of(figures: dict[str, dict[str, Any]]) -> list[Claim]:
    """The targets of the project, by family and runtime."""
    claims: list[Claim] = []
    for name, each in figures.items():
        family = FAMILIES[name]
        for runtime in RUNTIMES:
            claims += _speed_claims(f"{name} in {runtime}", each[runtime])
            behind, interval = each[runtime]["behind"], each[runtime]["interval"]
            text = f"{name} in {runtime}: {family.metric} below that of the better PTQ file"
            seen = f"{100 * behind:.2f} of {100 * interval:.2f} points"
            claims.append(Claim(text, "<= its interval", seen, behind <= interval))
            limit, seen = f"<= {family.deviation:.0%} of the quantization error", each[runtime]["deviation"]
            text = f"{name} in {runtime}: deviation from float64"
            claims.append(Claim(text, limit, f"{100 * seen:.2g} %", seen <= family.deviation))
        text = f"{name}: size relative to the smaller PTQ file"
        claims.append(Claim(text, "<= 1.02", f"{each['size']:.3f}", each["size"] <= 1.02))
        if family.integer:
            left = ", ".join(f"{count} {kind}" for kind, count in each["float kernels"].items())
            text = f"{name}: products, additions and poolings that run in floating point in ONNX Runtime"
            claims.append(Claim(text, "none", left or "none", not left))
    for runtime in RUNTIMES:
        fast = [
            name
            for name, each in figures.items()
            if min(m for m, _, _ in each[runtime]["to the better free file"].values()) >= 1.0
        ]
        text = f"models in {runtime} whose medians are at least those of the faster PTQ file in every setting"
        claims.append(Claim(text, ">= half", f"{len(fast)} of {len(figures)}", 2 * len(fast) >= len(figures)))
    return claims


def _speed_claims(name: str, figures: dict[str, Any]) -> list[Claim]:
    lows = [low for _, low, _ in figures["to the better free file"].values()]
    medians = [middle for middle, _, _ in figures["to the better free file"].values()]
    slower = [key for key, value in figures["fp32"].items() if value < 1 <= figures["free fp32"][key]]
    return [
        Claim(
            f"{name}: speed relative to the faster PTQ file, lower end of the 95% interval",
            ">= 0.97",
            f"{min(lows):.2f} (medians {min(medians):.2f} to {max(medians):.2f})",
            min(lows) >= 0.97,
        ),
        Claim(
            f"{name}: settings in which it is slower than fp32 and a PTQ file is not",
            "none",
            ", ".join(slower) or "none",
            not slower,
        ),
    ]


def source() -> dict[str, Any]:
    """What the files of all families depend on."""
    here = Path(__file__).parent
    code = [
        *here.glob("serve_*.py"),
        *here.parent.glob("qatkit/export/o*/*.py"),
        *here.parent.glob("qatkit/quantization/**/*.py"),
    ]
    versions = {package: version(package) for package in ("onnxruntime", "openvino", "torch")}
    return {"versions": versions, "code": digest(*sorted(code))}


def kind() -> str:
    """The name of the results of this kind of processor."""
    found = machine()
    flags = found.get("flags", [])
    wide = any("vnni" in flag or "int8" in flag for flag in flags)
    return "serve_" + ("vnni" if wide else "avx2" if "avx2" in flags else found["architecture"])


def prepared(names: list[str]) -> Path:
    """The folder with the files of all families, of which those that are missing are trained."""
    folder = BUILD / "-".join([source()["code"], *source()["versions"].values()])
    for name in names:
        began = time.perf_counter()
        prepare(name, folder / name, False)
        print(f"{name}: prepared in {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def measured(only: str | None) -> dict[str, Any]:
    """The results of the families, of which those without a stored result are measured.

    Raises:
        SystemExit: the stored results are of another machine or of other versions.
    """
    folder = prepared(list(FAMILIES) if only is None else [only])
    journal = Journal(folder / f"{kind()}.json", {"machine": machine(), **source()})
    for name in FAMILIES:
        if name == only or (only is None and name not in journal.results):
            journal.store(name, measure(name, folder / name, False))
    return journal.results


def quickly(only: str | None) -> dict[str, Any]:
    """The results after few steps and rounds."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in FAMILIES:
            if only in (None, name):
                prepare(name, Path(temporary) / name, True)
                found[name] = measure(name, Path(temporary) / name, True)
    return found


def main(only: str | None, quick: bool) -> None:
    found = quickly(only) if quick else measured(only)
    claims = claims_of({name: found[name][1] for name in FAMILIES if name in found})
    rows = [row for name in FAMILIES if name in found for row in found[name][0]]
    if quick or len(found) < len(FAMILIES):
        for row in rows:
            print(" | ".join(map(str, row.values())))
        for claim in claims:
            print(f"{'holds ' if claim.holds else 'FAILS '} {claim.text}: {claim.measured} (target {claim.target})")
        return
    finish(kind(), rows, claims, [0], "serve")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="train and write the files, and measure nothing")
    parser.add_argument("--only", choices=FAMILIES, help="measure one family again and keep the other results")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.prepare:
        prepared(list(FAMILIES) if arguments.only is None else [arguments.only])
    else:
        main(arguments.only, arguments.quick)
