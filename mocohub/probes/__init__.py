"""Arrays in, numbers out: scikit-learn estimators that judge features."""
