"""What healing is made of: losses, the training loop, checkpoints."""
