"""The four graphs, one module each, and what they share. The built ones never see a weight; the traced ones are sam2's own modules."""
