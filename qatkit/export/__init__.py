"""Export trained models: the format table, one module or folder per format, and verification of the exported files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.export.compressed.format import export_compressed as export_compressed
    from qatkit.export.dense import export_dense as export_dense
    from qatkit.export.explanation import Explanation as Explanation
    from qatkit.export.explanation import explain as explain
    from qatkit.export.exporting import export_model as export_model
    from qatkit.export.format_row import ExportFormat as ExportFormat
    from qatkit.export.formats import FORMATS as FORMATS
    from qatkit.export.gguf.format import export_gguf as export_gguf
    from qatkit.export.onnx.format import export_onnx as export_onnx
    from qatkit.export.onnx.runtime import integer_kernels as integer_kernels
    from qatkit.export.onnx.runtime import load_runtime as load_runtime
    from qatkit.export.openvino.format import export_openvino as export_openvino
    from qatkit.export.sparse import export_sparse as export_sparse
    from qatkit.export.verification import Verification as Verification
    from qatkit.export.verification import verify as verify

_HOMES = {
    "qatkit.export.compressed.format": ["export_compressed"],
    "qatkit.export.dense": ["export_dense"],
    "qatkit.export.explanation": ["Explanation", "explain"],
    "qatkit.export.exporting": ["export_model"],
    "qatkit.export.formats": ["FORMATS", "ExportFormat"],
    "qatkit.export.gguf.format": ["export_gguf"],
    "qatkit.export.onnx.format": ["export_onnx"],
    "qatkit.export.openvino.format": ["export_openvino"],
    "qatkit.export.onnx.runtime": ["integer_kernels", "load_runtime"],
    "qatkit.export.sparse": ["export_sparse"],
    "qatkit.export.verification": ["Verification", "verify"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
