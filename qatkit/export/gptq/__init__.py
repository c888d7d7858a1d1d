"""Export to the 4-bit checkpoint layouts of GPTQ and AWQ, which most servers of language models read."""
