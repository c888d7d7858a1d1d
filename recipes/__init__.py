"""Built-in recipes, as data. `qatkit list` lists them, and `qatkit show NAME` prints one."""
