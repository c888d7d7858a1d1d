"""Recipes that come with qatkit, as data. `qatkit list` lists them, and `qatkit show NAME` prints one."""
