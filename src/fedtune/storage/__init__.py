"""What is kept on the disk, and read back: configuration, records, checkpoints. Nothing here draws or prints."""
