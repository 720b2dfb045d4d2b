"""MoCo pre-training: recipes, the step, and the loop around it."""
