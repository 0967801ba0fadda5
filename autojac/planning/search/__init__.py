"""Candidates proposed, checked, timed and compared: the only room that imports Optuna."""
