"""The network: backbone, position encoding, transformer, heads, and its checkpoints."""
