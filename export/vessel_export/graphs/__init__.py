"""The four graphs, one module each. The first two are built and never see a weight; SAM2's two are traced from sam2's modules."""
