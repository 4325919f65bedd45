"""The lab's inside: a made-up world, its corpus, its judge and its small model."""
