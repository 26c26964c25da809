"""Estimates of a layout's cost before launch: memory by component and floating-point operations."""
