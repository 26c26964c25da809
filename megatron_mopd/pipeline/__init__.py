"""Teacher forwards in pipeline bubbles: plan, simulate, draw and execute one optimizer step."""
