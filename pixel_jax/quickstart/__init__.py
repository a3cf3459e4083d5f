"""One command that trains a model to reason in pixel space, on real photographs and handwriting, in minutes on a CPU."""
