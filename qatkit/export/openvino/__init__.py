"""OpenVINO: `format` converts the ONNX graph; `weights` compares the file with the model; `runtime` runs it."""
