"""Recipes that come with qatkit, as data: `qatkit list` names them, `qatkit show NAME` prints one."""
