"""Model configurations from a checkpoint's config.json."""
