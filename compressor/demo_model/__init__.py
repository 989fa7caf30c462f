"""The embedded checkpoint: a small GPT-NeoX trained on the Python standard library."""
