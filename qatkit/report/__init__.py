"""Reports of runs: numbers from run folders, sentences, tables, figures, and the HTML page."""
