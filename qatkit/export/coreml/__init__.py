"""Core ML packages: `format` checks and writes them, `content` reads them with coremltools, `read_back` compares."""
