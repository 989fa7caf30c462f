"""Model code that travels with an exported folder: torch, transformers and siblings only."""
