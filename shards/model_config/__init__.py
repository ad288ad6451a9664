"""Model configurations, read from a checkpoint's config.json."""
