"""Predict a recipe's memory use and cost before anything is loaded, and suggest changes that fit."""
