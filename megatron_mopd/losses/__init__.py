"""Computes the loss of one micro-batch from student and teacher hidden states, on the last pipeline stage."""
