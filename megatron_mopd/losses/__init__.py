"""From hidden states of student and teachers to the loss of one micro-batch, on the last pipeline stage."""
