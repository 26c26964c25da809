"""Teachers in the pipeline's bubbles: planning, simulating, drawing and executing one optimizer step."""
