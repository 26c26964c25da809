"""What a layout costs, before it is launched: memory by component, floating-point operations."""
