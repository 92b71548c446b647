"""Training of image classifiers: where the data of `vision` and the Trainer of `training` meet."""
