"""Vision: classifiers, image tokenizers and generators, one file a system."""
