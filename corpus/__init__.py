"""Text on its way to token shards: documents, tasks, the workers that do them, and the shards."""
