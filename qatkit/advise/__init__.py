"""Predict memory and cost of recipes before anything is loaded, and suggest changes that fit."""
